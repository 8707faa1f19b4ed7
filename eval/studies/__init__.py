"""Studies: small models trained on generated data, to learn what a mixer can and cannot do."""

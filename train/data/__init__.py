"""From text to batches: tokenisers, the token store, packing, mixtures and the loader."""

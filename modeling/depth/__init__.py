"""Recurrent depth: layers that run several times on one set of weights."""

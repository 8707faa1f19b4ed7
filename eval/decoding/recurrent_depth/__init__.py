"""Samplers for models of recurrent depth, which choose when and on how many tokens at a time the core runs."""

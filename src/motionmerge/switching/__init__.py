"""Experts in a live pipeline: weights that change with the noise level."""

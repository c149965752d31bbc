"""Merging weights: typed algebra, recipes, and what carries them out."""

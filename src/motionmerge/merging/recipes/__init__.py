"""Recipes: their file and the expressions in it."""

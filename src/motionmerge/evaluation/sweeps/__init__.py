"""Many values of a recipe's numbers, measured on the same photos and prompts."""

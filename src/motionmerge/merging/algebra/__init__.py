"""What a recipe can write, and its exact value."""

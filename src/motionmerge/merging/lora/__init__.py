"""LoRA files: what their keys mean, how strong they are, where they go in a model."""

"""What the original code of each family calls its tensors, beside the names of diffusers."""

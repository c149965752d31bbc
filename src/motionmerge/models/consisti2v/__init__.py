"""ConsistI2V: Stable Diffusion 2.1 with temporal layers, conditioned on a first frame."""

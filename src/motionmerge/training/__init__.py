"""Training: one loop, and the runs that use it."""

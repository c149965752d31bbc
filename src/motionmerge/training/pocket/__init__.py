"""The training runs of the pocket model."""

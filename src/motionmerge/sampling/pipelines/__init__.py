"""Our own pipelines: DynamiCrafter and the pocket model."""

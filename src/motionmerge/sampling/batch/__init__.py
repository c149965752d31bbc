"""The videos of a manifest, in one process or on a cluster."""

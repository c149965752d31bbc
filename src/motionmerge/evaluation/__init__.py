"""Measuring videos and stating what the measurements say."""

"""Networks that measure videos: built from files that the user gives, never downloaded."""

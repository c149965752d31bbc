"""Where tensors come from: files, folders, the hub; found, read, and fitted together."""

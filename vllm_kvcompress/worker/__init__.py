"""Worker side: runs Jobs before each forward pass."""

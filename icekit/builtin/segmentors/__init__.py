"""Image, word -> mask."""

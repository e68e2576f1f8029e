"""Image, regions, attributes -> tokens."""

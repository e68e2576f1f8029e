"""Image -> words."""

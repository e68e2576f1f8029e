"""What the bench measures."""

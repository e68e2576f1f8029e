"""What the bench measures on."""

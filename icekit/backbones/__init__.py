"""What a backbone is made of: a diffusers pipeline taken apart, its text encoders, its attention."""

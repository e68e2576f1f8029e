"""What a segmentor is made of: looking at a picture with the model, and the way from a soft map to a mask."""

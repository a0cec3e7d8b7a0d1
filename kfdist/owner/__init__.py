"""What inverts and serves; needs no Ray."""

"""How all ranks take a version into use at the same step."""

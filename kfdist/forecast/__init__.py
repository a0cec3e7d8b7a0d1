"""What a run will take, before anything of it starts. `kfdist plan` shows it."""

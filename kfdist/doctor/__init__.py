"""What of a machine would stop a run, found before one is started. `kfdist doctor` shows it."""

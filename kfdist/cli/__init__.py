"""The `kfdist` command."""

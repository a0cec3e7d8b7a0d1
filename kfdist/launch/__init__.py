"""The processes of `kfdist train`."""

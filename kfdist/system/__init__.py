"""Linux and the standard library: files, processes, addresses."""

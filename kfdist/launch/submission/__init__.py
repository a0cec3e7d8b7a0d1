"""Runs on a Ray cluster: `kfdist submit`, the job that it starts, and the ranks that Ray Train's workers start."""

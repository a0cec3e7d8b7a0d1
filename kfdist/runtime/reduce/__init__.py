"""From each rank's sums and rows to reduced statistics."""

"""From reduced statistics to jobs and back."""

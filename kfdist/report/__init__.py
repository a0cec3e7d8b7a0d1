"""One HTML page about a run, or about several, from what lies in their directories."""

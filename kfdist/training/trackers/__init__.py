"""Where else a run tells its numbers, besides `metrics.jsonl`."""

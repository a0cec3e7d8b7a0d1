"""Trackers of experiments that a run tells its numbers to, besides `metrics.jsonl`."""

"""Composes everything else: the pipeline, the trainer, checkpoints, and the launcher."""

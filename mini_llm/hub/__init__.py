"""Leaving the project: stock checkpoints and model cards."""

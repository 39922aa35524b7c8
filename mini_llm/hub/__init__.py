"""Leaving the project: stock checkpoints, model cards and pushing them to the hub."""

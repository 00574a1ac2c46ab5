"""Runs: folds, checkpoints, records."""

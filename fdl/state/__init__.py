"""Weights, checkpoints and how they lie in memory and on disk."""

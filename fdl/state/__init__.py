"""Model weights, checkpoints and run folders: their layout in memory and on disk."""

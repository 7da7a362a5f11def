"""Callbacks: TensorBoard, progress bar, CSV log, profiler, early stopping."""

"""What watches a run: TensorBoard, progress, CSV, early stopping."""

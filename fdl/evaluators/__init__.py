"""Evaluators: measurements of a student beyond the metrics of its own test set."""

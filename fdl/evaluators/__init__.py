"""Further questions to a trained student, beyond the metrics of its own test set."""

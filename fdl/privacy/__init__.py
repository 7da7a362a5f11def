"""Differential privacy: training with noise, and the account of what was spent."""

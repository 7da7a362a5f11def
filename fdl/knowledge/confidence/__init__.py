"""Confidence of predictions on the proxy set."""

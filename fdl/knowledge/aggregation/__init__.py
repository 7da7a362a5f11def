"""Aggregation of a round's uploads."""

"""Clients that fail, on purpose: what befalls whom in which round, drawn from the seed."""

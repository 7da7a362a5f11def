"""Clients of one architecture trained together."""

"""Codec stages."""

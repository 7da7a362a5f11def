"""Frozen public feature spaces."""

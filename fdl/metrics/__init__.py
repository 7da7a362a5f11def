"""Metrics of models and of federations."""

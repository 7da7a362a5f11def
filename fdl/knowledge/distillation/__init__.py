"""Distillation: clients' uploads for the proxy set, and the training of a student on them."""

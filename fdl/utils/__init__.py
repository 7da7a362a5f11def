"""Small helpers that are independent of federated learning."""

"""Byzantine-robust aggregation: rules, and their application to weights and to predictions."""

"""LightningDataModules: who gets which sample; the only place that reads data."""

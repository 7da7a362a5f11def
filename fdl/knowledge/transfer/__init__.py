"""Features and prototypes beside predictions."""

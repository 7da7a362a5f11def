"""The machinery of a round."""

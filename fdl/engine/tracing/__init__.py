"""Training steps traced once as plain tensor operations, and replayed."""

"""What clients upload about the proxy set, and how a student learns from it."""

"""Commands and what they print."""

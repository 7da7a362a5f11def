"""Attacks on a finished run, as evaluations: what somebody who sees models or messages can learn of private data."""

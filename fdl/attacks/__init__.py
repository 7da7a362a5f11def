"""Attacks on a finished run, as evaluations: private information that models or messages leak to an observer."""

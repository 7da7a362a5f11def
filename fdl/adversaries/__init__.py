"""Adversarial participants: what a dishonest client does to its data and to what it sends."""

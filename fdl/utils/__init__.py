"""Small helpers that know nothing of federations."""

"""Plug-ins: kinds, short names, and how a recipe's entry becomes an object."""

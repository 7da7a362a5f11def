"""Plug-ins: their kinds and short names, and the construction of objects from a recipe's components."""

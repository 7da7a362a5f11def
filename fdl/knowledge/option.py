"""What a recipe can switch on in federated distillation by one key each."""

from __future__ import annotations


class Option:
    """A part of federated distillation that can be left out; holds settings only."""

"""From a checked recipe to a federation ready to run."""

from fdl.build.federation import build

__all__ = ["build"]

"""A plug-in as a recipe names it."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Component:
    """A plug-in: what it is and its arguments."""

    target: str = "???"
    args: dict[str, Any] = dataclasses.field(default_factory=dict)

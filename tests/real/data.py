"""Where the real data lie that these tests are for, and how federations of them are made."""

import json
import os
from pathlib import Path

import pytest

from fdl.build import build
from fdl.loop import FederatedLoop
from fdl.recipe import load

FOLDER = Path(os.environ.get("FDL_DATA", "."))
real = pytest.mark.skipif("FDL_DATA" not in os.environ, reason="needs the data sets that FDL_DATA points at")


def adam(steps: int, batch_size: int = 32, lr: float = 0.002) -> dict:
    """Settings of a fit."""
    optimizer = {"target": "adamw", "args": {"lr": lr}}
    return {"steps": steps, "batch_size": batch_size, "gradient_clip": 1.0, "optimizer": optimizer}


def federation(folder: Path, **content) -> FederatedLoop:
    """What a recipe makes, on one thread of the CPU, in a folder of its own."""
    content = {"name": "real", "fabric": {"accelerator": "cpu", "threads": 1}, **content}
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return build(load(folder / "recipe.yaml"), folder / "run")

"""fdl: federated distillation of foundation models with PyTorch Lightning.

The names below are imported when they are first used, so that ``import fdl`` takes milliseconds and loads no torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdl.build import build
    from fdl.callbacks.base import Callback
    from fdl.comm.stages.base import Stage
    from fdl.datamodules.base import FederatedDataModule
    from fdl.datamodules.samples import Samples, TensorSamples
    from fdl.datamodules.source import Source
    from fdl.engine.requests import FitRequest, PredictRequest
    from fdl.errors import RecipeError, UserError
    from fdl.evaluators.base import Evaluator
    from fdl.knowledge.aggregation.base import Aggregate
    from fdl.loop import FederatedLoop
    from fdl.messages.base import Message
    from fdl.messages.parameters import Parameters
    from fdl.messages.responses import Responses
    from fdl.messages.tensors import TensorMessage
    from fdl.methods.base import Method
    from fdl.modules.base import FederatedModule
    from fdl.modules.output import Output
    from fdl.participants import Client, Server
    from fdl.recipe.config import Recipe
    from fdl.runs.api import compare, fit, load_recipe
    from fdl.runs.result import Comparison, Run

# MKL, which multiplies matrices for torch, else chooses kernels by where in memory a matrix happens to lie; it reads
# this once, when it is first used (docs/reproducibility.md)
os.environ.setdefault("MKL_CBWR", "AUTO")

__version__ = "0.1.0"

__all__ = [
    "Aggregate",
    "Callback",
    "Client",
    "Comparison",
    "Evaluator",
    "FederatedDataModule",
    "FederatedLoop",
    "FederatedModule",
    "FitRequest",
    "Message",
    "Method",
    "Output",
    "Parameters",
    "PredictRequest",
    "Recipe",
    "RecipeError",
    "Responses",
    "Run",
    "Samples",
    "Server",
    "Source",
    "Stage",
    "TensorMessage",
    "TensorSamples",
    "UserError",
    "build",
    "compare",
    "fit",
    "load_recipe",
]

_PLACES = {
    "fdl.callbacks.base": ["Callback"],
    "fdl.comm.stages.base": ["Stage"],
    "fdl.datamodules.base": ["FederatedDataModule"],
    "fdl.datamodules.samples": ["Samples", "TensorSamples"],
    "fdl.datamodules.source": ["Source"],
    "fdl.engine.requests": ["FitRequest", "PredictRequest"],
    "fdl.errors": ["RecipeError", "UserError"],
    "fdl.evaluators.base": ["Evaluator"],
    "fdl.knowledge.aggregation.base": ["Aggregate"],
    "fdl.loop": ["FederatedLoop"],
    "fdl.messages.base": ["Message"],
    "fdl.messages.parameters": ["Parameters"],
    "fdl.messages.responses": ["Responses"],
    "fdl.messages.tensors": ["TensorMessage"],
    "fdl.methods.base": ["Method"],
    "fdl.modules.base": ["FederatedModule"],
    "fdl.modules.output": ["Output"],
    "fdl.participants": ["Client", "Server"],
    "fdl.recipe.config": ["Recipe"],
    "fdl.runs.api": ["compare", "fit", "load_recipe"],
    "fdl.runs.result": ["Comparison", "Run"],
}
"""The public names by the module that defines them; `build` is the package `fdl.build`."""

_MODULES = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "build":  # a package, which Python sets here itself once it is imported, and which can be called
        return import_module("fdl.build")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

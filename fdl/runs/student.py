"""The trained student of a run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdl.build.federation import build
from fdl.engine.runtime import Runtime
from fdl.errors import UserError
from fdl.federation.snapshot import BEST
from fdl.modules.foreign import conforming
from fdl.participants import Server
from fdl.recipe.loading import load
from fdl.registry.instantiate import instantiate
from fdl.runs import run as runs
from fdl.runs.inputs import Inputs, read
from fdl.runs.redaction import LOCAL, without_paths
from fdl.state import checkpoint
from fdl.state.weights import load_into
from fdl.utils.seeding import stream_seed

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.methods.base import Method
    from fdl.recipe.config import Recipe


@dataclass
class Subject:
    """A run's student and what it takes.

    Attributes:
        recipe: of the run.
        student: filled with the weights of the round.
        inputs: what it was told of the data.
        round: the round.
    """

    recipe: Recipe
    student: LightningModule
    inputs: Inputs
    round: int

    @property
    def provides(self) -> dict[str, Any]:
        """What the data told the model."""
        return self.inputs.provides

    def normalization(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel that the exported images come with; 0 and 1 without any."""
        channels = self.provides["input_shape"][0]
        mean, std = self.provides.get("normalization") or ([0.0] * channels, [1.0] * channels)
        return list(map(float, mean)), list(map(float, std))

    def pictures(self) -> dict[str, Any]:
        """How a picture becomes what the network itself takes, behind the adapter where there is one."""
        adapter = getattr(self.student, "adapter", None)
        (mean, std), size = self.normalization(), self.provides["input_shape"]
        if adapter is not None:
            mean, std, size = adapter.mean, adapter.std, adapter.output_shape
        # data without a size of their own are all of one shape: nothing is cut off
        cut = self.recipe.data.args.get("size") is not None or size[1] == size[2]
        interpolation = "bilinear" if adapter is None else adapter.interpolation
        return {"input_size": size, "mean": mean, "std": std, "interpolation": interpolation, "cut": cut}

    def told(self) -> dict[str, Any]:
        """What the exported model takes and answers, for people and programs."""
        provides, told = self.provides, {"task": self.inputs.task}
        if "input_shape" in provides:
            mean, std = self.normalization()
            told["images"] = {
                "shape": ["batch", *provides["input_shape"]],
                "range": "0 (black) to 1 (white), then (x - mean) / std for each channel",
                "mean": mean,
                "std": std,
                "resize": "central square, then bilinear with antialiasing",
            }
        if "context" in provides:
            told["texts"] = {
                "shape": ["batch", provides["context"]],
                "ids": f"of the tokenizer ({_public(provides['tokenizer'])}), padded on the right with -1",
            }
        if self.inputs.classes and self.inputs.task == "classification":
            told["classes"] = self.inputs.classes
        return told


def trained_student(run: Path, summary: Mapping[str, Any], which: str) -> Subject:
    """Build a run's student and load its weights, without the data if the run kept what the model needs of them.

    Args:
        run: the run's folder.
        summary: the run's summary, as `fdl.runs.run.read_summary` returns it.
        which: ``"best"``: the best round on validation data; ``"last"``: the last round.

    Raises:
        UserError: the run's method has no student, or it cannot be built, or the round's weights are gone.
    """
    if which not in ("best", "last"):
        raise UserError(f"which: {which!r} is none of best, last")
    recipe, inputs = load(run / runs.RECIPE), read(run)
    if inputs is None:  # of an earlier version, or of data that tell models more than can be written down
        loop = build(recipe, run, launch=False)
        server, method = loop.server, loop.method
        inputs = Inputs(server.task, list(server.classes), dict(server.provides))
    else:
        method = instantiate(recipe.method, "method", "method")
        server = _server(recipe, method, inputs)
    if server.student is None:
        raise UserError(f"{run}: method {recipe.method.target} has no student")
    state = _saved(run, summary, which)
    load_into(server.student, state["student"])
    server.state = state["server"]
    method.restored(server)
    return Subject(recipe, server.student, inputs, state["round"])


def _server(recipe: Recipe, method: Method, inputs: Inputs) -> Server:
    """A server with a student and no data."""
    runtime = Runtime(accelerator="cpu", precision=recipe.fabric.precision, launch=False)
    student = None
    if "student" in method.requires:
        runtime.factories["student"] = lambda: conforming(
            instantiate(recipe.student, "module", "student", **inputs.provides), "student", inputs.example
        )
        student = runtime.create("student", stream_seed(recipe.seed, "init"))
    return Server(
        runtime=runtime,
        seed=recipe.seed,
        local=recipe.local,
        distil=recipe.distil,
        digest=recipe.digest or recipe.distil,
        proxy=None,
        validation=None,
        test=None,
        student=student,
        classes=inputs.classes,
        num_classes=len(inputs.classes),
        task=inputs.task,
        provides=inputs.provides,
    )


def _saved(run: Path, summary: Mapping[str, Any], which: str) -> Mapping[str, Any]:
    """The ``round``, the ``student``, and what belongs to it of the ``server``'s state.

    Raises:
        UserError: the round that is asked for is not there any more, or damaged.
    """
    number = summary["best"]["round"] if which == "best" else summary["rounds"]
    if which == "best" and checkpoint.round_of(run / BEST) == number:
        return checkpoint.load_best(run / BEST)
    if (state := checkpoint.load_round(run / runs.CHECKPOINTS, number)) is not None:
        return state
    raise UserError(
        f"{run}: the student of round {number}, the run's {which}, is not there: neither {BEST} nor a whole checkpoint "
        "has it; run again, or export another round with --which"
    )


def _public(tokenizer: Any) -> str:
    """What a tokenizer may be called elsewhere: its own name, or its place in the export."""
    return without_paths(tokenizer.label).replace(LOCAL, "tokenizer.json beside this file")

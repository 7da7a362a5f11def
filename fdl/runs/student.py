"""Loading of the trained student from a run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdl.build.federation import build_federation
from fdl.engine.runtime import Runtime
from fdl.errors import UserError
from fdl.federation.snapshot import BEST
from fdl.modules.foreign import as_federated_module
from fdl.participants import Server
from fdl.recipe.loading import load
from fdl.registry.instantiate import instantiate
from fdl.runs import run as runs
from fdl.runs.exported_student import ExportedStudent
from fdl.runs.inputs import InputSpec, read_input_spec
from fdl.state import checkpoint
from fdl.state.weights import load_into
from fdl.utils.seeding import stream_seed

if TYPE_CHECKING:
    from fdl.methods.base import Method
    from fdl.recipe.config import Recipe


def trained_student(run: Path, summary: Mapping[str, Any], which: str) -> ExportedStudent:
    """Build a run's student and load its weights, without the data if the run stored the description of its inputs.

    Args:
        run: the run's folder.
        summary: the run's summary, as `fdl.runs.run.read_summary` returns it.
        which: ``"best"``: the best round on validation data; ``"last"``: the last round.

    Raises:
        UserError: the run's method has no student, or it cannot be built, or the round's weights are missing.
    """
    if which not in ("best", "last"):
        raise UserError(f"which: {which!r} is none of best, last")
    recipe, inputs = load(run / runs.RECIPE), read_input_spec(run)
    if inputs is None:  # a run of an earlier version, or of data with arguments that cannot be stored
        loop = build_federation(recipe, run, launch=False)
        server, method = loop.server, loop.method
        inputs = InputSpec(server.task, list(server.classes), dict(server.model_kwargs))
    else:
        method = instantiate(recipe.method, "method", "method")
        server = _server(recipe, method, inputs)
    if server.student is None:
        raise UserError(f"{run}: method {recipe.method.target} has no student")
    state = _load_state(run, summary, which)
    load_into(server.student, state["student"])
    server.state = state["server"]
    method.on_restore(server)
    return ExportedStudent(recipe, server.student, inputs, state["round"])


def _server(recipe: Recipe, method: Method, inputs: InputSpec) -> Server:
    """Create a server with a student and without data."""
    runtime = Runtime(accelerator="cpu", precision=recipe.fabric.precision, launch=False)
    student = None
    if "student" in method.requires:
        runtime.factories["student"] = lambda: as_federated_module(
            instantiate(recipe.student, "module", "student", **inputs.model_kwargs), "student", inputs.example
        )
        student = runtime.create("student", stream_seed(recipe.seed, "init"))
    return Server(
        runtime=runtime,
        seed=recipe.seed,
        local_training=recipe.local_training,
        server_distil=recipe.server_distil,
        client_distil=recipe.client_distil or recipe.server_distil,
        proxy=None,
        validation=None,
        test=None,
        student=student,
        classes=inputs.classes,
        num_classes=len(inputs.classes),
        task=inputs.task,
        model_kwargs=inputs.model_kwargs,
    )


def _load_state(run: Path, summary: Mapping[str, Any], which: str) -> Mapping[str, Any]:
    """Load the ``round``, the ``student``, and the part of the ``server``'s state that belongs to it.

    Raises:
        UserError: the requested round is missing or damaged.
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

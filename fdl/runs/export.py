"""A run's student as other libraries load it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
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
from fdl.runs.export_graphs import save_onnx, save_torch
from fdl.runs.export_models import save_open_clip, save_timm, save_transformers
from fdl.runs.exported_student import ExportedStudent
from fdl.runs.inputs import Inputs, read
from fdl.runs.model_card import model_card
from fdl.state import checkpoint, run_folder
from fdl.state.weights import load_into
from fdl.utils.files import write_atomically
from fdl.utils.seeding import stream_seed

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.methods.base import Method
    from fdl.recipe.config import Recipe


FORMATS: dict[str, Callable[[LightningModule, ExportedStudent, Path], str]] = {
    "timm": save_timm,
    "transformers": save_transformers,
    "open_clip": save_open_clip,
    "torch": save_torch,
    "onnx": save_onnx,
}
"""Writer of each format: fills a folder and returns the lines of Python that load it."""


def export(run: Path, format: str, output: Path | None = None, which: str = "best") -> Path:
    """Write a finished run's student for another library, with a model card.

    Args:
        run: the run's folder.
        format: a name among `FORMATS`.
        output: a new or empty folder; default ``export-<format>`` in the run's folder.
        which: ``"best"``: the round that was best on validation data, or the last where none was validated, as the
            run's report names it; ``"last"``: the last.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds no finished run, or no student of that round any more, its student cannot be had in
            this format, or files are in the way.
    """
    output = output or run / f"export-{format}"
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is there already; name another folder with --output-dir, or delete it")
    runs.require_finished(run)
    runs.require_usable(output)
    summary = runs.read_summary(run)
    subject = _load_student(run, summary, which)
    student = subject.student
    student.to("cpu").eval()
    output.parent.mkdir(parents=True, exist_ok=True)
    # made beside its place and then moved, so that nothing half-written is ever taken for a model
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        usage = FORMATS[format](student, subject, folder)
        card = model_card(subject.recipe, summary, subject.round, usage, subject.description())
        write_atomically(folder / "README.md", card.encode())
        try:
            os.rename(folder, output)  # takes the place of an empty folder, and of no other
        except OSError as error:
            raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    run_folder.note_export(run, output)
    return output


def _load_student(run: Path, summary: Mapping[str, Any], which: str) -> ExportedStudent:
    """Build a run's student, without the data where the run kept what is needed of them.

    Raises:
        UserError: the run's method has no student, or it cannot be built.
    """
    recipe, inputs = load(run / runs.RECIPE), read(run)
    if inputs is None:  # of an earlier version, or of data that tell models more than can be written down
        loop = build(recipe, run, launch=False)
        server, method = loop.server, loop.method
        inputs = Inputs(server.task, list(server.classes), dict(server.model_kwargs))
    else:
        method = instantiate(recipe.method, "method", "method")
        server = _server(recipe, method, inputs)
    if server.student is None:
        raise UserError(f"{run}: method {recipe.method.target} has no student")
    state = _saved(run, summary, which)
    load_into(server.student, state["student"])
    server.state = state["server"]
    method.on_restore(server)
    return ExportedStudent(recipe, server.student, inputs, state["round"])


def _server(recipe: Recipe, method: Method, inputs: Inputs) -> Server:
    """A server with a student and no data."""
    runtime = Runtime(accelerator="cpu", precision=recipe.fabric.precision, launch=False)
    student = None
    if "student" in method.requires:
        runtime.factories["student"] = lambda: conforming(
            instantiate(recipe.student, "module", "student", **inputs.model_kwargs), "student", inputs.example
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
        model_kwargs=inputs.model_kwargs,
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

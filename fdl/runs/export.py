"""Export of a run's student for other libraries."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fdl.errors import UserError
from fdl.runs import run as runs
from fdl.runs.export_graphs import save_onnx, save_torch
from fdl.runs.export_models import save_open_clip, save_timm, save_transformers
from fdl.runs.exported_student import ExportedStudent
from fdl.runs.model_card import model_card
from fdl.runs.student import trained_student
from fdl.state import run_folder
from fdl.utils.files import write_atomically
from fdl.utils.paths import expanded
from fdl.utils.suggest import suggest

if TYPE_CHECKING:
    from lightning import LightningModule


WRITERS: dict[str, Callable[[LightningModule, ExportedStudent, Path], str]] = {
    "timm": save_timm,
    "transformers": save_transformers,
    "open_clip": save_open_clip,
    "torch": save_torch,
    "onnx": save_onnx,
}
"""Writer of each format: fills a folder and returns the lines of Python that load it."""


def export(run: str | Path, format: str, output: str | Path | None = None, which: str = "best") -> Path:
    """Write a finished run's student for another library, with a model card.

    Args:
        run: the run's folder.
        format: a name among `WRITERS`.
        output: a new or empty folder; default ``export-<format>`` in the run's folder.
        which: ``"best"``: the best round on validation data (the last one without validation data), as the run's
            report names it; ``"last"``: the last round.

    Returns:
        The folder of the export.

    Raises:
        UserError: the run is not finished, its folder no longer has the student of that round, the format does not
            support the student, or the output folder is not empty.
    """
    if format not in WRITERS:
        raise UserError(f"format: {format!r} is none of {', '.join(WRITERS)}{suggest(format, WRITERS)}")
    run = expanded(run)
    output = run / f"export-{format}" if output is None else expanded(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is there already; name another folder with --output-dir, or delete it")
    runs.require_finished(run)
    runs.require_usable(output)
    summary = runs.read_summary(run)
    subject = trained_student(run, summary, which)
    student = subject.student
    student.to("cpu").eval()
    output.parent.mkdir(parents=True, exist_ok=True)
    # written to a temporary folder and then moved, so that an incomplete export is never taken for a model
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        usage = WRITERS[format](student, subject, folder)
        card = model_card(subject.recipe, summary, subject.round, usage, subject.description())
        write_atomically(folder / "README.md", card.encode())
        try:
            os.rename(folder, output)  # replaces an empty folder only
        except OSError as error:
            raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    run_folder.note_export(run, output)
    return output

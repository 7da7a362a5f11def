"""CSV log: one row of metrics per round."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdl.callbacks.base import Callback
from fdl.errors import UserError
from fdl.utils.files import write_atomically

if TYPE_CHECKING:
    from fdl.federation.state import Federation

METRICS_FILE = "metrics.csv"


class CsvLog(Callback):
    """Writes metrics.csv, one row per round.

    Columns: ``round``; the numbers of clients in the ``cohort``, that ``dropped`` out and that were ``refused``
    (rejected); the round's metrics under their own names; ``communication/…`` in cumulative bytes and ``seconds/…``. A
    metric that first appears in a later round adds a column, empty above. A resumed run rewrites the file from the
    rounds of its checkpoint, so that it ends with the same table as a run without interruption.
    """

    name = "csv"

    def __init__(self) -> None:
        self.columns: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def on_fit_start(self, loop: Federation) -> None:
        """Write the completed rounds, none in a new run."""
        self.columns, self.rows = [], []
        for record in loop.history:
            self._take(record)
        self._rewrite(loop.folder / METRICS_FILE)

    def on_round_end(self, loop: Federation, record: dict[str, Any]) -> None:
        """Add the round's row."""
        path = loop.folder / METRICS_FILE
        if self._take(record):
            self._rewrite(path)
        else:
            try:
                with open(path, "a", newline="", encoding="utf-8") as file:
                    file.write(self._text(self.rows[-1:]))
            except OSError as error:
                raise UserError(f"{path}: cannot be written: {error.strerror}") from error

    def _take(self, record: dict[str, Any]) -> bool:
        """Append a record's row, and return True if it has new columns."""
        row = flatten(record)
        new = [column for column in row if column not in self.columns]
        self.columns += new
        self.rows.append(row)
        return bool(new)

    def _rewrite(self, path: Path) -> None:
        header = {column: column for column in self.columns}
        write_atomically(path, self._text([header, *self.rows] if header else []).encode())

    def _text(self, rows: Iterable[dict[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(rows)
        return text.getvalue()


def flatten(record: dict[str, Any]) -> dict[str, Any]:
    """Flatten a round's record into one row of numbers, without the metrics of single clients (see summary.json).

    Args:
        record: an entry of `FederatedLoop.history`.

    Example:
        >>> record = {"round": 1, "cohort": [0, 1], "dropped": [1], "refused": [], "metrics": {"loss": 0.5}}
        >>> row = flatten(record | {"communication": {"upload_bytes": 70}, "seconds": {"clients": 0.1}})
        >>> row["cohort"], row["loss"], row["communication/upload_bytes"]
        (2, 0.5, 70)
    """
    row = {"round": record["round"]}
    row |= {key: len(record[key]) for key in ("cohort", "dropped", "refused")}
    row |= record["metrics"]
    for part in ("communication", "seconds"):
        row |= {f"{part}/{key}": value for key, value in record[part].items()}
    return row

"""Base class of evaluators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from fdl.errors import UserError
from fdl.utils.arguments import at_least

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.participants import Server


class Evaluator(ABC):
    """Measures a module after a round, on public data only.

    Metrics are recorded as ``student/<label>/<metric>``. Evaluators draw from random streams of their own and leave the
    module's weights unchanged, so that a run gives the same result with and without them.

    Args:
        every: number of rounds between two evaluations; 0: only after the last round.
        label: name under which the metrics are recorded, to use one evaluator twice with different arguments; None: the
            evaluator's `name`.

    Attributes:
        name: short name in recipes and records.
        tasks: the tasks (kinds of data) whose models it can measure.

    Raises:
        UserError: `every` is negative, or `label` is empty or contains a slash.
    """

    name: ClassVar[str] = ""
    tasks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, every: int = 0, label: str | None = None):
        self.every, self.label = at_least("every", every, 0), self.name if label is None else label
        if not self.label or "/" in self.label:
            raise UserError(f"label must be a word or two without a slash, got {label!r}")

    def prepare(self, server: Server) -> None:
        """Read what is needed before the first round, and reject data that do not suit; by default nothing.

        Args:
            server: the server, with its public data.

        Raises:
            UserError: the server's data do not suit the evaluator.
        """

    @abstractmethod
    def evaluate(self, server: Server, module: LightningModule) -> dict[str, float]:
        """Compute the metrics of a module.

        Args:
            server: the server, with public data, tokenizer, classes and device; `Server.predict` runs the module.
            module: the model to measure, usually the student.

        Returns:
            One number per metric.

        Raises:
            UserError: the module or the server's data do not suit the evaluator.
        """

"""What can be asked of a student beyond the metrics of its own task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from fdl.errors import UserError

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.participants import Server


class Evaluator(ABC):
    """Asks a module something after a round, with public data only.

    What it returns is recorded as ``student/<label>/<metric>``. An evaluator draws from streams of its own, so that a
    run goes on the same whether it is asked or not, and it leaves the module's weights as they were.

    Args:
        every: rounds between two evaluations; 0: only after the last round.
        label: what its metrics are recorded under, for a recipe that asks one thing in two ways; default `name`.

    Attributes:
        name: the short name in recipes and in what is recorded.
        tasks: kinds of data whose models can be asked.

    Raises:
        UserError: `every` is negative, or the label is empty or has a slash.
    """

    name: ClassVar[str] = ""
    tasks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, every: int = 0, label: str | None = None):
        self.every, self.label = at_least("every", every, 0), self.name if label is None else label
        if not self.label or "/" in self.label:
            raise UserError(f"label must be a word or two without a slash, got {label!r}")

    def prepare(self, server: Server) -> None:
        """Before the first round: read what is needed, and refuse what cannot work; here nothing.

        Raises:
            UserError: when the server's data cannot answer the question.
        """

    @abstractmethod
    def evaluate(self, server: Server, module: LightningModule) -> dict[str, float]:
        """Ask the module.

        Args:
            server: holds the public data, the tokenizer, the classes and the device; `Server.predict` answers samples.
            module: the model to ask, usually the student.

        Returns:
            One number a metric.

        Raises:
            UserError: when the module or the server's data cannot answer the question.
        """


def at_least(name: str, value: int, minimum: int) -> int:
    """Return a constructor's whole number, or raise UserError where it is below the minimum."""
    if value < minimum:
        raise UserError(f"{name} must be at least {minimum}, got {value}")
    return value

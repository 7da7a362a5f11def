"""Schedules that alternate between centralised and federated phases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from fdl.errors import UserError
from fdl.metrics.tasks import TASKS
from fdl.participants import Server
from fdl.utils.arguments import at_least, positive

CENTRALIZED, FEDERATED = "centralized", "federated"


class PhaseSchedule(ABC):
    """Decides after every round whether the next one is of the other phase.

    Attributes:
        alternates: whether a phase may ever end.
    """

    alternates = True

    @abstractmethod
    def is_over(self, server: Server, phase: str, rounds: int, memory: dict[str, Any]) -> bool:
        """Return True if a phase is over.

        Args:
            server: with the student as it is after the round.
            phase: ``"centralized"`` or ``"federated"``.
            rounds: that the phase has lasted, ≥ 1.
            memory: the switch's own between two rounds, changed in place; new with every phase, but for what
                `carry_over` gives it.
        """

    def carry_over(self, memory: dict[str, Any]) -> dict[str, Any]:
        """The memory with which the next phase begins, made of the last one's."""
        return {}

    def log(self, memory: dict[str, Any]) -> dict[str, float]:
        """Return the parts of its memory to log."""
        return {}


class SinglePhase(PhaseSchedule):
    """The first phase lasts to the end: training at the server alone, or federated averaging alone."""

    name = "single_phase"
    alternates = False

    def is_over(self, server: Server, phase: str, rounds: int, memory: dict[str, Any]) -> bool:
        """No."""
        return False


class FixedPhases(PhaseSchedule):
    """Phases of given lengths, in turns.

    Args:
        centralized: rounds of a phase on public data, ≥ 1.
        federated: rounds of a phase on private data, ≥ 1.
    """

    name = "fixed_phases"

    def __init__(self, centralized: int = 1, federated: int = 1):
        self.lengths = {
            CENTRALIZED: at_least("centralized", centralized, 1),
            FEDERATED: at_least("federated", federated, 1),
        }

    def is_over(self, server: Server, phase: str, rounds: int, memory: dict[str, Any]) -> bool:
        """After so many rounds."""
        return rounds >= self.lengths[phase]


class PlateauPhases(PhaseSchedule):
    """A phase ends once it no longer gains anything on the server's validation set.

    What is looked at is the task's score, e.g. accuracy, as an exponential moving average over the rounds of the phase:
    s ← β s + (1 − β) score, beginning with the score that the phase before left. A round's gain is the change of s,
    counted positive where the score gets better; a phase that has gained less than the threshold in so many rounds one
    after the other ends. The very first round of a run has no gain, since nothing was measured before it.

    Args:
        threshold: least gain of a round that is worth going on for, > 0, in units of the score.
        patience: rounds in a row without it that end a phase, ≥ 1.
        smoothing: β in [0, 1), the weight of the past; 0 takes every score as it is.
        min_rounds: least length of a phase, so that noise does not make phases alternate with every round.
        max_rounds: longest length of a phase; None for no limit.
    """

    name = "plateau"

    def __init__(
        self,
        threshold: float = 0.005,
        patience: int = 2,
        smoothing: float = 0.5,
        min_rounds: int = 2,
        max_rounds: int | None = None,
    ):
        self.threshold, self.patience = positive("threshold", threshold), at_least("patience", patience, 1)
        if not 0 <= smoothing < 1:
            raise UserError(f"smoothing must be in [0, 1), got {smoothing}")
        self.smoothing, self.min_rounds = smoothing, at_least("min_rounds", min_rounds, 1)
        self.max_rounds = None if max_rounds is None else at_least("max_rounds", max_rounds, self.min_rounds)

    def is_over(self, server: Server, phase: str, rounds: int, memory: dict[str, Any]) -> bool:
        """Return True if the phase has stopped improving, or has reached its maximum length."""
        self.note(self.score(server), memory)
        done = memory["stale"] >= self.patience and rounds >= self.min_rounds
        return done or (self.max_rounds is not None and rounds >= self.max_rounds)

    def note(self, score: float, memory: dict[str, Any]) -> None:
        """Take in a round's score, of which more is better."""
        before = memory.get("smoothed")
        memory["score"] = score
        memory["smoothed"] = score if before is None else self.smoothing * before + (1 - self.smoothing) * score
        if before is None:
            memory["stale"] = 0
            return
        memory["gain"] = memory["smoothed"] - before
        memory["stale"] = 0 if memory["gain"] >= self.threshold else memory.get("stale", 0) + 1

    def score(self, server: Server) -> float:
        """The student's score on the validation set, turned so that more is better.

        Raises:
            UserError: there is no validation set.
        """
        if len(server.validation) == 0:
            raise UserError("switch plateau watches the validation set, which is empty; set data.args.validation")
        task = TASKS[server.task]
        value = task.measure(server, server.student, server.validation, (task.score,))[task.score]
        return value if task.higher_is_better else -value

    def carry_over(self, memory: dict[str, Any]) -> dict[str, Any]:
        """The last score: what the next phase gains is counted from there."""
        return {"smoothed": memory["score"]}

    def log(self, memory: dict[str, Any]) -> dict[str, float]:
        """The smoothed score, the round's gain, and for how many rounds it has been too small."""
        return {f"switch/{key}": float(memory[key]) for key in ("smoothed", "gain", "stale") if key in memory}

"""Private data that come in over the rounds: which sample is there when.

A schedule cuts a run into stages, each of so many rounds, and gives every sample the stage in which it arrives. What a
participant holds is then a matter of the round alone, so that methods need not know of it and a resumed run goes on
with the same samples. Numpy only, so that a recipe is checked without importing torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from fdl.errors import UserError

if TYPE_CHECKING:
    from fdl.datamodules.samples import Samples


class Arrival(ABC):
    """When private samples arrive; a subclass writes `assign`.

    Args:
        stages: S, how many times new data come in.
        rounds: of each stage; the last goes on to the end of the run.
        keep: whether samples of earlier stages stay; otherwise they are gone when the next ones come.

    Attributes:
        by_domain: whether it goes by samples' groups rather than by their classes.

    Raises:
        UserError: for values out of range.
    """

    name: str
    by_domain: bool = False

    def __init__(self, stages: int, rounds: int = 1, keep: bool = False):
        for key, value in (("stages", stages), ("rounds", rounds)):
            if value < 1:
                raise UserError(f"{key} must be at least 1, got {value}")
        self.stages, self.rounds, self.keep = stages, rounds, keep

    def stage(self, round: int) -> int:
        """The stage of a round, from 0; preparations in round 0 belong to the first."""
        return min(max(round - 1, 0) // self.rounds, self.stages - 1)

    def visible(self, assigned: np.ndarray, stage: int) -> np.ndarray:
        """Which samples are there in a stage.

        Args:
            assigned: the stage of each sample, as `assign` gives it.
            stage: from 0.

        Returns:
            Positions, int64, ascending.
        """
        return np.flatnonzero(assigned <= stage if self.keep else assigned == stage)

    @abstractmethod
    def assign(self, labels: np.ndarray | None, groups: np.ndarray | None, classes: int) -> np.ndarray:
        """Give every sample its stage.

        Args:
            labels: class of each sample, int [n]; None where the data have none.
            groups: natural client or domain of each sample, [n]; None where the data have none.
            classes: C, number of classes.

        Returns:
            int64 [n] of 0 … S-1.

        Raises:
            UserError: the data do not have what this schedule goes by.
        """

    def known_classes(self, stage: int, classes: int) -> list[int]:
        """The classes of which samples have arrived up to and with a stage; here all of them."""
        return list(range(classes))


class ClassIncremental(Arrival):
    """New classes in every stage (Rebuffi et al., iCaRL, 2017).

    Classes are cut into S runs, whose lengths differ by at most one.

    Args:
        stages: as in `Arrival`.
        rounds: likewise.
        keep: likewise.
        order: numbers of the classes as they come; default as the data number them.
    """

    name = "class_incremental"

    def __init__(self, stages: int, rounds: int = 1, keep: bool = False, order: list[int] | None = None):
        super().__init__(stages, rounds, keep)
        self.order = order

    def assign(self, labels: np.ndarray | None, groups: np.ndarray | None, classes: int) -> np.ndarray:
        """The stage of each sample's class."""
        if labels is None:
            raise UserError("class_incremental is for data with classes, and these have none")
        stage_of = np.empty(classes, dtype=np.int64)
        for stage, chosen in enumerate(self._runs(classes)):
            stage_of[chosen] = stage
        return stage_of[labels]

    def known_classes(self, stage: int, classes: int) -> list[int]:
        """Those of this and the earlier stages, by number."""
        return sorted(int(c) for chosen in self._runs(classes)[: stage + 1] for c in chosen)

    def _runs(self, classes: int) -> list[np.ndarray]:
        order = list(range(classes)) if self.order is None else self.order
        if sorted(order) != list(range(classes)):
            raise UserError(f"order must name each of the {classes} classes once, by number, got {order}")
        if self.stages > classes:
            raise UserError(f"stages: {self.stages}, but the data have only {classes} classes")
        return np.array_split(np.array(order, dtype=np.int64), self.stages)


class DomainIncremental(Arrival):
    """Another domain in every stage, with the same classes.

    Args:
        domains: the data's groups as they come, of which each is a stage.
        rounds: as in `Arrival`.
        keep: likewise.
    """

    name = "domain_incremental"
    by_domain = True

    def __init__(self, domains: list[str], rounds: int = 1, keep: bool = False):
        super().__init__(len(domains), rounds, keep)
        self.domains = [str(domain) for domain in domains]
        if len(set(self.domains)) < len(self.domains):
            raise UserError(f"domains must differ, got {', '.join(self.domains)}")

    def assign(self, labels: np.ndarray | None, groups: np.ndarray | None, classes: int) -> np.ndarray:
        """The place of each sample's domain."""
        if groups is None:
            raise UserError("domain_incremental is for data with domains, and these have none")
        found = sorted({str(group) for group in groups})
        if missing := [domain for domain in found if domain not in self.domains]:
            raise UserError(f"domains must name all of {', '.join(found)}; {', '.join(missing)} is missing")
        stage_of = {domain: stage for stage, domain in enumerate(self.domains)}
        return np.array([stage_of[str(group)] for group in groups], dtype=np.int64)


class ScheduledSamples:
    """Samples that arrive in stages.

    Args:
        samples: all that ever arrive.
        assigned: the stage of each, int64 [n].
        arrival: the schedule.
    """

    def __init__(self, samples: Samples, assigned: np.ndarray, arrival: Arrival):
        self.samples, self.assigned, self.arrival = samples, assigned, arrival

    def samples_at(self, stage: int) -> Samples:
        """Select the samples that are visible in a stage; may be none."""
        return self.samples.subset(self.arrival.visible(self.assigned, stage))


def samples_at(samples: Samples | ScheduledSamples | None, stage: int) -> Samples | None:
    """Select what is visible in a stage of samples that arrive; others are visible from the start."""
    return samples.samples_at(stage) if isinstance(samples, ScheduledSamples) else samples

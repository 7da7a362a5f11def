"""Arrival schedules: private data that become available over the rounds.

A schedule divides a run into stages of equal numbers of rounds, and assigns each sample the stage in which it arrives.
The samples of a participant then depend on the round alone, so that methods need no code for it and a resumed run
continues with the same samples. Numpy only, so that a recipe is checked without importing torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from fdl.errors import UserError

if TYPE_CHECKING:
    from fdl.datamodules.samples import Samples


class Arrival(ABC):
    """Base of arrival schedules of private samples; a subclass implements `assign`.

    Args:
        stages: S, number of stages in which new data arrive.
        rounds: number of rounds per stage; the last stage lasts to the end of the run.
        keep: keep samples of earlier stages; otherwise they are dropped when the next stage begins.

    Attributes:
        by_domain: whether samples are assigned by group rather than by class.

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
        """Return the stage of a round, from 0; preparations in round 0 belong to the first stage."""
        return min(max(round - 1, 0) // self.rounds, self.stages - 1)

    def visible(self, assigned: np.ndarray, stage: int) -> np.ndarray:
        """Select the samples that are available in a stage.

        Args:
            assigned: stage of each sample as returned by `assign`, int64 [n].
            stage: number of the stage, from 0.

        Returns:
            Positions, int64, ascending.
        """
        return np.flatnonzero(assigned <= stage if self.keep else assigned == stage)

    @abstractmethod
    def assign(self, labels: np.ndarray | None, groups: np.ndarray | None, classes: int) -> np.ndarray:
        """Assign a stage to each sample.

        Args:
            labels: class of each sample, int [n]; None where the data have none.
            groups: natural client or domain of each sample, [n]; None where the data have none.
            classes: C, number of classes.

        Returns:
            Stage of each sample, int64 [n] in 0 … S-1.

        Raises:
            UserError: the data lack the labels or groups that the schedule needs.
        """

    def known_classes(self, stage: int, classes: int) -> list[int]:
        """List the classes with samples that have arrived by a stage, that stage included; by default all."""
        return list(range(classes))


class ClassIncremental(Arrival):
    """New classes in every stage (Rebuffi et al., iCaRL, 2017).

    Classes are divided into S consecutive blocks, whose sizes differ by at most one.

    Args:
        stages: S, number of stages.
        rounds: number of rounds per stage; the last stage lasts to the end of the run.
        keep: keep samples of earlier stages.
        order: class numbers in order of arrival; None: in the order of the data.
    """

    name = "class_incremental"

    def __init__(self, stages: int, rounds: int = 1, keep: bool = False, order: list[int] | None = None):
        super().__init__(stages, rounds, keep)
        self.order = order

    def assign(self, labels: np.ndarray | None, groups: np.ndarray | None, classes: int) -> np.ndarray:
        """Assign each sample the stage of its class."""
        if labels is None:
            raise UserError("class_incremental is for data with classes, and these have none")
        stage_of = np.empty(classes, dtype=np.int64)
        for stage, chosen in enumerate(self._runs(classes)):
            stage_of[chosen] = stage
        return stage_of[labels]

    def known_classes(self, stage: int, classes: int) -> list[int]:
        """List the class numbers of this stage and the earlier ones, ascending."""
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
        domains: groups of the data in order of arrival, one per stage.
        rounds: number of rounds per stage; the last stage lasts to the end of the run.
        keep: keep samples of earlier stages.
    """

    name = "domain_incremental"
    by_domain = True

    def __init__(self, domains: list[str], rounds: int = 1, keep: bool = False):
        super().__init__(len(domains), rounds, keep)
        self.domains = [str(domain) for domain in domains]
        if len(set(self.domains)) < len(self.domains):
            raise UserError(f"domains must differ, got {', '.join(self.domains)}")

    def assign(self, labels: np.ndarray | None, groups: np.ndarray | None, classes: int) -> np.ndarray:
        """Assign each sample the stage of its domain."""
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
        samples: samples of all stages.
        assigned: stage of each sample, int64 [n].
        arrival: the arrival schedule.
    """

    def __init__(self, samples: Samples, assigned: np.ndarray, arrival: Arrival):
        self.samples, self.assigned, self.arrival = samples, assigned, arrival

    def samples_at(self, stage: int) -> Samples:
        """Select the samples that are available in a stage; possibly none."""
        return self.samples.subset(self.arrival.visible(self.assigned, stage))


def samples_at(samples: Samples | ScheduledSamples | None, stage: int) -> Samples | None:
    """Select the samples available in a stage; samples without a schedule are available from the start."""
    return samples.samples_at(stage) if isinstance(samples, ScheduledSamples) else samples

"""Base class of attacks on a finished run, their target, and their results."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from fdl.errors import RejectedMessageError, UserError
from fdl.federation.executors import Sequential
from fdl.messages import Responses, parts_of

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from fdl.engine.runtime import Runtime
    from fdl.federation.state import Federation
    from fdl.methods.base import Method
    from fdl.participants import Client, Server

T = TypeVar("T")


class AttackTarget:
    """A finished run as attacks see it; none of its methods changes the run.

    Args:
        loop: the run after its last round.

    Attributes:
        server: the server with the student after the last round.
        clients: the clients with their data and their specialists after the last round.
        method: the federated algorithm.
        runtime: the devices to compute on.
        seed: the run's seed, from which all random streams are derived.
    """

    def __init__(self, loop: Federation):
        self.loop = loop
        self.server: Server = loop.server
        self.clients: list[Client] = loop.clients
        self.method: Method = loop.method
        self.runtime: Runtime = loop.runtime
        self.seed: int = loop.recipe.seed
        self._cache: dict[Any, Any] = {}

    def cached(self, key: Any, make: Callable[[], T]) -> T:
        """Return an object that several attacks share, e.g. shadow models, created on first use.

        Args:
            key: hashable key that identifies the object.
            make: function that creates it.
        """
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def received_responses(self, client: Client) -> Responses | None:
        """Return the predictions on the proxy set that the server receives from a client's current model.

        The client's local update of the last round is repeated without training, with that round's random streams, and
        its upload passes through the run's codecs: predictions that were sent in the last round are reproduced exactly.
        The client gets the download of a first round, so that it neither distils nor reinitialises its model first.

        Args:
            client: one of the run's clients.

        Returns:
            The received predictions; None if the client sends no responses, or has no specialist.
        """
        return self.cached(("responses", client.id), lambda: self._send_responses(client))

    def _send_responses(self, client: Client) -> Responses | None:
        if "specialist" not in client.state:
            return None
        server, twin = self.server.clone(), client.clone(copy.deepcopy(client.state))
        client.offload_state(changed=False)
        server.start_round(self.loop.round)
        with self.runtime.dry_run():
            download = self.method.download(server, client.id)
            ((_, upload),) = Sequential()(self.method, [(twin, download)])
        try:
            received = self.loop.channel.fresh().upload(upload, client.id, self.loop.round)
        except RejectedMessageError:
            return None
        return parts_of(received).get(Responses)


@dataclass(frozen=True, eq=False)
class MembershipScores:
    """An attack's scores of samples that were trained on (members), and of samples that were not.

    Attributes:
        target: name of the attacked object, e.g. ``"student"``.
        members: scores of members, [n]; a larger score is a stronger claim that a sample was trained on.
        non_members: scores of non-members, [m].
        epsilon: ε that the run's privacy accounting guarantees for the target, for one example; infinite for none.
        delta: the δ of that ε.
    """

    target: str
    members: np.ndarray
    non_members: np.ndarray
    epsilon: float = math.inf
    delta: float = 0.0


@dataclass
class AttackResult:
    """Results of one attack.

    Attributes:
        metrics: values by name, e.g. ``"responses/total_variation"``.
        curves: scores of members and non-members, from which the audit derives metrics, a figure and a verdict.
        figures: functions that draw further figures, by name; called only when a figure is shown.
        arrays: further results by name, e.g. reconstructed images.
        notes: sentences without which the metrics could be misread.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    curves: list[MembershipScores] = field(default_factory=list)
    figures: dict[str, Callable[[], Figure]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Attack(ABC):
    """Base class of attacks, which infer private information from a finished run; an instance holds settings only.

    An attack draws from random streams of its own, and changes no model, state or message.

    Args:
        label: name under which the results are recorded, for an audit that runs one attack twice with different
            settings; default `name`.

    Attributes:
        name: the short name in recipes and records.
        tasks: the tasks that the attack supports, among `fdl.metrics.tasks.TASKS`.

    Raises:
        UserError: the label is empty or contains a slash.
    """

    name: ClassVar[str] = ""
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def __init__(self, label: str | None = None):
        self.label = self.name if label is None else label
        if not self.label or "/" in self.label:
            raise UserError(f"label must be a word or two without a slash, got {label!r}")

    @abstractmethod
    def run(self, subject: AttackTarget) -> AttackResult:
        """Attack a finished run.

        Args:
            subject: the run.

        Raises:
            UserError: the run has nothing that this attack applies to.
        """

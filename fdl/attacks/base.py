"""What an attack is: a question to a finished run, and what it found out."""

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
    """A finished run as an attacker finds it; nothing that is asked of it changes the run.

    Args:
        loop: after its last round.

    Attributes:
        server: with the student in its last state.
        clients: with their data and specialists in their last state.
        method: the federated algorithm.
        runtime: where to compute.
        seed: the run's; streams are derived from it as everywhere.
    """

    def __init__(self, loop: Federation):
        self.loop = loop
        self.server: Server = loop.server
        self.clients: list[Client] = loop.clients
        self.method: Method = loop.method
        self.runtime: Runtime = loop.runtime
        self.seed: int = loop.recipe.seed
        self._made: dict[Any, Any] = {}

    def cached(self, key: Any, make: Callable[[], T]) -> T:
        """What several attacks need, e.g. shadow models, made when it is first asked for.

        Args:
            key: what tells it from all else; hashable.
            make: makes it.
        """
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def answers(self, client: Client) -> Responses | None:
        """What the server receives when a client answers the proxy set with the model that it has now.

        The client takes its turn once more without training, as of the last round and with that round's streams, and
        what it says goes through the run's codecs: an answer that it gave in the last round comes back as it was. The
        server says to it what it would say in a first round, so that it does not learn or begin anew before it answers.

        Returns:
            None where it sends no responses, or has no specialist.
        """
        return self.cached(("answers", client.id), lambda: self._ask(client))

    def _ask(self, client: Client) -> Responses | None:
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
    """How an attack scored samples that were trained on, and samples that were not.

    Attributes:
        target: what was attacked, e.g. ``"student"``.
        members: scores of the former, [n]; a larger score is a stronger claim that a sample was trained on.
        non_members: scores of the latter, [m].
        epsilon: what the run's account proves of the target, at the level of one example; infinite for nothing.
        delta: the δ of that ε.
    """

    target: str
    members: np.ndarray
    non_members: np.ndarray
    epsilon: float = math.inf
    delta: float = 0.0


@dataclass
class AttackResult:
    """What an attack found out.

    Attributes:
        metrics: numbers by name, e.g. ``"responses/total_variation"``.
        curves: scores of members and non-members, from which the audit makes metrics, a figure and a verdict.
        figures: what draws each further figure, by name; called only where somebody looks at it.
        arrays: by name, what else is worth keeping.
        notes: sentences without which the numbers could be misread.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    curves: list[MembershipScores] = field(default_factory=list)
    figures: dict[str, Callable[[], Figure]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Attack(ABC):
    """Tries to learn something of private data from a finished run; holds settings only.

    An attack draws from streams of its own and leaves models, states and messages as they were.

    Args:
        label: what its findings are recorded under, for an audit that runs one attack in two ways; default `name`.

    Attributes:
        name: the short name in recipes and in what is recorded.
        tasks: the kinds of data that it is for, among `fdl.metrics.tasks.TASKS`.

    Raises:
        UserError: the label is empty or has a slash.
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

        Raises:
            UserError: the run has nothing that this attack could be tried on.
        """

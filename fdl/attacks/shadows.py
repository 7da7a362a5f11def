"""Shadow federations: repetitions of a run with other private samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fdl.attacks.base import AttackTarget
from fdl.attacks.candidates import Candidates, ConcatSamples, candidates
from fdl.attacks.signals import nearest_proxy_rows, signals
from fdl.callbacks.base import CallbackList
from fdl.loop import FederatedLoop
from fdl.utils.seeding import numpy_stream, stream_seed

if TYPE_CHECKING:
    from fdl.participants import Client, Server

log = logging.getLogger("fdl")


@dataclass(frozen=True, eq=False)
class Shadows:
    """Signals of the candidates in shadow federations.

    Attributes:
        signals: by target, φ of each candidate in each shadow, float64 [S, n].
        inside: True where a shadow was trained on a candidate, bool [S, n].
    """

    signals: dict[str, np.ndarray]
    inside: np.ndarray


def observe_signals(subject: AttackTarget, neighbours: int) -> dict[str, np.ndarray]:
    """Compute φ of the candidates in the attacked run itself; see `fdl.attacks.signals.signals`.

    Args:
        subject: the attacked run.
        neighbours: number of proxy samples that approximate a candidate.
    """
    queries = candidates(subject)
    near = _near(subject, queries, neighbours)
    return subject.cached(("signals", neighbours), lambda: signals(subject, queries, near))


def run_shadow_federations(subject: AttackTarget, count: int, neighbours: int) -> Shadows:
    """Run shadow federations, and compute the signals of the candidates in each of them.

    A shadow runs the same rounds with the same method, clients, codecs and cohorts: participation is no secret. Its
    participants' random streams and initial weights are its own, and each client trains on a random half of its
    candidates and on all of its samples that are no candidates: as many samples of each class as in the attacked run.
    Consecutive shadows use complementary halves, so every candidate was trained on in exactly half of them. All clients
    of a shadow are honest.

    Args:
        subject: the attacked run.
        count: number of shadow federations, even.
        neighbours: number of proxy samples that approximate a candidate.
    """
    known = subject.cached(("shadows", neighbours), lambda: _ShadowSequence(subject, neighbours))
    return known.first(count)


class _ShadowSequence:
    """Sequence of shadow federations, extended on demand."""

    def __init__(self, subject: AttackTarget, neighbours: int):
        self.subject, self.queries = subject, candidates(subject)
        self.near = _near(subject, self.queries, neighbours)
        self.found: list[dict[str, np.ndarray]] = []
        self.inside: list[np.ndarray] = []

    def first(self, count: int) -> Shadows:
        while len(self.found) < count:
            number = len(self.found)
            half = self.queries.halves(numpy_stream(self.subject.seed, "shadow/half", number // 2))
            self.inside.append(half if number % 2 == 0 else ~half)
            clock = self.subject.runtime.clock
            try:
                shadow = run_shadow_federation(self.subject, self.queries, self.inside[-1], number)
                self.found.append(signals(shadow, self.queries, self.near))
            finally:
                self.subject.runtime.clock = clock  # a loop replaces it by its own
            log.info("shadow federation %d of %d", number + 1, count)
        missing = np.full(len(self.queries.owner), np.nan)
        names = {name for found in self.found[:count] for name in found}
        together = {name: np.stack([f.get(name, missing) for f in self.found[:count]]) for name in sorted(names)}
        return Shadows(together, np.stack(self.inside[:count]))


def run_shadow_federation(subject: AttackTarget, queries: Candidates, inside: np.ndarray, number: int) -> AttackTarget:
    """Run one shadow federation.

    Args:
        subject: the attacked run.
        queries: the candidates.
        inside: mask of the candidates to train on, bool [n].
        number: number of the shadow, from which its random streams are derived.

    Returns:
        The shadow after its last round.
    """
    loop, seed = subject.loop, stream_seed(subject.seed, "shadow", number)
    clients = [c.clone(train=queries.share(c, inside), seed=seed, honest=True) for c in subject.clients]
    rounds = loop.round
    never = rounds + 1  # no round is evaluated or saved
    recipe = replace(
        loop.recipe,
        evaluation=replace(loop.recipe.evaluation, every=never),
        checkpoint=replace(loop.recipe.checkpoint, every=never),
    )
    shadow = FederatedLoop(
        recipe=recipe,
        folder=loop.folder,
        method=loop.method,
        server=_server(subject, clients, seed),
        clients=clients,
        channel=loop.channel.fresh(),
        executor=loop.executor,
        callbacks=CallbackList(),
    )
    shadow.rounds = never
    shadow.start_round(0)
    shadow.method.setup(shadow.server, clients)
    for round in range(1, rounds + 1):
        shadow.run_round(round)
    shadow.placement.replicate_states()
    return AttackTarget(shadow)


def _server(subject: AttackTarget, clients: list[Client], seed: int) -> Server:
    pooled = None if subject.server.pooled is None else ConcatSamples([client.train for client in clients])
    twin = subject.server.clone(pooled=pooled, seed=seed)
    for part, purpose in (("student", "init"), ("teacher", "teacher")):
        if getattr(twin, part) is not None:
            setattr(twin, part, subject.runtime.create(part, stream_seed(seed, purpose)))
    return twin


def _near(subject: AttackTarget, queries: Candidates, count: int) -> np.ndarray | None:
    """Find the proxy rows near the candidates; None without a proxy set or a space to measure distances in."""
    server = subject.server
    if not server.proxy or (server.encoder is None and "context" in server.model_kwargs):
        return None
    return subject.cached(("near", count), lambda: nearest_proxy_rows(server, queries.samples, count))

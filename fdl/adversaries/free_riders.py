"""Free-riders, clients that never respond, and Sybil attacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from fdl.adversaries.base import (
    Adversary,
    AttackContext,
    Upload,
    initial_vector,
    logits_of,
    probabilities_of,
    with_logits,
    with_probabilities,
    with_vector,
)
from fdl.adversaries.parameters import normal
from fdl.datamodules.samples import Samples
from fdl.messages import Bundle, Message, Parameters, Responses, parts_of
from fdl.participants import Client
from fdl.utils.arguments import not_negative


class FreeRider(Adversary):
    """Upload the server's download, as if it were a local update, to benefit without doing any work.

    Weights and predictions are returned unchanged; the prediction is uniform for samples that are not in the download.
    Noise makes the attack less obvious (Fraboni, Vidal and Lorenzi, "Free-rider Attacks on Model Aggregation", 2021).
    In the simulation the client trains nevertheless, and the result is discarded.

    Args:
        noise: standard deviation of the normal noise added to weights or logits, ≥ 0.
        confidence: the log-weight to send, ``"largest"`` or ``"own"``; see `Adversary`.
    """

    name = "free_rider"

    def __init__(self, noise: float = 0.0, confidence: Literal["largest", "own"] = "own"):
        super().__init__(confidence)
        self.noise = not_negative("noise", noise)

    def parameters(self, own: Parameters, context: AttackContext) -> Parameters:
        """Return the downloaded weights, with noise."""
        start = initial_vector(own, context)
        return with_vector(own, start + self.noise * normal(start.shape, context) if self.noise else start)

    def responses(self, own: Responses, context: AttackContext) -> Responses:
        """Return the downloaded predictions, with noise."""
        count, classes = own.values.shape
        values = torch.full((count, classes), 1 / classes, dtype=torch.float64)
        sent = parts_of(context.download).get(Responses)
        if sent is not None:
            known = dict(zip(_rows(sent), probabilities_of(sent)))
            for place, row in enumerate(_rows(own)):
                values[place] = known.get(row, values[place])
        echoed = with_probabilities(own, values)
        if not self.noise:
            return echoed
        return with_logits(own, logits_of(echoed) + self.noise * normal(values.shape, context))


class NonResponder(Adversary):
    """Receive downloads and never upload.

    The federation learns nothing from the client's data, but is not attacked either. No defence against Byzantine
    clients can do better than excluding them, so this is the reference for defences.
    """

    name = "non_response"
    spaces = ("data", "parameters", "responses")

    def attack(self, context: AttackContext) -> None:
        """Return None, for no upload."""
        return None


class Sybil(Adversary):
    """Sybil attack: one participant controls all clients of its entry, which all send the upload of the first.

    Args:
        attack: the attack that replaces the first client's honest upload; None: the participant only has more votes
            than it should.
    """

    name = "sybil"

    def __init__(self, attack: Adversary | None = None):
        super().__init__("own")
        self.attacker = attack
        self.spaces = ("parameters", "responses") if attack is None else attack.spaces
        self.sees = "all" if attack is not None and attack.sees == "all" else "allies"

    def prepare(self, client: Client) -> None:
        """Prepare the attack."""
        if self.attacker is not None:
            self.attacker.prepare(client)

    def corrupt(self, samples: Samples, generator: torch.Generator) -> Samples:
        """Return the samples as the attack changes them."""
        return samples if self.attacker is None else self.attacker.corrupt(samples, generator)

    def attack(self, context: AttackContext) -> Upload:
        """Return the first client's upload, with each client's own sample count."""
        first = min(context.allies)
        leader = replace(context, client=context.clients[first], own=context.allies[first])
        made = leader.own if self.attacker is None else self.attacker.attack(leader)
        samples = {kind: getattr(part, "samples", None) for kind, part in parts_of(context.own).items()}

        def signed(part: Message) -> Message:
            count = samples.get(type(part))
            return part if count is None else replace(part, samples=count)

        return Bundle(tuple(map(signed, made.parts))) if isinstance(made, Bundle) else signed(made)


def _rows(message: Responses) -> list[int]:
    return list(range(len(message.values))) if message.rows is None else message.rows.tolist()

"""Those who do not work, and those who are one behind many names."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from fdl.adversaries.base import (
    Adversary,
    AttackContext,
    Upload,
    answer,
    answer_logits,
    logits_of,
    probabilities_of,
    start_of,
    with_vector,
)
from fdl.adversaries.parameters import normal
from fdl.datamodules.samples import Samples
from fdl.messages import Bundle, Message, Parameters, Responses, parts_of
from fdl.participants import Client
from fdl.utils.arguments import not_negative


class FreeRider(Adversary):
    """Send back what the server sent, as if it had been learnt from, to share in the result without any work.

    Weights come back as they were. So do answers; samples of which the server said nothing are answered uniformly.
    Noise makes it less plain (Fraboni, Vidal and Lorenzi, "Free-rider Attacks on Model Aggregation", 2021). In the
    simulation the client trains nevertheless, and the result is thrown away.

    Args:
        noise: standard deviation of what is added to weights or logits, ≥ 0.
        confidence: as in `Adversary`.
    """

    name = "free_rider"

    def __init__(self, noise: float = 0.0, confidence: Literal["largest", "own"] = "own"):
        super().__init__(confidence)
        self.noise = not_negative("noise", noise)

    def parameters(self, own: Parameters, scene: AttackContext) -> Parameters:
        """The weights that came down."""
        start = start_of(own, scene)
        return with_vector(own, start + self.noise * normal(start.shape, scene) if self.noise else start)

    def responses(self, own: Responses, scene: AttackContext) -> Responses:
        """The answers that came down."""
        count, classes = own.values.shape
        values = torch.full((count, classes), 1 / classes, dtype=torch.float64)
        sent = parts_of(scene.download).get(Responses)
        if sent is not None:
            known = dict(zip(_rows(sent), probabilities_of(sent)))
            for place, row in enumerate(_rows(own)):
                values[place] = known.get(row, values[place])
        echoed = answer(own, values)
        if not self.noise:
            return echoed
        return answer_logits(own, logits_of(echoed) + self.noise * normal(values.shape, scene))


class NonResponder(Adversary):
    """Take what the server sends, and never answer: of its data the others learn nothing, and from it no lies.

    No defence can do better against liars than if they were silent, so this is what defences are measured by.
    """

    name = "non_response"
    spaces = ("data", "parameters", "responses")

    def attack(self, scene: AttackContext) -> None:
        """Nothing."""
        return None


class Sybil(Adversary):
    """One participant behind the names of all clients of its entry: they all send what the first of them sends.

    Args:
        attack: what the first one sends in the place of its honest upload; None: it only has more votes than it should.
    """

    name = "sybil"

    def __init__(self, attack: Adversary | None = None):
        super().__init__("own")
        self.attacker = attack
        self.spaces = ("parameters", "responses") if attack is None else attack.spaces
        self.sees = "all" if attack is not None and attack.sees == "all" else "allies"

    def prepare(self, client: Client) -> None:
        """As the attack."""
        if self.attacker is not None:
            self.attacker.prepare(client)

    def corrupt(self, samples: Samples, generator: torch.Generator) -> Samples:
        """As the attack."""
        return samples if self.attacker is None else self.attacker.corrupt(samples, generator)

    def attack(self, scene: AttackContext) -> Upload:
        """The first one's upload; how many samples it stands for, every name says for itself."""
        first = min(scene.allies)
        leader = replace(scene, client=scene.clients[first], own=scene.allies[first])
        made = leader.own if self.attacker is None else self.attacker.attack(leader)
        samples = {kind: getattr(part, "samples", None) for kind, part in parts_of(scene.own).items()}

        def signed(part: Message) -> Message:
            count = samples.get(type(part))
            return part if count is None else replace(part, samples=count)

        return Bundle(tuple(map(signed, made.parts))) if isinstance(made, Bundle) else signed(made)


def _rows(message: Responses) -> list[int]:
    return list(range(len(message.values))) if message.rows is None else message.rows.tolist()

"""What a dishonest client may do: tamper with its own data, or with what it sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from fdl.errors import UserError
from fdl.knowledge.confidence.base import LIMIT
from fdl.messages import Bundle, Message, Parameters, QuantizedLogWeights, Responses, parts_of
from fdl.utils.arguments import one_of

if TYPE_CHECKING:
    from fdl.datamodules.samples import Samples
    from fdl.participants import Client

Upload = Message | Bundle

EPS = torch.finfo(torch.float32).eps
"""What float32 can tell from a probability of 0."""


@dataclass(frozen=True)
class AttackContext:
    """What an adversary knows when it makes its upload.

    Attributes:
        client: the client that it plays.
        own: what an honest client with its data would send.
        download: what the server sent it in this round.
        honest: what the honest clients of the round send, in the order of their turns; empty for an adversary that
            sees nobody, and where there are none.
        allies: by id, what the clients of its own entry would send honestly; likewise.
        clients: the allies themselves, by id.
        heard: how many clients upload in this round.
        hostile: how many of them are adversaries.
    """

    client: Client
    own: Upload
    download: Upload | None = None
    honest: Sequence[Upload] = ()
    allies: Mapping[int, Upload] | None = None
    clients: Mapping[int, Client] | None = None
    heard: int = 1
    hostile: int = 1


class Adversary:
    """A dishonest client; holds settings only, and draws from its client's own streams.

    It is part of the simulation, not of the protocol: it goes through the same channel as all others, and what it sends
    can be decoded. A subclass writes `corrupt`, or one of `parameters` and `responses`, or both.

    Args:
        confidence: what it says of itself where answers carry a confidence: the largest log-weight that is accepted, or
            its own, honestly measured.

    Attributes:
        spaces: what it tampers with, among ``"data"``, ``"parameters"`` and ``"responses"``.
        tasks: kinds of data that it is for; empty for any.
        sees: whose uploads of the round it must know: nobody's, those of its own entry, or everybody's. For the latter
            two all uploads of a round are held in memory at once.
    """

    name: ClassVar[str] = ""
    spaces: tuple[str, ...] = ("parameters", "responses")
    tasks: ClassVar[tuple[str, ...]] = ()
    sees: Literal["nobody", "allies", "all"] = "nobody"

    def __init__(self, confidence: Literal["largest", "own"] = "largest"):
        self.confidence = one_of("confidence", confidence, ("largest", "own"))

    def prepare(self, client: Client) -> None:
        """Look at the client that is to be played, before the first round.

        Raises:
            UserError: when it cannot be.
        """

    def corrupt(self, samples: Samples, generator: torch.Generator) -> Samples:
        """The private samples that the client works with once it has turned; here the honest ones.

        Args:
            samples: its training or its calibration samples.
            generator: a stream of this client, the same in every round.
        """
        return samples

    def attack(self, scene: AttackContext) -> Upload | None:
        """Make the upload, None for none; parts of a bundle that are not attacked stay as they are.

        Raises:
            UserError: nothing of what the method sends can be attacked.
        """
        if self.spaces == ("data",):
            return scene.own
        parts = parts_of(scene.own)
        changed = dict(parts)
        for kind, space in SPACES.items():
            if kind in parts and space in self.spaces:
                changed[kind] = getattr(self, space)(parts[kind], scene)
        if Responses in changed and changed[Responses] is not parts[Responses]:
            changed[Responses] = self.claim(changed[Responses])
        if all(changed[kind] is parts[kind] for kind in parts):
            found = " and ".join(sorted(kind.kind for kind in parts))
            if found != "standing":  # its last answers, which were an attack, stay in force
                raise UserError(f"{self.name} attacks {' and '.join(self.spaces)}, and what would be sent is {found}")
        return Bundle(tuple(changed.values())) if isinstance(scene.own, Bundle) else next(iter(changed.values()))

    def parameters(self, own: Parameters, scene: AttackContext) -> Parameters:
        """Weights to send in place of the client's own, here these; those of other participants are in `scene`."""
        return own

    def responses(self, own: Responses, scene: AttackContext) -> Responses:
        """Answers to send in place of the client's own, for the same rows and in the same form; here its own."""
        return own

    def claim(self, responses: Responses) -> Responses:
        """The answers with the confidence that the adversary claims."""
        if responses.confidence is None or self.confidence == "own":
            return responses
        largest = torch.full((len(responses.values),), LIMIT)
        return replace(responses, confidence=QuantizedLogWeights.quantize(largest))


SPACES: dict[type[Message], str] = {Parameters: "parameters", Responses: "responses"}
"""What each kind of message is called among `Adversary.spaces`."""


def with_vector(own: Parameters, vector: Tensor) -> Parameters:
    """The message with other real numbers in it; counters stay.

    Args:
        own: gives names, shapes, dtypes and counters.
        vector: all floating-point elements in order, [d].
    """
    tensors, start = {}, 0
    for name, tensor in own.tensors.items():
        if tensor.is_floating_point():
            part = vector[start : start + tensor.numel()]
            start += tensor.numel()
            tensor = part.reshape(tensor.shape).to(tensor.dtype)
        tensors[name] = tensor
    return Parameters(tensors, own.samples)


def vector_of(message: Parameters) -> Tensor:
    """All floating-point elements in order, float64 [d] on the CPU."""
    parts = [t.detach().to("cpu", torch.float64).flatten() for t in message.tensors.values() if t.is_floating_point()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def start_of(own: Parameters, scene: AttackContext) -> Tensor:
    """The weights from which the client began its round, as a vector like its own; zeros where it was sent none."""
    sent = parts_of(scene.download).get(Parameters)
    tensors = {} if sent is None else sent.tensors
    parts = []
    for name, tensor in own.tensors.items():
        if tensor.is_floating_point():
            begun = tensors.get(name)
            known = begun is not None and begun.shape == tensor.shape
            parts.append((begun if known else torch.zeros(tensor.shape)).detach().to("cpu", torch.float64).flatten())
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def honest_vectors(own: Parameters, scene: AttackContext) -> Tensor:
    """What honest clients send, one row each, float64 [k, d]; the adversary's own where it sees nobody's."""
    layout = own.layout
    seen = (parts_of(upload).get(Parameters) for upload in scene.honest)
    alike = [vector_of(message) for message in seen if message is not None and message.layout == layout]
    return torch.stack(alike or [vector_of(own)])


def probabilities_of(responses: Responses) -> Tensor:
    """Answers as probabilities, float64 [n, C] on the CPU."""
    values = responses.values.detach().to("cpu", torch.float64)
    return torch.softmax(values, dim=1) if responses.form == "logits" else values


def logits_of(responses: Responses) -> Tensor:
    """Answers as logits, float64 [n, C] on the CPU; embeddings as they are."""
    values = responses.values.detach().to("cpu", torch.float64)
    return values.clamp_min(EPS).log() if responses.form == "probabilities" else values


def honest_values(own: Responses, scene: AttackContext) -> Tensor:
    """Honest answers to the same rows as sent, float64 [k, n, C]; the adversary's own where it sees nobody's."""
    seen = (parts_of(upload).get(Responses) for upload in scene.honest)
    alike = [m.values for m in seen if m is not None and m.form == own.form and _same_rows(m, own)]
    return torch.stack([values.detach().to("cpu", torch.float64) for values in alike or [own.values]])


def answer(own: Responses, probabilities: Tensor) -> Responses:
    """The same message with other answers, given as probabilities [n, C]; logits are no lower than float32 allows."""
    values = probabilities if own.form == "probabilities" else probabilities.clamp_min(EPS).log()
    return replace(own, values=values.to(own.values.dtype))


def answer_logits(own: Responses, logits: Tensor) -> Responses:
    """The same message with other answers, given as logits [n, C] or embeddings."""
    values = torch.softmax(logits, dim=1) if own.form == "probabilities" else logits
    return replace(own, values=values.to(own.values.dtype))


def _same_rows(a: Responses, b: Responses) -> bool:
    if a.values.shape != b.values.shape or (a.rows is None) != (b.rows is None):
        return False
    return a.rows is None or torch.equal(a.rows, b.rows)

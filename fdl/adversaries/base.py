"""Byzantine clients, which tamper with their own data or with their uploads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from fdl.errors import UserError
from fdl.knowledge.confidence.base import LIMIT
from fdl.messages import Bundle, Message, Parameters, QuantizedLogWeights, Responses, UploadStatus, parts_of
from fdl.utils.arguments import one_of

if TYPE_CHECKING:
    from fdl.datamodules.samples import Samples
    from fdl.participants import Client

Upload = Message | Bundle

EPS = torch.finfo(torch.float32).eps
"""Smallest probability that float32 distinguishes from 0 next to 1."""


@dataclass(frozen=True)
class AttackContext:
    """Knowledge of an adversary at the time of its upload.

    Attributes:
        client: the client that the adversary controls.
        own: the upload of an honest client with the same data.
        download: the server's download to the client in this round.
        honest: uploads of the round's honest clients, in the order of their turns; empty if the adversary does not see
            them (`Adversary.sees`) or the round has none.
        allies: honest uploads of the clients of the same recipe entry, by client id; empty or None if not seen.
        clients: the allied clients, by id.
        num_uploads: number of clients that upload in this round.
        num_attackers: number of adversaries among them.
    """

    client: Client
    own: Upload
    download: Upload | None = None
    honest: Sequence[Upload] = ()
    allies: Mapping[int, Upload] | None = None
    clients: Mapping[int, Client] | None = None
    num_uploads: int = 1
    num_attackers: int = 1


class Adversary:
    """Behaviour of a Byzantine client; holds settings only, and draws from the client's own random streams.

    It is part of the simulation, not of the protocol: its uploads pass through the same channel as all others and can
    be decoded. A subclass overrides `corrupt`, or one or both of `parameters` and `responses`.

    Args:
        confidence: the confidence sent along with predictions that carry one: ``"largest"``, the largest log-weight
            that is accepted, or ``"own"``, the honestly measured one.

    Attributes:
        spaces: the targets of the attack, among ``"data"``, ``"parameters"`` and ``"responses"``.
        tasks: supported kinds of data; empty for any.
        sees: the uploads of the round that the attack needs: ``"nobody"`` for none, ``"allies"`` for those of its own
            recipe entry, ``"all"`` for all. The latter two keep all uploads of a round in memory at once.
    """

    name: ClassVar[str] = ""
    spaces: tuple[str, ...] = ("parameters", "responses")
    tasks: ClassVar[tuple[str, ...]] = ()
    sees: Literal["nobody", "allies", "all"] = "nobody"

    def __init__(self, confidence: Literal["largest", "own"] = "largest"):
        self.confidence = one_of("confidence", confidence, ("largest", "own"))

    def prepare(self, client: Client) -> None:
        """Inspect the client before the first round.

        Args:
            client: the client that the adversary will control.

        Raises:
            UserError: the attack does not fit the client's data.
        """

    def corrupt(self, samples: Samples, generator: torch.Generator) -> Samples:
        """Return the private samples that the client uses from the attack's first round on; here the honest ones.

        Args:
            samples: the client's training or calibration samples.
            generator: a random stream of this client, the same in every round.
        """
        return samples

    def attack(self, context: AttackContext) -> Upload | None:
        """Build the upload; parts of a bundle that are not attacked stay as they are.

        Args:
            context: what the adversary knows in this round.

        Returns:
            The upload, None for none.

        Raises:
            UserError: the attack applies to no part of what the method sends.
        """
        if self.spaces == ("data",):
            return context.own
        parts = parts_of(context.own)
        changed = dict(parts)
        for kind, space in SPACES.items():
            if kind in parts and space in self.spaces:
                changed[kind] = getattr(self, space)(parts[kind], context)
        if Responses in changed and changed[Responses] is not parts[Responses]:
            changed[Responses] = self.with_confidence(changed[Responses])
        if all(changed[kind] is parts[kind] for kind in parts):
            found = " and ".join(sorted(kind.kind for kind in parts))
            if found != UploadStatus.kind:  # the last predictions, already an attack, stay in use
                raise UserError(f"{self.name} attacks {' and '.join(self.spaces)}, and what would be sent is {found}")
        return Bundle(tuple(changed.values())) if isinstance(context.own, Bundle) else next(iter(changed.values()))

    def parameters(self, own: Parameters, context: AttackContext) -> Parameters:
        """Return the weights to send; here the client's own.

        Args:
            own: the client's honest weights.
            context: what the adversary knows in this round, among it other participants' uploads.
        """
        return own

    def responses(self, own: Responses, context: AttackContext) -> Responses:
        """Return the predictions to send, for the same rows and in the same form; here the client's own.

        Args:
            own: the client's honest predictions.
            context: what the adversary knows in this round, among it other participants' uploads.
        """
        return own

    def with_confidence(self, responses: Responses) -> Responses:
        """Return the predictions with the confidence that the adversary sends; see the argument `confidence`."""
        if responses.confidence is None or self.confidence == "own":
            return responses
        largest = torch.full((len(responses.values),), LIMIT)
        return replace(responses, confidence=QuantizedLogWeights.quantize(largest))


SPACES: dict[type[Message], str] = {Parameters: "parameters", Responses: "responses"}
"""Entry of `Adversary.spaces` per type of message."""


def with_vector(own: Parameters, vector: Tensor) -> Parameters:
    """Return the message with its real numbers replaced; counters stay.

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
    """Return all floating-point elements in order, float64 [d] on the CPU."""
    parts = [t.detach().to("cpu", torch.float64).flatten() for t in message.tensors.values() if t.is_floating_point()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def initial_vector(own: Parameters, context: AttackContext) -> Tensor:
    """Return the weights from which the client started its round; zeros where it received none.

    Args:
        own: the client's upload, which gives names and shapes.
        context: gives the download.

    Returns:
        All floating-point elements in the order of `own`, float64 [d] on the CPU.
    """
    sent = parts_of(context.download).get(Parameters)
    tensors = {} if sent is None else sent.tensors
    parts = []
    for name, tensor in own.tensors.items():
        if tensor.is_floating_point():
            begun = tensors.get(name)
            known = begun is not None and begun.shape == tensor.shape
            parts.append((begun if known else torch.zeros(tensor.shape)).detach().to("cpu", torch.float64).flatten())
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def honest_vectors(own: Parameters, context: AttackContext) -> Tensor:
    """Return the weights that honest clients send, one row per client.

    Args:
        own: the client's honest weights; uploads of another layout are left out.
        context: gives the uploads of the honest clients.

    Returns:
        float64 [k, d]; the client's own row where the adversary sees no others.
    """
    layout = own.layout
    seen = (parts_of(upload).get(Parameters) for upload in context.honest)
    alike = [vector_of(message) for message in seen if message is not None and message.layout == layout]
    return torch.stack(alike or [vector_of(own)])


def probabilities_of(responses: Responses) -> Tensor:
    """Return predictions as probabilities, float64 [n, C] on the CPU."""
    values = responses.values.detach().to("cpu", torch.float64)
    return torch.softmax(values, dim=1) if responses.form == "logits" else values


def logits_of(responses: Responses) -> Tensor:
    """Return predictions as logits, float64 [n, C] on the CPU; embeddings unchanged."""
    values = responses.values.detach().to("cpu", torch.float64)
    return values.clamp_min(EPS).log() if responses.form == "probabilities" else values


def honest_values(own: Responses, context: AttackContext) -> Tensor:
    """Return the honest predictions for the same rows, in the form in which they are sent.

    Args:
        own: the client's honest predictions; uploads of other rows or another form are left out.
        context: gives the uploads of the honest clients.

    Returns:
        float64 [k, n, C]; the client's own predictions where the adversary sees no others.
    """
    seen = (parts_of(upload).get(Responses) for upload in context.honest)
    alike = [m.values for m in seen if m is not None and m.form == own.form and _same_rows(m, own)]
    return torch.stack([values.detach().to("cpu", torch.float64) for values in alike or [own.values]])


def with_probabilities(own: Responses, probabilities: Tensor) -> Responses:
    """Replace the predictions of a message.

    Args:
        own: the message, whose form and dtype are kept; logits are no lower than float32 allows.
        probabilities: the new predictions, [n, C].
    """
    values = probabilities if own.form == "probabilities" else probabilities.clamp_min(EPS).log()
    return replace(own, values=values.to(own.values.dtype))


def with_logits(own: Responses, logits: Tensor) -> Responses:
    """Replace the predictions of a message.

    Args:
        own: the message, whose form and dtype are kept.
        logits: the new predictions, logits or embeddings [n, C].
    """
    values = torch.softmax(logits, dim=1) if own.form == "probabilities" else logits
    return replace(own, values=values.to(own.values.dtype))


def _same_rows(a: Responses, b: Responses) -> bool:
    if a.values.shape != b.values.shape or (a.rows is None) != (b.rows is None):
        return False
    return a.rows is None or torch.equal(a.rows, b.rows)

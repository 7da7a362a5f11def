"""Aggregated affinities of several dual encoders for image–text pairs, which do not depend on embedding widths.

A client's answer to a pair is one row, its image's vector and then its text's, each multiplied with the square root of
the client's scale: products of the rows are its logits, so that its certainty travels with its vectors, and no width,
rotation or scale of anyone's space needs to be known.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor

from fdl.datamodules.samples import Samples
from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.base import Aggregate
from fdl.knowledge.aggregation.shares import CAP, Cap
from fdl.knowledge.confidence.base import LIMIT
from fdl.knowledge.confidence.calibration import fit_temperature
from fdl.losses.contrastive import MAX_SCALE
from fdl.messages import Responses
from fdl.modules.dual_encoder import logit_scale_of
from fdl.participants import Client, Participant

PAIRS_PER_BLOCK = 256
"""Most pairs among which the match of one is searched, to measure a client's confidence."""

_NEVER = -1e5
"""A logit so small that its probability is 0 in float64 at every temperature that is tried."""

_SLACK = 0.1
"""Relative tolerance for the length of a vector after rounding in transmission."""


def answers(participant: Participant, module: LightningModule, samples: Samples, temperature: float = 1.0) -> Tensor:
    """A model's answers to n pairs, float32 [n, 2 D]: images, then texts, each of length √(scale / temperature)."""
    return scaled(participant.predict(module, samples, "embedding"), module, temperature)


def scaled(embedding: Tensor, module: LightningModule, temperature: float = 1.0) -> Tensor:
    """Give a model's vectors the length √(scale / temperature).

    Args:
        embedding: unit vectors of n pairs, images and then texts, float32 [n, 2 D].
        module: the dual encoder that they come from.
        temperature: what its logits are divided by, > 0.
    """
    return embedding * math.sqrt(min(logit_scale_of(module) / temperature, MAX_SCALE))


def temperature_of(client: Client, module: LightningModule) -> float:
    """By what to divide a specialist's logits so that they mean what they say on its held-out pairs; 1 without any."""
    if len(client.calibration) < 2:
        return 1.0
    parts = logit_blocks(answers(client, module, client.calibration))
    widest = max(len(block) for block in parts)
    # blocks differ by one pair at most; what fills a row up is unlikely at any temperature, but has a derivative
    rows = [F.pad(side, (0, widest - len(block)), value=_NEVER) for block in parts for side in (block, block.T)]
    own = [torch.arange(len(block)) for block in parts for _ in range(2)]
    return fit_temperature(torch.cat(rows), torch.cat(own))


def logit_blocks(given: Tensor) -> list[Tensor]:
    """Logits between images and texts, in blocks of almost equal size, each at most `PAIRS_PER_BLOCK` pairs."""
    parts = [block.chunk(2, dim=1) for block in given.tensor_split(max(-(-len(given) // PAIRS_PER_BLOCK), 1))]
    return [images @ texts.T for images, texts in parts]


class TeacherEmbeddings:
    """Several models' answers to the same pairs, and how much each counts; their affinities are mixed batch by batch.

    ``p_i = Σ_k w_ki softmax_j(a_ki · b_kj)`` for image i and the texts j of a batch, and the other way round; w_ki is
    the softmax over the models that answered pair i of their log-weights. A model knows as candidates only what it
    answered.

    Args:
        answers: of each model, [n, 2 D_k]; what stands in rows that it did not answer is not looked at.
        log_weights: [k, n]; -inf where a model did not answer.
        clients: whose answers these are; None numbers them.
    """

    def __init__(self, answers: list[Tensor], log_weights: Tensor, clients: list[int] | None = None):
        self.answers, self.clients = answers, list(range(len(answers))) if clients is None else clients
        self.answered = log_weights > -torch.inf
        self.weights = torch.softmax(log_weights, dim=0).nan_to_num(0.0)  # a pair that nobody answered weighs nothing

    def targets(self, rows: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Compute the soft labels of a batch.

        Args:
            rows: numbers of the pairs in the proxy set, int64 [B], on the CPU.
            device: device of the computation.

        Returns:
            Image to text [B, B], text to image [B, B], and the pairs' weights [B]: 1, or 0 without any prediction.
        """
        total = [torch.zeros(len(rows), len(rows), device=device) for _ in range(2)]
        for answer, answered, weights in zip(self.answers, self.answered[:, rows], self.weights[:, rows]):
            if not bool(answered.any()):
                continue
            images, texts = answer[rows].to(device).float().chunk(2, dim=1)
            logits, answered, weights = images @ texts.T, answered.to(device), weights.to(device)
            for way, side in zip(total, (logits, logits.T)):
                side = side.masked_fill(~answered, -torch.inf)
                way += weights.unsqueeze(1) * torch.softmax(side, dim=1)
        return *total, self.answered[:, rows].any(0).to(device).float()


class EmbeddingPool(Aggregate):
    """Pool of the clients' embeddings of a round.

    They cannot be summed as they come, since their widths differ: the server holds them in 16 bits until it has learnt
    from them, 4 n D bytes a client, and forgets them then.

    Args:
        n_rows: size of the proxy set.
        weighted: whether answers must come with a confidence.
        cap: how much one client may have at most; None for any.
    """

    def __init__(self, n_rows: int, weighted: bool, cap: Cap | None = CAP):
        self.n_rows, self.weighted, self.cap = n_rows, weighted, cap
        self._by_client: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, message: Responses, client: int) -> None:
        """Take in one client's answers.

        Raises:
            RefusedError: they do not fit; the pool is as it was.
        """
        rows = self._checked(message)
        log_weights = torch.full((self.n_rows,), -torch.inf)
        log_weights[rows] = message.confidence.values() if self.weighted else 0.0
        values = message.values.detach().cpu().to(torch.float16)
        if len(rows) < self.n_rows or message.rows is not None:
            values = torch.zeros(self.n_rows, values.shape[1], dtype=torch.float16).index_copy(0, rows, values)
        self._by_client[client] = values, log_weights

    def result(self) -> TeacherEmbeddings | None:
        """The embeddings of all clients; None without uploads."""
        if not self._by_client:
            return None
        clients = sorted(self._by_client)
        values, log_weights = zip(*(self._by_client[client] for client in clients))
        logs = torch.stack(log_weights).double()
        logs = logs if self.cap is None else self.cap.limit(logs)
        return TeacherEmbeddings(list(values), logs.float(), clients)

    def _checked(self, message: Responses) -> Tensor:
        """The rows that were predicted, int64 [m]."""
        if not isinstance(message, Responses) or message.form != "embeddings":
            raise RejectedMessageError(f"expected embeddings, got {getattr(message, 'form', message.kind)}")
        message.validate()
        values, rows, confidence = message.values, message.rows, message.confidence
        if values.shape[1] % 2:
            raise RejectedMessageError(
                f"an image's and a text's vector have the same width, got {values.shape[1]} numbers"
            )
        rows = torch.arange(self.n_rows) if rows is None else rows.cpu()
        if len(rows) != len(values):
            raise RejectedMessageError(f"expected answers to all {self.n_rows} proxy pairs, got {len(values)}")
        if len(rows) and not rows.max() < self.n_rows:
            raise RejectedMessageError(f"a row lies outside of 0 … {self.n_rows - 1}")
        if len(rows.unique()) < len(rows):
            raise RejectedMessageError("a row is answered twice")
        longest = max((side.float().norm(dim=1).amax() for side in values.chunk(2, dim=1) if len(values)), default=0.0)
        if longest > math.sqrt(MAX_SCALE) * (1 + _SLACK):
            raise RejectedMessageError(f"a vector of length {longest:.3g}: none may be longer than √{MAX_SCALE:g}")
        if (confidence is not None) != self.weighted:
            raise RejectedMessageError(
                "answers without confidence" if self.weighted else "a confidence that nobody asked for"
            )
        if confidence is not None and not (confidence.values().abs() <= LIMIT + _SLACK).all():
            raise RejectedMessageError(f"a confidence lies outside of ±{LIMIT:g}")
        return rows

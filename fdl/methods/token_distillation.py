"""Federated distillation of language models: specialists predict public text, a student learns from their mixture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fdl.engine.requests import FitRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.shares import Cap
from fdl.knowledge.aggregation.tokens import TokenKnowledge, TokenMixture
from fdl.knowledge.confidence.tokens import TokenConfidence
from fdl.knowledge.distillation.proxy_subsampling import rows_of_round
from fdl.knowledge.distillation.targets import SoftLabelled
from fdl.knowledge.distillation.token_objective import TokenObjective
from fdl.knowledge.distillation.token_upload import (
    TokenUploadBuilder,
    require_language_model,
    sampled_message,
    translates,
    vocabulary,
)
from fdl.messages.sparse_responses import SparseResponses
from fdl.methods.base import Method
from fdl.participants import Client, Participant, Server
from fdl.utils.arguments import at_least

_CAPACITY = 4  # ids per token that the mixture keeps, as a multiple of those that a client may send


class TokenDistillation(Method):
    """Private language models predict each token of public text; the student is distilled from their mixture.

    Clients upload, per token of the round's proxy windows, a sparse distribution over the next token and a confidence,
    and download the mixture. Neither text nor weights leave a site. Distributions are averaged with weights that are
    the softmax over clients of their log-weights at that token. The proxy text is public, so its own next tokens are
    labels that the student may learn from, too: `ground_truth`.

    Predictions are of tokens of the data's tokenizer, which is the student's. Specialists with another one
    (``aligned_causal_lm``) predict where both have a boundary; they do not receive the mixture or learn from it.

    Args:
        confidence: weight of a client's prediction of a token; None weights all alike.
        mode: form of predictions, and of their loss: the likeliest ids with a tail for the rest (``"tail"``), the
            likeliest, renormalised (``"renormalised"``), which over-estimates them, or ids drawn at random
            (``"sampled"``), whose expectation is the full distribution. The mixture is downloaded in the same form.
        k: maximum number of likeliest ids per token.
        mass: probability at which the list of likeliest ids ends, in (0, 1].
        draws: ids drawn per token, in 1 … 255, for the mode ``"sampled"``.
        temperature: T > 0 of both the predictions and the learner's distribution.
        ground_truth: weight of the plain next-token loss on the proxy text, besides the distillation's, ≥ 0.
        feedback: download of the clients from the second round on: the mixture, from which they learn
            (``"aggregate"``), or nothing.
        proxy_fraction: fraction of the proxy windows that is predicted in a round, the same ones by all clients.
        max_client_share: largest weight of one client in a round, in equal shares, whatever confidence it uploads, ≥ 1;
            None: no limit.
        max_client_share_over: apply the limit over a round, or per token (``"row"``).
    """

    name = "token_distillation"
    sends = (SparseResponses,)
    tasks = ("language",)
    requires: ClassVar[tuple[str, ...]] = ("student", "specialists", "proxy")

    def __init__(
        self,
        confidence: TokenConfidence | None = None,
        mode: Literal["tail", "sampled", "renormalised"] = "tail",
        k: int = 16,
        mass: float = 1.0,
        draws: int = 50,
        temperature: float = 1.0,
        ground_truth: float = 0.0,
        feedback: Literal["aggregate", "none"] = "aggregate",
        proxy_fraction: float = 1.0,
        max_client_share: float | None = 2.0,
        max_client_share_over: Literal["round", "row"] = "round",
    ):
        for key, value in (("mass", mass), ("proxy_fraction", proxy_fraction)):
            if not 0 < value <= 1:
                raise UserError(f"{key} must be in (0, 1], got {value}")
        if not 1 <= draws <= 255:
            raise UserError(f"draws must be in 1 … 255, got {draws}")
        self.mode, self.proxy_fraction, self.feedback, self.cap = (
            mode,
            proxy_fraction,
            feedback,
            Cap.of(max_client_share, max_client_share_over),
        )
        self.objective = TokenObjective(mode, temperature, ground_truth)
        drawn = draws if mode == "sampled" else None
        self.uploads = TokenUploadBuilder(at_least("k", k, 1), mass, drawn, self.objective.temperature, confidence)

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Check that all models use the same tokens, and record the clients that translate and only upload."""
        require_language_model(server, server.student, "student")
        upload_only = set()
        for architecture in sorted({client.architecture for client in clients}):
            module = server.runtime.shared_module(architecture)
            require_language_model(server, module, f"specialist {architecture}", learns=False)
            if translates(module):
                upload_only.add(architecture)
        members = [client.id for client in clients if client.architecture in upload_only]
        server.state["upload_only"] = torch.tensor(members, dtype=torch.int64)

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """Return the bytes of the proxy text."""
        return {"proxy": server.proxy.nbytes}

    def download(self, server: Server, client: int) -> SparseResponses | None:
        """Return the last round's mixture, one message for all clients that can learn from it."""
        if "mixture" not in server.state or client in server.state["upload_only"]:
            return None
        return server.cached_download("mixture", lambda: SparseResponses(**server.state["mixture"]))

    def local_update(self, client: Client, download: SparseResponses | None) -> Requests[SparseResponses]:
        """Learn from the download, train on private text, predict the proxy text."""
        specialist = client.specialist()
        rows = rows_of_round(client, self.proxy_fraction)
        if download is not None:
            mixture = self._mixture(client, download.rows, weighted=False)
            mixture.add(download, -1)
            drawn = download.form == "sampled"  # the likeliest ids leave a tail, which draws do not have
            objective = self.objective if drawn == (self.mode == "sampled") else self.objective.of_likeliest
            samples = _labelled_windows(client, mixture.result())
            yield FitRequest(specialist, samples, client.client_distil, objective, name="digest")
        yield FitRequest(specialist, client.train, client.local_training)
        client.save_specialist(specialist)
        return self.uploads.upload(client, specialist, rows)

    def aggregate(self, server: Server) -> TokenMixture:
        """Return an empty mixture of the clients' predictions, per token."""
        rows = rows_of_round(server, self.proxy_fraction)
        weighted = self.uploads.confidence is not None
        return self._mixture(server, rows, weighted)

    def server_update(self, server: Server, knowledge: TokenKnowledge) -> dict[str, float]:
        """Distil the student from the mixture, and keep the next round's download."""
        objective = self.objective if self.objective.ground_truth > 0 else self.objective.of_responses
        samples = _labelled_windows(server, knowledge)
        server.fit(server.student, samples, server.server_distil, objective, name="distil")
        if self.feedback == "aggregate":
            message = self._message(server, knowledge)
            fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
            server.state["mixture"] = {name: value for name, value in fields.items() if value is not None}
        return {"coverage": float(knowledge.coverage.float().mean())}

    def _message(self, server: Server, knowledge: TokenKnowledge) -> SparseResponses:
        """Return the mixture to download, in the form of the uploads, for which the mode's loss is right."""
        vocab, most = vocabulary(server), self.uploads.most
        if self.mode == "sampled":
            return sampled_message(knowledge, vocab, most, server.rng("mixture draws"))
        return knowledge.message(vocab, most)

    def _mixture(self, participant: Participant, rows: Tensor | None, weighted: bool) -> TokenMixture:
        rows = torch.arange(len(participant.proxy)) if rows is None else rows
        length, most = participant.proxy.input_shape[0], self.uploads.most
        return TokenMixture(rows, length, vocabulary(participant), most, _CAPACITY * most, weighted, self.cap)


def _labelled_windows(participant: Participant, knowledge: TokenKnowledge) -> SoftLabelled:
    """Return the predicted proxy windows, labelled with the mixture."""
    return SoftLabelled(participant.proxy, knowledge.ids, knowledge.rows, (knowledge.probabilities,))

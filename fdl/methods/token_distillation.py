"""Federated distillation of language models: specialists foretell public text, a student learns their distributions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

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

_CAPACITY = 4  # ids a token that the mixture keeps, for each that a client may send


class TokenDistillation(Method):
    """Private language models answer every token of public text; the student is distilled from their mixture.

    Up goes, for each token of the proxy windows of the round, a sparse distribution over the next token, and each
    client's confidence in it; down goes the mixture. Neither text nor weights leave a site. Distributions are averaged
    with weights that are the softmax over clients of their log-weights at that token. The proxy text is public, so its
    own next tokens are labels that the student may learn from, too: `ground_truth`.

    Answers are about the tokens of the data's tokenizer, which is the student's. Specialists with another one
    (``aligned_causal_lm``) answer where both have a boundary; they learn nothing from the mixture, and are sent none.

    Args:
        confidence: how much a client's answer to a token counts; None weighs all alike.
        mode: what is sent and how it is learnt: the likeliest ids with a tail for the rest (``"tail"``), the likeliest
            as if there were no others (``"renormalised"``), which over-estimates them, or ids drawn at random
            (``"sampled"``), whose expectation is the whole distribution. The mixture comes back in the same form.
        k: the likeliest ids of a token that are sent, at most.
        mass: no more of them than hold this probability, in (0, 1].
        draws: ids drawn a token, in 1 … 255, for the mode ``"sampled"``.
        temperature: that softens both the answers and the learner's distribution; > 0.
        ground_truth: weight of the plain next-token loss on the proxy text beside the distillation's, ≥ 0.
        feedback: whether clients receive the mixture, and learn from it, from the second round on.
        proxy_fraction: share of the proxy windows that is answered in a round, the same ones by all clients.
        max_client_share: equal shares of the weight of a round that one client may have at most, whatever confidence it
            declares, ≥ 1; None for any.
        max_client_share_over: whether the limit holds over a round, or for each token.
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
        self.answering = TokenUploadBuilder(at_least("k", k, 1), mass, drawn, self.objective.temperature, confidence)

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Check that all models speak of the same tokens, and note who only answers in them."""
        require_language_model(server, server.student, "student")
        answering = set()
        for architecture in sorted({client.architecture for client in clients}):
            module = server.runtime.shared_module(architecture)
            require_language_model(server, module, f"specialist {architecture}", learns=False)
            if translates(module):
                answering.add(architecture)
        members = [client.id for client in clients if client.architecture in answering]
        server.state["answering"] = torch.tensor(members, dtype=torch.int64)

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """The proxy text."""
        return {"proxy": server.proxy.nbytes}

    def download(self, server: Server, client: int) -> SparseResponses | None:
        """The last round's mixture, one message for all clients that can learn from it."""
        if "answers" not in server.state or client in server.state["answering"]:
            return None
        return server.cached_download("answers", lambda: SparseResponses(**server.state["answers"]))

    def local_update(self, client: Client, download: SparseResponses | None) -> SparseResponses:
        """Learn from what came back, train on private text, answer the proxy text."""
        specialist = client.specialist()
        rows = rows_of_round(client, self.proxy_fraction)
        if download is not None:
            mixture = self._mixture(client, download.rows, weighted=False)
            mixture.add(download, -1)
            drawn = download.form == "sampled"  # the likeliest ids leave a tail, which draws do not have
            objective = self.objective if drawn == (self.mode == "sampled") else self.objective.of_likeliest
            client.fit(specialist, _answered(client, mixture.result()), client.client_distil, objective, name="digest")
        client.fit(specialist, client.train, client.local_training)
        client.save_specialist(specialist)
        return self.answering.upload(client, specialist, rows)

    def aggregate(self, server: Server) -> TokenMixture:
        """The mixture of the clients' answers, token by token."""
        rows = rows_of_round(server, self.proxy_fraction)
        weighted = self.answering.confidence is not None
        return self._mixture(server, rows, weighted)

    def server_update(self, server: Server, knowledge: TokenKnowledge) -> dict[str, float]:
        """Distil the student from the mixture, and keep what is to be sent back."""
        objective = self.objective if self.objective.ground_truth > 0 else self.objective.of_responses
        server.fit(server.student, _answered(server, knowledge), server.server_distil, objective, name="distil")
        if self.feedback == "aggregate":
            message = self._message(server, knowledge)
            fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
            server.state["answers"] = {name: value for name, value in fields.items() if value is not None}
        return {"coverage": float(knowledge.coverage.float().mean())}

    def _message(self, server: Server, knowledge: TokenKnowledge) -> SparseResponses:
        """The mixture as it goes down, in the form of the answers that come up, for which the mode's loss is right."""
        vocab, most = vocabulary(server), self.answering.most
        if self.mode == "sampled":
            return sampled_message(knowledge, vocab, most, server.rng("mixture draws"))
        return knowledge.message(vocab, most)

    def _mixture(self, participant: Participant, rows: Tensor | None, weighted: bool) -> TokenMixture:
        rows = torch.arange(len(participant.proxy)) if rows is None else rows
        length, most = participant.proxy.input_shape[0], self.answering.most
        return TokenMixture(rows, length, vocabulary(participant), most, _CAPACITY * most, weighted, self.cap)


def _answered(participant: Participant, knowledge: TokenKnowledge) -> SoftLabelled:
    """The proxy windows that were answered, with the answers."""
    return SoftLabelled(participant.proxy, knowledge.ids, knowledge.rows, (knowledge.probabilities,))

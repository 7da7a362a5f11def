"""Federated distillation of language models: specialists foretell public text, a student learns their distributions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fdl.engine.requests import FitRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.shares import Cap
from fdl.knowledge.aggregation.tokens import TokenKnowledge, TokenMixture
from fdl.knowledge.confidence.tokens import TokenConfidence
from fdl.knowledge.distillation.proxy_subsampling import rows_of_round
from fdl.knowledge.distillation.targets import SoftLabelled
from fdl.knowledge.distillation.token_upload import (
    TokenUploadBuilder,
    drawn_message,
    require_language_model,
    translates,
    vocabulary,
)
from fdl.losses.tokens import next_token_and_sparse, sparse_distillation
from fdl.messages.sparse_responses import SparseResponses
from fdl.methods.base import Method
from fdl.modules.objectives import mean_over
from fdl.modules.types import Batch
from fdl.participants import Client, Participant, Server
from fdl.utils.arguments import at_least, not_negative, positive

_CAPACITY = 4  # ids a token that the mixture keeps, for each that a client may send
_LOGITS = 1 << 22  # values of a head's output that exist at a time


def _answered_tokens(batch: Batch) -> int:
    return int((batch[1][..., 0] >= 0).sum())


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
        subsample: share of the proxy windows that is answered in a round, the same ones by all clients.
        cap: equal shares of the weight of a round that one client may have at most, whatever confidence it declares,
            ≥ 1; None for any.
        cap_over: whether the cap holds over a round, or for each token.
    """

    name = "token_distillation"
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
        subsample: float = 1.0,
        cap: float | None = 2.0,
        cap_over: Literal["round", "row"] = "round",
    ):
        for key, value in (("mass", mass), ("subsample", subsample)):
            if not 0 < value <= 1:
                raise UserError(f"{key} must be in (0, 1], got {value}")
        if not 1 <= draws <= 255:
            raise UserError(f"draws must be in 1 … 255, got {draws}")
        self.mode, self.subsample, self.feedback, self.cap = mode, subsample, feedback, Cap.of(cap, cap_over)
        self.temperature = positive("temperature", temperature)
        self.ground_truth = not_negative("ground_truth", ground_truth)
        drawn = draws if mode == "sampled" else None
        self.answering = TokenUploadBuilder(at_least("k", k, 1), mass, drawn, self.temperature, confidence)

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Check that all models speak of the same tokens, and note who only answers in them."""
        require_language_model(server, server.student, "student")
        answering = set()
        for architecture in sorted({client.architecture for client in clients}):
            module = server.runtime.template(architecture)
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
        return server.say("answers", lambda: SparseResponses(**server.state["answers"]))

    def local_update(self, client: Client, download: SparseResponses | None) -> Requests[SparseResponses]:
        """Learn from what came back, train on private text, answer the proxy text."""
        specialist = client.specialist()
        rows = rows_of_round(client, self.subsample)
        if download is not None:
            mixture = self._mixture(client, download.rows, weighted=False)
            mixture.add(download, -1)
            drawn = download.form == "sampled"  # the likeliest ids leave a tail, which draws do not have
            objective = self.objective if drawn == (self.mode == "sampled") else self.likeliest
            yield FitRequest(specialist, _answered(client, mixture.result()), client.digest, objective, name="digest")
        yield FitRequest(specialist, client.train, client.local)
        client.keep(specialist)
        return self.answering.upload(client, specialist, rows)

    def aggregate(self, server: Server) -> TokenMixture:
        """The mixture of the clients' answers, token by token."""
        rows = rows_of_round(server, self.subsample)
        weighted = self.answering.confidence is not None
        return self._mixture(server, rows, weighted)

    def server_update(self, server: Server, knowledge: TokenKnowledge) -> dict[str, float]:
        """Distil the student from the mixture, and keep what is to be sent back."""
        objective = self.objective if self.ground_truth > 0 else self.response
        server.fit(server.student, _answered(server, knowledge), server.distil, objective, name="distil")
        if self.feedback == "aggregate":
            message = self._message(server, knowledge)
            fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
            server.state["answers"] = {name: value for name, value in fields.items() if value is not None}
        return {"coverage": float(knowledge.coverage.float().mean())}

    def objective(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The named parts of a learner's loss; ``loss`` is their weighted sum.

        Args:
            module: the learner.
            batch: tokens [B, T], ids and probabilities of the answers [B, T, C].
        """
        return self._parts(module, batch, self.mode)

    def likeliest(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """As `objective`, of answers in another form than the mode's: the likeliest ids with a tail."""
        return self._parts(module, batch, "tail")

    def _parts(
        self, module: nn.Module, batch: Batch, mode: Literal["tail", "sampled", "renormalised"]
    ) -> dict[str, Tensor]:
        tokens, ids, probabilities = batch
        hidden, chunk = module.hidden(tokens), max(1, _LOGITS // module.vocab_size)
        answers = (ids.long(), probabilities, mode, ids[..., 0] >= 0, self.temperature, chunk)
        if self.ground_truth > 0:
            following, response = next_token_and_sparse(hidden, module.head, tokens, *answers)
            parts, loss = {"response": response, "next_token": following}, response + self.ground_truth * following
        else:
            loss = sparse_distillation(hidden, module.head, *answers)
            parts = {"response": loss}
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    @mean_over(_answered_tokens)
    def response(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """As `objective`, where there are only answers to learn from, so that the loss is one mean."""
        return self.objective(module, batch)

    def _message(self, server: Server, knowledge: TokenKnowledge) -> SparseResponses:
        """The mixture as it goes down, in the form of the answers that come up, for which the mode's loss is right."""
        vocab, most = vocabulary(server), self.answering.most
        if self.mode == "sampled":
            return drawn_message(knowledge, vocab, most, server.rng("mixture draws"))
        return knowledge.message(vocab, most)

    def _mixture(self, participant: Participant, rows: Tensor | None, weighted: bool) -> TokenMixture:
        rows = torch.arange(len(participant.proxy)) if rows is None else rows
        length, most = participant.proxy.input_shape[0], self.answering.most
        return TokenMixture(rows, length, vocabulary(participant), most, _CAPACITY * most, weighted, self.cap)


def _answered(participant: Participant, knowledge: TokenKnowledge) -> SoftLabelled:
    """The proxy windows that were answered, with the answers."""
    return SoftLabelled(participant.proxy, knowledge.ids, knowledge.rows, (knowledge.probabilities,))

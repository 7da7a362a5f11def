"""A client's upload of next-token predictions of proxy text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor

from fdl.errors import UserError
from fdl.knowledge.aggregation.tokens import TokenKnowledge
from fdl.knowledge.confidence.tokens import Certainty, TokenConfidence
from fdl.messages.sparse_responses import FLOOR, SparseResponses, TokenLogWeights
from fdl.modules.base import NextTokenModel
from fdl.participants import Client, Participant

_VALUES = 1 << 24  # values of answers that exist at a time before they are made sparse
_STATISTICS = 4  # columns before the answer: whether there is a token, log-likelihood of the next, entropy, largest


@dataclass(frozen=True)
class TokenUploadBuilder:
    """Settings by which a client builds its upload of its specialist's predictions.

    Args:
        k: send at most so many of the likeliest ids of a position.
        mass: and no more of them than are needed to hold this probability, in (0, 1].
        draws: send so many draws from the whole distribution instead; None for the likeliest ids. Draws of what is no
            token of the data are lost.
        temperature: of the softmax over logits that is drawn from; all else is measured at 1.
        confidence: how much each answer counts; None sends none.
    """

    k: int
    mass: float
    draws: int | None
    temperature: float
    confidence: TokenConfidence | None

    @property
    def most(self) -> int:
        """Ids a position at most."""
        return self.k if self.draws is None else self.draws

    def upload(self, client: Client, specialist: LightningModule, rows: Tensor | None) -> SparseResponses:
        """Answer windows of the proxy set.

        Args:
            client: who answers.
            specialist: its model, with `next_log_probabilities` and `token_nll`.
            rows: which windows, int64 [n], rising; None for all.
        """
        asked = torch.arange(len(client.proxy)) if rows is None else rows
        vocab, length = vocabulary(client), client.proxy.input_shape[0]
        width = _STATISTICS + (2 * min(self.k, vocab) if self.draws is None else self.draws)
        selector = self._output_selector(vocab, client.rng("draws"))
        parts = []
        for some in asked.split(max(1, _VALUES // (length * width))):
            told = client.predict(specialist, client.proxy.subset(some), selector)
            sent = self._likeliest(told) if self.draws is None else self._counted_draws(told, vocab)
            parts.append((told[..., :_STATISTICS], *sent))
        seen, ids, values, sizes, tail = (torch.cat(part) for part in zip(*parts))
        weights = None
        if self.confidence is not None:
            weights = TokenLogWeights.quantize(self.confidence.log_weights(client, _certainty(seen)))
        tail = tail if self.draws is None else None
        return SparseResponses(ids, values, sizes, vocab, tail, weights, rows)

    def _output_selector(self, vocab: int, stream: torch.Generator) -> Callable[[LightningModule, Tensor], Tensor]:
        """Return the output to compute: [B, T, 4 + k + k] with ids and log-probabilities, or [B, T, 4 + N] with ids."""

        def selector(module: LightningModule, tokens: Tensor) -> Tensor:
            following = F.pad(tokens[:, 1:], (0, 1), value=-1).flatten()
            width = _STATISTICS + (2 * min(self.k, vocab) if self.draws is None else self.draws)
            told = torch.zeros(len(following), width, device=tokens.device)
            for where, log_p, softened in self._predictions(module, tokens):
                largest, targets = log_p.amax(1), following[where]
                likelihood = log_p.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1).where(targets >= 0, 0.0)
                if self.draws is None:
                    values, ids = log_p.topk(min(self.k, vocab), dim=1)
                    answer = torch.cat([ids.float(), values], dim=1)  # float32 holds ids exactly
                else:
                    answer = _systematic_draws(softened.exp(), self.draws, stream)
                # who gives no token of the data any probability has not answered; what is not a number is kept
                heard = ~(largest < math.log(FLOOR))
                seen = torch.stack([heard, likelihood, _entropy(log_p.exp()), largest], dim=1)
                told[where] = torch.cat([seen, answer], dim=1).where(heard.unsqueeze(1), 0.0)
            told = told.unflatten(0, tokens.shape)
            if self.confidence is not None and translates(module):
                # probabilities of single tokens of the data do not tell what the text's own tokens were worth
                told[..., 1] = F.pad(-module.token_nll(tokens), (0, 1))
            return told

        return selector

    def _predictions(self, module: LightningModule, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Positions, log-probabilities at temperature 1, and at that of the draws."""
        if self.draws is None or self.temperature == 1:
            for where, log_p in module.next_log_probabilities(tokens):
                yield where, log_p, log_p
        else:
            both = (module.next_log_probabilities(tokens, temperature) for temperature in (1.0, self.temperature))
            for (where, log_p), (_, softened) in zip(*both, strict=True):
                yield where, log_p, softened

    def _likeliest(self, told: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids, log-probabilities, sizes and tails of what is sent."""
        ids, values = told[..., _STATISTICS:].chunk(2, dim=2)
        p = values.double().exp()
        before = p.cumsum(2) - p
        # what is not a number is kept, so that the receiver sees and refuses it
        kept = ~(values < math.log(FLOOR)) & ~(before >= self.mass) & (told[..., :1] > 0)
        tail = (1 - (p * kept).sum(2)).clamp_min(FLOOR).log().float()
        # rising ids, those that are not sent behind all others
        order = ids.masked_fill(~kept, torch.inf).argsort(dim=2)
        ids, values, kept = (x.gather(2, order) for x in (ids, values, kept))
        return ids[kept].int(), values[kept], kept.sum(2, dtype=torch.int32), tail

    def _counted_draws(self, told: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids, how often they were drawn, sizes, and a tail that is nothing."""
        ids = told[..., _STATISTICS:]
        first = torch.cat([torch.ones_like(ids[..., :1], dtype=torch.bool), ids.diff(dim=2) > 0], dim=2)
        first &= told[..., :1] > 0
        places = torch.arange(ids.shape[2]).expand_as(ids)[first]
        # a run of equal ids ends where the next begins, or with the position
        ends = torch.cat([places[1:], places.new_zeros(1)])[: len(places)]
        counts = ends.where(ends > 0, ids.shape[2]) - places
        # of a model whose numbers are none nothing can be drawn: the receiver refuses counts of 0
        counts *= told[..., 2:3].isfinite().expand_as(ids)[first]
        named = (ids[first] < vocab) | (counts == 0)
        first[first.clone()] = named
        return ids[first].int(), counts[named].to(torch.uint8), first.sum(2, dtype=torch.int32), told[..., 0]


def _entropy(p: Tensor) -> Tensor:
    """Entropy of distributions [M, V] in nats, where what they leave of 1 is one more outcome."""
    return torch.special.entr(p).sum(1) + torch.special.entr((1 - p.sum(1)).clamp_min(0))


def _systematic_draws(p: Tensor, draws: int, stream: torch.Generator) -> Tensor:
    """Ids drawn from a distribution each, rising, [M, N] for probabilities [M, V]; V for what these leave of 1.

    Draws are systematic: N points at equal distances, shifted together by one uniform number, through the cumulative
    distribution. Every id is drawn N·p times in expectation, as by independent draws, and never off by one or more.
    """
    cumulative = p.cumsum(1)
    shift = torch.rand(len(p), 1, generator=stream).to(p.device)
    points = (torch.arange(draws, device=p.device) + shift) / draws * cumulative[:, -1:].clamp_min(1)
    return torch.searchsorted(cumulative, points, right=True).float()


def sampled_message(knowledge: TokenKnowledge, vocab: int, draws: int, stream: torch.Generator) -> SparseResponses:
    """Draws from the clients' mixture as a message: the mean over draws of their frequencies is the mixture.

    Source: random sampling knowledge distillation (Anshumann et al., 2025), here on the way down. The likeliest ids of
    a mixture of draws would not do: those that were drawn too often would be chosen, and what is said of them believed.
    Draws of what the mixture does not name are lost.

    Args:
        knowledge: the mixture.
        vocab: size of the vocabulary.
        draws: draws a position, in 1 … 255.
        stream: of randomness.
    """
    p, ids = knowledge.probabilities.double().flatten(0, 1), knowledge.ids.flatten(0, 1)
    columns = _systematic_draws(p, draws, stream).long()
    counts = torch.zeros(len(p), p.shape[1] + 1, dtype=torch.int64)
    counts = counts.scatter_add_(1, columns, torch.ones_like(columns))[:, :-1]
    counts = counts.masked_fill(ids < 0, 0)
    order = ids.masked_fill(counts == 0, vocab).argsort(dim=1)
    ids, counts = ids.gather(1, order), counts.gather(1, order)
    sizes = (counts > 0).sum(1, dtype=torch.int32).view(knowledge.ids.shape[:2])
    return SparseResponses(ids[counts > 0].int(), counts[counts > 0].to(torch.uint8), sizes, vocab, rows=knowledge.rows)


def _certainty(seen: Tensor) -> Certainty:
    """Log-likelihoods move by one: what a position says of the next token is known where that token is."""
    likelihood = torch.cat([torch.zeros_like(seen[:, :1, 1]), seen[:, :-1, 1]], dim=1)
    return Certainty(likelihood, seen[..., 2], seen[..., 3])


def vocabulary(participant: Participant) -> int:
    """The number of tokens that the data's tokenizer knows, so the ids that all participants speak of."""
    return participant.model_kwargs["tokenizer"].vocab_size


def translates(module: LightningModule) -> bool:
    """Return True if a model has a tokenizer of its own, and translates its predictions into the data's tokens."""
    return module.tokenizer is not module.data_tokenizer


def require_language_model(participant: Participant, module: LightningModule, whose: str, learns: bool = True) -> None:
    """Make sure that a module can be asked for, and be taught, the next token of the data.

    Args:
        participant: who knows the data.
        module: the model.
        whose: what messages call it.
        learns: whether it must be possible to teach it; else it may have a tokenizer of its own.

    Raises:
        UserError: it is no language model, or one of other tokens.
    """
    if "tokenizer" not in participant.model_kwargs:
        raise UserError(f"token_distillation is for language data; these are for {participant.task}")
    if not isinstance(module, NextTokenModel):
        raise UserError(
            f"{whose}: {type(module).__name__} is no language model, which token_distillation needs; take causal_lm, "
            "or add what fdl.modules.base.NextTokenModel declares"
        )
    tokenizer, own = participant.model_kwargs["tokenizer"], module.data_tokenizer
    if not own.matches(tokenizer) or (not translates(module) and module.vocab_size < tokenizer.vocab_size):
        raise UserError(
            f"{whose}: its vocabulary of {module.vocab_size} tokens is not the data's, of {tokenizer.vocab_size}; "
            "answers are compared token by token: give it the data's tokenizer, or take aligned_causal_lm for "
            "specialists, whose aligner goes between the two"
        )
    if learns and translates(module):
        raise UserError(
            f"{whose}: {module.name} answers in the data's tokens, and cannot be taught in them; take causal_lm, and "
            "give the data the tokenizer that it is to have"
        )

"""Objective of a language model that learns from sparse distributions over next tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fdl.losses.tokens import next_token_and_sparse, sparse_distillation
from fdl.modules.objectives import mean_over
from fdl.modules.types import Batch
from fdl.utils.arguments import not_negative, positive

Mode = Literal["tail", "sampled", "renormalised"]

_LOGITS = 1 << 22  # values of a head's output that exist at a time


def predicted_tokens(batch: Batch) -> int:
    """Number of tokens of a batch that have a distribution."""
    return int((batch[1][..., 0] >= 0).sum())


class TokenObjective:
    """Distillation from sparse distributions, beside which the next tokens of the text can be learnt.

    Args:
        mode: the form of the distributions: the likeliest ids with a tail, draws, or the likeliest alone.
        temperature: T > 0.
        ground_truth: weight of the plain next-token loss, ≥ 0.
    """

    def __init__(self, mode: Mode, temperature: float, ground_truth: float):
        self.mode, self.temperature = mode, positive("temperature", temperature)
        self.ground_truth = not_negative("ground_truth", ground_truth)

    def __call__(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The named parts of a model's loss; ``loss`` is their weighted sum.

        Args:
            module: the model.
            batch: tokens [B, T], ids and probabilities of the distributions [B, T, C].
        """
        return self._parts(module, batch, self.mode)

    def of_likeliest(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The loss where the distributions are the likeliest ids with a tail, whatever the mode.

        Args:
            module: the model.
            batch: tokens [B, T], ids and probabilities of the distributions [B, T, C].
        """
        return self._parts(module, batch, "tail")

    @mean_over(predicted_tokens)
    def of_responses(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The loss where nothing but distributions is learnt from, so that it is one mean over tokens.

        Args:
            module: the model.
            batch: tokens [B, T], ids and probabilities of the distributions [B, T, C].
        """
        return self(module, batch)

    def _parts(self, module: nn.Module, batch: Batch, mode: Mode) -> dict[str, Tensor]:
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

"""How close a model's continuations come to the true ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fdl.errors import UserError
from fdl.evaluators.base import Evaluator, at_least
from fdl.evaluators.continuation import continuations, text_model, until
from fdl.utils.seeding import numpy_stream

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.participants import Server

_ROUGE = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}


class Generation(Evaluator):
    """The model goes on from the first tokens of test windows; its words are compared with those that come there.

    Metrics: ``bleu``, of the corpus with n-grams up to 4 (Papineni et al., 2002), and F-measures ``rouge_1``,
    ``rouge_2`` and ``rouge_l`` (Lin, 2004), means over windows. Words are what white space separates for BLEU, and
    letters and digits in lower case, without stemming, for ROUGE. Both texts stop where a document ends.

    Args:
        samples: how many test windows are drawn, the same in every round; fewer where the test set has fewer.
        prompt_tokens: length of the prompt.
        new_tokens: length of the continuation.
        every: as in `Evaluator`.
        label: as in `Evaluator`.
    """

    name = "generation"
    tasks = ("language",)

    def __init__(
        self,
        samples: int = 128,
        prompt_tokens: int = 32,
        new_tokens: int = 32,
        every: int = 0,
        label: str | None = None,
    ):
        super().__init__(every, label)
        self.samples = at_least("samples", samples, 1)
        self.prompt_tokens = at_least("prompt_tokens", prompt_tokens, 1)
        self.new_tokens = at_least("new_tokens", new_tokens, 1)

    def prepare(self, server: Server) -> None:
        """Look for windows that are long enough."""
        text_model(server, self.new_tokens, self.name)
        self._windows(server)

    def evaluate(self, server: Server, module: LightningModule) -> dict[str, float]:
        """Continue the prompts and compare."""
        from torchmetrics.functional.text import bleu_score
        from torchmetrics.functional.text.rouge import rouge_score

        windows, tokenizer = self._windows(server), text_model(server, self.new_tokens, self.name)
        made = continuations(server, module, [row[: self.prompt_tokens] for row in windows], self.new_tokens)
        predicted = [tokenizer.decode(ids) for ids in made]
        true = [tokenizer.decode(until(row[self.prompt_tokens :], tokenizer.eos)) for row in windows]
        rouge = rouge_score(predicted, true, rouge_keys=tuple(_ROUGE))
        return {
            "bleu": float(bleu_score(predicted, [[text] for text in true])),
            **{name: float(rouge[f"{key}_fmeasure"]) for key, name in _ROUGE.items()},
        }

    def _windows(self, server: Server) -> list[list[int]]:
        """Token ids of the drawn windows, prompt and true continuation."""
        length, end = self.prompt_tokens + self.new_tokens, server.model_kwargs["tokenizer"].eos
        found: list[list[int]] = []
        for i in numpy_stream(server.seed, self.name).permutation(len(server.test)).tolist():
            row = server.test.batch(torch.tensor([i]))[0][0, :length].tolist()
            if len(row) == length and row[-1] >= 0 and row[self.prompt_tokens] != end:
                found.append(row)
            if len(found) == self.samples:
                break
        if not found:
            raise UserError(
                f"{self.name}: no window of the test set has {length} tokens, prompt_tokens and new_tokens together"
            )
        return found

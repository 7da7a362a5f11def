"""Similarity of generated continuations to the true ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fdl.errors import UserError
from fdl.evaluators.base import Evaluator
from fdl.evaluators.continuation import continuations, cut_before, require_tokenizer
from fdl.utils.arguments import at_least
from fdl.utils.seeding import numpy_stream

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.participants import Server

_ROUGE = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}


class Generation(Evaluator):
    """BLEU and ROUGE of greedy continuations of test windows.

    Metrics: ``bleu``, corpus BLEU with n-grams up to 4 (Papineni et al., 2002), and the F-measures ``rouge_1``,
    ``rouge_2`` and ``rouge_l`` (Lin, 2004), averaged over windows. BLEU splits words at white space; ROUGE uses lower
    case letters and digits, without stemming. Both texts end at the end of the document.

    Args:
        samples: number of test windows drawn, the same ones in every round; at most as many as the test set has.
        prompt_tokens: length of the prompt in tokens.
        new_tokens: length of the continuation in tokens.
        every: number of rounds between two evaluations; 0: only after the last round.
        label: name under which the metrics are recorded; None: ``"generation"``.
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
        """Check that there are windows that are long enough."""
        require_tokenizer(server, self.new_tokens, self.name)
        self._windows(server)

    def evaluate(self, server: Server, module: LightningModule) -> dict[str, float]:
        """Continue the prompts, and compare with the true continuations."""
        from torchmetrics.functional.text import bleu_score
        from torchmetrics.functional.text.rouge import rouge_score

        windows, tokenizer = self._windows(server), require_tokenizer(server, self.new_tokens, self.name)
        made = continuations(server, module, [row[: self.prompt_tokens] for row in windows], self.new_tokens)
        predicted = [tokenizer.decode(ids) for ids in made]
        true = [tokenizer.decode(cut_before(row[self.prompt_tokens :], tokenizer.eos)) for row in windows]
        rouge = rouge_score(predicted, true, rouge_keys=tuple(_ROUGE))
        return {
            "bleu": float(bleu_score(predicted, [[text] for text in true])),
            **{name: float(rouge[f"{key}_fmeasure"]) for key, name in _ROUGE.items()},
        }

    def _windows(self, server: Server) -> list[list[int]]:
        """Draw windows; each is a list of token ids, the prompt followed by the true continuation."""
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

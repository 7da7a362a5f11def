"""A causal language model of which learned vectors before the text alone are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.modules.language_model import LanguageModel
from fdl.modules.tokenizers import Tokenizer


class SoftPromptLM(LanguageModel):
    """A frozen language model with learned vectors before every text.

    Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning" (2021). Vectors start at those of
    `words`, or else of tokens drawn from the vocabulary.

    Args:
        model: as in `LanguageModel`.
        pretrained: as in `LanguageModel`.
        checkpoint: as in `LanguageModel`.
        config: as in `LanguageModel`.
        length: number of vectors, where there are no words.
        words: a text whose tokens' vectors the prompt starts from.
        chunk: as in `LanguageModel`.
        tokenizer: the data's.
        context: tokens of a window; the model needs as many positions and the prompt's.
        optimizer: for a plain Trainer, as in `LanguageModel`.
        scheduler: for a plain Trainer, as in `LanguageModel`.

    Raises:
        UserError: as `LanguageModel`; there are no known weights, or too few positions.
    """

    name = "soft_prompt_lm"

    def __init__(
        self,
        model: str,
        pretrained: bool = False,
        checkpoint: str | None = None,
        config: dict | None = None,
        length: int = 20,
        words: str | None = None,
        chunk: int = 512,
        *,
        tokenizer: Tokenizer,
        context: int,
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        if length < 1:
            raise UserError(f"length must be at least 1, got {length}")
        if not pretrained and checkpoint is None:
            raise UserError("prompts are for known weights, which are not sent: give pretrained or checkpoint")
        ids = tokenizer.encode(words) if words else []
        count = len(ids) or length
        super().__init__(
            model,
            pretrained,
            checkpoint,
            config,
            tuning="frozen",
            chunk=chunk,
            tokenizer=tokenizer,
            context=context,
            optimizer=optimizer,
            scheduler=scheduler,
        )
        rows = torch.tensor(ids) if ids else torch.randint(tokenizer.vocab_size, (count,))
        if self.positions is not None:
            if context + count > self.positions:
                raise UserError(
                    f"model: {model} reads {self.positions} tokens at most, and the data's context of {context} leaves "
                    f"no room for a prompt of {count}"
                )
            self.positions -= count
        self.prompt = nn.Parameter(self.network.get_input_embeddings().weight[rows].detach().clone())

    def _hidden_states(self, tokens: Tensor) -> Tensor:
        if not hasattr(self, "prompt"):  # the trial run of the base class, before there is one
            return super()._hidden_states(tokens)
        states = self.network.base_model(inputs_embeds=self._with_prompt(tokens), use_cache=False).last_hidden_state
        return states[:, len(self.prompt) :]

    def _generate_after(self, prompt: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        ones = mask.new_ones(len(mask), len(self.prompt))
        embedded = self._with_prompt(prompt)
        return self.network.generate(inputs_embeds=embedded, attention_mask=torch.cat([ones, mask], dim=1), **settings)

    def _with_prompt(self, tokens: Tensor) -> Tensor:
        """Vectors ``[B, n + T, D]`` of the prompt and of the tokens."""
        vectors = self.network.get_input_embeddings()(tokens.clamp_min(0))
        return torch.cat([self.prompt.to(vectors).expand(len(vectors), -1, -1), vectors], dim=1)

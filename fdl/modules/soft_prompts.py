"""Soft prompt tuning: a frozen causal language model with trained vectors before the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.modules.language_model import LanguageModel
from fdl.modules.tokenizers import Tokenizer


class SoftPromptLM(LanguageModel):
    """Frozen language model with trained vectors before every text.

    Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning" (2021). The vectors are
    initialised with the embeddings of `words`, or of tokens sampled from the vocabulary.

    Args:
        model: local folder in the format of transformers, id of the Hugging Face hub, or family of transformers.
        pretrained: load the weights of the folder or the hub.
        checkpoint: local file of weights instead, ``.safetensors`` or of torch.
        config: settings of the model's configuration, by transformers' names.
        length: number of vectors if `words` is not given.
        words: text whose token embeddings initialise the prompt.
        chunk: number of tokens whose logits are in memory at once.
        tokenizer: tokenizer of the data.
        context: tokens per window; the model needs this many positions plus those of the prompt.
        optimizer: ``{target, args}`` for a plain Trainer; default AdamW at 0.0005.
        scheduler: ``{target, args, interval}`` for a plain Trainer; default: none.

    Raises:
        UserError: the model cannot be loaded or does not match the data (see `LanguageModel`), neither `pretrained` nor
            `checkpoint` is given, or the model has too few positions.
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
        if not hasattr(self, "prompt"):  # the base class probes the network before the prompt exists
            return super()._hidden_states(tokens)
        states = self.network.base_model(inputs_embeds=self._with_prompt(tokens), use_cache=False).last_hidden_state
        return states[:, len(self.prompt) :]

    def _generate_after(self, prompt: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        ones = mask.new_ones(len(mask), len(self.prompt))
        embedded = self._with_prompt(prompt)
        return self.network.generate(inputs_embeds=embedded, attention_mask=torch.cat([ones, mask], dim=1), **settings)

    def _with_prompt(self, tokens: Tensor) -> Tensor:
        """Return the embeddings ``[B, n + T, D]`` of the prompt followed by the tokens."""
        vectors = self.network.get_input_embeddings()(tokens.clamp_min(0))
        return torch.cat([self.prompt.to(vectors).expand(len(vectors), -1, -1), vectors], dim=1)

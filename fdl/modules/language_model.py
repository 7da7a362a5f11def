"""Causal language models of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.losses.tokens import next_token_loss, sample_ids, token_nll
from fdl.modules.features import capture
from fdl.modules.objectives import mean_over, next_tokens_of
from fdl.modules.output import Output
from fdl.modules.tokenizers import Tokenizer, require_own_tokenizer
from fdl.modules.tracing import traceable
from fdl.modules.transformers_loading import load_model
from fdl.modules.transformers_module import TransformersModule, masked_mean
from fdl.modules.tuning import apply_tuning
from fdl.modules.types import TensorBatch


class LanguageModel(TransformersModule):
    """Causal language model of transformers: GPT-2, Pythia (gpt_neox), OPT, Llama, Qwen2 and more.

    The logits of a full batch need more memory than everything else, so only `forward` computes them; training and
    evaluation use `hidden` and `head`, one chunk of tokens at a time.

    Padding (-1) is on the right, where no real token attends to it, so no attention mask is needed.

    Args:
        model: a family of transformers (``gpt2``, ``gpt_neox``, ``opt``, ``llama``, ``qwen2``, …) for a new model; a
            local folder in the format of transformers; or an id of the Hugging Face hub.
        pretrained: load the weights of the folder or the hub; False creates a new model of the same sizes.
        checkpoint: local file of weights instead, ``.safetensors`` or of torch, for the sizes of `model` and `config`.
        config: settings of the model's configuration, by transformers' names (``{n_layer: 12, n_embd: 768}``). By
            default a new model has the data's vocabulary, end of text and number of positions.
        tuning: trained part: ``"full"``, ``"head"`` (the output layer, and embeddings that are tied to it), ``"lora"``
            or ``"frozen"``.
        lora: settings of ``"lora"``, see `apply_tuning`.
        gradient_checkpointing: store one activation per layer, and recompute the others for the gradient.
        chunk: number of tokens whose logits are in memory at once.
        tokenizer: tokenizer of the data.
        context: number of tokens per window.
        optimizer: ``{target, args}`` for a plain Trainer; default AdamW at 0.0005.
        scheduler: ``{target, args, interval}`` for a plain Trainer; default: none.

    Attributes:
        tokenizer: tokenizer of the network.
        data_tokenizer: tokenizer of the data; the same in this class.
        vocab_size: V, number of logits per token; at least the size of the tokenizer's vocabulary.
        embedding_dim: D, width of the hidden states.
        positions: length of the longest sequence; None for no limit.

    Raises:
        UserError: the model is unknown, weights do not match it, windows are too long for it, or its weights were
            trained with a tokenizer other than the data's.
    """

    name = "causal_lm"

    def __init__(
        self,
        model: str,
        pretrained: bool = False,
        checkpoint: str | None = None,
        config: dict | None = None,
        tuning: Literal["full", "head", "frozen", "lora"] = "full",
        lora: dict | None = None,
        gradient_checkpointing: bool = False,
        chunk: int = 512,
        *,
        tokenizer: Tokenizer,
        context: int,
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        if chunk < 1:
            raise UserError(f"chunk must be at least 1, got {chunk}")
        new = {
            "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": context,
            "pad_token_id": None,  # some families never train the embedding of their padding
        }
        ends = {} if pretrained else {"bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos}
        network, _ = load_model("AutoModelForCausalLM", model, pretrained, checkpoint, config, new, ends)
        positions = getattr(network.config, "max_position_embeddings", None)
        if positions is not None and context > positions:
            raise UserError(f"model: {model} reads {positions} tokens at most, and the data's context is {context}")
        if network.config.vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"model: {model} has a vocabulary of {network.config.vocab_size}, and the data's tokenizer "
                f"({tokenizer.label}) one of {tokenizer.vocab_size}"
            )
        if pretrained:
            hint = ", or take the module aligned_causal_lm, whose aligner goes between the two"
            require_own_tokenizer(model, tokenizer, hint)
        if gradient_checkpointing:
            _enable_gradient_checkpointing(network)
        frozen = apply_tuning(
            network,
            tuning,
            [_name_of(network, network.get_output_embeddings())],
            lora,
            pretrained=pretrained or checkpoint is not None,
            train_head=False,
        )
        super().__init__(network, frozen, optimizer, scheduler)
        self.tokenizer = self.data_tokenizer = tokenizer
        self.context, self.chunk, self.positions = context, chunk, positions
        self.vocab_size = network.config.vocab_size
        self.embedding_dim = self._probe_model(model)

    @property
    def head(self) -> nn.Module:
        """Layer that maps the last hidden states to logits."""
        return self.network.get_output_embeddings()

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the last hidden states.

        Args:
            tokens: int64 ``[B, T]``, padded on the right with -1.

        Returns:
            ``[B, T, D]``; values at padding are meaningless.
        """
        return self._hidden_states(tokens)

    def forward(self, tokens: Tensor, features: Sequence[str] = ()) -> Output:
        """Compute logits, embedding and requested activations of a batch.

        Args:
            tokens: int64 ``[B, T]``, padded on the right with -1.
            features: submodules of the network, by dotted name or glob, whose activations are returned.

        Returns:
            Logits ``[B, T, V]`` (all of them at once), and the mean of the last hidden states as embedding ``[B, D]``.

        Raises:
            UserError: a name in `features` matches nothing.
        """
        if not features:
            hidden, seen = self.hidden(tokens), {}
        else:
            with capture(self.network, features) as seen:
                hidden = self.hidden(tokens)
        return Output(self.head(hidden), masked_mean(hidden, tokens >= 0), seen)

    def token_nll(self, tokens: Tensor) -> Tensor:
        """Return the negative log-likelihood of every next token, see `fdl.losses.tokens.token_nll`.

        Args:
            tokens: int64 ``[B, T]``, padded on the right with -1.
        """
        return token_nll(self.hidden(tokens), self.head, tokens, self.chunk)

    @traceable
    @mean_over(next_tokens_of)
    def training_step(self, batch: TensorBatch, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return ``loss``, the mean cross entropy of the next token over all real tokens."""
        return {"loss": next_token_loss(self.hidden(batch[0]), self.head, batch[0], self.chunk)}

    def validation_step(self, batch: TensorBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return the ``loss`` of `training_step`."""
        return self.training_step(batch)

    @torch.no_grad()
    def next_log_probabilities(self, tokens: Tensor, temperature: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        """Predict the next token, one chunk of positions at a time.

        Args:
            tokens: int64 ``[B, T]``, padded on the right with -1.
            temperature: temperature of the softmax over logits.

        Yields:
            Positions, int64 ``[n]``, as indices into the flattened batch (``b · T + t``), and the log-probabilities of
            the data's tokens given those up to the position, float32 ``[n, V]``. Positions that are in no chunk have no
            prediction: in this class, padding. If the probabilities sum to less than 1, the rest belongs to no
            particular token of the data.
        """
        states, known = self._hidden_states(tokens).flatten(0, 1), self.tokenizer.vocab_size
        for where in (tokens >= 0).flatten().nonzero().squeeze(1).split(self.chunk):
            # ids that merely pad a model's vocabulary are dropped
            yield where, torch.log_softmax(self.head(states[where])[:, :known].float() / temperature, dim=-1)

    def top_predictions(self, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the k most likely next tokens at every position.

        Args:
            tokens: int64 ``[B, T]``, padded on the right with -1.
            k: number of tokens per position, at most the size of the data's vocabulary.

        Returns:
            - ids in the data's vocabulary, int64 ``[B, T, k]``, most likely first, padded with -1 if there are fewer
              than k;
            - their probabilities given the tokens up to this position, float32 ``[B, T, k]``; the difference from 1 is
              the probability of all other tokens;
            - bool ``[B, T]``, True for positions that have a prediction.
        """

        def likeliest(log_p: Tensor) -> tuple[Tensor, Tensor]:
            values, ids = log_p.topk(k, dim=-1)
            return ids.masked_fill(values == -torch.inf, -1), values.exp()

        k = min(k, self.data_tokenizer.vocab_size)
        return self._predictions(tokens, k, 1.0, likeliest)

    def sampled_predictions(
        self, tokens: Tensor, draws: int, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample next tokens at every position.

        Args:
            tokens: int64 ``[B, T]``, padded on the right with -1.
            draws: number of samples per position, with replacement.
            generator: random generator on the module's device.
            temperature: temperature of the sampled distribution.

        Returns:
            The results of `top_predictions`, with sample frequencies instead of probabilities, see `sample_ids`.
        """

        def drawn(log_p: Tensor) -> tuple[Tensor, Tensor]:
            p = log_p.exp()
            rest = (1 - p.sum(-1, keepdim=True)).clamp_min(0)  # samples outside of the data's vocabulary are dropped
            ids, p = sample_ids(torch.cat([p, rest], dim=-1), draws, generator)
            p, order = p.masked_fill(ids == log_p.shape[-1], 0).sort(dim=-1, descending=True, stable=True)
            return ids.gather(-1, order).masked_fill(p == 0, -1), p

        return self._predictions(tokens, draws, temperature, drawn)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Generate continuations of texts.

        Args:
            tokens: int64 ``[B, T]``, padded on the right with -1. The beginning of a text is cut off if text and
                continuation together exceed the model's positions.
            max_new_tokens: maximum number of tokens to generate.
            temperature: 0 for greedy decoding; otherwise the temperature of sampling.
            generator: random generator that seeds the sampling.

        Returns:
            int64 ``[B, N]`` on the same device, the continuations alone, with -1 from the end of text on.

        Raises:
            UserError: `max_new_tokens` leaves no position for the text.
        """
        if self.positions is not None:
            if max_new_tokens >= self.positions:
                raise UserError(f"max_new_tokens must be below the model's {self.positions} positions")
            tokens = _keep_last(tokens, self.positions - max_new_tokens)
        length = tokens.shape[1]
        shift = (tokens < 0).sum(1, keepdim=True)  # a text is continued at its end, so padding goes to the left
        places = torch.arange(length, device=tokens.device) - shift
        prompt = tokens.gather(1, places % length).masked_fill(places < 0, -1)
        eos = self.tokenizer.eos
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
        with torch.random.fork_rng(enabled=generator is not None):
            if generator is not None:
                seeds = torch.randint(2**62, (1,), generator=generator, device=generator.device)
                torch.manual_seed(int(seeds))
            result = self._generate_after(
                prompt,
                (prompt >= 0).long(),
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                eos_token_id=eos,
                pad_token_id=eos if eos is not None else 0,
                use_cache=True,
                **sampling,
            )
        if eos is None:
            return result
        return result.masked_fill((result == eos).cumsum(1) > 0, -1)

    def _generate_after(self, prompt: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        """Generate with transformers from texts that are padded on the left, and return the new tokens only."""
        tokens = self.network.generate(input_ids=prompt.clamp_min(0), attention_mask=mask, **settings)
        return tokens[:, prompt.shape[1] :]

    def _hidden_states(self, tokens: Tensor) -> Tensor:
        return self.network.base_model(input_ids=tokens.clamp_min(0), use_cache=False).last_hidden_state

    def _predictions(
        self, tokens: Tensor, width: int, temperature: float, choose: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids and probabilities ``[B, T, width]`` selected by `choose`, and a mask of predicted positions."""
        ids = tokens.new_full((tokens.numel(), width), -1)
        p = torch.zeros(ids.shape, device=tokens.device)
        predicted = torch.zeros(len(ids), dtype=torch.bool, device=tokens.device)
        for where, log_p in self.next_log_probabilities(tokens, temperature):
            ids[where], p[where] = choose(log_p)
            predicted[where] = True
        return tuple(values.unflatten(0, tokens.shape) for values in (ids, p, predicted))

    @torch.no_grad()
    def _probe_model(self, model: str) -> int:
        """Check that the head maps the last hidden states to the logits, and return the width of the states."""
        training = self.training
        self.eval()
        tokens = torch.arange(min(self.context, 4)).unsqueeze(0) % self.vocab_size
        hidden = self._hidden_states(tokens)
        logits = self.network(input_ids=tokens, use_cache=False).logits
        self.train(training)
        if not torch.allclose(self.head(hidden), logits, rtol=1e-3, atol=1e-4):
            raise UserError(f"model: {model} changes its logits after the output layer, which is not supported")
        return hidden.shape[-1]


def _keep_last(tokens: Tensor, room: int) -> Tensor:
    """Return the last `room` real tokens of each row, padded on the right again."""
    if tokens.shape[1] <= room:
        return tokens
    skip = ((tokens >= 0).sum(1, keepdim=True) - room).clamp_min(0)
    return tokens.gather(1, torch.arange(room, device=tokens.device) + skip)


def _name_of(network: nn.Module, module: nn.Module) -> str:
    return next(name for name, one in network.named_modules() if one is module)


def _enable_gradient_checkpointing(network: nn.Module) -> None:
    """Turn on gradient checkpointing, with the method of transformers 5 or that of earlier releases.

    Raises:
        UserError: the family does not support it.
    """
    try:
        if hasattr(network, "activation_checkpointing_enable"):
            network.activation_checkpointing_enable()
        else:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"gradient_checkpointing: {error}") from error

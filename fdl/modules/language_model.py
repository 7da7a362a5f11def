"""Any causal language model of transformers."""

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
    """Any causal language model of transformers: GPT-2, Pythia (gpt_neox), OPT, Llama, Qwen2 and more.

    Logits of a whole batch take more memory than everything else, so only `forward` makes them; whatever trains or
    measures the model goes through `hidden` and `head`, a chunk of tokens at a time.

    Padding (-1) stands on the right, where no real token can see it, so no attention mask is needed.

    Args:
        model: a family of transformers (``gpt2``, ``gpt_neox``, ``opt``, ``llama``, ``qwen2``, …) for a new model; a
            local folder as transformers writes it; or an id of the Hugging Face hub.
        pretrained: take the folder's or the hub's weights, too; without them it is a new model of the same sizes.
        checkpoint: local file of weights instead, ``.safetensors`` or of torch, for the sizes of `model` and `config`.
        config: settings of the model's configuration, by transformers' names (``{n_layer: 12, n_embd: 768}``). A new
            model's vocabulary, end of text and number of positions are the data's unless they are given here.
        tuning: what is trained: ``"full"``, ``"head"`` (the output layer, and embeddings that are tied to it),
            ``"lora"`` or ``"frozen"``.
        lora: settings of ``"lora"``, as in `apply_tuning`.
        gradient_checkpointing: keep one activation a layer, and compute the others again for the gradient.
        chunk: tokens whose logits exist at once.
        tokenizer: the data's.
        context: tokens of a window.
        optimizer: for a plain Trainer, as in `TransformersModule`.
        scheduler: for a plain Trainer, as in `TransformersModule`.

    Attributes:
        tokenizer: whose ids the network reads.
        data_tokenizer: whose ids the module's callers use; here the same.
        vocab_size: V, the number of logits; at least the tokenizer's.
        embedding_dim: D.
        positions: the longest sequence, None where there is no limit.

    Raises:
        UserError: there is no such model, weights do not fit, windows are too long for it, or its weights were
            trained with another tokenizer than the data's.
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
        """The layer that makes logits of last hidden states."""
        return self.network.get_output_embeddings()

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the last hidden states.

        Args:
            tokens: int64 ``[B, T]``, padded on the right with -1.

        Returns:
            ``[B, T, D]``; what stands at padding means nothing.
        """
        return self._hidden_states(tokens)

    def forward(self, tokens: Tensor, features: Sequence[str] = ()) -> Output:
        """Answer a batch.

        Args:
            tokens: int64 ``[B, T]``, padded on the right with -1.
            features: submodules of the network, by dotted name or glob, whose activations are wanted.

        Returns:
            Logits ``[B, T, V]`` (all of them at once), embedding ``[B, D]``, the mean of the last hidden states.

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
        """Return the negative log-likelihood of every next token, see `fdl.losses.tokens.token_nll`."""
        return token_nll(self.hidden(tokens), self.head, tokens, self.chunk)

    @traceable
    @mean_over(next_tokens_of)
    def training_step(self, batch: TensorBatch, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return ``loss``, the mean cross entropy of the next token over the real ones."""
        return {"loss": next_token_loss(self.hidden(batch[0]), self.head, batch[0], self.chunk)}

    def validation_step(self, batch: TensorBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return ``loss``, as in training."""
        return self.training_step(batch)

    @torch.no_grad()
    def next_log_probabilities(self, tokens: Tensor, temperature: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        """Say what comes next, a chunk of positions at a time.

        Args:
            tokens: int64 ``[B, T]``, padded on the right with -1.
            temperature: of the softmax over logits.

        Yields:
            Which positions, int64 ``[n]``, counted through the whole batch (``b · T + t``), and log-probabilities of
            the data's tokens given those up to there, float32 ``[n, V]``. Positions that are in no chunk are not
            answered: here, padding. What the probabilities leave of 1 is for no token of the data in particular.
        """
        states, known = self._hidden_states(tokens).flatten(0, 1), self.tokenizer.vocab_size
        for where in (tokens >= 0).flatten().nonzero().squeeze(1).split(self.chunk):
            # ids that only pad a model's vocabulary are left out
            yield where, torch.log_softmax(self.head(states[where])[:, :known].float() / temperature, dim=-1)

    def top_predictions(self, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Say what comes next at every position, by the k likeliest tokens.

        Args:
            tokens: int64 ``[B, T]``, padded on the right with -1.
            k: at most the data's vocabulary.

        Returns:
            - ids in the data's vocabulary, int64 ``[B, T, k]``, the likeliest first, -1 where there are fewer than k;
            - their probabilities given the tokens up to this position, float32 ``[B, T, k]``: what is missing to 1
              is the probability of all other tokens;
            - bool ``[B, T]``, which positions are answered.
        """

        def likeliest(log_p: Tensor) -> tuple[Tensor, Tensor]:
            values, ids = log_p.topk(k, dim=-1)
            return ids.masked_fill(values == -torch.inf, -1), values.exp()

        k = min(k, self.data_tokenizer.vocab_size)
        return self._predictions(tokens, k, 1.0, likeliest)

    def sampled_predictions(
        self, tokens: Tensor, draws: int, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Say what comes next at every position, by how often it came in so many draws.

        Args:
            tokens: int64 ``[B, T]``, padded on the right with -1.
            draws: from the distribution of each position, with replacement.
            generator: on the module's device.
            temperature: of the distribution that is drawn from.

        Returns:
            As `top_predictions`, with frequencies in the place of probabilities, see `sample_ids`.
        """

        def drawn(log_p: Tensor) -> tuple[Tensor, Tensor]:
            p = log_p.exp()
            rest = (1 - p.sum(-1, keepdim=True)).clamp_min(0)  # draws of no token of the data are lost
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
        """Continue texts.

        Args:
            tokens: int64 ``[B, T]``, padded on the right with -1. Of texts that leave no room for the continuation
                within the model's positions the beginning is not read.
            max_new_tokens: at most.
            temperature: 0 takes the likeliest token each time; above, tokens are drawn.
            generator: seeds the draws.

        Returns:
            int64 ``[B, N]`` on the same device, the continuations alone, with -1 from the end of text on.

        Raises:
            UserError: the model has not so many positions.
        """
        if self.positions is not None:
            if max_new_tokens >= self.positions:
                raise UserError(f"max_new_tokens must be below the model's {self.positions} positions")
            tokens = _keep_last(tokens, self.positions - max_new_tokens)
        length = tokens.shape[1]
        shift = (tokens < 0).sum(1, keepdim=True)  # a text goes on where it ends, so here padding stands on the left
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
        """What transformers writes behind texts that are padded on the left, without the texts."""
        tokens = self.network.generate(input_ids=prompt.clamp_min(0), attention_mask=mask, **settings)
        return tokens[:, prompt.shape[1] :]

    def _hidden_states(self, tokens: Tensor) -> Tensor:
        return self.network.base_model(input_ids=tokens.clamp_min(0), use_cache=False).last_hidden_state

    def _predictions(
        self, tokens: Tensor, width: int, temperature: float, choose: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and probabilities ``[B, T, width]`` that are chosen of all log-probabilities, and where there are any."""
        ids = tokens.new_full((tokens.numel(), width), -1)
        p = torch.zeros(ids.shape, device=tokens.device)
        answered = torch.zeros(len(ids), dtype=torch.bool, device=tokens.device)
        for where, log_p in self.next_log_probabilities(tokens, temperature):
            ids[where], p[where] = choose(log_p)
            answered[where] = True
        return tuple(values.unflatten(0, tokens.shape) for values in (ids, p, answered))

    @torch.no_grad()
    def _probe_model(self, model: str) -> int:
        """Make sure that logits are what the head makes of the last hidden states; returns the width of these."""
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
    """The last real tokens of each row, as many as there is room for, padded on the right again."""
    if tokens.shape[1] <= room:
        return tokens
    skip = ((tokens >= 0).sum(1, keepdim=True) - room).clamp_min(0)
    return tokens.gather(1, torch.arange(room, device=tokens.device) + skip)


def _name_of(network: nn.Module, module: nn.Module) -> str:
    return next(name for name, one in network.named_modules() if one is module)


def _enable_gradient_checkpointing(network: nn.Module) -> None:
    """Turn gradient checkpointing on, by the name that transformers 5 gives it or by the one before.

    Raises:
        UserError: the family has none.
    """
    try:
        if hasattr(network, "activation_checkpointing_enable"):
            network.activation_checkpointing_enable()
        else:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"gradient_checkpointing: {error}") from error

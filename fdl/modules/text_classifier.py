"""Text classifiers of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.losses.responses import cross_entropy
from fdl.modules.checkpoints import one_line
from fdl.modules.features import capture, capture_input, last_layer
from fdl.modules.objectives import ignores_padding, mean_over, samples_of
from fdl.modules.output import Output
from fdl.modules.tokenizers import Tokenizer, require_own_tokenizer
from fdl.modules.tracing import traceable
from fdl.modules.transformers_loading import head_children, load_model
from fdl.modules.transformers_module import TransformersModule, masked_mean
from fdl.modules.tuning import apply_tuning
from fdl.modules.types import TensorBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TextClassifier(TransformersModule):
    """Text classifier of transformers: BERT, DistilBERT, RoBERTa, MiniLM, GPT-2 and more.

    Args:
        model: a family of transformers (``bert``, ``distilbert``, ``roberta``, ``gpt2``, …) for a new model; a local
            folder in the format of transformers; or an id of the Hugging Face hub.
        pretrained: load the weights of the folder or the hub; the head is new if they have none, or one for a different
            number of classes.
        checkpoint: local file of weights instead, ``.safetensors`` or of torch, for the sizes of `model` and `config`.
        config: settings of the model's configuration, by transformers' names. By default a new model has the data's
            vocabulary and number of positions.
        pooling: ``"own"``: the family's own head; ``"mean"``: a linear layer on the mean of the last hidden states of
            the real tokens, as intended for sentence encoders.
        tuning: trained part: ``"full"``, ``"head"``, ``"frozen"``, or ``"lora"`` and the head.
        lora: settings of ``"lora"``, see `apply_tuning`.
        num_classes: number of classes.
        tokenizer: tokenizer of the data.
        context: number of tokens of the longest text.
        optimizer: ``{target, args}`` for a plain Trainer; default AdamW at 0.0005.
        scheduler: ``{target, args, interval}`` for a plain Trainer; default: none.

    Attributes:
        head: dotted name of the last layer, whose input is the embedding.
        embedding_dim: D, width of the embedding.

    Raises:
        UserError: the model is unknown, weights do not match it, texts are too long for it, or its weights were trained
            with a tokenizer other than the data's.
    """

    name = "text_classifier"

    def __init__(
        self,
        model: str,
        pretrained: bool = False,
        checkpoint: str | None = None,
        config: dict | None = None,
        pooling: Literal["own", "mean"] = "own",
        tuning: Literal["full", "head", "frozen", "lora"] = "full",
        lora: dict | None = None,
        *,
        num_classes: int,
        tokenizer: Tokenizer,
        context: int,
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        new = {
            "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": context + 2,  # RoBERTa counts from 2
        }
        if "roberta" not in model:  # it derives positions from the id of padding; others only leave that id untrained
            new["pad_token_id"] = None
        auto, always = "AutoModelForSequenceClassification", {"num_labels": num_classes}
        if pooling == "mean":
            auto, always = "AutoModel", {}
        if not pretrained:
            always = {**always, "bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos}
        network, fresh = load_model(auto, model, pretrained, checkpoint, config, new, always, fresh_head=True)
        vocabulary, padding = network.config.vocab_size, network.config.pad_token_id
        positions = getattr(network.config, "max_position_embeddings", None)
        if positions is not None and context > positions:
            raise UserError(f"model: {model} reads {positions} tokens at most, and the data's context is {context}")
        if vocabulary < tokenizer.vocab_size:
            raise UserError(
                f"model: {model} has a vocabulary of {vocabulary}, and the data's tokenizer ({tokenizer.label}) one "
                f"of {tokenizer.vocab_size}"
            )
        if pretrained:
            require_own_tokenizer(model, tokenizer)
        if pooling == "mean":
            network, heads, fresh = MeanPooled(network, num_classes), ["head"], ["head"]
        else:
            heads = head_children(network)
        if tuning == "frozen" and fresh:
            raise UserError(f"tuning: frozen would keep a head of random weights; {model} has none, give tuning: head")
        frozen = apply_tuning(
            network,
            tuning,
            [*heads, *(name for name in fresh if name.split(".")[0] not in heads)],
            lora,
            pretrained=pretrained or checkpoint is not None,
        )
        super().__init__(network, frozen, optimizer, scheduler)
        self.num_classes, self.tokenizer, self.context = num_classes, tokenizer, context
        self.head, self.padding = last_layer(network, num_classes), padding or 0
        self.last_token = False
        self.embedding_dim = self._probe_model(model)

    def forward(self, tokens: Tensor, features: Sequence[str] = ()) -> Output:
        """Compute logits, embedding and requested activations of a batch.

        Args:
            tokens: int64 ``[B, T]``, padded on the right with -1.
            features: submodules of the network, by dotted name or glob, whose activations are returned.

        Returns:
            Logits ``[B, C]``, and the input of the last layer as embedding ``[B, D]``.

        Raises:
            UserError: a name in `features` matches nothing.
        """
        if not features:
            return Output(*self._predict(tokens), {})
        with capture(self.network, features) as seen:
            logits, embedding = self._predict(tokens)
        return Output(logits, embedding, seen)

    @traceable
    @mean_over(samples_of)
    @ignores_padding
    def training_step(self, batch: TensorBatch, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return ``loss``, the mean cross entropy of a labelled batch."""
        tokens, labels = batch
        return {"loss": cross_entropy(self(tokens).logits, labels)}

    def validation_step(self, batch: TensorBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return ``loss`` and ``accuracy`` of a labelled batch."""
        tokens, labels = batch
        logits = self(tokens).logits
        return {"loss": cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}

    def _predict(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        real = tokens >= 0
        ids = tokens.masked_fill(~real, self.padding)
        if self.last_token:
            # decoders classify by the last real token; transformers finds it by the id of padding, which may not exist
            hidden = self.network.base_model(input_ids=ids, use_cache=False).last_hidden_state
            rows = torch.arange(tokens.shape[0], device=tokens.device)
            embedding = hidden[rows, (real.sum(1) - 1).clamp_min(0)]
            return self.network.get_submodule(self.head)(embedding), embedding
        with capture_input(self.network.get_submodule(self.head)) as seen:
            logits = self.network(input_ids=ids, attention_mask=real.long()).logits
        return logits, seen[-1]

    @torch.no_grad()
    def _probe_model(self, model: str) -> int:
        """Run one blank text of full length through the network, and return the width of the embedding."""
        training = self.training
        self.eval()
        try:
            logits, embedding = self._predict(torch.full((1, self.context), self.tokenizer.vocab_size - 1))
            if embedding.ndim == 3:
                self.last_token = True
                logits, embedding = self._predict(torch.full((1, self.context), self.tokenizer.vocab_size - 1))
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"model: {model} cannot read texts of {self.context} tokens: {one_line(error)}") from error
        self.train(training)
        if logits.shape != (1, self.num_classes) or embedding.ndim != 2:
            raise UserError(
                f"model: {model} returns logits of shape {list(logits.shape)} and an embedding of shape "
                f"{list(embedding.shape)} for one text, expected [1, {self.num_classes}] and [1, D]"
            )
        return embedding.shape[1]


class MeanPooled(nn.Module):
    """Text encoder with a linear layer on the mean of its last hidden states.

    Args:
        encoder: base model of transformers.
        num_classes: number of classes.
    """

    def __init__(self, encoder: PreTrainedModel, num_classes: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Return an object with ``logits``, like transformers' classifiers.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask: int64 ``[B, T]``, 0 at padding.
        """
        from transformers.modeling_outputs import SequenceClassifierOutput

        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return SequenceClassifierOutput(logits=self.head(masked_mean(hidden, attention_mask > 0)))

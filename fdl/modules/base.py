"""Contracts that a federation adds to Lightning's own, as a base class and protocols."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lightning import LightningModule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Set

    from torch import Tensor, nn

    from fdl.modules.output import Output
    from fdl.modules.types import Batch, Inputs


class FederatedModule(LightningModule):
    """LightningModule that declares the optional properties that methods use, each with a default.

    An ordinary LightningModule works without it: ``forward(x)`` returns logits, ``training_step(batch, batch_idx)`` the
    loss, and the input of the last layer is the embedding. Inherit from this class to declare more: the names of the
    frozen weights, the width of the embedding, or a `forward` that takes ``features=`` itself. Classes that cannot
    inherit from it define the same attributes (`SupportsFederation`).

    A `training_step` may carry two marks of `fdl.modules.objectives`: `mean_over` allows its batches to be split across
    devices, and `ignores_padding` allows models of several clients to be trained in one vectorised pass although their
    last batches differ in size.

    Attributes:
        frozen: names in the state dict that come from public weights and are the same at every site, so that messages
            and checkpoints leave them out.
        embedding_dim: D, the width of `Output.embedding`; None if it is not known before the first batch.
        input_shape: shape of one input; None if any shape is accepted.
        positions: longest text that a language model reads, in tokens; None for no limit.
    """

    frozen: Set[str] = frozenset()
    embedding_dim: int | None = None
    input_shape: tuple[int, ...] | None = None
    positions: int | None = None

    def feature_network(self) -> nn.Module | None:
        """Return the network in which names of ``features=`` are looked up; None for a module without features.

        By default this is the submodule `backbone`, if the module has one.
        """
        return dict(self.named_children()).get("backbone")

    def feature_head(self) -> str | None:
        """Return the dotted name, within the feature network, of the layer that computes logits; None if unknown.

        By default this is the attribute `head`, if it is a string.
        """
        head = self.__dict__.get("head")
        return head if isinstance(head, str) else None


@runtime_checkable
class SupportsFederation(Protocol):
    """Protocol with the members of `FederatedModule`, for modules that cannot inherit from it.

    Attributes:
        frozen: names in the state dict that come from public weights and are the same at every site.
        embedding_dim: D, the width of `Output.embedding`; None if it is not known before the first batch.
        input_shape: shape of one input; None if any shape is accepted.
        positions: longest text that a language model reads, in tokens; None for no limit.
    """

    frozen: Set[str]
    embedding_dim: int | None
    input_shape: tuple[int, ...] | None
    positions: int | None

    def feature_network(self) -> nn.Module | None:
        """Return the network in which names of ``features=`` are looked up, or None."""

    def feature_head(self) -> str | None:
        """Return the dotted name of the layer that computes logits, or None."""

    def forward(self, x: Inputs, features: Sequence[str] = ()) -> Output:
        """Compute logits, embedding and requested activations of a batch.

        Args:
            x: inputs of the batch.
            features: submodules of the feature network, by dotted name or glob, whose activations are returned.
        """

    def training_step(self, batch: Batch, batch_idx: int = 0) -> Tensor | Mapping[str, Any]:
        """Return the loss of a labelled batch, or a mapping with ``loss``.

        Args:
            batch: inputs and labels.
            batch_idx: number of the batch within the epoch.
        """


@runtime_checkable
class NextTokenModel(Protocol):
    """Language model that methods can compare with others token by token, such as `LanguageModel`.

    Attributes:
        tokenizer: the model's own tokenizer.
        data_tokenizer: the tokenizer of the data, which may differ from the model's.
        vocab_size: V, the number of logits per token.
    """

    tokenizer: Any
    data_tokenizer: Any
    vocab_size: int

    def next_log_probabilities(self, tokens: Tensor, temperature: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield positions and the log-probabilities of their next tokens, one part of the batch at a time.

        Args:
            tokens: int64 [B, T], padded on the right with -1.
            temperature: temperature of the softmax, > 0.
        """

    def token_nll(self, tokens: Tensor) -> Tensor:
        """Return the negative log-likelihood of every token but the first, in nats, [B, T - 1].

        Args:
            tokens: int64 [B, T], padded on the right with -1.
        """


@runtime_checkable
class HiddenStateModel(Protocol):
    """Language model that exposes its hidden states, so that pools of models need not store V logits per token.

    Attributes:
        vocab_size: V, the number of logits per token.
        head: layer that maps hidden states to logits.
    """

    vocab_size: int
    head: nn.Module

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the last hidden states [B, T, D].

        Args:
            tokens: int64 [B, T], padded on the right with -1.
        """


@runtime_checkable
class ImageEncoder(Protocol):
    """Dual encoder whose image vectors evaluators use instead of an embedding."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Return unit vectors [B, D].

        Args:
            images: float32 [B, C, H, W].
        """

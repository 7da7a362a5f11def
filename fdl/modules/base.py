"""What a federation asks of a model beyond Lightning's own contract."""

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
    """LightningModule that declares what methods may look for in a model, each with a default that needs no code.

    An ordinary LightningModule works without it: ``forward(x)`` returns logits, ``training_step(batch, batch_idx)`` the
    loss, and the input of the last layer is the embedding. Inherit from this class to say more: which weights are
    frozen, how wide the embedding is, or that `forward` takes ``features=`` by itself. Classes that cannot inherit from
    it have the same attributes (`SupportsFederation`).

    A `training_step` may carry two marks of `fdl.modules.objectives`: `mean_over`, with which several devices share its
    batches, and `ignores_padding`, with which models of several clients train in one pass although their last batches
    differ in size.

    Attributes:
        frozen: names in the state dict that come from public weights and are the same at every site, so that no message
            and no checkpoint need carry them.
        embedding_dim: D, the width of `Output.embedding`; None where it is not known before the first batch.
        input_shape: shape of one input; None where any will do.
        positions: longest text that a language model reads, in tokens; None for no limit.
    """

    frozen: Set[str] = frozenset()
    embedding_dim: int | None = None
    input_shape: tuple[int, ...] | None = None
    positions: int | None = None

    def feature_network(self) -> nn.Module | None:
        """Return the network whose submodules ``features=`` names; None for a module with no features to name.

        By default the submodule `backbone`, where there is one.
        """
        return dict(self.named_children()).get("backbone")

    def feature_head(self) -> str | None:
        """Return the dotted name, within the feature network, of the layer that makes logits; None if it is not known.

        By default the attribute `head`, where that is a name.
        """
        head = self.__dict__.get("head")
        return head if isinstance(head, str) else None


@runtime_checkable
class SupportsFederation(Protocol):
    """What `FederatedModule` declares, for modules that cannot inherit from it; attributes as there."""

    frozen: Set[str]
    embedding_dim: int | None
    input_shape: tuple[int, ...] | None
    positions: int | None

    def feature_network(self) -> nn.Module | None:
        """Return the network whose submodules ``features=`` names, or None."""

    def feature_head(self) -> str | None:
        """Return the dotted name of the layer that makes logits, or None."""

    def forward(self, x: Inputs, features: Sequence[str] = ()) -> Output:
        """Answer a batch.

        Args:
            x: inputs.
            features: submodules of the feature network, by dotted name or glob, whose activations are wanted.
        """

    def training_step(self, batch: Batch, batch_idx: int = 0) -> Tensor | Mapping[str, Any]:
        """Return the loss of a labelled batch, or a mapping with ``loss``."""


@runtime_checkable
class NextTokenModel(Protocol):
    """What methods that compare models token by token ask of a language model; `LanguageModel` has it.

    Attributes:
        tokenizer: the model's own.
        data_tokenizer: the tokenizer of the data, which may be another one.
        vocab_size: V, the number of logits per token.
    """

    tokenizer: Any
    data_tokenizer: Any
    vocab_size: int

    def next_log_probabilities(self, tokens: Tensor, temperature: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield places and log-probabilities of the tokens that follow, a part of the batch at a time.

        Args:
            tokens: int64 [B, T], padded on the right with -1.
            temperature: of the softmax, > 0.
        """

    def token_nll(self, tokens: Tensor) -> Tensor:
        """Return the negative log-likelihood of every token that follows another, in nats, [B, T - 1].

        Args:
            tokens: int64 [B, T], padded on the right with -1.
        """


@runtime_checkable
class HiddenStateModel(Protocol):
    """What pools of language models ask of one, so that they never hold a vocabulary of logits per token.

    Attributes:
        vocab_size: V, the number of logits per token.
        head: maps hidden states to logits.
    """

    vocab_size: int
    head: nn.Module

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return hidden states [B, T, D] of tokens, int64 [B, T]."""


@runtime_checkable
class ImageEncoder(Protocol):
    """What evaluators ask of a dual encoder, whose image vectors are taken in the place of an embedding."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Return unit vectors [B, D] of images [B, C, H, W]."""

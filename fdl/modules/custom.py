"""Custom networks, given by import path."""

from __future__ import annotations

from torch import nn

from fdl.errors import UserError
from fdl.modules.classifier import ImageClassifier
from fdl.utils.imports import import_dotted


class CustomNetwork(ImageClassifier):
    """Image classifier from a custom network, given by the dotted path of a class or function that builds it.

    Args:
        backbone: dotted path of a callable that returns an ``nn.Module``. The module maps images ``[B, C, H, W]`` to
            logits ``[B, num_classes]``, or to a tuple of logits and embedding ``[B, D]``.
        args: keyword arguments of the callable.
        head: dotted name, within the network, of the layer whose input is the embedding; default: the last linear layer
            (or convolution) with `num_classes` outputs.
        num_classes: number of classes.
        input_shape: (C, H, W) of one image.
        optimizer: ``{target, args}`` for a plain Trainer; default Adam at 0.001.
        scheduler: ``{target, args, interval}`` for a plain Trainer; default: none.

    Raises:
        UserError: the callable does not exist or rejects its arguments, or its network does not match the data.
    """

    name = "custom"

    def __init__(
        self,
        backbone: str,
        args: dict | None = None,
        head: str | None = None,
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        make = import_dotted(backbone)
        if not callable(make):
            raise UserError(f"{backbone} is a {type(make).__name__}, expected what builds a torch.nn.Module")
        try:
            network = make(**(args or {}))
        except (TypeError, ValueError) as error:
            raise UserError(f"{backbone} refuses its arguments: {error}") from error
        if not isinstance(network, nn.Module):
            raise UserError(f"{backbone} returns a {type(network).__name__}, expected a torch.nn.Module")
        super().__init__(
            network,
            num_classes=num_classes,
            input_shape=input_shape,
            head=head,
            optimizer=optimizer,
            scheduler=scheduler,
        )

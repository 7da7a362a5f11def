"""Any network of one's own."""

from __future__ import annotations

from torch import nn

from fdl.errors import UserError
from fdl.modules.classifier import ImageClassifier
from fdl.utils.imports import import_dotted


class CustomNetwork(ImageClassifier):
    """Any network of one's own, by the dotted path of a class or function that builds it.

    Args:
        backbone: dotted path of what returns an ``nn.Module``. The module maps images ``[B, C, H, W]`` to logits
            ``[B, num_classes]``, or to a tuple of logits and embedding ``[B, D]``.
        args: arguments of the call.
        head: dotted name, within the network, of the layer whose input is the embedding, as in `ImageClassifier`.
        num_classes: number of classes.
        input_shape: (C, H, W) of one image.
        optimizer: for a plain Trainer, as in `ImageClassifier`.
        scheduler: for a plain Trainer, as in `ImageClassifier`.

    Raises:
        UserError: there is no such callable, it refuses its arguments, or its network does not fit the data.
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

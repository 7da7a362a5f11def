"""Labelled public samples for evaluators that ask for classes, and what a frozen model makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fdl.errors import UserError

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.datamodules.base import FederatedDataModule
    from fdl.datamodules.samples import Samples
    from fdl.participants import Server


def labelled(server: Server, data: FederatedDataModule | None, asker: str) -> tuple[Samples, Samples, list[str]]:
    """Find labelled public samples: of data of their own, or else the server's.

    Images of further data are normalised as the server's are, which is how the model knows them.

    Args:
        server: holds validation and test set.
        data: a further public data set of images; None for the server's own.
        asker: who asks, for messages.

    Returns:
        Samples to learn from (the further data's training set, or the server's validation set), samples to test on,
        and the names of the classes.

    Raises:
        UserError: there are no labels, or the images have another shape than the model's.
    """
    if data is None:
        if server.test.labels is None:
            raise UserError(f"{asker}: the data have no labels; name labelled images in its data")
        return server.validation, server.test, list(server.classes)
    data.set_default_seed(server.seed)
    data.prepare_data()
    data.setup()
    wanted, given = server.model_kwargs.get("input_shape"), data.model_kwargs.get("input_shape")
    if wanted is None or given is None:
        raise UserError(f"{asker}: further data are for models of images only")
    if tuple(wanted) != tuple(given):
        raise UserError(
            f"{asker}: {data.name} has images of {_size(given)}, but the model takes {_size(wanted)}; set size and "
            "channels in the arguments of its data"
        )
    mean, std = server.model_kwargs.get("normalization") or (None, None)
    pool, test = (samples.transformed(mean, std) for samples in (data.train, data.test))
    return pool, test, list(data.classes)


def image_features(module: LightningModule, inputs: Any) -> Tensor:
    """What a frozen model makes of a batch, [B, D]: a dual encoder's image vectors, or else its embedding."""
    if hasattr(module, "encode_image"):
        return module.encode_image(inputs[0] if isinstance(inputs, tuple) else inputs)
    return module(inputs).embedding


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))

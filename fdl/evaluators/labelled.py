"""Labelled public samples and frozen features for evaluators that need classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fdl.errors import UserError
from fdl.modules.base import ImageEncoder

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.datamodules.base import FederatedDataModule
    from fdl.datamodules.samples import Samples
    from fdl.participants import Server


def labelled_samples(
    server: Server, data: FederatedDataModule | None, evaluator: str
) -> tuple[Samples, Samples, list[str]]:
    """Select labelled public samples: those of a further data set, or else the server's own.

    Images of a further data set are normalised like the server's, because the model was trained with these.

    Args:
        server: the server, with validation and test set.
        data: a further public data set of images; None: the server's own data.
        evaluator: name of the evaluator, for error messages.

    Returns:
        Samples to train on (the further data's training set, or the server's validation set), samples to test on, and
        the names of the classes.

    Raises:
        UserError: the data have no labels, or images of another shape than the model takes.
    """
    if data is None:
        if server.test.labels is None:
            raise UserError(f"{evaluator}: the data have no labels; name labelled images in its data")
        return server.validation, server.test, list(server.classes)
    data.set_default_seed(server.seed)
    data.prepare_data()
    data.setup()
    wanted, given = server.model_kwargs.get("input_shape"), data.model_kwargs.get("input_shape")
    if wanted is None or given is None:
        raise UserError(f"{evaluator}: further data are for models of images only")
    if tuple(wanted) != tuple(given):
        raise UserError(
            f"{evaluator}: {data.name} has images of {_size(given)}, but the model takes {_size(wanted)}; set size and "
            "channels in the arguments of its data"
        )
    mean, std = server.model_kwargs.get("normalization") or (None, None)
    pool, test = (samples.transformed(mean, std) for samples in (data.train, data.test))
    return pool, test, list(data.classes)


def image_features(module: LightningModule, inputs: Any) -> Tensor:
    """Compute frozen image features, [B, D]: a dual encoder's image vectors, or else a model's embedding.

    Args:
        module: the model.
        inputs: a batch of images, or of pairs whose first element is the images.
    """
    if isinstance(module, ImageEncoder):
        return module.encode_image(inputs[0] if isinstance(inputs, tuple) else inputs)
    return module(inputs).embedding


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))

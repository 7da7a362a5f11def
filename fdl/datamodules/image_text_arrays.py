"""Images with captions in NumPy's file formats."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from fdl.datamodules.arrays import Arrays
from fdl.datamodules.pairs import PairDataModule, PairSamples
from fdl.datamodules.records import checked_text
from fdl.errors import UserError


class ImageTextArrays(PairDataModule, Arrays):
    """Images and their captions from an .npz file, or from a folder of .npy files, as in `Arrays`.

    Args:
        path: an .npz file, or a folder with one .npy file a key, named after it.
        x_train: key of the training images.
        captions_train: key of their captions, an array of strings.
        x_test: key of the test images; None, or the default name missing, means that there is no test split.
        captions_test: key of their captions.
        y_train: key of the training images' classes, whole numbers from 0; None: there are none.
        y_test: key of the test images' classes.
        classes: key of the names of the classes.
        groups: key of the natural client or domain of each training pair, [n] of any type.
        layout: as in `Arrays`.
        common: the other arguments of `PairDataModule`.

    Raises:
        UserError: when the file is missing; from `setup`, naming file and key, for all that is wrong with its arrays.
    """

    name = "image_text_arrays"

    def __init__(
        self,
        path: str,
        x_train: str = "x_train",
        captions_train: str = "captions_train",
        x_test: str | None = "x_test",
        captions_test: str = "captions_test",
        y_train: str | None = None,
        y_test: str | None = None,
        classes: str | None = None,
        groups: str | None = None,
        layout: Literal["auto", "HW", "HWC", "CHW"] = "auto",
        **common: Any,
    ):
        super().__init__(
            path=path,
            x_train=x_train,
            y_train=y_train,
            x_test=x_test,
            y_test=y_test,
            classes=classes,
            groups=groups,
            layout=layout,
            **common,
        )
        self._keys |= {"captions_train": captions_train, "captions_test": captions_test}

    def _present(self, stored: Any) -> list[str]:
        """Select the arrays to read: all test arrays, or none of them where they are missing under the default key."""
        roles = {role: key for role, key in self._keys.items() if key is not None}
        if "x_test" not in roles or (roles["x_test"] == "x_test" and "x_test" not in stored):
            roles = {role: key for role, key in roles.items() if not role.endswith("_test")}
        for role, key in roles.items():
            if key not in stored:
                raise UserError(f"{self._path}: no array {key!r} for {role}; there are {', '.join(stored) or 'none'}")
        return list(roles)

    def _samples(self, split: str, arrays: dict[str, np.ndarray]) -> PairSamples:
        images = super()._samples(split, arrays)
        role = f"captions_{split}"
        captions = self._decoded(role, arrays[role])
        if captions.dtype.kind != "U" or captions.shape != (len(images),):
            raise self._wrong(
                role, f"expected {len(images)} strings, one an image, got {captions.dtype} of shape {captions.shape}"
            )
        key = f"{self._path}: {self._keys[role]!r}"
        return self.pairs(images, [checked_text(text, f"{key}[{i}]") for i, text in enumerate(captions.tolist())])

"""Images and labels in NumPy's file formats."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fdl.datamodules.classes import class_codes, class_numbers, whole_numbers
from fdl.datamodules.images import ImageDataModule
from fdl.datamodules.records import existing
from fdl.datamodules.samples import TensorSamples
from fdl.datamodules.source import Source
from fdl.errors import UserError

_TO_CHW: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "HW": lambda x: x[:, None],
    "HWC": lambda x: x.transpose(0, 3, 1, 2),
    "CHW": lambda x: x,
}


class Arrays(ImageDataModule):
    """Images and labels from an .npz file, or from a folder of .npy files.

    Images are [n, H, W], [n, H, W, C] or [n, C, H, W], uint8 (255 is white) or floating point: 0 … 1, or 0 … 255, or
    standardised, with values below 0; in all splits alike. Other ranges and integers need `value_range`. Labels are
    whole numbers, [n]: classes in their order, or positions in `classes`. Arrays that hold Python objects are not read.

    Args:
        path: an .npz file, or a folder with one .npy file a key, named after it.
        x_train: key of the training images.
        y_train: key of their labels; None for images that are only a proxy set.
        x_test: key of the test images; None, or the default name missing, means that there is no test split.
        y_test: key of their labels.
        classes: key of the names of the classes; without it they are called 0, 1, ….
        groups: key of the natural client or domain of each training image, [n] of any type.
        layout: order of the dimensions of one image; ``"auto"`` looks for a dimension of 1 or 3.
        common: the arguments of `ImageDataModule`.

    Raises:
        UserError: when the file is missing; from `setup`, naming file and key, for all that is wrong with its arrays.
    """

    name = "arrays"

    def __init__(
        self,
        path: str,
        x_train: str = "x_train",
        y_train: str | None = "y_train",
        x_test: str | None = "x_test",
        y_test: str | None = "y_test",
        classes: str | None = "classes",
        groups: str | None = None,
        layout: Literal["auto", "HW", "HWC", "CHW"] = "auto",
        **common: Any,
    ):
        super().__init__(**common)
        if layout not in ("auto", *_TO_CHW):
            raise UserError(f"layout must be one of auto, {', '.join(_TO_CHW)}, got {layout!r}")
        self._path, self._layout = existing(path), layout
        self._keys = {
            "x_train": x_train,
            "y_train": y_train,
            "x_test": x_test,
            "y_test": y_test,
            "classes": classes,
            "groups": groups,
        }
        if self._path.is_file() and not zipfile.is_zipfile(self._path):
            raise UserError(f"{self._path}: not an .npz file; for .npy files give the folder that holds them")

    def load(self) -> Source:
        """Read and check the arrays."""
        arrays = self._read()
        names = self._classes(arrays)
        train = self._samples("train", arrays)
        test = self._samples("test", arrays) if "x_test" in arrays else None
        groups = arrays.get("groups")
        if groups is not None:
            if groups.shape != (len(train),):
                raise self._wrong("groups", f"shape {groups.shape}, expected ({len(train)},)")
            groups = self._decoded("groups", groups)
        return Source(train, names, test=test, groups=groups)

    def place(self, split: str, part: str) -> str:
        """The file and key of a part of the data."""
        key = self._keys.get("classes" if part == "classes" else f"{part}_{split}")
        return f"{self._path}: {key!r}" if key is not None else super().place(split, part)

    def _classes(self, arrays: dict[str, np.ndarray]) -> list[str]:
        """Names of the classes; labels become numbers of classes, from 0, where names do not say what they mean."""
        labels = {role: self._labels(role, arrays[role]) for role in ("y_train", "y_test") if role in arrays}
        arrays |= labels
        if "classes" in arrays:
            names = self._decoded("classes", arrays["classes"])
            if names.ndim != 1:
                raise self._wrong("classes", f"expected one name a class, got an array of shape {names.shape}")
            top = max((int(own.max()) for own in labels.values() if len(own)), default=-1)
            if len(names) <= top:
                raise self._wrong("classes", f"{len(names)} names, but labels go up to {top}")
            return [str(name) for name in names.tolist()]
        if "y_train" not in labels or not len(labels["y_train"]):
            return []
        found = class_numbers(labels["y_train"], self.place("train", "y"))
        if len(found) == 1:  # a single class, which the checks of all data report
            found = np.unique(np.concatenate(list(labels.values())))
        for role, own in labels.items():
            arrays[role] = class_codes(own, found, f"{self._path}: {self._keys[role]!r}")
        return [str(number) for number in found.tolist()]

    def _labels(self, role: str, y: np.ndarray) -> np.ndarray:
        """Labels as whole numbers ≥ 0, int64 [n]."""
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        if y.dtype.kind not in "biuf" or y.ndim != 1:
            raise self._wrong(role, f"labels must be whole numbers, one an image, got {y.dtype} of shape {y.shape}")
        if len(y) and int(np.nanmax(y)) > np.iinfo(np.int64).max:
            raise self._wrong(role, f"labels go up to {y.max()}; number the classes from 0")
        y = whole_numbers(y, f"{self._path}: {self._keys[role]!r}")
        if len(y) and int(y.min()) < 0:
            raise self._wrong(role, f"labels must be ≥ 0, got {y.min()}")
        return y

    def _decoded(self, role: str, array: np.ndarray) -> np.ndarray:
        """Text as text, where it is stored as bytes.

        Raises:
            UserError: the bytes are no UTF-8.
        """
        if array.dtype.kind != "S":
            return array
        try:
            return np.char.decode(array, "utf-8")
        except UnicodeDecodeError as error:
            raise self._wrong(role, f"its bytes are no text in UTF-8 ({error})") from error

    def _read(self) -> dict[str, np.ndarray]:
        """The arrays by our names for them; those that may be missing and are, are left out."""
        if self._path.is_dir():
            stored = {file.stem: file for file in sorted(self._path.glob("*.npy"))}
            return {
                role: self._array(role, lambda key: np.load(stored[key], allow_pickle=False))
                for role in self._present(stored)
            }
        try:
            with np.load(self._path, allow_pickle=False) as archive:
                return {role: self._array(role, archive.__getitem__) for role in self._present(archive.files)}
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{self._path}: cannot be read ({error})") from error

    def _present(self, stored: Any) -> list[str]:
        """Select the arrays to read.

        Raises:
            UserError: when one that is needed is missing.
        """
        roles = {role: key for role, key in self._keys.items() if key is not None}
        for role in ("x_test", "y_test", "classes"):
            if roles.get(role) == role and role not in stored:
                del roles[role]
        if "x_test" not in roles:
            roles.pop("y_test", None)
        elif "y_test" not in roles:
            raise self._wrong("x_test", "test images without labels; set y_test to their key, or x_test to null")
        for role, key in roles.items():
            if key not in stored:
                raise UserError(f"{self._path}: no array {key!r} for {role}; there are {', '.join(stored) or 'none'}")
        return list(roles)

    def _array(self, role: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
        try:
            return read(self._keys[role])
        except ValueError as error:  # objects, or a damaged header
            raise self._wrong(role, f"not a plain array ({error})") from error
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise self._wrong(role, f"damaged ({error})") from error

    def _samples(self, split: str, arrays: dict[str, np.ndarray]) -> TensorSamples:
        x_role, y_role = f"x_{split}", f"y_{split}"
        x = self._images(x_role, arrays[x_role])
        if y_role not in arrays:
            return self.in_memory(x, None)
        y = arrays[y_role]
        if len(y) != len(x):
            raise self._wrong(y_role, f"{len(y)} labels for {len(x)} images in {self._keys[x_role]!r}")
        return self.in_memory(x, torch.from_numpy(y))

    def _images(self, role: str, x: np.ndarray) -> Tensor:
        """Images as [n, C, H, W]."""
        if x.dtype.kind in "iu" and x.dtype != np.uint8 and self.value_range is not None:
            x = x.astype(np.float32)
        if x.dtype != np.uint8 and x.dtype.kind != "f":
            hint = "; or set value_range to what is black and what is white" if x.dtype.kind in "iu" else ""
            raise self._wrong(role, f"images must be uint8 or floating point, got {x.dtype}{hint}")
        if x.dtype.kind == "f":
            with np.errstate(over="ignore"):
                x = x.astype(np.float32, copy=False)
            if not np.isfinite(x).all():
                count = int((~np.isfinite(x)).sum())
                raise self._wrong(role, f"{count} values are not finite in single precision")
        layout = self._layout if self._layout != "auto" else self._detected(role, x)
        if x.ndim != len(layout) + 1:
            raise self._wrong(role, f"layout {layout} needs {len(layout) + 1} dimensions, got shape {x.shape}")
        return torch.from_numpy(np.ascontiguousarray(_TO_CHW[layout](x)))

    def _detected(self, role: str, x: np.ndarray) -> str:
        if x.ndim == 3:
            return "HW"
        fits = [name for name, axis in (("HWC", -1), ("CHW", 1)) if x.ndim == 4 and x.shape[axis] in (1, 3)]
        if len(fits) == 1:
            return fits[0]
        problem = "either HWC or CHW" if fits else "not [n, H, W], nor with a dimension of 1 or 3 channels"
        raise self._wrong(role, f"shape {x.shape} is {problem}; set layout to HW, HWC or CHW")

    def _wrong(self, role: str, problem: str) -> UserError:
        return UserError(f"{self._path}: {self._keys[role]!r}: {problem}")

"""Public image data sets that torchvision can download."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torchvision import datasets

from fdl.datamodules.images import ImageDataModule
from fdl.datamodules.samples import TensorSamples
from fdl.datamodules.source import Source
from fdl.errors import UserError
from fdl.utils.paths import expanded

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class TorchvisionDataModule(ImageDataModule):
    """Base of data sets that torchvision reads, in the folders and formats that it writes.

    Args:
        path: torchvision's data folder.
        download: fetch the data set when it is not there.
        normalize: as in `ImageDataModule`, with the published constants of each data set.
        common: the other arguments of `ImageDataModule`.

    Raises:
        UserError: from `prepare_data` when the download fails; from `setup` when the files are absent or damaged.
    """

    folder: ClassVar[str] = ""
    """Folder of the data set below the path, as torchvision names it."""

    def __init__(self, path: str = "data", download: bool = False, normalize: bool = True, **common: Any):
        super().__init__(normalize=normalize, **common)
        self._path, self._download = expanded(path), download

    @property
    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """The splits to read: training first."""

    @abstractmethod
    def open(self, split: str, download: bool) -> datasets.VisionDataset:
        """One split as torchvision gives it."""

    def prepare_data(self) -> None:
        """Download missing files, if downloads are enabled."""
        super().prepare_data()
        if self._download:
            for split in self.splits:
                try:
                    self.open(split, download=True)
                except (OSError, RuntimeError) as error:
                    raise UserError(f"{self.name}: cannot download to {self._path.absolute()}: {error}") from error

    def read(self, split: str) -> datasets.VisionDataset:
        """One split from the disk.

        Raises:
            UserError: when its files are absent or damaged, saying where they should be.
        """
        try:
            return self.open(split, download=False)
        except (OSError, RuntimeError) as error:
            place = (self._path / self.folder).absolute()
            raise UserError(
                f"{self.name}: its {split} split is absent from {place}, or damaged; set download: true to fetch it "
                "from the internet, or path to the folder where torchvision has stored it"
            ) from error


class _InMemory(TorchvisionDataModule):
    """Small images that torchvision holds as one array."""

    splits = ("train", "test")
    labels_in: ClassVar[str] = "targets"
    layout_is_chw: ClassVar[bool] = False

    def load(self) -> Source:
        """Read both splits."""
        train, test = (self.read(split) for split in self.splits)
        return Source(self._samples(train), self.class_names(train), test=self._samples(test))

    def class_names(self, train: datasets.VisionDataset) -> list[str]:
        """Names of the classes in the order of their labels."""
        return list(train.classes)

    def _samples(self, data: datasets.VisionDataset) -> TensorSamples:
        x = torch.as_tensor(data.data)
        if x.ndim == 3:
            x = x.unsqueeze(1)
        elif not self.layout_is_chw:
            x = x.permute(0, 3, 1, 2).contiguous()
        return self.in_memory(x, torch.as_tensor(getattr(data, self.labels_in)))


class CIFAR10(_InMemory):
    """CIFAR-10: 50,000 + 10,000 colour photographs of 32 × 32 in 10 classes.

    Krizhevsky 2009. Arguments as in `TorchvisionDataModule`.
    """

    name = "cifar10"
    folder = "cifar-10-batches-py"
    published = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

    def open(self, split: str, download: bool) -> datasets.CIFAR10:
        """One split as torchvision gives it."""
        return datasets.CIFAR10(self._path, train=split == "train", download=download)


class CIFAR100(_InMemory):
    """CIFAR-100: 50,000 + 10,000 colour photographs of 32 × 32 in 100 classes.

    Krizhevsky 2009. Arguments as in `TorchvisionDataModule`.
    """

    name = "cifar100"
    folder = "cifar-100-python"
    published = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))

    def open(self, split: str, download: bool) -> datasets.CIFAR100:
        """One split as torchvision gives it."""
        return datasets.CIFAR100(self._path, train=split == "train", download=download)


class FashionMNIST(_InMemory):
    """Fashion-MNIST: 60,000 + 10,000 greyscale images of 28 × 28 of clothing in 10 classes.

    Xiao et al. 2017. Arguments as in `TorchvisionDataModule`.
    """

    name = "fashion_mnist"
    folder = "FashionMNIST/raw"
    published = ((0.2860,), (0.3530,))

    def open(self, split: str, download: bool) -> datasets.FashionMNIST:
        """One split as torchvision gives it."""
        return datasets.FashionMNIST(self._path, train=split == "train", download=download)


class SVHN(_InMemory):
    """SVHN: 73,257 + 26,032 colour photographs of 32 × 32 of house numbers in 10 classes.

    Netzer et al. 2011. The 531,131 easier ones of ``extra`` make a proxy set: name `svhn` there with
    ``train_split: extra``.

    Args:
        train_split: which images are the training images.
        common: the arguments of `TorchvisionDataModule`.
    """

    name = "svhn"
    published = ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
    labels_in = "labels"
    layout_is_chw = True

    def __init__(self, train_split: Literal["train", "extra"] = "train", **common: Any):
        super().__init__(**common)
        if train_split not in ("train", "extra"):
            raise UserError(f"train_split must be 'train' or 'extra', got {train_split!r}")
        self.splits = (train_split, "test")

    def open(self, split: str, download: bool) -> datasets.SVHN:
        """One split as torchvision gives it."""
        return datasets.SVHN(self._path, split=split, download=download)

    def class_names(self, train: datasets.VisionDataset) -> list[str]:
        """The ten digits."""
        return [str(digit) for digit in range(10)]


class Flowers102(TorchvisionDataModule):
    """Flowers-102: 1,020 + 1,020 + 6,149 photographs of flowers in 102 classes, for training, validation and test.

    Nilsback and Zisserman 2008. Normalised with ImageNet's constants, as is usual.

    Args:
        size: images are cut to their central square and resized to size × size.
        common: the other arguments of `TorchvisionDataModule`.
    """

    name = "flowers102"
    folder = "flowers-102"
    published = _IMAGENET
    splits = ("train", "val", "test")

    def __init__(self, size: int = 224, **common: Any):
        super().__init__(size=size, **common)

    def open(self, split: str, download: bool) -> datasets.Flowers102:
        """One split as torchvision gives it."""
        return datasets.Flowers102(self._path, split=split, download=download)

    def load(self) -> Source:
        """List the files of the three splits."""
        splits = [self.read(split) for split in self.splits]
        train, validation, test = (self.in_files(s._image_files, torch.tensor(s._labels)) for s in splits)
        # names came with torchvision 0.22
        classes = getattr(datasets.Flowers102, "classes", range(102))
        return Source(train, [str(name) for name in classes], test=test, validation=validation)

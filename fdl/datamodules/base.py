"""Base data module of a federation: a private pool, public sets without and with labels, validation and test."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from fdl.datamodules.checks import check_classes, check_samples
from fdl.datamodules.partition import Partitioner
from fdl.datamodules.samples import Samples
from fdl.datamodules.source import Source
from fdl.errors import UserError
from fdl.modules.types import Batch
from fdl.utils.seeding import numpy_stream, torch_stream


class FederatedDataModule(LightningDataModule, ABC):
    """Base of all data modules of a federation; also usable with a plain ``lightning.Trainer``.

    A subclass implements `load`; one whose samples are not labelled images also sets `task` and overrides
    `model_kwargs`. Held-out sets are drawn from the training samples, in random order, by streams that depend on `seed`
    alone: with one seed, every method, number of clients and partition sees the same proxy set, validation set and
    test set; another seed draws others, so that a spread over seeds includes the draws of the data. Validation and
    test are drawn in proportion to the classes, so that chance does not change their class shares. Public sets are
    drawn regardless of class, as public data come without labels.

    Args:
        proxy: source of the public proxy set. A whole number: that many training samples, held out from the private
            pool; a fraction below 1: that share; another data module: all its training inputs; None or 0: no proxy
            set. Its labels are dropped.
        validation: labelled samples held out for model selection, a number or a fraction; None takes the source's
            own validation split where it has one, and holds out nothing otherwise.
        test: labelled samples held out for the report, only for a source without a test split of its own.
        public: labelled samples held out for training on the server, a number, or a share of the samples left by the
            other sets; drawn last, so that it changes none of them.
        limit: use only this many training samples (before anything is held out), drawn in proportion to the classes;
            of a data set that is the proxy set of another, whatever their classes, unless that has `stratify_public`.
        stratify_public: draw `proxy` and `public`, too, in proportion to the classes. A real public set cannot be drawn
            so without labels.
        seed: of the held-out sets; None takes the run's seed (of nested data, the outer data's), and 0 without a run.
            A number keeps the same samples in all runs.
        batch_size: number of samples per batch of the loaders for a plain Trainer.

    Attributes:
        task: task of models of these data: ``"classification"``, ``"language"`` or ``"image_text"``.
        counted: unit of `proxy`, `validation`, `test` and `limit`, for messages.
        seed: seed of the held-out sets.
        train: the pooled private samples, labelled where the task is classification.
        proxy: the public proxy set, unlabelled; empty where none is configured.
        validation: validation samples, labelled where the task is classification; may be empty.
        public: the server's own training samples, labelled and augmented like `train`; may be empty.
        test: test samples, labelled where the task is classification.
        classes: names of the classes; empty where there are none.
        num_classes: number of classes.
        input_shape: shape of one input, (C, H, W).
        groups: natural client or domain of each sample of `train`, None where the source has none.
        test_groups: natural client or domain of each sample of `test`; None where the source has none, or has a test
            split of its own.

    Raises:
        UserError: for values out of range; from `setup` when the source has too few samples or the proxy set another
            input shape.
    """

    task: ClassVar[str] = "classification"
    counted: ClassVar[str] = "samples"

    train: Samples
    proxy: Samples
    validation: Samples
    test: Samples
    public: Samples
    classes: list[str]
    groups: np.ndarray | None
    test_groups: np.ndarray | None

    def __init__(
        self,
        proxy: int | float | FederatedDataModule | None = None,
        validation: int | float | None = None,
        test: int | float | None = None,
        public: int | float | None = None,
        limit: int | None = None,
        seed: int | None = None,
        batch_size: int = 32,
        stratify_public: bool = False,
    ):
        super().__init__()
        self._public = proxy if isinstance(proxy, FederatedDataModule) else None
        self._sizes = {
            # the proxy set last: drawn whatever its classes, it must not shift the shares of those measured on
            "test": _checked_size("test", test),
            "validation": _checked_size("validation", validation),
            "proxy": None if self._public is not None else _checked_size("proxy", proxy),
        }
        self._public_size = _checked_size("public", public)
        for key, value in (("limit", limit), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise UserError(f"{key} must be at least 1, got {value}")
        if seed is not None and seed < 0:
            raise UserError(f"seed must be at least 0, got {seed}")
        self.seed, self._seed_given = seed or 0, seed is not None
        self._limit, self.batch_size, self.stratify_public = limit, batch_size, stratify_public
        self._ready = False
        self._fingerprint: str | None = None

    @abstractmethod
    def load(self) -> Source:
        """Read the data set.

        Raises:
            UserError: naming the file and what is wrong with it.
        """

    def set_default_seed(self, seed: int) -> None:
        """Set the seed of a data module constructed without one; call before `setup`.

        Args:
            seed: usually the seed of the run.
        """
        if not self._seed_given:
            self.seed = seed

    def source(self, stratify: bool = True) -> Source:
        """Load and check the data set, reduced to at most `limit` training samples.

        Args:
            stratify: draw them in proportion to the classes.
        """
        source = self.checked(self.load())
        if self._limit is None or self._limit >= len(source.train):
            return source
        kept, _ = self._hold_out("limit", np.arange(len(source.train)), source.train, self._limit, stratify)
        kept.sort()
        groups = None if source.groups is None else source.groups[kept]
        return replace(source, train=source.train.subset(kept), groups=groups)

    def checked(self, source: Source) -> Source:
        """Return a loaded data set after checking that models can be trained and tested with it.

        Args:
            source: the data set as returned by `load`.

        Raises:
            UserError: naming the split and what is wrong with it.
        """
        check_samples(source, self.place)
        return source

    def place(self, split: str, part: str) -> str:
        """Name the origin of a part of the data, for messages; a subclass may name a file and key.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            part: ``"x"`` for the inputs, ``"y"`` for the labels, ``"classes"`` for the names of the classes.
        """
        return f"{self.name}: {'classes' if part == 'classes' else split + {'x': ' samples', 'y': ' labels'}[part]}"

    def prepare_data(self) -> None:
        """Download the data where a subclass does so; here only those of a nested proxy set."""
        if self._public is not None:
            self._public.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read the data and hold out test, proxy set and validation; done once, whatever the stage.

        Raises:
            UserError: when data and settings do not fit together.
        """
        if self._ready:
            return
        source = self.source()
        check_classes(source, self.place, self.task == "classification")
        pool, counts = source.train, self._counts(source)
        rows = np.arange(len(pool))
        held_out, self.test_groups = {}, None
        for split, count in counts.items():
            chosen, rows = self._hold_out(split, rows, pool, count, split != "proxy" or self.stratify_public)
            held_out[split] = pool.subset(chosen)
            if split == "test" and source.groups is not None and source.test is None:
                self.test_groups = source.groups[chosen]
        self.train, self.classes = pool.subset(rows), list(source.classes)
        self.groups = None if source.groups is None else source.groups[rows]
        self.test = held_out["test"] if source.test is None else source.test
        self.validation = held_out["validation"]
        if source.validation is not None and self._sizes["validation"] is None:
            self.validation = source.validation
        if self._public is None:
            self.proxy = held_out["proxy"].unlabelled()
        else:
            self._public.set_default_seed(self.seed)
            self.proxy = self._proxy_from(self._public)
        self.postprocess()
        self.public = self._hold_out_public()
        self._ready = True

    def postprocess(self) -> None:
        """Transform the four sets after they are drawn; a hook for subclasses, by default empty."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, (C, H, W) for images."""
        return self.train.input_shape

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Arguments that the data supply to the constructors of modules and encoders, by name."""
        return {"num_classes": self.num_classes, "input_shape": tuple(self.input_shape)}

    def partition(self, partitioner: Partitioner, clients: int, seed: int) -> list[np.ndarray]:
        """Partition the private samples among clients.

        Args:
            partitioner: the partitioner that assigns the samples.
            clients: number of clients.
            seed: the run's seed; the stream depends on nothing else.

        Returns:
            One sorted array of indices into `train` per client, disjoint.

        Raises:
            UserError: when the data cannot be partitioned in this way.
        """
        stream = numpy_stream(seed, "partition")
        labels = self.train.labels
        if labels is None and partitioner.needs_labels:
            raise UserError(f"{self.name} has no labels to split by; take iid, quantity_skew or by_group")
        kinds = np.zeros(len(self.train), dtype=np.int64) if labels is None else labels.numpy()
        return partitioner.split(kinds, clients, stream, self.groups)

    def fingerprint(self) -> str:
        """Return a hex digest of the contents and labels of all sets, computed once; files are read in full."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=16)
            for split in ("train", "proxy", "validation", "test", *(("public",) if len(self.public) else ())):
                samples: Samples = getattr(self, split)
                digest.update(f"{split} {len(samples)} {samples.content_hash()}\n".encode())
                if samples.labels is not None:
                    digest.update(samples.labels.numpy())
            groups = None if self.groups is None else self.groups.tolist()
            digest.update(repr((self.classes, groups)).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def train_dataloader(self) -> DataLoader:
        """Return shuffled, augmented batches of the pooled private samples."""
        stream = torch_stream(self.seed, "loader")
        batches = _Batches(self.train, torch_stream(self.seed, "augment"))
        return DataLoader(batches, batch_size=self.batch_size, shuffle=True, generator=stream, collate_fn=_as_it_is)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return batches of the validation set; no loader where it is empty."""
        return self._in_order(self.validation)

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return batches of the test set."""
        return self._in_order(self.test)

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return unlabelled batches of the proxy set; no loader where it is empty."""
        return self._in_order(self.proxy)

    def _in_order(self, samples: Samples) -> DataLoader | list[DataLoader]:
        # all by keyword: the Trainer rebuilds the loader and would pass a positional argument twice
        return DataLoader(_Batches(samples), batch_size=self.batch_size, collate_fn=_as_it_is) if len(samples) else []

    def _counts(self, source: Source) -> dict[str, int]:
        """Compute the number of training samples to hold out for each split, checked against the source."""
        total = len(source.train)
        if source.train.labels is None and self.task == "classification":
            raise UserError(f"{self.name}: the training samples have no labels; such data can only be a proxy set")
        counts = {split: self._count(split, size, total) for split, size in self._sizes.items()}
        if source.test is not None and self._sizes["test"] is not None:
            raise UserError(f"{self.name}: test is set, but the data have a test split of {len(source.test)} already")
        if source.test is None and counts["test"] == 0:
            raise UserError(
                f"{self.name}: the data have no test split; set test to how many {self.counted} to hold out for it, or "
                "to a share such as 0.2"
            )
        if sum(counts.values()) >= total:
            wanted = " + ".join(f"{split} {count}" for split, count in counts.items() if count)
            raise UserError(f"{self.name}: {wanted} leave nothing to train on of {total} training {self.counted}")
        return counts

    def _count(self, split: str, size: int | float | None, total: int) -> int:
        """Convert a number or share of `total` to a count.

        Raises:
            UserError: a share that rounds to 0.
        """
        if not isinstance(size, float):
            return size or 0
        count = round(size * total)
        if size and not count:
            raise UserError(f"{self.name}: {split} {size:g} of {total} {self.counted} rounds to 0; {self._advice()}")
        return count

    def _advice(self) -> str:
        """Return the advice for a share that rounds to 0."""
        return "set a larger share, or a number"

    def _hold_out(
        self, split: str, rows: np.ndarray, pool: Samples, count: int, stratify: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw `count` rows, in random order so that it reveals nothing of the labels, and return the rest too."""
        alike = pool.labels is None or not stratify
        labels = np.zeros(len(rows), dtype=np.int64) if alike else pool.labels.numpy()[rows]
        chosen = stratified(labels, count, numpy_stream(self.seed, f"hold out {split}"))
        return rows[chosen], np.delete(rows, chosen)

    def _hold_out_public(self) -> Samples:
        """Move the server's training samples from the private pool to a set of their own."""
        size, total = self._public_size or 0, len(self.train)
        count = self._count("public", size, total)
        if count == 0:
            return self.train.subset(np.arange(0))
        if count >= total:
            raise UserError(f"{self.name}: public {count} leaves nothing to train on of {total} training samples")
        chosen, rows = self._hold_out("public", np.arange(total), self.train, count, self.stratify_public)
        public, self.train = self.train.subset(chosen), self.train.subset(rows)
        self.groups = None if self.groups is None else self.groups[rows]
        return public

    def _proxy_from(self, public: FederatedDataModule) -> Samples:
        """Return the inputs of another data set, in random order."""
        inputs = public.source(self.stratify_public).train.unlabelled()
        if inputs.input_shape != self.input_shape:
            raise UserError(
                f"proxy: {public.name} has inputs of shape {_shape(inputs.input_shape)}, but {self.name} has "
                f"{_shape(self.input_shape)}; set size and channels in the proxy's args"
            )
        return inputs.subset(numpy_stream(self.seed, "proxy order").permutation(len(inputs)))


def stratified(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw positions so that every class has its share, to within one sample.

    Args:
        labels: class of each sample, int [n].
        count: number of samples to draw, ≤ n.
        rng: random stream of the draw.

    Returns:
        Positions in random order, int64 [count].
    """
    classes, sizes = np.unique(labels, return_counts=True)
    quotas = count * sizes / max(len(labels), 1)
    takes = np.floor(quotas).astype(np.int64)
    # the remainder from rounding down goes to the largest fractional parts, ties broken at random
    order = np.lexsort((rng.random(len(classes)), takes - quotas))
    takes[order[: count - takes.sum()]] += 1
    drawn = [rng.permutation(np.flatnonzero(labels == c))[:take] for c, take in zip(classes, takes)]
    return rng.permutation(np.concatenate([np.empty(0, dtype=np.int64), *drawn]))


class _Batches(Dataset):
    """Dataset of a loader, which fetches a batch in one piece."""

    def __init__(self, samples: Samples, generator: torch.Generator | None = None):
        self.samples, self.generator = samples, generator

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.samples.batch(torch.tensor(indices), self.generator)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _checked_size(key: str, value: int | float | None) -> int | float | None:
    """A number of samples or, as a float, a share of them."""
    if value is None:
        return None
    if isinstance(value, bool) or not value >= 0 or (isinstance(value, float) and value >= 1):
        raise UserError(f"{key} must be a whole number of samples or a fraction below 1, got {value}")
    return value


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))

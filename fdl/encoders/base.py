"""One public space for all sites: frozen encoders that know nothing but public data."""

from __future__ import annotations

import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from lightning import LightningModule
from torch.nn import functional as F

from fdl.datamodules.samples import Samples
from fdl.errors import UserError


class Encoder(ABC):
    """Maps samples into a space that every site shares, and is never trained on private data.

    Embeddings have length 1 unless the encoder says otherwise. Those of private samples stay at the site that owns
    the samples; those of the proxy set are public, computed once and cached.

    Args:
        normalize: scale every embedding to length 1.
        batch_size: samples encoded at a time.
        cache_dir: a folder that keeps embeddings of public samples between runs; None keeps them in memory only.
    """

    def __init__(self, normalize: bool = True, batch_size: int = 256, cache_dir: str | None = None):
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self.normalize, self.batch_size = normalize, batch_size
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._public: dict[str, np.ndarray] = {}

    @abstractmethod
    def fit(self, proxy: Samples) -> None:
        """Learn what there is to learn from the public proxy set alone."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that it costs to ship the encoder to one site; 0 where each site makes the same one by itself."""

    @abstractmethod
    def identity(self) -> str:
        """A text that changes whenever the embedding of some sample may change."""

    @abstractmethod
    def _encode(self, inputs: torch.Tensor) -> np.ndarray:
        """Embed one batch [B, …] as float [B, d]."""

    def encode(self, samples: Samples) -> np.ndarray:
        """Embed samples, keeping nothing of them.

        Args:
            samples: n samples, private or public; their labels are not looked at.

        Returns:
            float32 [n, d].

        Raises:
            ValueError: there are no samples.
        """
        if len(samples) == 0:
            raise ValueError("there is nothing to encode")
        batches = [self._encode(samples.batch(rows)[0]) for rows in torch.arange(len(samples)).split(self.batch_size)]
        embeddings = np.concatenate(batches).astype(np.float32, copy=False)
        if self.normalize:
            length = np.linalg.norm(embeddings, axis=1, keepdims=True)
            embeddings = embeddings / np.maximum(length, np.finfo(np.float32).tiny)
        return embeddings

    def encode_public(self, samples: Samples) -> np.ndarray:
        """Embed public samples once, and hand out the same read-only array from then on.

        Args:
            samples: n public samples, e.g. the proxy set; found again by the hash of their content.

        Returns:
            float32 [n, d], not writeable.
        """
        key = hashlib.blake2b(
            f"{self.identity()}/{self.normalize}/{samples.content_hash()}".encode(), digest_size=16
        ).hexdigest()
        if key not in self._public:
            embeddings = self._stored(key, len(samples))
            if embeddings is None:
                embeddings = self.encode(samples)
                self._store(key, embeddings)
            embeddings.flags.writeable = False
            self._public[key] = embeddings
        return self._public[key]

    def _stored(self, key: str, count: int) -> np.ndarray | None:
        """The embeddings in the cache folder; a file that cannot be read is as good as none."""
        if self.cache_dir is None:
            return None
        try:
            found = np.load(self.cache_dir / f"{key}.npy", allow_pickle=False)
        except (OSError, ValueError):
            return None
        return found if found.ndim == 2 and len(found) == count and found.dtype == np.float32 else None

    def _store(self, key: str, embeddings: np.ndarray) -> None:
        """Write them under another name first, so that no reader finds half a file."""
        if self.cache_dir is None:
            return
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.cache_dir, suffix=".tmp", delete=False) as file:
            np.save(file, embeddings, allow_pickle=False)
        os.replace(file.name, self.cache_dir / f"{key}.npy")


class Pixels(Encoder):
    """The inputs themselves, flattened; nothing to fit and nothing to ship."""

    name = "pixels"

    def __init__(self, normalize: bool = False, batch_size: int = 256):
        super().__init__(normalize, batch_size)

    def fit(self, proxy: Samples) -> None:
        """Nothing to learn."""

    def nbytes(self) -> int:
        """Nothing to ship."""
        return 0

    def identity(self) -> str:
        """Always the same."""
        return "pixels"

    def _encode(self, inputs: torch.Tensor) -> np.ndarray:
        return inputs.flatten(1).cpu().numpy()


class PCA(Encoder):
    """Principal components of the proxy set, which every site computes for itself from the data it already has.

    Args:
        components: how many at most; there are fewer where the proxy set has fewer samples or values.
        whiten: scale every component to unit variance on the proxy set, so that all count alike.
        normalize: as in `Encoder`; off by default, since how far a sample lies from the proxy set's centre tells
            something too.
        batch_size: as in `Encoder`.
    """

    name = "pca"

    def __init__(self, components: int = 32, whiten: bool = False, normalize: bool = False, batch_size: int = 256):
        if components < 1:
            raise UserError(f"components must be at least 1, got {components}")
        super().__init__(normalize, batch_size)
        self.components, self.whiten = components, whiten
        self._pca = None
        self._identity = ""

    def fit(self, proxy: Samples) -> None:
        """Find the components of the proxy set; the result depends on nothing else."""
        from sklearn import decomposition

        if len(proxy) < 2:
            raise UserError(f"pca needs a proxy set of at least 2 samples, got {len(proxy)}")
        if not proxy.batch(torch.zeros(1, dtype=torch.int64))[0].is_floating_point():
            raise UserError(
                "pca: token ids have no principal components; name a frozen encoder of texts under encoder, "
                "{target: frozen, args: {module: {target: text_classifier, args: {model: …, pretrained: true}}}}"
            )
        rows = torch.arange(len(proxy)).split(self.batch_size)
        inputs = np.concatenate([proxy.batch(r)[0].flatten(1).cpu().numpy() for r in rows])
        components = min(self.components, *inputs.shape)
        self._pca = decomposition.PCA(components, whiten=self.whiten, random_state=0).fit(inputs)
        self._identity = f"pca/{components}/{self.whiten}/{proxy.content_hash()}"

    def nbytes(self) -> int:
        """Nothing to ship: it follows from the proxy set."""
        return 0

    def identity(self) -> str:
        """The settings and what it was fitted on."""
        return self._identity

    def _encode(self, inputs: torch.Tensor) -> np.ndarray:
        if self._pca is None:
            raise RuntimeError("PCA.fit comes before PCA.encode")
        return self._pca.transform(inputs.flatten(1).cpu().numpy())

    def decode(self, points: np.ndarray) -> np.ndarray:
        """The inputs, flat, that lie nearest to points of the space: float64 [n, values] for [n, d].

        Raises:
            RuntimeError: nothing was fitted yet.
        """
        if self._pca is None:
            raise RuntimeError("PCA.fit comes before PCA.decode")
        return self._pca.inverse_transform(np.asarray(points, dtype=np.float64))


class Frozen(Encoder):
    """The embedding of a public pretrained model, which is shipped to every site once and never trained.

    Args:
        module: a model whose answer has an ``embedding`` [B, d]; it is frozen and kept in evaluation mode.
        image_size: resize images to this many pixels a side (bicubic) before the model sees them; None leaves them.
        normalize: as in `Encoder`.
        batch_size: as in `Encoder`.
        cache_dir: as in `Encoder`.
    """

    name = "frozen"

    def __init__(
        self,
        module: LightningModule,
        image_size: int | None = None,
        normalize: bool = True,
        batch_size: int = 64,
        cache_dir: str | None = None,
    ):
        if image_size is not None and image_size < 1:
            raise UserError(f"image_size must be at least 1, got {image_size}")
        super().__init__(normalize, batch_size, cache_dir)
        self.module = module.requires_grad_(False).eval()
        self.image_size = image_size
        self._identity: str | None = None

    def fit(self, proxy: Samples) -> None:
        """Nothing to learn: the model is pretrained."""

    def nbytes(self) -> int:
        """Size of all weights and buffers."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def identity(self) -> str:
        """Hash of the weights and settings, computed once: the model never changes."""
        if self._identity is None:
            digest = hashlib.blake2b(f"{type(self.module).__qualname__}/{self.image_size}".encode(), digest_size=16)
            for name, tensor in sorted(self._tensors().items()):
                digest.update(f"{name}/{tensor.dtype}/{list(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._identity = digest.hexdigest()
        return self._identity

    @torch.inference_mode()
    def _encode(self, inputs: torch.Tensor) -> np.ndarray:
        self.module.eval()
        reference = next(self.module.parameters())
        inputs = inputs.to(reference.device, reference.dtype if inputs.is_floating_point() else inputs.dtype)
        if self.image_size is not None:
            size = (self.image_size, self.image_size)
            inputs = F.interpolate(inputs, size=size, mode="bicubic", antialias=True, align_corners=False)
        return self.module(inputs).embedding.flatten(1).float().cpu().numpy()

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self.module.state_dict()

"""Frozen encoders: one embedding space for all sites, fitted on public data alone."""

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
    """Base of maps from samples to an embedding space that all sites share; never trained on private data.

    Embeddings have length 1 unless a subclass documents another default. Embeddings of private samples stay at the site
    that owns the samples; those of the proxy set are public, computed once and cached.

    Args:
        normalize: scale every embedding to length 1.
        batch_size: number of samples per batch.
        cache_dir: folder that keeps embeddings of public samples between runs; None keeps them in memory only.
    """

    def __init__(self, normalize: bool = True, batch_size: int = 256, cache_dir: str | None = None):
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self.normalize, self.batch_size = normalize, batch_size
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._public: dict[str, np.ndarray] = {}

    @abstractmethod
    def fit(self, proxy: Samples) -> None:
        """Fit the encoder to the public proxy set alone.

        Args:
            proxy: samples of the proxy set.
        """

    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes needed to send the encoder to one site; 0 where each site can compute it."""

    @abstractmethod
    def identity(self) -> str:
        """Return a text that changes whenever the embedding of any sample may change."""

    @abstractmethod
    def _encode(self, inputs: torch.Tensor) -> np.ndarray:
        """Embed one batch [B, …] as float [B, d]."""

    def encode(self, samples: Samples) -> np.ndarray:
        """Embed samples without caching the result.

        Args:
            samples: n samples, private or public; labels are not read.

        Returns:
            Embeddings, float32 [n, d].

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
        """Embed public samples once; later calls return the same read-only array.

        Args:
            samples: n public samples, e.g. the proxy set; the cache is keyed by the hash of their content.

        Returns:
            Embeddings, float32 [n, d], not writeable.
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
        """Read embeddings from the cache folder; None where the file is missing or cannot be read."""
        if self.cache_dir is None:
            return None
        try:
            found = np.load(self.cache_dir / f"{key}.npy", allow_pickle=False)
        except (OSError, ValueError):
            return None
        return found if found.ndim == 2 and len(found) == count and found.dtype == np.float32 else None

    def _store(self, key: str, embeddings: np.ndarray) -> None:
        """Write embeddings under a temporary name and rename the file, so that no reader finds a partial one."""
        if self.cache_dir is None:
            return
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.cache_dir, suffix=".tmp", delete=False) as file:
            np.save(file, embeddings, allow_pickle=False)
        os.replace(file.name, self.cache_dir / f"{key}.npy")


class Pixels(Encoder):
    """Identity encoder: the flattened inputs; nothing to fit and nothing to send."""

    name = "pixels"

    def __init__(self, normalize: bool = False, batch_size: int = 256):
        super().__init__(normalize, batch_size)

    def fit(self, proxy: Samples) -> None:
        """Do nothing: the encoder has no parameters."""

    def nbytes(self) -> int:
        """Return 0: nothing is sent."""
        return 0

    def identity(self) -> str:
        """Return a constant."""
        return "pixels"

    def _encode(self, inputs: torch.Tensor) -> np.ndarray:
        return inputs.flatten(1).cpu().numpy()


class PCA(Encoder):
    """Principal components of the proxy set, which every site computes from its own copy of the proxy set.

    Args:
        components: maximum number of components; fewer where the proxy set has fewer samples or values.
        whiten: scale every component to unit variance on the proxy set, so that all have equal weight.
        normalize: scale every embedding to length 1; off by default, since the distance of a sample from the proxy
            set's centre carries information.
        batch_size: number of samples per batch.
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
        """Compute the components of the proxy set; the result depends on nothing else.

        Args:
            proxy: samples of the proxy set, at least 2.

        Raises:
            UserError: there are fewer than 2 samples, or the inputs are token ids.
        """
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
        """Return 0: each site computes the components from the proxy set."""
        return 0

    def identity(self) -> str:
        """Return the settings and the content hash of the proxy set."""
        return self._identity

    def _encode(self, inputs: torch.Tensor) -> np.ndarray:
        if self._pca is None:
            raise RuntimeError("PCA.fit comes before PCA.encode")
        return self._pca.transform(inputs.flatten(1).cpu().numpy())

    def decode(self, points: np.ndarray) -> np.ndarray:
        """Reconstruct flattened inputs from points of the embedding space.

        Args:
            points: points of the space, [n, d].

        Returns:
            The nearest reconstructions, float64 [n, values].

        Raises:
            RuntimeError: the encoder is not fitted yet.
        """
        if self._pca is None:
            raise RuntimeError("PCA.fit comes before PCA.decode")
        return self._pca.inverse_transform(np.asarray(points, dtype=np.float64))


class Frozen(Encoder):
    """Embedding of a public pretrained model, which is sent to every site once and never trained.

    Args:
        module: a model whose output has an ``embedding`` [B, d]; it is frozen and kept in evaluation mode.
        image_size: side length in pixels to which images are resized (bicubic) for the model; None: no resizing.
        normalize: scale every embedding to length 1.
        batch_size: number of samples per batch.
        cache_dir: folder that keeps embeddings of public samples between runs; None: in memory only.
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
        """Do nothing: the model is pretrained."""

    def nbytes(self) -> int:
        """Return the size in bytes of all weights and buffers."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def identity(self) -> str:
        """Return a hash of weights and settings, computed once, since the model never changes."""
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

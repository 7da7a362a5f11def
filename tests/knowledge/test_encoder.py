import numpy as np
import pytest
import torch
from lightning import LightningModule
from sklearn.metrics import pairwise_distances
from torch import nn

from fdl.encoders.base import PCA, Frozen, Pixels
from fdl.errors import UserError
from fdl.modules.output import Output
from tests.knowledge.clients import samples


class Tiny(LightningModule):
    """Embeds images by a linear map, after dropout that must stay off."""

    def __init__(self, seed=0):
        super().__init__()
        self.linear = nn.Linear(12, 5)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("counter", torch.zeros(3, dtype=torch.int64))
        for parameter in self.linear.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
        self.calls, self.sizes = 0, []

    def forward(self, x, features=()):
        self.calls += 1
        self.sizes.append(tuple(x.shape))
        embedding = self.linear(self.dropout(x.flatten(1)))
        return Output(embedding[:, :2], embedding, {})


def images(n, seed=0, side=2):
    return samples(torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed)))


def pixels(samples):
    return samples.batch(torch.arange(len(samples)))[0].flatten(1)


def test_pca_keeps_the_projection_on_the_leading_directions_of_the_proxy_set():
    proxy, own = images(40, 0), images(9, 1)
    encoder = PCA(components=4, batch_size=7)
    encoder.fit(proxy)
    x, q = pixels(proxy).numpy(), pixels(own).numpy()
    centre = x.mean(axis=0)
    directions = np.linalg.svd(x - centre, full_matrices=False)[2][:4]
    found = encoder.encode(own)
    assert found.shape == (9, 4) and found.dtype == np.float32
    # up to the sign of each direction
    np.testing.assert_allclose(np.abs(found), np.abs((q - centre) @ directions.T), atol=1e-4)


def test_pca_of_full_rank_keeps_distances():
    proxy, own = images(40, 0), images(9, 1)
    encoder = PCA(components=12)
    encoder.fit(proxy)
    expected = pairwise_distances(pixels(own).numpy())
    np.testing.assert_allclose(pairwise_distances(encoder.encode(own)), expected, atol=1e-4)


def test_pca_whitened_counts_all_directions_alike():
    proxy = images(200)
    encoder = PCA(components=6, whiten=True)
    encoder.fit(proxy)
    np.testing.assert_allclose(np.cov(encoder.encode(proxy).T), np.eye(6), atol=1e-3)


def test_every_site_fits_the_same_pca():
    first, second = PCA(), PCA()
    for encoder in (first, second):
        encoder.fit(images(50))
    assert np.array_equal(first.encode(images(5, 3)), second.encode(images(5, 3)))
    assert first.identity() == second.identity() and first.nbytes() == 0


def test_pca_has_fewer_components_than_asked_where_the_proxy_set_is_small():
    encoder = PCA(components=32)
    encoder.fit(images(4))
    assert encoder.encode(images(3, 1)).shape == (3, 4)


def test_pca_has_to_be_fitted():
    with pytest.raises(RuntimeError, match="before"):
        PCA().encode(images(3))
    with pytest.raises(UserError, match="at least 2 samples, got 1"):
        PCA().fit(images(1))


@pytest.mark.parametrize("encoder", [PCA(normalize=True), Pixels(normalize=True), Frozen(Tiny())])
def test_embeddings_have_length_one_where_asked(encoder):
    encoder.fit(images(30))
    np.testing.assert_allclose(np.linalg.norm(encoder.encode(images(8, 1)), axis=1), 1, atol=1e-6)


def test_a_sample_without_length_stays_finite():
    assert np.array_equal(Pixels(normalize=True).encode(samples(torch.zeros(2, 3))), np.zeros((2, 3)))


def test_pixels_are_the_inputs():
    own = images(5)
    assert np.array_equal(Pixels(batch_size=2).encode(own), pixels(own).numpy())
    assert Pixels().nbytes() == 0


def test_frozen_gives_the_modules_embedding_and_never_trains_it():
    module = Tiny().train()
    encoder = Frozen(module, normalize=False, batch_size=4)
    own = images(10)
    expected = pixels(own) @ module.linear.weight.T + module.linear.bias
    module.train()  # whoever else holds it
    np.testing.assert_allclose(encoder.encode(own), expected.detach().numpy(), atol=1e-5)
    assert not any(p.requires_grad for p in module.parameters()) and not module.training


def test_frozen_costs_its_weights_and_buffers():
    assert Frozen(Tiny()).nbytes() == 4 * (12 * 5 + 5) + 8 * 3


def test_frozen_resizes_images_for_the_model():
    module = Tiny()
    Frozen(module, image_size=2).encode(images(3, side=8))
    assert module.sizes == [(3, 3, 2, 2)]


def test_public_embeddings_are_computed_once_and_private_ones_never_kept():
    module = Tiny()
    encoder = Frozen(module, batch_size=100)
    first = encoder.encode_public(images(10))
    assert encoder.encode_public(images(10)) is first and module.calls == 1
    assert not first.flags.writeable
    assert encoder.encode_public(images(10, 1)) is not first and module.calls == 2
    encoder.encode(images(6, 2))
    encoder.encode(images(6, 2))
    assert module.calls == 4 and [len(e) for e in encoder._public.values()] == [10, 10]


def test_a_folder_keeps_public_embeddings_for_the_next_run(tmp_path):
    folder = str(tmp_path / "cache")
    expected = Frozen(Tiny(), cache_dir=folder).encode_public(images(10))
    module = Tiny()
    assert np.array_equal(Frozen(module, cache_dir=folder).encode_public(images(10)), expected)
    assert module.calls == 0
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"]


@pytest.mark.parametrize(
    ("seed", "options", "data"),
    [(1, {}, 0), (0, {"normalize": False}, 0), (0, {"image_size": 2}, 0), (0, {}, 5)],
    ids=["other weights", "not normalised", "resized", "other samples"],
)
def test_the_folder_is_not_trusted_for_anything_else(tmp_path, seed, options, data):
    Frozen(Tiny(), cache_dir=str(tmp_path)).encode_public(images(10))
    module = Tiny(seed)
    Frozen(module, cache_dir=str(tmp_path), **options).encode_public(images(10, data))
    assert module.calls == 1


def test_a_damaged_file_in_the_folder_is_computed_again(tmp_path):
    expected = Frozen(Tiny(), cache_dir=str(tmp_path)).encode_public(images(10))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(Frozen(Tiny(), cache_dir=str(tmp_path)).encode_public(images(10)), expected)


def test_nothing_to_encode_is_an_error():
    with pytest.raises(ValueError, match="nothing to encode"):
        Pixels().encode(samples(torch.zeros(0, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PCA(components=0), "components must be at least 1, got 0"),
        (lambda: PCA(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: Frozen(Tiny(), image_size=0), "image_size must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_token_ids_have_no_principal_components_but_a_frozen_encoder_reads_them():
    from fdl.datamodules.text import TextSamples

    class Counts(torch.nn.Module):
        """Embeds a text as how often it has each of four tokens."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, tokens, features=()):
            counts = torch.stack([(tokens == i).sum(1) for i in range(4)], 1) * self.scale
            return Output(counts, counts, {})

    texts = TextSamples(np.array([0, 1, 1, 3, 2]), np.array([3, 2]))
    with pytest.raises(UserError, match="token ids have no principal components"):
        PCA().fit(texts)
    encoder = Frozen(Counts(), normalize=False)
    encoder.fit(texts)
    assert encoder.encode(texts).tolist() == [[1, 2, 0, 0], [0, 0, 1, 1]]

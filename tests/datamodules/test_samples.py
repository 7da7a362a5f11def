import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from fdl.datamodules import samples as module
from fdl.datamodules.samples import TensorSamples, crop_flip

MEAN, STD = [0.2, 0.5, 0.7], [0.1, 0.25, 0.5]


def bytes_of(count=20, shape=(3, 16, 16), seed=0):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_bytes_are_scaled_and_normalised_as_torchvision_does():
    x, indices = bytes_of(), torch.tensor([3, 3, 0])
    plain, labels = TensorSamples(x, torch.arange(20)).batch(indices)
    torch.testing.assert_close(plain, reference.to_dtype(x[indices], torch.float32, scale=True))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [3, 3, 0]
    normalised, _ = TensorSamples(x, mean=MEAN, std=STD).batch(indices)
    torch.testing.assert_close(normalised, reference.normalize(plain, MEAN, STD), atol=2e-6, rtol=1e-6)


def test_floats_are_normalised_without_touching_the_store():
    x = torch.rand(5, 3, 4, 4)
    kept = x.clone()
    samples = TensorSamples(x, mean=MEAN, std=STD)
    torch.testing.assert_close(
        samples.batch(torch.arange(5))[0], reference.normalize(x, MEAN, STD), atol=2e-6, rtol=1e-6
    )
    plain = TensorSamples(x).batch(torch.arange(5))[0].mul_(0)  # a batch is the caller's to change
    assert plain.sum() == 0
    assert torch.equal(x, kept)


def test_a_constant_channel_is_only_shifted():
    x = TensorSamples(torch.full((2, 1, 2, 2), 0.5), mean=[0.5], std=[0.0]).batch(torch.arange(2))[0]
    assert torch.equal(x, torch.zeros(2, 1, 2, 2))


def test_double_precision_becomes_single():
    assert TensorSamples(torch.zeros(2, 3, dtype=torch.float64)).batch(torch.arange(1))[0].dtype == torch.float32


@pytest.mark.parametrize("copy_below", [0, 1 << 30], ids=["view", "copy"])
def test_subsets_of_subsets(copy_below, monkeypatch):
    monkeypatch.setattr(module, "COPY_BELOW", copy_below)
    x, y = bytes_of(), torch.arange(20)
    inner = TensorSamples(x, y, MEAN, STD).subset(range(10, 20)).subset(torch.tensor([7, 0, 7]))
    assert len(inner) == 3
    assert inner.labels.tolist() == [17, 10, 17]
    got, labels = inner.batch(torch.tensor([2, 1]))
    expected, _ = TensorSamples(x, y, MEAN, STD).batch(torch.tensor([17, 10]))
    assert torch.equal(got, expected)
    assert labels.tolist() == [17, 10]
    shares_memory = inner._x.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert shares_memory == (copy_below == 0)


def test_a_permutation_in_slices_covers_everything_once():
    samples = TensorSamples(torch.arange(10.0)[:, None], torch.arange(10))
    order = torch.randperm(10)
    batches = [samples.batch(order[start : start + 3]) for start in range(0, 10, 3)]
    assert [len(x) for x, _ in batches] == [3, 3, 3, 1]
    assert torch.equal(torch.cat([y for _, y in batches]), order)
    assert torch.equal(torch.cat([x for x, _ in batches])[:, 0], order.float())


def test_empty_subset():
    empty = TensorSamples(bytes_of(), torch.arange(20)).subset([])
    assert len(empty) == 0
    assert empty.batch(torch.arange(0))[0].shape == (0, 3, 16, 16)
    assert isinstance(empty.content_hash(), str)


@pytest.mark.parametrize(
    ("indices", "error"),
    [([True, False], TypeError), ([0.5], TypeError), ([20], IndexError), ([-1], IndexError)],
)
def test_indices_must_be_positions(indices, error):
    with pytest.raises(error, match="indices must be"):
        TensorSamples(bytes_of(), torch.arange(20)).subset(indices)


def test_mismatched_arguments():
    with pytest.raises(ValueError, match="20 inputs with labels of shape"):
        TensorSamples(bytes_of(), torch.arange(19))
    with pytest.raises(TypeError, match="uint8 or floating point"):
        TensorSamples(torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="mean and std"):
        TensorSamples(bytes_of(), mean=MEAN)
    with pytest.raises(ValueError, match="augment must be one of crop_flip"):
        TensorSamples(bytes_of(), augment="blur")


def test_unlabelled_has_no_way_back():
    labels = torch.arange(20)
    public = TensorSamples(bytes_of(), labels).unlabelled()
    assert public.labels is None
    assert public.batch(torch.arange(4))[1] is None
    assert public.subset([1, 2]).batch(torch.arange(2))[1] is None
    held = [value for value in vars(public).values() if isinstance(value, torch.Tensor)]
    assert not any(value.shape == labels.shape and torch.equal(value.long(), labels) for value in held)


def test_content_hash_is_of_what_a_model_sees():
    x, y = bytes_of(), torch.arange(20)
    samples = TensorSamples(x, y)
    again = TensorSamples(x.clone())
    assert samples.content_hash() == again.content_hash() == samples.unlabelled().content_hash()
    assert samples.content_hash() == TensorSamples(x, y, augment="crop_flip").content_hash()
    changed = x.clone()
    changed[19, 0, 0, 0] ^= 1
    others = [
        TensorSamples(changed),
        TensorSamples(x.flip(0)),
        TensorSamples(x.reshape(20, 3, 32, 8)),
        TensorSamples(x, mean=MEAN, std=STD),
        TensorSamples(x.float()),
        samples.subset(range(19)),
    ]
    assert len({samples.content_hash(), *(o.content_hash() for o in others)}) == 7
    assert samples.subset([4, 2]).content_hash() == TensorSamples(x[[4, 2]]).content_hash()


def test_hash_of_a_view_is_that_of_its_rows(monkeypatch):
    monkeypatch.setattr(module, "COPY_BELOW", 0)
    x = bytes_of(1200, (1, 2, 2))
    rows = torch.randperm(1200)
    assert TensorSamples(x).subset(rows).content_hash() == TensorSamples(x[rows]).content_hash()


def test_channel_statistics():
    x = bytes_of(700)
    mean, std = TensorSamples(x, mean=MEAN, std=STD).channel_statistics()
    scaled = x.double() / 255
    torch.testing.assert_close(torch.tensor(mean), scaled.mean((0, 2, 3)).float())
    torch.testing.assert_close(torch.tensor(std), scaled.std((0, 2, 3), unbiased=False).float())


# -- augmentation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_flip_gives_windows_of_the_padded_image(dtype):
    """Each result is one of the 5 · 5 · 2 possible crops, and over many draws each of them occurs equally often."""
    image = (torch.arange(1, 3 * 16 * 16 + 1).reshape(1, 3, 16, 16) % 251).to(dtype)
    padded = reference.pad(image, [2, 2, 2, 2])
    crops = [padded[0, :, top : top + 16, left : left + 16] for top in range(5) for left in range(5)]
    allowed = {c.float().numpy().tobytes(): i for i, c in enumerate([*crops, *(c.flip(2) for c in crops)])}
    out = crop_flip(image.repeat(5000, 1, 1, 1), torch.Generator().manual_seed(0))
    assert out.dtype == dtype
    assert out.shape == (5000, 3, 16, 16)
    seen = torch.bincount(torch.tensor([allowed[o.float().numpy().tobytes()] for o in out]), minlength=50)
    # 100 expected of each; chi-square with 49 degrees of freedom exceeds 95 once in ten thousand times
    assert ((seen - 100).square() / 100).sum() < 95


def test_augmentation_follows_its_generator_only():
    samples = TensorSamples(bytes_of(), torch.arange(20), MEAN, STD, "crop_flip")
    every = torch.arange(20)
    still = samples.batch(every)[0]
    assert torch.equal(still, TensorSamples(bytes_of(), mean=MEAN, std=STD).batch(every)[0])
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed + 100 * len(draws))  # the global stream has no say
        draws.append(samples.batch(every, torch.Generator().manual_seed(seed))[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], still)
    before = torch.get_rng_state()
    samples.batch(every, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_augmentation_a_generator_is_not_used():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    TensorSamples(bytes_of()).batch(torch.arange(3), generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("normalised", [False, True])
def test_what_is_stored_becomes_the_batch_wherever_it_is_normalised(kind, normalised):
    x = torch.randint(256, (6, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = x if kind == torch.uint8 else x.float() / 255
    statistics = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]) if normalised else (None, None)
    samples, rows = TensorSamples(x, None, *statistics), torch.tensor([4, 0, 5])
    stored = samples.stored(rows)
    assert stored.dtype == kind
    assert torch.equal(samples.normalised(stored), samples.batch(rows)[0])

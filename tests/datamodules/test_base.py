import numpy as np
import pytest
import torch

from fdl.datamodules.base import FederatedDataModule, stratified
from fdl.datamodules.digits import Digits
from fdl.datamodules.images import ImageDataModule, recoloured, resized
from fdl.datamodules.partition import ByGroup, Dirichlet
from fdl.datamodules.samples import TensorSamples
from fdl.datamodules.source import Source
from fdl.errors import UserError


class Numbered(ImageDataModule):
    """Images whose first pixel is their number, so that every sample can be traced.

    400 of 3 classes with shares 50, 30 and 20 %, in order of their classes.
    """

    name = "numbered"

    def __init__(self, count=400, test_count=0, val_count=0, labelled=True, shape=(1, 4, 4), offset=0, **common):
        super().__init__(**common)
        self._build = count, test_count, val_count, labelled, shape, offset

    def load(self):
        count, test_count, val_count, labelled, shape, offset = self._build

        def make(n, start):
            x = torch.zeros(n, *shape)
            x[:, 0, 0, 0] = torch.arange(start, start + n) / 10_000
            y = torch.tensor([0] * 5 + [1] * 3 + [2] * 2).repeat_interleave(-(-n // 10))[:n]
            return self.in_memory(x, y if labelled else None)

        return Source(
            make(count, offset),
            ["a", "b", "c"],
            test=make(test_count, 2000) if test_count else None,
            validation=make(val_count, 3000) if val_count else None,
            groups=np.arange(count) % 4,
        )


def ready(module):
    module.prepare_data()
    module.setup()
    return module


def numbers(samples):
    return (samples.batch(torch.arange(len(samples)))[0][:, 0, 0, 0] * 10_000).round().long().tolist()


def test_held_out_sets_are_disjoint_and_cover_the_source():
    data = ready(Numbered(proxy=100, validation=0.1, test=60))
    sets = [data.train, data.proxy, data.validation, data.test]
    assert [len(s) for s in sets] == [200, 100, 40, 60]
    assert sorted(n for s in sets for n in numbers(s)) == list(range(400))
    assert numbers(data.train) == sorted(numbers(data.train))
    assert data.classes == ["a", "b", "c"]
    assert data.num_classes == 3
    assert data.input_shape == (1, 4, 4)
    assert data.groups.tolist() == [n % 4 for n in numbers(data.train)]


def classes_of(samples):
    """What `Numbered` images were labelled before their labels were dropped."""
    return np.searchsorted([200, 320], np.array(numbers(samples)) % 1000, side="right")


def test_what_is_measured_on_is_stratified_and_public_sets_if_asked():
    data = ready(Numbered(proxy=100, validation=40, test=60, public=50, stratify_public=True))
    for samples in (data.train, data.validation, data.test, data.public):
        shares = samples.labels.bincount() / len(samples)
        torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]))
    assert np.bincount(classes_of(data.proxy)).tolist() == [50, 30, 20]
    # the order tells nothing of the classes: sorted samples would put only class 0 first
    assert len(set(classes_of(data.proxy)[:20])) == 3
    plain = ready(Numbered(proxy=100, validation=40, test=60))
    for samples in (plain.validation, plain.test):
        torch.testing.assert_close(samples.labels.bincount() / len(samples), torch.tensor([0.5, 0.3, 0.2]))
    assert numbers(plain.validation) == numbers(data.validation)
    assert numbers(plain.test) == numbers(data.test)


@pytest.mark.parametrize("kind", ["held out", "nested", "public"])
def test_public_sets_are_drawn_whatever_their_classes(kind):
    """The number of class 0 among 100 of 300 or 400 is hypergeometric; in proportion it would always be the same."""
    counts = []
    for seed in range(60):
        if kind == "nested":
            drawn = ready(Numbered(proxy=Numbered(limit=100, offset=1000), test=100, seed=seed)).proxy
        else:
            data = ready(Numbered(test=100, seed=seed, **{"public" if kind == "public" else "proxy": 100}))
            drawn = data.public if kind == "public" else data.proxy
        assert len(set(numbers(drawn))) == 100
        counts.append(int((classes_of(drawn) == 0).sum()))
    total = 400 if kind == "nested" else 300
    variance = 100 * 0.5 * 0.5 * (total - 100) / (total - 1)
    assert abs(np.mean(counts) - 50) < 4 * (variance / 60) ** 0.5
    assert 0.5 < np.var(counts, ddof=1) / variance < 1.7
    nested = ready(Numbered(proxy=Numbered(limit=100, offset=1000), test=100, stratify_public=True)).proxy
    assert np.bincount(classes_of(nested)).tolist() == [50, 30, 20]


def test_proxy_labels_are_gone():
    for data in (ready(Numbered(proxy=100, test=60)), ready(Numbered(proxy=Numbered(offset=1000), test=60))):
        assert len(data.proxy) > 0
        assert data.proxy.labels is None
        assert data.proxy.batch(torch.arange(5))[1] is None
        assert data.proxy.subset([0, 1]).labels is None
        (_, labels), *_ = list(data.predict_dataloader())
        assert labels is None


def test_splits_depend_on_the_seed_alone():
    first, again, other = (ready(Numbered(proxy=100, test=60, seed=s)) for s in (0, 0, 1))
    assert numbers(first.proxy) == numbers(again.proxy)
    assert sorted(numbers(first.proxy)) != sorted(numbers(other.proxy))
    smaller = ready(Numbered(proxy=50, validation=10, test=60))
    assert numbers(smaller.test) == numbers(first.test)
    resized = ready(Numbered(proxy=70, validation=10, test=60))
    assert numbers(resized.validation) == numbers(smaller.validation)


def test_data_without_a_seed_take_the_default_nested_ones_too():
    def drawn(default=None, seed=None, nested=None):
        data = Numbered(proxy=Numbered(offset=1000, limit=50, seed=nested), validation=20, test=60, seed=seed)
        if default is not None:
            data.set_default_seed(default)
        ready(data)
        return data.seed, *(sorted(numbers(s)) for s in (data.test, data.validation, data.proxy))

    assert drawn() == drawn(default=0) == drawn(seed=0)
    assert drawn(default=3) == drawn(seed=3) == drawn(default=1, seed=3)
    for one, other in zip(drawn(default=3), drawn(default=4)):
        assert one != other
    # a nested data set may have a seed of its own
    assert drawn(default=3, nested=7)[3] == drawn(default=4, nested=7)[3]
    assert drawn(default=3, nested=7)[1] == drawn(default=3)[1]


def test_setup_happens_once():
    data = ready(Numbered(proxy=100, test=60))
    train = data.train
    for stage in ("fit", "validate", "test", "predict", None):
        data.setup(stage)
    assert data.train is train


def test_a_nested_data_set_is_the_proxy():
    public = Numbered(offset=1000, count=30, limit=20, labelled=False)
    data = ready(Numbered(proxy=public, test=60))
    assert len(data.train) == 340
    found = numbers(data.proxy)
    assert len(set(found)) == 20
    assert min(found) >= 1000
    assert found != sorted(found)


def test_a_nested_proxy_must_fit():
    with pytest.raises(UserError, match="proxy: numbered has inputs of shape 3×8×8, but numbered has 1×4×4; set size"):
        ready(Numbered(proxy=Numbered(shape=(3, 8, 8)), test=60))
    data = ready(Numbered(proxy=Numbered(shape=(3, 8, 8), size=4, channels=1), test=60))
    assert data.proxy.input_shape == (1, 4, 4)


def test_own_splits_of_the_source_are_used():
    data = ready(Numbered(test_count=50, val_count=30, proxy=0.25))
    assert [len(s) for s in (data.train, data.proxy, data.validation, data.test)] == [300, 100, 30, 50]
    assert min(numbers(data.test)) == 2000
    assert min(numbers(data.validation)) == 3000
    held_out = ready(Numbered(test_count=50, val_count=30, validation=20))
    assert len(held_out.validation) == 20
    assert max(numbers(held_out.validation)) < 400


def test_limit_keeps_class_shares_and_groups():
    data = ready(Numbered(limit=100, test=20))
    assert len(data.train) == 80
    assert data.train.labels.bincount().tolist() == [40, 24, 16]
    assert data.groups.tolist() == [n % 4 for n in numbers(data.train)]
    assert len(ready(Numbered(limit=1000, test=20)).train) == 380


@pytest.mark.parametrize("none", [None, 0, 0.0])
def test_no_proxy_set(none):
    data = ready(Numbered(proxy=none, test=60))
    assert len(data.proxy) == 0
    assert data.proxy.labels is None
    assert data.predict_dataloader() == []
    assert data.val_dataloader() == []
    assert isinstance(data.fingerprint(), str)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no test split; set test to how many samples to hold out for it, or to a share such as 0.2"),
        ({"test": 0.001}, "test 0.001 of 400 samples rounds to 0; set a larger share, or a number"),
        ({"test": 10, "proxy": 0.001}, "proxy 0.001 of 400 samples rounds to 0"),
        ({"test": 10, "validation": 0.001}, "validation 0.001 of 400 samples rounds to 0"),
        ({"test": 10, "public": 0.001}, "public 0.001 of 390 samples rounds to 0"),
        ({"test_count": 50, "test": 20}, "test is set, but the data have a test split of 50 already"),
        ({"test": 300, "proxy": 0.25}, r"test 300 \+ proxy 100 leave nothing to train on of 400"),
        ({"test": 10, "labelled": False}, "no labels; such data can only be a proxy set"),
        ({"test": 10, "normalize": True}, "normalize needs a public proxy set, or mean and std"),
        ({"test": 10, "normalize": True, "mean": [0.1, 0.2], "std": [1.0, 1.0]}, "mean has 2 values for 1 channels"),
    ],
)
def test_settings_that_the_data_do_not_allow(options, message):
    with pytest.raises(UserError, match=message):
        ready(Numbered(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proxy": -1}, "proxy must be a whole number of samples or a fraction below 1, got -1"),
        ({"proxy": 1.5}, "proxy must be a whole number of samples or a fraction below 1, got 1.5"),
        ({"test": True}, "test must be"),
        ({"validation": float("nan")}, "validation must be"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"augment": "blur"}, "augment must be 'none' or 'crop_flip', got 'blur'"),
        ({"mean": [0.5], "normalize": True}, "mean and std need one value a channel each"),
        ({"mean": [0.5], "std": [0.5]}, "normalize is false"),
        ({"mean": [0.5], "std": [0.0], "normalize": True}, "std must be > 0"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        Numbered(**options)


def test_normalisation_is_of_the_proxy_set_and_for_all():
    data = ready(Numbered(proxy=Numbered(offset=5000), test=60, normalize=True))
    public = torch.zeros(400, 1, 4, 4)
    public[:, 0, 0, 0] = torch.arange(5000, 5400) / 10_000
    mean, std = public.double().mean().item(), public.double().std(unbiased=False).item()
    for samples in (data.train, data.proxy, data.validation, data.test):
        assert samples.mean == pytest.approx((mean,))
        assert samples.std == pytest.approx((std,))
    everything = data.proxy.batch(torch.arange(400))[0]
    assert everything.mean().item() == pytest.approx(0, abs=1e-5)
    assert everything.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)


def test_private_data_do_not_reach_the_normalisation():
    """Two federations that differ in the private pool alone normalise alike."""
    public = Numbered(offset=5000)
    one = ready(Numbered(proxy=public, test=60, normalize=True))
    two = ready(Numbered(proxy=public, test=60, normalize=True, offset=1000, count=200))
    assert one.train.mean == two.train.mean
    assert one.train.std == two.train.std


def test_given_and_published_constants():
    class Published(Numbered):
        published = ((0.3,), (0.2,))

    assert ready(Published(test=60, normalize=True)).train.mean == (0.3,)
    assert ready(Published(test=60, normalize=True, mean=[0.4], std=[0.1])).test.mean == (0.4,)
    # constants for another number of channels are of no use
    coloured = ready(Published(test=60, proxy=100, normalize=True, channels=3))
    assert len(coloured.train.mean) == 3


def test_only_private_training_batches_are_augmented():
    data = ready(Numbered(proxy=100, validation=20, test=60, augment="crop_flip"))
    assert data.train.augment == "crop_flip"
    assert [s.augment for s in (data.proxy, data.validation, data.test)] == [None] * 3
    first = [torch.cat([x for x, _ in data.train_dataloader()]) for _ in range(2)]
    assert torch.equal(first[0], first[1])


def test_partition_reaches_labels_and_groups():
    data = ready(Numbered(proxy=100, test=60))
    by_group = data.partition(ByGroup(), 4, seed=0)
    assert [set(data.groups[part]) for part in by_group] == [{0}, {1}, {2}, {3}]
    skewed, again, other = (data.partition(Dirichlet(0.5), 5, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(skewed, again))
    assert any(not np.array_equal(a, b) for a, b in zip(skewed, other))
    assert sorted(np.concatenate(skewed)) == list(range(len(data.train)))
    with pytest.raises(UserError, match="300 clients cannot share 240 samples"):
        data.partition(Dirichlet(0.5), 300, 0)


def test_fingerprint_notices_every_change():
    base = {"proxy": 100, "validation": 20, "test": 60}
    first = ready(Numbered(**base)).fingerprint()
    assert first == ready(Numbered(**base)).fingerprint()
    others = [
        Numbered(**{**base, "proxy": 101}),
        Numbered(**{**base, "validation": 21}),
        Numbered(**base, seed=1),
        Numbered(**base, offset=1),
        Numbered(**base, normalize=True),
        Numbered(**{**base, "proxy": Numbered(offset=1000)}),
        Numbered(**{**base, "proxy": Numbered(offset=1001)}),
    ]
    assert len({first, *(ready(o).fingerprint() for o in others)}) == 8

    class Relabelled(Numbered):
        def load(self):
            source = super().load()
            samples = TensorSamples(source.train.batch(torch.arange(400))[0], (source.train.labels + 1) % 3)
            return Source(samples, source.classes, groups=source.groups)

    # the proxy set has the same images: what differs is who is labelled what
    assert ready(Relabelled(**base)).fingerprint() != first


def test_load_is_what_a_subclass_must_write():
    with pytest.raises(TypeError, match="load"):
        FederatedDataModule()


@pytest.mark.parametrize("count", [0, 1, 7, 13, 40])
def test_stratified_draw(count):
    labels = np.repeat([0, 1, 2, 5], [20, 10, 9, 1])
    drawn = stratified(labels, count, np.random.default_rng(0))
    assert len(drawn) == len(set(drawn)) == count
    quotas = count * np.array([20, 10, 9, 1]) / 40
    taken = np.bincount(labels[drawn], minlength=6)[[0, 1, 2, 5]]
    assert (np.abs(taken - quotas) < 1).all()


def test_resizing_takes_the_central_square_and_averages():
    x = torch.zeros(1, 1, 8, 4, dtype=torch.uint8)
    x[:, :, 2:6] = (
        torch.tensor([[0, 100], [200, 100]], dtype=torch.uint8).repeat_interleave(2, 0).repeat_interleave(2, 1)
    )
    small = resized(x, 2)
    assert small.dtype == torch.uint8
    # antialiased bilinear weights of a factor of two: 1/8, 3/8, 3/8, 1/8, cut off at the edge
    near, far = 6 / 7, 1 / 7
    block = torch.tensor([[0.0, 100.0], [200.0, 100.0]])
    mix = torch.tensor([[near, far], [far, near]])
    torch.testing.assert_close(small[0, 0].float(), mix @ block @ mix.T, atol=1.0, rtol=0)
    assert resized(x, None) is x


def test_greyscale_is_luma_and_colour_is_three_times_grey():
    colour = torch.tensor([200, 100, 50], dtype=torch.uint8).reshape(1, 3, 1, 1)
    assert recoloured(colour, 1).item() == pytest.approx(0.2989 * 200 + 0.587 * 100 + 0.114 * 50, abs=1)
    grey = torch.tensor([[[[7]]]], dtype=torch.uint8)
    assert recoloured(grey, 3).flatten().tolist() == [7, 7, 7]
    with pytest.raises(UserError, match="images with 2 channels"):
        recoloured(torch.zeros(1, 2, 1, 1), 3)


def test_digits():
    from sklearn.datasets import load_digits

    data = ready(Digits())
    assert [len(s) for s in (data.train, data.proxy, data.validation, data.test)] == [937, 400, 100, 360]
    assert data.input_shape == (1, 8, 8)
    assert data.classes == [str(i) for i in range(10)]
    images, labels = load_digits(return_X_y=True)
    ours = {(*(16 * x).int().flatten().tolist(), int(y)) for x, y in zip(*data.test.batch(torch.arange(360)))}
    theirs = {(*map(int, image), int(label)) for image, label in zip(images, labels)}
    assert len(ours) == 360
    assert ours <= theirs
    assert data.test.labels.bincount().tolist() == pytest.approx((360 * np.bincount(labels) / 1797).tolist(), abs=1)
    every = data.train.batch(torch.arange(937))[0]
    assert every.min() == 0
    assert every.max() == 1

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.datamodules.partition import (
    IID,
    ByGroup,
    ClassSplit,
    Dirichlet,
    Partitioner,
    QuantitySkew,
    Shards,
)
from fdl.errors import UserError
from fdl.utils.seeding import numpy_stream

LABELS = np.random.default_rng(0).integers(0, 10, 2000)
GROUPS = np.random.default_rng(1).choice(["north", "south", "east"], 2000, p=[0.6, 0.3, 0.1])
ALL = {
    "iid": IID(),
    "dirichlet by class": Dirichlet(0.5),
    "dirichlet balanced": Dirichlet(0.1, balance=True),
    "dirichlet by client": Dirichlet(0.1, by="client"),
    "class split": ClassSplit(3),
    "shards": Shards(2),
    "quantity by alpha": QuantitySkew(alpha=0.3),
    "quantity by power law": QuantitySkew(exponent=1.5),
    "by group": ByGroup(),
}


def histogram(labels, parts, classes=10):
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts])


def assert_cover(parts, count):
    assert all(part.dtype == np.int64 and len(part) and (np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(count))


@pytest.mark.parametrize("partitioner", ALL.values(), ids=ALL)
@pytest.mark.parametrize("clients", [4, 7, 20])
def test_disjoint_cover_and_stable_under_the_seed(partitioner, clients):
    first, again = (partitioner.split(LABELS, clients, numpy_stream(3, "partition"), GROUPS) for _ in range(2))
    other = partitioner.split(LABELS, clients, numpy_stream(4, "partition"), GROUPS)
    assert len(first) == clients
    assert_cover(first, len(LABELS))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda c: sum(c) >= 1),
    clients=st.integers(1, 12),
    kind=st.sampled_from([IID(), Dirichlet(0.3, by="client"), QuantitySkew(alpha=0.05), Shards(1), ByGroup()]),
    seed=st.integers(0, 99),
)
def test_any_labels_and_number_of_clients(counts, clients, kind, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    rng = np.random.default_rng(seed)
    if clients > len(labels):
        with pytest.raises(UserError, match=f"{clients} clients cannot share {len(labels)} samples"):
            kind.split(labels, clients, rng, labels)
    else:
        assert_cover(kind.split(labels, clients, rng, labels), len(labels))


@pytest.mark.parametrize("by", ["class", "client"])
def test_dirichlet_becomes_uniform_for_a_large_alpha(by):
    labels = np.repeat(np.arange(10), 1000)
    counts = histogram(labels, Dirichlet(1e6, by=by).split(labels, 8, np.random.default_rng(0)))
    np.testing.assert_allclose(counts, 1000 / 8, atol=5)
    sizes = counts.sum(1)
    np.testing.assert_allclose(sizes, 1250, atol=10)


@pytest.mark.parametrize(("alpha", "expected"), [(0.01, 0.945), (0.1, 0.664), (0.5, 0.380), (1.0, 0.293), (100, 0.116)])
def test_largest_class_share_of_a_client_is_that_of_its_mixture(alpha, expected):
    """E[max p] for p ~ Dir(α·1_10), tabulated; the first client draws from full classes."""
    labels = np.repeat(np.arange(10), 2500)
    partitioner = Dirichlet(alpha, by="client")
    shares = []
    for seed in range(250):
        first = partitioner.assign(labels, 10, np.random.default_rng(seed), None)[0]
        shares.append(np.bincount(labels[first]).max() / len(first))
    # three standard errors of the mean of 250 draws, and the table's own rounding
    assert abs(np.mean(shares) - expected) < 3 * np.std(shares) / np.sqrt(len(shares)) + 0.0005


def test_dirichlet_by_client_gives_equal_sizes():
    sizes = [len(part) for part in Dirichlet(0.05, by="client").split(LABELS[:1999], 7, np.random.default_rng(0))]
    assert sorted(set(sizes)) == [285, 286]


def test_dirichlet_by_class_follows_the_drawn_shares():
    """Against the plain definition: cumulated shares of one Dirichlet draw a class, rounded."""
    labels = np.repeat(np.arange(3), [100, 57, 1000])
    shares = np.random.default_rng(5).dirichlet([1.0] * 4, 3)
    expected = []
    for share, size in zip(shares, [100, 57, 1000]):
        edges = [0, *[round(float(e)) for e in np.cumsum(share)[:-1] * size], size]
        expected.append(np.diff(edges))
    counts = histogram(labels, Dirichlet(1.0, min_samples=1).split(labels, 4, np.random.default_rng(5)), 3)
    np.testing.assert_array_equal(counts, np.transpose(expected))


def test_balance_gives_no_class_to_clients_that_hold_an_equal_share():
    labels = np.repeat(np.arange(10), 500)
    free, balanced = (
        np.concatenate(
            [
                histogram(labels, Dirichlet(0.1, balance=b).split(labels, 10, numpy_stream(s, "p"))).sum(1)
                for s in range(10)
            ]
        )
        for b in (False, True)
    )
    # a client that has less than 500 gets at most one more class of 500
    assert balanced.max() < 1000 < free.max()


def test_dirichlet_keeps_the_smallest_client_above_min_samples():
    parts = Dirichlet(0.2, min_samples=40).split(LABELS, 10, np.random.default_rng(0))
    assert min(map(len, parts)) >= 40


def test_dirichlet_gives_up_and_says_what_to_change():
    with pytest.raises(UserError, match=r"no draw of 20 .* 30 clients 20 of the 2000 samples .* larger alpha.*balance"):
        Dirichlet(0.01, min_samples=20, max_tries=20).split(LABELS, 30, np.random.default_rng(0))
    with pytest.raises(UserError, match="30 clients with min_samples 70 need 2100 samples, got 2000"):
        Dirichlet(0.01, min_samples=70).split(LABELS, 30, np.random.default_rng(0))


@pytest.mark.parametrize("alpha", [1e-4, 1e-3])
@pytest.mark.parametrize("options", [{"balance": True}, {"by": "client"}])
def test_tiny_alpha_loses_nothing(alpha, options):
    assert_cover(Dirichlet(alpha, **options).split(LABELS, 5, np.random.default_rng(0)), len(LABELS))


def test_class_split_owns_the_right_number_of_classes():
    labels = np.repeat(np.arange(10), 100)
    counts = histogram(labels, ClassSplit(2).split(labels, 15, np.random.default_rng(0)))
    np.testing.assert_array_equal((counts > 0).sum(1), 2)
    owners = (counts > 0).sum(0)
    np.testing.assert_array_equal(owners, 3)
    np.testing.assert_allclose(counts[counts > 0], 100 / 3, atol=1)


def test_class_split_refuses_what_cannot_be_covered():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="3 clients with classes_per_client 3 hold 9 of 10 classes"):
        ClassSplit(3).split(LABELS, 3, rng)
    with pytest.raises(UserError, match="classes_per_client is 11, but the data have 10 classes"):
        ClassSplit(11).split(LABELS, 3, rng)
    with pytest.raises(UserError, match="class 1 has 2 samples for 5 clients"):
        ClassSplit(2).split(np.array([0] * 50 + [1] * 2), 5, rng)


def test_shards_hold_few_classes_and_equal_sizes():
    labels = np.repeat(np.arange(10), 100)
    parts = Shards(2).split(labels, 10, np.random.default_rng(0))
    assert {len(part) for part in parts} == {100}
    # shards of 50 never straddle classes of 100
    assert max(len(np.unique(labels[part])) for part in parts) <= 2
    with pytest.raises(UserError, match="600 clients with shards_per_client 2 need 1200 samples, got 1000"):
        Shards(2).split(labels, 600, np.random.default_rng(0))


def test_power_law_sizes():
    parts = QuantitySkew(exponent=1.0).split(np.zeros(11004, int), 4, np.random.default_rng(0))
    # 1 + 11000 · (1, 1/2, 1/3, 1/4) / (25/12)
    np.testing.assert_array_equal(sorted(map(len, parts)), [1321, 1761, 2641, 5281])


def test_quantity_skew_keeps_class_shares_and_min_samples():
    labels = np.repeat(np.arange(4), 2500)
    parts = QuantitySkew(alpha=0.05, min_samples=25).split(labels, 20, np.random.default_rng(0))
    assert min(map(len, parts)) >= 25
    largest = max(parts, key=len)
    assert len(largest) > 2000
    np.testing.assert_allclose(np.bincount(labels[largest]) / len(largest), 0.25, atol=0.03)
    with pytest.raises(UserError, match="20 clients with min_samples 501 need 10020 samples, got 10000"):
        QuantitySkew(alpha=1, min_samples=501).split(labels, 20, np.random.default_rng(0))


def test_by_group_one_client_a_group():
    parts = ByGroup().split(LABELS, 3, np.random.default_rng(0), GROUPS)
    assert [set(GROUPS[part]) for part in parts] == [{"east"}, {"north"}, {"south"}]


def test_by_group_merges_whole_groups_to_even_sizes():
    groups = np.repeat(np.arange(5), [50, 40, 30, 20, 10])
    parts = ByGroup().split(np.zeros(150, int), 3, np.random.default_rng(0), groups)
    held = [set(groups[part]) for part in parts]
    assert sum(map(len, held)) == 5  # no group on two clients
    assert [len(part) for part in parts] == [50, 50, 50]


def test_by_group_divides_the_largest_groups():
    groups = np.repeat(["a", "b"], [900, 100])
    parts = ByGroup().split(np.zeros(1000, int), 5, np.random.default_rng(0), groups)
    assert [set(groups[part]) for part in parts] == [{"a"}] * 4 + [{"b"}]
    assert [len(part) for part in parts] == [225] * 4 + [100]


def test_by_group_names_clients_and_tells_who_went_where(caplog):
    kinds, sites = np.zeros(120, int), np.repeat(["north", "east", "west"], [60, 40, 20])

    def named(clients):
        caplog.clear()
        parts = ByGroup().split(kinds, clients, np.random.default_rng(0), sites)
        return ByGroup().names(parts, sites), caplog.text

    names, said = named(3)
    assert names == ["east", "north", "west"]
    assert not said
    names, said = named(2)
    assert names == ["north", "east + west"]
    assert "by_group: 3 groups are put together to make 2 clients: client 0: north; client 1: east + west" in said
    names, said = named(5)
    assert names == ["east (1/2)", "east (2/2)", "north (1/2)", "north (2/2)", "west"]
    assert "by_group: 3 groups are divided to make 5 clients: client 0: east (1/2); " in said


def test_names_of_many_groups_stay_short(caplog):
    sites = np.arange(900) // 3
    parts = ByGroup().split(np.zeros(900, int), 30, np.random.default_rng(0), sites)
    names = ByGroup().names(parts, sites)
    assert names[0].endswith(" + 6 more") and max(map(len, names)) < 40
    assert "; and 18 more" in caplog.text


def test_clients_of_other_partitioners_are_numbers():
    parts = IID().split(LABELS, 3, np.random.default_rng(0), GROUPS)
    assert IID().names(parts, GROUPS) == ["", "", ""]


def test_by_group_needs_groups():
    with pytest.raises(UserError, match="natural client or domain column"):
        ByGroup().split(LABELS, 3, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dirichlet(0), "alpha must be a finite number > 0, got 0"),
        (lambda: Dirichlet(-1.0), "alpha must be a finite number > 0, got -1.0"),
        (lambda: Dirichlet(float("nan")), "alpha must be"),
        (lambda: Dirichlet(1, by="site"), "by must be 'class' or 'client', got 'site'"),
        (lambda: Dirichlet(1, min_samples=0), "min_samples must be at least 1, got 0"),
        (lambda: Dirichlet(1, max_tries=0), "max_tries must be at least 1"),
        (lambda: Dirichlet(1, by="client", balance=True), "are for by: class"),
        (lambda: ClassSplit(0), "classes_per_client must be at least 1"),
        (lambda: Shards(0), "shards_per_client must be at least 1"),
        (lambda: QuantitySkew(), "exactly one of alpha and exponent"),
        (lambda: QuantitySkew(alpha=1, exponent=1), "exactly one of alpha and exponent"),
        (lambda: QuantitySkew(exponent=-1), "exponent must be a finite number > 0"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_partitioner_that_leaves_a_client_empty_is_named():
    class Greedy(Partitioner):
        name = "greedy"

        def assign(self, labels, clients, rng, groups):
            return [np.arange(len(labels)), *[np.empty(0)] * (clients - 1)]

    with pytest.raises(UserError, match=r"greedy leaves 2 of 3 clients without a sample \(first: client 1\)"):
        Greedy().split(LABELS, 3, np.random.default_rng(0))
    with pytest.raises(UserError, match="clients must be at least 1, got 0"):
        Greedy().split(LABELS, 0, np.random.default_rng(0))


def test_import_needs_no_torch():
    code = "import sys, fdl.datamodules.partition; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

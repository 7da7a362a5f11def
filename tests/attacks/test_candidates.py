import numpy as np
import pytest
import torch

from fdl.attacks.base import AttackTarget
from fdl.attacks.candidates import ConcatSamples, candidates
from fdl.datamodules.samples import TensorSamples
from fdl.errors import UserError
from tests.attacks.runs import finished


def samples(values, labels):
    return TensorSamples(torch.tensor(values)[:, None].float(), torch.tensor(labels))


def test_joined_sets_answer_as_one():
    both = ConcatSamples([samples([0, 1, 2], [0, 0, 1]), samples([10, 11], [1, 0])])
    assert len(both) == 5 and both.labels.tolist() == [0, 0, 1, 1, 0]
    inputs, labels = both.batch(torch.tensor([4, 0, 3, 2]))
    assert inputs.squeeze(1).tolist() == [11, 0, 10, 2] and labels.tolist() == [0, 0, 1, 1]
    part = both.subset([3, 1, 1])
    assert part.batch(torch.arange(3))[0].squeeze(1).tolist() == [10, 1, 1] and part.labels.tolist() == [1, 0, 0]
    assert part.subset([2, 0]).batch(torch.arange(2))[0].squeeze(1).tolist() == [1, 10]
    assert part.unlabelled().labels is None and len(both.subset([])) == 0
    assert part.content_hash() != both.content_hash()


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return AttackTarget(finished(tmp_path_factory.mktemp("run")))


def test_members_and_others_match_by_client_and_class(subject):
    asked = candidates(subject)
    for client in subject.clients:
        for label in range(10):
            rows = (asked.owner == client.id) & (asked.labels == label)
            held = int((client.train.labels == label).sum())
            assert (rows & asked.member).sum() == (rows & ~asked.member).sum() <= held
    others = asked.place[~asked.member]
    assert len(set(others)) == len(others), "each is asked about once"
    assert len(others) > 0.8 * len(asked.population), "few go unused"
    for i in np.random.default_rng(0).choice(len(asked.owner), 40, replace=False):
        source = subject.clients[asked.owner[i]].train if asked.member[i] else asked.population
        x, y = source.batch(torch.tensor([asked.place[i]]))
        assert torch.equal(asked.samples.batch(torch.tensor([i]))[0], x) and asked.labels[i] == y


def test_a_shadow_with_the_members_inside_trains_on_what_the_client_trained_on(subject):
    asked = candidates(subject)
    for client in subject.clients:
        share = asked.share(client, asked.member)
        assert sorted(share.rows.tolist()) == list(range(len(client.train)))
        half = asked.halves(np.random.default_rng(client.id))
        for inside in (half, ~half):
            other = asked.share(client, inside)
            assert len(set(other.rows.tolist())) == len(other) == len(client.train)
            assert torch.equal(other.labels.bincount(minlength=10), client.train.labels.bincount(minlength=10))


def test_halves_are_halves_of_every_client_and_class(subject):
    asked = candidates(subject)
    half = asked.halves(np.random.default_rng(0))
    for client in subject.clients:
        for label in range(10):
            rows = (asked.owner == client.id) & (asked.labels == label)
            assert half[rows].sum() * 2 == rows.sum()


def test_nothing_held_out_is_refused(tmp_path):
    loop = finished(tmp_path, trained=False)
    loop.server.test, loop.server.validation = loop.server.test.subset([]), loop.server.validation.subset([])
    with pytest.raises(UserError, match="test or validation samples"):
        candidates(AttackTarget(loop))

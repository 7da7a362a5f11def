"""Noisy prototypes: what one sample changes, the noise, and that the same data are paid for once."""

import math

import pytest
import torch

from fdl.datamodules.guarded import GuardedSamples
from fdl.errors import UserError
from fdl.messages import Prototypes, parts_of
from fdl.methods.federated_distillation import FederatedDistillation
from fdl.privacy.accounting import epsilon, events_of
from fdl.privacy.noisy_prototypes import NoisyPrototypes, class_sums
from tests.privacy.clients import someone
from tests.test_loop import outcome
from tests.toy import federation, samples


class Plain:
    """A public space in which samples lie where they are."""

    def encode(self, samples):
        return samples.batch(torch.arange(len(samples)))[0].numpy()

    encode_public = encode


def owner(points, labels, classes, **more):
    private = samples(points.tolist(), labels.tolist())
    proxy = samples(torch.eye(points.shape[1]).tolist())
    return someone(dp_sgd="as if", train=private, proxy=proxy, encoder=Plain(), num_classes=classes, stage=0, **more)


def test_one_sample_more_moves_sums_and_counts_by_the_root_of_2_together():
    stream, clip, found = torch.Generator().manual_seed(0), 1.5, []
    for case in range(100):
        points = 10.0 ** (case % 4 - 2) * torch.randn(8, 5, generator=stream)
        labels = torch.randint(0, 3, (8,), generator=stream)
        sums, counts = class_sums(points, labels, 3, clip)
        fewer, less = class_sums(points[1:], labels[1:], 3, clip)
        found.append(float((((sums - fewer) / clip).square().sum() + (counts - less).square().sum()).sqrt()))
    assert max(found) <= math.sqrt(2) + 1e-5
    assert max(found) == pytest.approx(math.sqrt(2), rel=1e-5)  # of any sample that is clipped


def test_the_noise_has_the_deviation_of_the_formula():
    classes, width, each, z, clip = 400, 10, 60, 3.0, 2.0
    labels = torch.arange(classes).repeat(each)
    said = NoisyPrototypes(z, clip).message(owner(torch.zeros(len(labels), width), labels, classes), None, None)
    assert len(said.values) == classes
    counts = said.counts.double()
    deviation = z * math.sqrt(2)
    assert float(counts.std()) == pytest.approx(math.sqrt(deviation**2 + 1 / 12), rel=4 / math.sqrt(2 * classes))
    assert abs(float(counts.mean()) - each) < 4 * deviation / math.sqrt(classes)
    sums = said.values.double() * counts.unsqueeze(1)  # all samples lie at 0: only noise is left
    assert float(sums.std()) == pytest.approx(deviation * clip, rel=4 / math.sqrt(2 * classes * width) + 0.01)
    assert torch.linalg.vector_norm(said.values, dim=1).max() <= clip + 1e-5


def test_many_samples_and_little_noise_give_the_means():
    stream = torch.Generator().manual_seed(0)
    points, labels = torch.rand(200, 4, generator=stream), torch.arange(200) % 2
    said = NoisyPrototypes(1e-4, clip=10.0).message(owner(points, labels, 3), None, None)
    assert said.labels.tolist() == [0, 1]  # of the third class there is nothing but noise
    assert said.counts.tolist() == [100, 100]
    expected = torch.stack([points[labels == c].mean(0) for c in (0, 1)])
    torch.testing.assert_close(said.values, expected, rtol=0, atol=1e-3)
    assert said.confidence is None


def test_the_same_data_are_paid_for_once_and_others_again():
    client = owner(torch.rand(30, 4), torch.arange(30) % 2, 2)
    transfer = NoisyPrototypes(0.5)
    first = transfer.message(client, None, None)
    client.round, client.noise = 2, someone(round=2).noise
    again = transfer.message(client, None, None)
    assert torch.equal(first.values, again.values)
    assert [one["count"] for one in events_of(client)] == [1]
    client.stage = 1
    assert not torch.equal(first.values, transfer.message(client, None, None).values)
    assert [one["count"] for one in events_of(client)] == [2]
    assert math.isfinite(epsilon(events_of(client), 1e-5, "rdp"))
    assert epsilon(events_of(client), 1e-5, "rdp", "institution") == math.inf


def test_samples_that_are_closed_to_all_but_noisy_training_are_opened_for_it():
    client = owner(torch.rand(30, 4), torch.arange(30) % 2, 2)
    client.train = GuardedSamples(client.train, client.data_gate)
    with pytest.raises(UserError, match="reads private samples outside of a training with noise"):
        _ = client.train.labels
    assert len(NoisyPrototypes(0.1).message(client, None, None).values) == 2
    assert not client.data_gate.is_open


def test_the_clip_is_by_default_of_the_size_of_public_embeddings():
    client = owner(torch.full((50, 4), 7.0), torch.zeros(50, dtype=torch.int64), 1)  # the proxy set has norm 1
    assert torch.linalg.vector_norm(NoisyPrototypes(1e-3).message(client, None, None).values) == pytest.approx(1, 1e-5)


def test_answers_beside_noisy_prototypes_are_not_called_private(tmp_path):
    loop = federation(FederatedDistillation(prototypes=NoisyPrototypes(1.0)), tmp_path)
    loop.run()
    for client in loop.clients:
        assert {one["mechanism"]: one["noise_multiplier"] for one in events_of(client)} == {
            "noisy_prototypes": 1.0,
            "responses": 0.0,
        }
        assert epsilon(events_of(client), 1e-5, "rdp") == math.inf


def test_a_resumed_run_equals_the_straight_one(tmp_path):
    def toy(folder):
        method = FederatedDistillation(prototypes=NoisyPrototypes(0.1))
        return federation(method, tmp_path / folder, rounds=4, local_training=2)

    straight, crashed = toy("straight"), toy("crashed")
    straight.run()
    crashed.rounds = 2
    crashed.run()
    resumed = toy("crashed")
    resumed.run(resume=True)
    assert outcome(resumed) == outcome(straight)
    assert [events_of(c) for c in resumed.clients] == [events_of(c) for c in straight.clients]


def test_a_client_without_data_sends_noise_too(tmp_path):
    loop = federation(FederatedDistillation(prototypes=NoisyPrototypes(0.5)), tmp_path)
    loop.start_round(1)
    client = loop.clients[0]
    client.train = client.train.subset(torch.arange(0))
    with client.turn():
        with pytest.raises(StopIteration) as end:  # with prototypes, nothing is left to the executor
            next(loop.method.uploads.upload(client, client.specialist(), None))
        said = parts_of(end.value.value)[Prototypes]
    said.validate()
    assert "noisy_prototypes" in {one["mechanism"] for one in events_of(client)}


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="noise_multiplier must be a number > 0"):
        NoisyPrototypes(0.0)
    with pytest.raises(UserError, match="clip must be a number > 0"):
        NoisyPrototypes(1.0, clip=0.0)

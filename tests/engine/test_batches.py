"""Batches that are gathered several at once are those that are gathered one by one."""

import pytest
import torch

import fdl.engine.batches
from fdl.datamodules.samples import TensorSamples
from fdl.engine.batches import batches, gathered
from fdl.recipe import Fit
from fdl.utils.seeding import torch_stream


class Counted(TensorSamples):
    """Counts how often it is asked for a batch."""

    asked = 0

    def batch(self, indices, generator=None):
        self.asked += 1
        return super().batch(indices, generator)


def one_by_one(samples, drawn, generator):
    for ended, indices in drawn:
        yield ended, indices, samples.batch(indices, generator)


@pytest.mark.parametrize("augment", [None, "crop_flip"])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(("at_once", "asked"), [(10**6, 1), (3 * 8 * 64, 3), (1, 9)])
def test_they_are_the_same_in_the_same_order(augment, labels, at_once, asked, monkeypatch):
    monkeypatch.setattr(fdl.engine.batches, "AT_ONCE", at_once)
    x = torch.randint(0, 256, (21, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    samples = Counted(x, torch.arange(21) if labels else None, mean=[0.3], std=[0.2], augment=augment)

    def drawn(gather):
        generator = torch_stream(0, "fit")
        stream = batches(len(samples), Fit(epochs=3, batch_size=8), generator)
        return list(gather(samples, stream, generator)), generator.get_state()

    expected, state = drawn(one_by_one)
    samples.asked = 0
    found, left = drawn(gathered)
    assert torch.equal(state, left) and len(found) == len(expected) == 9
    for (ended, indices, batch), (end, order, wanted) in zip(found, expected):
        assert ended == end and torch.equal(indices, order) and torch.equal(batch[0], wanted[0])
        assert (batch[1] is None) == (wanted[1] is None) == (not labels)
        assert batch[1] is None or torch.equal(batch[1], wanted[1])
    assert samples.asked == (9 if augment else asked)


def test_no_batches_are_asked_for_where_there_are_none():
    samples = Counted(torch.zeros(0, 1, 2, 2))
    assert list(gathered(samples, iter(()), torch.Generator())) == []
    assert samples.asked == 0

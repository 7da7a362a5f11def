"""In what order, and how fast, the student meets the proxy samples."""

import pytest
import torch

from fdl.datamodules.samples import TensorSamples
from fdl.engine.batches import batches
from fdl.errors import UserError
from fdl.knowledge.aggregation.means import AggregatedResponses
from fdl.knowledge.distillation.curriculum import PACINGS, Curriculum, Paced, difficulty
from fdl.recipe import Fit


def knowledge(agreement, log_weight):
    n = len(agreement)
    return AggregatedResponses(
        torch.zeros(n, 2), "logits", torch.ones(n).long(), torch.tensor(log_weight), torch.tensor(agreement)
    )


KNOWN = knowledge([0.1, 0.9, 0.5, 0.7], [3.0, 0.0, 2.0, -float("inf")])
SAMPLES = TensorSamples(torch.arange(4.0).unsqueeze(1))


def test_what_is_easy():
    assert difficulty(KNOWN, "agreement").tolist() == pytest.approx([1, 0, 2 / 3, 1 / 3])
    assert difficulty(KNOWN, "confidence").tolist() == pytest.approx([0, 2 / 3, 1 / 3, 1])
    assert difficulty(KNOWN, "both").tolist() == pytest.approx([0.5, 1 / 3, 0.5, 2 / 3])
    assert difficulty(knowledge([0.5], [0.0]), "both").tolist() == [0]


@pytest.mark.parametrize("pacing", PACINGS)
def test_pacings_rise_from_start_to_all(pacing):
    curriculum = Curriculum(start=0.2, pacing=pacing)
    shares = [curriculum.share(t / 20) for t in range(21)]
    assert shares[0] == pytest.approx(0.2) and shares[-1] == pytest.approx(1.0)
    assert shares == sorted(shares)
    assert curriculum.share(7.0) == 1.0 and curriculum.share(-1.0) == pytest.approx(0.2)
    assert {"linear": 0.6, "root": 0.2 + 0.8 * 0.5**0.5, "step": 0.6}[pacing] == pytest.approx(curriculum.share(0.5))


def test_over_rounds_only_the_easy_ones_are_seen_at_first():
    curriculum = Curriculum(by="agreement", start=0.5, pacing="linear", length=2)
    for round, expected in ((1, {1, 3}), (2, {1, 3, 2}), (3, {0, 1, 2, 3}), (9, {0, 1, 2, 3})):
        view = curriculum.pace(SAMPLES, KNOWN, None, Fit(), round)
        seen = view.batch(torch.arange(4), torch.Generator())[0].flatten().tolist()
        assert set(seen) == expected
    assert seen == [0, 1, 2, 3]


def test_over_steps_the_share_grows_with_batches():
    curriculum = Curriculum(by="agreement", start=0.25, pacing="linear", over="steps", length=50)
    view = curriculum.pace(SAMPLES, KNOWN, None, Fit(epochs=None, steps=12), 1)
    in_use = []
    for _, indices in batches(4, Fit(epochs=None, steps=12, batch_size=4), torch.Generator().manual_seed(0)):
        in_use.append(len(set(view.batch(indices, torch.Generator())[0].flatten().tolist())))
    assert in_use == [1, 2, 2, 3, 3, 4, 4, 4, 4, 4, 4, 4]
    epochs = curriculum.pace(SAMPLES, KNOWN, None, Fit(epochs=6, batch_size=2), 1)
    assert epochs.share(6) == 1.0 and epochs.share(0) == 0.25


def test_rows_that_were_not_answered_are_left_out():
    rows = torch.tensor([0, 2])
    view = Curriculum(by="agreement", start=0.5, length=1).pace(SAMPLES.subset(rows), KNOWN, rows, Fit(), 1)
    assert view.batch(torch.arange(2), torch.Generator())[0].flatten().tolist() == [2, 2]
    assert len(view) == 2 and view.labels is None
    assert view.content_hash() == SAMPLES.subset(rows).content_hash() and view.nbytes == SAMPLES.subset(rows).nbytes
    assert len(view.subset(torch.tensor([0]))) == 1 and len(view.unlabelled()) == 2


def test_at_least_one_sample_is_in_use():
    view = Paced(SAMPLES, torch.tensor([2, 0, 1, 3]), lambda step: 1e-6)
    assert view.batch(torch.tensor([3, 1]))[0].flatten().tolist() == [2, 2]


@pytest.mark.parametrize(
    "settings",
    [
        {"start": 0.0},
        {"start": 1.5},
        {"length": 0},
        {"by": "luck"},
        {"pacing": "fast"},
        {"over": "years"},
        {"over": "steps", "length": 200},
    ],
)
def test_settings_are_checked(settings):
    with pytest.raises(UserError, match=next(iter(settings)) if len(settings) == 1 else "length"):
        Curriculum(**settings)

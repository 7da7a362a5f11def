"""Retrieval against the naive formula, torchmetrics and cases by hand."""

import math

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.retrieval import retrieval_recall

from fdl.metrics import retrieval as retrieval_metrics
from fdl.metrics.retrieval import contrastive_loss, image_text, match_ranks, recall
from tests.evaluators.models import Towers
from tests.evaluators.pairs import Pairs
from tests.evaluators.worlds import server

EVERY = ["mean_recall", "image_to_text_recall_at_1", "text_to_image_recall_at_5", "contrastive_loss"]


def unit(n, seed, d=8):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture(params=[1 << 23, 300, 1])
def chunk(request, monkeypatch):
    monkeypatch.setattr(retrieval_metrics, "_CELLS", request.param)


def test_recall_equals_torchmetrics_where_every_query_has_one_match(chunk):
    images = unit(50, 0)
    texts = F.normalize(images + 0.5 * unit(50, 1), dim=1)
    ranks, similar = match_ranks(images, texts), images @ texts.T
    for k in (1, 3, 10):
        expected = sum(retrieval_recall(similar[i], torch.arange(50) == i, top_k=k) for i in range(50)) / 50
        assert recall(ranks, k) == pytest.approx(float(expected))
    assert 0.1 < recall(ranks, 1) < recall(ranks, 10)


def test_with_several_matches_the_first_one_counts(chunk):
    images, texts, groups = unit(40, 0), unit(40, 1), torch.arange(40) % 12
    order = (images @ texts.T).argsort(1, descending=True)
    expected = []
    for i in range(40):
        right = [groups[j] == groups[i] for j in order[i].tolist()]
        expected.append(1 + right.index(True))  # what stands before the first match is none
    assert match_ranks(images, texts, groups).tolist() == expected


def test_equal_candidates_come_before_the_match():
    same = torch.ones(6, 4) / 2
    assert match_ranks(unit(6, 0, 4), same).tolist() == [6] * 6
    assert match_ranks(same, same, torch.tensor([0, 0, 0, 1, 1, 2])).tolist() == [4, 4, 4, 5, 5, 6]


def test_a_tie_within_rounding_is_a_tie():
    images = torch.tensor([[1.0, 0.0]])
    texts = torch.tensor([[1.0, 0.0], [1.0 - 1e-7, 0.0]])
    assert match_ranks(images.expand(2, 2), texts).tolist() == [2, 2]


def test_a_model_that_has_diverged_finds_nothing():
    images, texts = unit(5, 0), unit(5, 1)
    assert match_ranks(images * math.nan, texts).tolist() == [5] * 5
    texts = images.clone()
    texts[2] = math.nan
    assert match_ranks(images, texts).tolist() == [2, 2, 5, 2, 2]


def test_contrastive_loss_is_clip_s_over_all_pairs(chunk):
    images, texts = unit(20, 0), unit(20, 1)
    logits = 5.0 * images @ texts.T
    own = torch.arange(20)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert contrastive_loss(images, texts, 5.0) == pytest.approx(float(expected), rel=1e-5)
    assert contrastive_loss(images, images[:1].expand(20, -1), 5.0) > math.log(20)


def test_a_dual_encoder_is_measured_both_ways():
    images = unit(12, 0)
    texts = images.clone()
    texts[[3, 4]] = texts[[4, 3]]  # two captions swapped
    module, samples = Towers(images, texts, 4.0), Pairs([[i, 9] for i in range(12)])
    got = image_text(server(samples, task="image_text", batch_size=5), module, samples, EVERY)
    assert list(got) == EVERY
    assert got["image_to_text_recall_at_1"] == pytest.approx(10 / 12)
    ranks = torch.cat([match_ranks(images, texts), match_ranks(texts, images)]).reshape(2, -1)
    means = [(ranks[way] <= k).double().mean() for way in (0, 1) for k in (1, 5, 10)]
    assert got["mean_recall"] == pytest.approx(float(torch.stack(means).mean()))
    assert got["text_to_image_recall_at_5"] == pytest.approx(float((ranks[1] <= 5).double().mean()))
    assert got["contrastive_loss"] == pytest.approx(contrastive_loss(images, texts, 4.0), rel=1e-5)


def test_the_same_caption_is_a_match():
    """Images 0 and 1 have one caption; each finds the other's text as readily as its own."""
    vectors = torch.eye(3)[[0, 0, 1]]
    samples = Pairs([[0, 5, -1], [0, 5], [2]])
    got = image_text(server(samples, batch_size=2), Towers(vectors, vectors), samples, EVERY[:2])
    assert got == {"mean_recall": 1.0, "image_to_text_recall_at_1": 1.0}


def test_similarities_of_all_pairs_never_exist_at_once(monkeypatch):
    seen, product = [], torch.Tensor.__matmul__
    monkeypatch.setattr(retrieval_metrics, "_CELLS", 1000)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append(len(a) * b.shape[1]) or product(a, b))
    match_ranks(unit(300, 0), unit(300, 1))
    contrastive_loss(unit(300, 0), unit(300, 1), 1.0)
    assert max(seen) <= 1000 and sum(seen) == 3 * 300 * 300


def test_no_pairs_are_nan():
    samples = Pairs([])
    got = image_text(server(samples), Towers(torch.eye(2), torch.eye(2)), samples, EVERY)
    assert list(got) == EVERY
    assert all(math.isnan(value) for value in got.values())

"""What the server holds of each client, how alike clients are, and which rows a round has."""

from types import SimpleNamespace

import pytest
import torch

from fdl.errors import RejectedMessageError, UserError
from fdl.knowledge.aggregation.last_uploads import ExactLogWeights, LastAnswers
from fdl.knowledge.distillation.personalization import (
    AdaptiveWeights,
    Similarity,
    ValidationGains,
    prototype_likeness,
    response_likeness,
    shifted,
)
from fdl.knowledge.distillation.proxy_subsampling import SoftLabelCache, rows_of_round
from fdl.knowledge.distillation.upload_on_change import MEASURES, UploadOnChange
from fdl.messages import Features, Prototypes, QuantizedLogWeights, Responses, UploadStatus
from fdl.state import checkpoint

P = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]])


def server(round=1):
    return SimpleNamespace(state={}, round=round, seed=0, proxy=range(4), validation=[])


def upload(rows, shift=0.0):
    rows = None if rows is None else torch.tensor(rows)
    values = P if rows is None else P[rows]
    sure = QuantizedLogWeights.quantize(torch.arange(len(values)).float() + shift)
    layers = {"a": torch.arange(2.0 * len(values)).view(-1, 2)}
    groups = Prototypes(torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([1, 2]))
    return {
        Responses: Responses(values, "probabilities", rows, sure, 9),
        Features: Features(layers, rows),
        Prototypes: groups,
    }


def test_newer_answers_lie_over_older_ones():
    holder = server()
    last = LastAnswers(holder)
    last.keep(3, upload([0, 1]))
    holder.round = 2
    last.keep(3, upload([1, 2], shift=5.0))
    got = last.recall(3, 2, None)
    assert got[Responses].rows.tolist() == [0, 1, 2] and got[Responses].samples == 9
    assert torch.equal(got[Responses].values, P[:3])
    torch.testing.assert_close(got[Responses].confidence.values(), torch.tensor([0.0, 5.0, 6.0]), atol=0.03, rtol=0)
    assert got[Features].layers["a"].tolist() == [[0, 1], [0, 1], [2, 3]]
    assert got[Prototypes].labels.tolist() == [0, 1]
    assert last.recall(3, 2, torch.tensor([2, 3]))[Responses].rows.tolist() == [2]


def test_answers_expire_row_by_row_and_survive_a_checkpoint():
    holder = server()
    LastAnswers(holder).keep(0, upload([0, 1]))
    holder.round = 3
    LastAnswers(holder).keep(0, upload([1, 2]))
    holder.state = checkpoint.from_bytes(checkpoint.to_bytes(holder.state))
    holder.round = 4
    assert LastAnswers(holder, expiry=2).recall(0, 3, None)[Responses].rows.tolist() == [1, 2]
    assert LastAnswers(holder, expiry=9).all()[0][Responses].rows.tolist() == [0, 1, 2]
    holder.round = 9
    assert LastAnswers(holder, expiry=2).all() == {}
    with pytest.raises(RejectedMessageError, match="expired"):
        LastAnswers(holder, expiry=2).recall(0, 3, None)
    with pytest.raises(RejectedMessageError, match="of round 2 are not held, but of 3"):
        LastAnswers(holder).recall(0, 2, None)


def test_shifted_answers_count_more():
    plain = Responses(P, "probabilities")
    assert shifted(plain, 0.0) is plain
    assert shifted(plain, 1.5).confidence.values().tolist() == [1.5] * 4
    sure = Responses(P, "probabilities", confidence=ExactLogWeights(torch.tensor([31.0, 0.0, -31.0, 1.0])))
    assert shifted(sure, 2.0).confidence.values().tolist() == [32, 2, -29, 3]


def test_likeness_of_answers_is_1_for_equal_and_0_for_disjoint_ones():
    a = {Responses: Responses(P, "probabilities")}
    b = {Responses: Responses(P.flip(1)[[0, 3]], "probabilities", torch.tensor([0, 3]))}
    assert response_likeness(a, a) == pytest.approx(1) and response_likeness(a, b) == 0
    logits = {Responses: Responses(P[1:3].log(), "logits", torch.tensor([1, 2]))}
    assert response_likeness(a, logits) == pytest.approx(1)
    nothing = {Responses: Responses(P[:0], "probabilities", torch.tensor([], dtype=torch.int64))}
    assert response_likeness(a, nothing) == 0


def test_likeness_of_prototypes_is_the_best_cosine_of_common_classes():
    def made(values, labels):
        return {Prototypes: Prototypes(torch.tensor(values), torch.tensor(labels), torch.ones(len(labels)).long())}

    a = made([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], [0, 0, 1])
    b = made([[0.0, 5.0], [1.0, 0.0]], [0, 2])
    assert prototype_likeness(a, b) == pytest.approx(1)
    assert prototype_likeness(a, made([[-1.0, 0.0], [1.0, 0.0]], [0, 1])) == pytest.approx((0 + 0.5**0.5) / 2)
    assert prototype_likeness(a, made([[1.0, 0.0]], [2])) == 0


def test_weights_are_centred_clipped_and_start_alike():
    holder, weights = server(), AdaptiveWeights(rate=1.0, limit=2.0)
    assert weights.current(holder) == {} and weights.update(holder, {}) == {}
    weights.update(holder, {0: 0.5, 1: -0.5})
    assert weights.current(holder) == {0: 0.5, 1: -0.5}
    for _ in range(9):
        weights.update(holder, {0: 1.0, 1: -1.0, 2: 0.0})
    assert weights.current(holder) == {0: 2.0, 1: -2.0, 2: pytest.approx(0, abs=0.3)}


def test_weights_need_a_validation_set():
    with pytest.raises(UserError, match="validation"):
        ValidationGains(server())
    with pytest.raises(UserError, match="validation"):
        UploadOnChange(patience=1).update_plateau(server())


def test_rows_of_a_round():
    participant = SimpleNamespace(seed=1, round=3, proxy=range(10))
    rows = rows_of_round(participant, 0.3)
    assert len(rows) == 3 and rows.tolist() == sorted(set(rows.tolist()))
    assert torch.equal(rows, rows_of_round(SimpleNamespace(seed=1, round=3, proxy=range(10)), 0.3))
    drawn = {tuple(rows_of_round(SimpleNamespace(seed=1, round=r, proxy=range(10)), 0.3).tolist()) for r in range(9)}
    assert len(drawn) > 5 and len(rows_of_round(participant, 0.001)) == 1
    assert rows_of_round(participant, 1.0) is None


def test_the_cache_forgets_after_its_rounds():
    holder, cache = server(), SoftLabelCache(2)
    assert cache.update(holder, Responses(P[:2], "probabilities", torch.tensor([0, 1])))[0].tolist() == [0, 1]
    holder.round = 2
    rows, answers = cache.update(holder, Responses(P[2:3], "probabilities", torch.tensor([1])))
    assert rows.tolist() == [0, 1] and torch.equal(answers, P[[0, 2]])
    holder.round = 3
    assert cache.update(holder, Responses(P[3:], "probabilities", torch.tensor([3])))[0].tolist() == [1, 3]
    holder.round = 4
    assert cache.update(holder, Responses(P, "probabilities"))[0] is None
    assert SoftLabelCache(1).update(server(), Responses(P, "probabilities"))[0] is None


def test_measures_of_change():
    a, b = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    assert MEASURES["l1"](a, b).item() == pytest.approx(0.8)
    assert MEASURES["kl"](a, b).item() == pytest.approx((b * (b / a).log()).sum().item())
    assert MEASURES["kl"](b, b).item() == pytest.approx(0, abs=1e-6)


def test_a_client_compares_with_what_was_taken_in():
    rule, owner = UploadOnChange(threshold=0.1, expiry=3), SimpleNamespace(state={}, round=1)
    logits = P.clamp_min(1e-6).log()
    assert not rule.is_unchanged(owner, UploadStatus(0), logits, torch.tensor([0, 1]))
    owner.round = 2
    # of row 2 nothing was said yet
    assert not rule.is_unchanged(owner, UploadStatus(1), logits, torch.tensor([1, 2]))
    owner.round = 3
    assert rule.is_unchanged(owner, UploadStatus(2), logits, torch.tensor([0, 2]))
    assert not rule.is_unchanged(owner, UploadStatus(2), logits.flip(1), torch.tensor([0, 2]))
    owner.round = 4
    # the upload of round 3 was lost: what was accepted in round 2 is what counts
    assert rule.is_unchanged(owner, UploadStatus(2), logits, torch.tensor([1, 2]))
    owner.round = 6
    assert not rule.is_unchanged(owner, UploadStatus(2), logits, torch.tensor([1, 2]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: UploadOnChange(threshold=-1.0),
        lambda: UploadOnChange(measure="l7"),
        lambda: UploadOnChange(expiry=0),
        lambda: UploadOnChange(patience=0),
        lambda: Similarity(temperature=0.0),
        lambda: Similarity(by="name"),
        lambda: AdaptiveWeights(rate=0.0),
        lambda: AdaptiveWeights(limit=-1.0),
    ],
)
def test_settings_are_checked(make):
    with pytest.raises(UserError, match="must be"):
        make()

"""Answers of dual encoders: mixing affinities, what is refused, and how much an answer counts."""

import math

import pytest
import torch
import torch.nn.functional as F

from fdl.comm.channel import Channel
from fdl.comm.codec import Codec
from fdl.comm.ledger import Ledger
from fdl.comm.stages.quantize import Quantize
from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.shares import Cap
from fdl.knowledge.confidence.base import Entropy, Margin, SampleCount, Uniform, Validation
from fdl.knowledge.confidence.density import Density
from fdl.knowledge.confidence.pairs import PairConfidence, confidences
from fdl.knowledge.distillation.affinity import GuidedStudent
from fdl.knowledge.transfer.embeddings import EmbeddingPool, TeacherEmbeddings, answers, logit_blocks, temperature_of
from fdl.losses.contrastive import affinities, logits_between
from fdl.messages import QuantizedLogWeights, Responses
from fdl.methods.affinity_distillation import AffinityDistillation
from tests.pairs import PairSamples, blobs, federation, fit, tiny


def vectors(rows, width, seed, scale):
    draw = torch.Generator().manual_seed(seed)
    sides = [F.normalize(torch.randn(rows, width, generator=draw), dim=1) for _ in range(2)]
    return torch.cat(sides, dim=1) * math.sqrt(scale)


A, B = vectors(9, 4, 0, 5.0), vectors(9, 7, 1, 20.0)


def sides(given):
    return given[:, : given.shape[1] // 2], given[:, given.shape[1] // 2 :]


def pool(*entries, weighted=False, rows=9):
    found = EmbeddingPool(rows, weighted)
    for client, message in entries:
        found.add(message, client)
    return found.result()


def sent(values, rows=None, weights=None):
    confidence = None if weights is None else QuantizedLogWeights.quantize(weights)
    return Responses(values, "embeddings", rows, confidence)


def test_affinities_of_two_widths_are_mixed_row_by_row():
    weights = torch.linspace(-2, 2, 9)
    teachers = TeacherEmbeddings([A, B], torch.stack([weights, torch.zeros(9)]))
    rows = torch.tensor([7, 0, 3, 4])
    to_texts, to_images, known = teachers.targets(rows)
    share = torch.sigmoid(weights[rows]).unsqueeze(1)
    for found, way in ((to_texts, 0), (to_images, 1)):
        own = [affinities(sides(x[rows])[0] @ sides(x[rows])[1].T)[way] for x in (A, B)]
        torch.testing.assert_close(found, share * own[0] + (1 - share) * own[1])
        torch.testing.assert_close(found.sum(1), torch.ones(4))
    assert known.tolist() == [1, 1, 1, 1]


def test_the_order_of_clients_does_not_matter_and_equal_clients_are_one():
    rows = torch.arange(9)
    first = pool((3, sent(A)), (1, sent(B))).targets(rows)
    second = pool((1, sent(B)), (3, sent(A))).targets(rows)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    one, three = pool((0, sent(A))).targets(rows), pool(*((k, sent(A)) for k in range(3))).targets(rows)
    for a, b in zip(one, three):
        torch.testing.assert_close(a, b)


def test_a_loud_client_has_two_equal_shares_of_a_pair():
    shares = {}
    for cap in (Cap(), None):
        pool = EmbeddingPool(9, weighted=True, cap=cap)
        for i, level in enumerate((0.0, 32.0, 0.0, 0.0)):
            pool.add(Responses(A, "embeddings", None, QuantizedLogWeights.quantize(torch.full((9,), level))), i)
        shares[cap] = pool.result().weights[:, 0]
    torch.testing.assert_close(shares[Cap()], torch.tensor([1 / 6, 1 / 2, 1 / 6, 1 / 6]))
    torch.testing.assert_close(shares[None], torch.tensor([0.0, 1.0, 0.0, 0.0]))


def test_a_client_knows_as_candidates_only_what_it_answered():
    some = torch.tensor([0, 2, 5])
    teachers = pool((0, sent(A[some], some)), (1, sent(B[[2, 3]], torch.tensor([2, 3]))))
    to_texts, to_images, known = teachers.targets(torch.tensor([0, 2, 3, 8]))
    assert known.tolist() == [1, 1, 1, 0]  # nobody answered row 8
    images, texts = sides(A.half().float())
    of_a = affinities(images[[0, 2]] @ texts[[0, 2]].T)
    torch.testing.assert_close(to_texts[0, :2], of_a[0][0])
    assert to_texts[0, 2:].abs().max() == 0 and to_texts[3].abs().max() == 0 and to_images[3].abs().max() == 0
    images, texts = sides(B.half().float())
    of_b = affinities(images[[2, 3]] @ texts[[2, 3]].T)
    expected = torch.zeros(4)
    expected[:2] += of_a[1][1] / 2
    expected[1:3] += of_b[1][0] / 2
    torch.testing.assert_close(to_images[1], expected)


def test_certainty_travels_with_the_vectors_through_a_lossy_channel():
    channel = Channel(Codec([Quantize(bits=8)]), Codec(), Ledger(), 0)
    received = channel.upload(sent(B), 0, 1).values
    exact, coarse = (TeacherEmbeddings([x], torch.zeros(1, 9)).targets(torch.arange(9))[0] for x in (B, received))
    assert (exact - coarse).abs().max() < 0.05
    assert coarse.amax(1).mean() == pytest.approx(exact.amax(1).mean().item(), abs=0.01)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Responses(torch.rand(9, 4), "logits"), "expected embeddings, got logits"),
        (sent(A[:, :5]), "same width"),
        (sent(A[:8]), "all 9 proxy pairs"),
        (sent(A[:2], torch.tensor([1, 9])), "outside of 0 … 8"),
        (sent(A[:2], torch.tensor([1, 1])), "answered twice"),
        (sent(A * 10), "none may be longer"),
        (sent(A * math.nan), "not finite"),
        (sent(A, weights=torch.zeros(9)), "nobody asked for"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(message, reason):
    found = EmbeddingPool(9, weighted=False)
    with pytest.raises(RejectedMessageError, match=reason):
        found.add(message, 0)
    assert found.result() is None


def test_a_confidence_that_is_missing_or_too_large_is_refused():
    loud = sent(A, weights=torch.full((9,), 99.0))
    for message, reason in ((sent(A), "without confidence"), (loud, "outside of ±32")):
        with pytest.raises(RejectedMessageError, match=reason):
            EmbeddingPool(9, weighted=True).add(message, 0)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    loop = federation(
        AffinityDistillation(),
        tmp_path_factory.mktemp("run"),
        tiny(),
        [tiny()],
        [blobs(40, seed=1).subset(torch.arange(30))],
        blobs(50, seed=2),
        fit(30, 0.01, 16, "adam"),
        fit(1, 0.01),
        calibration=blobs(30, seed=3),
    )
    loop.start_round(1)
    found = loop.clients[0]
    with found.turn():
        found.fit(found.specialist(), found.train, found.local_training)
        found.save_specialist(found.specialist())
        yield found


def test_answers_are_unit_vectors_times_the_root_of_the_scale(client):
    module = client.specialist()
    given = answers(client, module, client.proxy)
    output = client.predict(module, client.proxy, "logits")
    images, texts = sides(given)
    torch.testing.assert_close(images @ texts.T, output, atol=1e-4, rtol=1e-4)
    cooler = answers(client, module, client.proxy, temperature=4.0)
    torch.testing.assert_close(cooler, given / 2)


def test_own_pair_is_the_probability_of_the_captions_group(client):
    given = answers(client, client.specialist(), client.proxy)
    images, texts = sides(given)
    ways = affinities(images @ texts.T)
    tokens = client.proxy.tokens
    same = (tokens.unsqueeze(0) == tokens.unsqueeze(1)).all(2)
    score = confidences(PairConfidence(), client, given).values()
    # columns: the group's probability, and those of all others, each the mean of both ways in logarithms
    group = sum((way * same).sum(1).log() for way in ways) / 2
    others = sum(way.log() for way in ways) / 2
    total = torch.logaddexp(group, others.masked_fill(same, -torch.inf).logsumexp(1))
    torch.testing.assert_close(score, group - total, atol=0.02, rtol=0)
    assert score.max() <= 0.02


@pytest.mark.parametrize(
    "kind", [Uniform(), SampleCount(), Validation(), Entropy(), Margin(), Density(k=2)], ids=lambda k: k.name
)
def test_every_confidence_weighs_pairs(client, kind):
    score = confidences(kind, client, answers(client, client.specialist(), client.proxy)).values()
    assert score.shape == (50,) and score.isfinite().all()
    if kind.name in ("uniform", "sample_count"):
        assert score.unique().numel() == 1
    if kind.name == "sample_count":
        assert score[0].item() == pytest.approx(math.log(30), abs=1e-4)
    if kind.name in ("density", "entropy", "margin"):
        assert score.std() > 0


def test_density_prefers_images_like_the_clients_own(client):
    near, far = client.train.images[:25], torch.randn(25, 1, 8, 8, generator=torch.Generator().manual_seed(7)) * 4
    mixed = PairSamples(torch.cat([near, far]), client.proxy.tokens)
    before, client.proxy = client.proxy, mixed
    client.cache.clear()
    try:
        score = confidences(Density(k=1), client, answers(client, client.specialist(), mixed)).values()
    finally:
        client.proxy = before
        client.cache.clear()
    assert score[:25].min() > score[25:].max()


def test_a_model_that_its_held_out_pairs_contradict_is_cooled_down(client):
    module, right = client.specialist(), client.calibration
    fitted = temperature_of(client, module)
    client.calibration = PairSamples(right.images, right.tokens.flip(0))
    try:
        assert temperature_of(client, module) > 3 * fitted
        client.calibration = right.subset([0])
        assert temperature_of(client, module) == 1.0
    finally:
        client.calibration = right


def test_blocks_hold_all_pairs_once():
    given = vectors(600, 3, 5, 2.0)
    parts = logit_blocks(given)
    assert [len(part) for part in parts] == [200, 200, 200]
    images, texts = sides(given)
    torch.testing.assert_close(parts[1], logits_between(images[200:400], texts[200:400], 1.0))


def test_feature_and_interactive_terms_written_out(client):
    """One projector, the identity, so that both terms follow from the vectors alone."""
    teachers = pool((4, sent(A, weights=torch.zeros(9))), weighted=True)
    guided = GuidedStudent(client, _Wide(4), teachers)
    with torch.no_grad():
        guided.projectors["4"].weight.copy_(torch.eye(4))
    own, rows = vectors(5, 4, 9, 1.0), torch.tensor([8, 1, 0, 4, 5])
    features, interactive = guided.terms(own, rows, teachers, torch.tensor(3.0))
    images, texts = (F.normalize(side.half().float(), dim=1) for side in sides(A[rows]))
    cosines = [(mine * other).sum(1) for mine, other in zip(sides(own), (images, texts))]
    assert features.item() == pytest.approx((1 - (cosines[0] + cosines[1]) / 2).mean().item(), abs=1e-3)
    z = [3 * mine @ other.T for mine, other in zip(sides(own), (texts, images))]
    expected = sum((side.logsumexp(1) - side.diagonal()).mean() for side in z) / 2
    assert interactive.item() == pytest.approx(expected.item(), abs=1e-3)


class _Wide(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding_dim = width

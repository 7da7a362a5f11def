"""Affinity distillation: numbers by hand, limits where it must do nothing, restarts, and whether it teaches."""

import math

import pytest
import torch

from fdl.comm.stages.quantize import Quantize
from fdl.errors import RejectedMessageError, UserError
from fdl.federation.local_turns import run_local_update
from fdl.knowledge.confidence.base import SampleCount
from fdl.knowledge.confidence.pairs import PairConfidence
from fdl.knowledge.transfer.embeddings import answers
from fdl.messages import Responses
from fdl.methods.affinity_distillation import AffinityDistillation
from fdl.participants import copy_of
from fdl.state.weights import module_state
from tests.pairs import Given, blobs, federation, fit, given, tiny


def sigma(z):
    return 1 / (1 + math.exp(-z))


def by_hand(method, folder, rounds=1, private=((0, 1), (1, 0)), **more):
    """Client 0's private captions are right, client 1's are swapped; the public ones are right."""
    loop = federation(
        method,
        folder,
        Given,
        [Given],
        [given(texts) for texts in private],
        given((0, 1)),
        fit(1, 0.25),
        fit(1, 0.5),
        rounds=rounds,
        **more,
    )
    loop.run()
    return loop


# d(-log σ(s))/d log s = -(1 - σ(s)) s for right captions, σ(s) s for swapped ones, from s = 2
RIGHT = math.log(2) + 0.25 * (1 - sigma(2)) * 2
SWAPPED = math.log(2) - 0.25 * sigma(2) * 2


def test_two_clients_by_hand(tmp_path):
    loop = by_hand(AffinityDistillation(), tmp_path)
    for client, expected in zip(loop.clients, (RIGHT, SWAPPED)):
        assert client.state["specialist"]["logit_scale"].item() == pytest.approx(expected, abs=1e-6)
    # either row's probability of its own pair is σ(s), so the mean over clients is p; the student's gradient (q - p) s
    target = (sigma(math.exp(RIGHT)) + sigma(math.exp(SWAPPED))) / 2
    student = math.log(2) - 0.5 * (sigma(2) - target) * 2
    assert loop.server.student.logit_scale.item() == pytest.approx(student, abs=2e-4)  # answers are held in 16 bits
    q, p = sigma(2), target
    loss = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert loop.history[0]["metrics"]["distil/loss"] == pytest.approx(loss, abs=1e-4)


def test_clients_weigh_by_their_confidence(tmp_path):
    # log n_k: the second client has three times as many pairs, all right, so it counts ¾
    private = ((0, 1), (0, 1, 0, 1, 0, 1))
    loop = federation(
        AffinityDistillation(SampleCount()),
        tmp_path,
        Given,
        [Given],
        [given((0, 1)), given((0, 1)).subset([0, 1, 0, 1, 0, 1])],
        given((0, 1)),
        fit(1, 0.25),
        fit(1, 0.5),
    )
    loop.run()
    assert len(private[1]) == 6
    scales = [math.exp(client.state["specialist"]["logit_scale"].item()) for client in loop.clients]
    target = 0.25 * sigma(scales[0]) + 0.75 * sigma(scales[1])
    student = math.log(2) - 0.5 * (sigma(2) - target) * 2
    assert loop.server.student.logit_scale.item() == pytest.approx(student, abs=2e-3)  # weights travel in 8 bits


def test_the_students_own_contrastive_loss_is_added(tmp_path):
    loop = by_hand(AffinityDistillation(contrastive=0.5), tmp_path)
    target = (sigma(math.exp(RIGHT)) + sigma(math.exp(SWAPPED))) / 2
    gradient = (sigma(2) - target) * 2 - 0.5 * (1 - sigma(2)) * 2
    assert loop.server.student.logit_scale.item() == pytest.approx(math.log(2) - 0.5 * gradient, abs=2e-4)
    assert loop.history[0]["metrics"]["distil/contrastive"] == pytest.approx(-math.log(sigma(2)), abs=1e-5)


def test_the_students_vectors_come_back_and_teach(tmp_path):
    with_feedback = by_hand(
        AffinityDistillation(feedback="student"), tmp_path / "a", rounds=2, client_distil=fit(1, 0.5)
    )
    first = by_hand(AffinityDistillation(), tmp_path / "b")
    student = math.exp(first.server.student.logit_scale.item())
    scale = math.exp(RIGHT)
    digested = RIGHT - 0.5 * (sigma(scale) - sigma(student)) * scale
    expected = digested + 0.25 * (1 - sigma(math.exp(digested))) * math.exp(digested)
    found = with_feedback.clients[0].state["specialist"]["logit_scale"].item()
    assert found == pytest.approx(expected, abs=2e-4)  # answers are held in 16 bits
    sent = with_feedback.ledger.by_kind()
    assert sent["down/responses"] > 0 and "down/responses" not in first.ledger.by_kind()


def test_of_a_download_that_the_link_cut_short_the_rest_teaches(tmp_path):
    loop = federation(AffinityDistillation(), tmp_path, **BLOBS)
    loop.start_round(1)
    client, rows = loop.clients[0], torch.arange(0, 60, 3)
    whole = answers(loop.server, loop.server.student, loop.server.proxy)
    upload = run_local_update(loop.method, client, Responses(whole[rows], "embeddings", rows))
    assert upload.values.shape == (60, 16) and 0 < client.metrics["digest/loss"] < 10
    with pytest.raises(RejectedMessageError, match="expected embeddings"):
        run_local_update(loop.method, client, Responses(whole.softmax(1), "probabilities"))


def test_other_data_are_refused(tmp_path):
    loop = federation(AffinityDistillation(), tmp_path, **BLOBS)
    loop.server.task = "classification"
    with pytest.raises(UserError, match=r"needs images with captions.*these are classification data"):
        loop.run()


BLOBS = {
    "student": tiny(dim=16),
    "specialists": [tiny(dim=8, image="cnn", widths=[4]), tiny(dim=24, text="transformer", heads=2)],
    "private": [blobs(40, seed=1), blobs(40, seed=2), blobs(30, seed=3)],
    "proxy": blobs(60, seed=4),
    "local_training": fit(5, 0.002, 16, "adam"),
    "server_distil": fit(6, 0.002, 16, "adam"),
    "test": blobs(50, seed=5),
}


def test_a_client_whose_model_is_the_student_teaches_nothing(tmp_path):
    # plain gradient descent: Adam would take steps of full size from the rounding of answers to 16 bits, too
    still = {"local_training": fit(0, 0.1), "server_distil": fit(6, 0.001), "specialists": [BLOBS["student"]]}
    loop = federation(AffinityDistillation(), tmp_path, **BLOBS | still | {"private": BLOBS["private"][:1]})
    before = copy_of(loop.server.student)
    loop.clients[0].state["specialist"] = dict(before)
    loop.run()
    assert loop.history[0]["metrics"]["distil/loss"] < 1e-5
    for name, value in module_state(loop.server.student).items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=0)


def test_identical_clients_are_one(tmp_path):
    def student(count, folder):
        loop = federation(
            AffinityDistillation(PairConfidence()),
            folder,
            **BLOBS | {"specialists": [BLOBS["specialists"][0]], "private": [BLOBS["private"][0]] * count},
        )
        fresh = copy_of(loop.runtime.create("specialist-0", 5))
        for client in loop.clients:
            client.state["specialist"] = dict(fresh)
            client.local_training = fit(0, 0.1)
        loop.run()
        return copy_of(loop.server.student)

    one, three = student(1, tmp_path / "a"), student(3, tmp_path / "b")
    for name, value in one.items():
        torch.testing.assert_close(value, three[name], atol=2e-5, rtol=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    method = {
        "confidence": PairConfidence(),
        "feedback": "student",
        "contrastive": 0.1,
        "calibrate": True,
        "features": 0.5,
    }
    settings = BLOBS | {"calibration": blobs(20, seed=6), "upload": [Quantize(bits=8)]}
    straight = federation(AffinityDistillation(**method), tmp_path / "a", rounds=3, **settings)
    straight.run()
    first = federation(AffinityDistillation(**method), tmp_path / "b", rounds=1, **settings)
    first.run()
    second = federation(AffinityDistillation(**method), tmp_path / "b", rounds=3, **settings)
    second.recipe.federation.rounds = second.rounds = 3
    second.run(resume=True)
    for name, value in module_state(straight.server.student).items():
        assert torch.equal(value, module_state(second.server.student)[name]), name
    assert straight.ledger.totals() == second.ledger.totals()
    assert straight.history[-1]["metrics"] == second.history[-1]["metrics"]


def test_the_student_learns_what_no_single_client_was_shown(tmp_path):
    """Each client sees six of twelve kinds; the student, taught by affinities alone, finds the captions of all."""
    kinds = blobs(400, seed=1, kinds=12)
    kind = kinds.tokens[:, 5] - ord("a")
    loop = federation(
        AffinityDistillation(PairConfidence(2.0)),
        tmp_path,
        tiny(dim=16),
        BLOBS["specialists"],
        [kinds.subset(torch.nonzero(kind // 6 == k).flatten()) for k in (0, 1)],
        blobs(200, seed=2, kinds=12),
        fit(60, 0.01, 32, "adam"),
        fit(120, 0.01, 32, "adam"),
        test=blobs(100, seed=3, kinds=12),
    )
    loop.run()
    metrics = loop.history[-1]["metrics"]
    assert metrics["student/test/mean_recall"] > 0.8 > 0.6 > metrics["specialists/test/mean_recall"]


def test_projectors_are_learnt_kept_and_bring_the_student_closer(tmp_path):
    method = AffinityDistillation(features=1.0, interactive=0.5)
    loop = federation(
        method,
        tmp_path,
        **BLOBS | {"server_distil": fit(60, 0.005, 16, "adam"), "local_training": fit(0, 1.0)},
        rounds=2,
    )
    loop.run()
    kept = loop.server.state["projectors"]
    assert [kept[str(k)]["weight"].shape for k in range(3)] == [(8, 16), (24, 16), (8, 16)]
    first, second = (record["metrics"] for record in loop.history)
    assert second["distil/features"] < 0.8 * first["distil/features"]
    assert second["distil/interactive"] < first["distil/interactive"]
    parts = second["distil/affinity"] + second["distil/features"] + 0.5 * second["distil/interactive"]
    assert second["distil/loss"] == pytest.approx(parts, rel=1e-5)


def test_a_negative_weight_is_refused():
    with pytest.raises(UserError, match="contrastive must be a number ≥ 0"):
        AffinityDistillation(contrastive=-1.0)

"""Federated distillation with each of its options: equivalences where one is off, resuming, and what is refused."""

import dataclasses
import math

import pytest
import torch

from fdl.comm.stages.quantize import Quantize
from fdl.errors import RejectedMessageError, UserError
from fdl.federation.traffic_estimate import estimate_bytes
from fdl.knowledge.distillation.curriculum import Curriculum
from fdl.knowledge.distillation.personalization import AdaptiveWeights, Similarity
from fdl.knowledge.distillation.upload_on_change import UploadOnChange
from fdl.knowledge.transfer.features import FeatureTransfer
from fdl.knowledge.transfer.prototypes import PrototypeTransfer
from fdl.messages import Bundle, Features, Prototypes, Responses, UploadStatus, parts_of
from fdl.methods.federated_distillation import FederatedDistillation
from tests.test_loop import outcome
from tests.toy import E0, E1, federation, samples, weight

OPTIONS = {
    "features": lambda: {"features": FeatureTransfer(layers=0)},
    "projector": lambda: {"features": FeatureTransfer(layers=0, loss="mse")},
    "prototypes": lambda: {"prototypes": PrototypeTransfer(floor=1, count=1)},
    "concepts": lambda: {"prototypes": PrototypeTransfer(floor=1, count=1, by="concept", loss="mse")},
    "film": lambda: {"features": FeatureTransfer(layers=0, loss="cosine"), "adapter": "film"},
    "own space": lambda: {"prototypes": PrototypeTransfer(floor=1, space="embedding"), "adapter": "low_rank"},
    "weights": lambda: {"adaptive_client_weights": AdaptiveWeights()},
    "personal": lambda: {"personalization": Similarity()},
    "curriculum": lambda: {"curriculum": Curriculum(start=0.5)},
    "steps": lambda: {"curriculum": Curriculum(start=0.5, over="steps", length=50)},
    "cache": lambda: {"proxy_fraction": 0.5, "soft_label_cache_rounds": 3, "features": FeatureTransfer(layers=0)},
    "frequency": lambda: {"upload_policy": UploadOnChange(threshold=0.05, expiry=2)},
    "patience": lambda: {"upload_policy": UploadOnChange(threshold=0.05, patience=1)},
    "sharpen": lambda: {"sharpen": 0.1},
    "power": lambda: {"sharpen": 2.0, "sharpening": "power"},
    "restart": lambda: {"reinitialize_clients": True},
    "alpha": lambda: {"alpha": 0.5},
    "all": lambda: {
        "features": FeatureTransfer(layers=0),
        "prototypes": PrototypeTransfer(floor=1, count=1),
        "adapter": "affine",
        "adaptive_client_weights": AdaptiveWeights(),
        "personalization": Similarity(by="prototypes"),
        "curriculum": Curriculum(start=0.5),
        "proxy_fraction": 0.5,
        "soft_label_cache_rounds": 2,
        "upload_policy": UploadOnChange(threshold=0.01),
    },
}


def toy(folder, rounds=3, upload=(), **options):
    loop = federation(
        FederatedDistillation(**options), folder, rounds=rounds, local_training=2, server_distil=2, upload=upload
    )
    loop.server.validation = samples([E0, E1], [0, 1])
    return loop


def ran(folder, **options):
    loop = toy(folder, **options)
    loop.run()
    assert all(record["refused"] == {} for record in loop.history)
    return loop


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_equals_the_straight_one(tmp_path, name):
    straight = toy(tmp_path / "straight", rounds=4, **OPTIONS[name]())
    straight.run()
    crashed = toy(tmp_path / "crashed", rounds=4, **OPTIONS[name]())
    crashed.rounds = 2  # stops here, as if the rest were never asked for
    crashed.run()
    resumed = toy(tmp_path / "crashed", rounds=4, **OPTIONS[name]())
    resumed.run(resume=True)
    assert resumed.resumed_from == 2
    assert outcome(resumed) == outcome(straight)
    assert straight.server.state.keys() == resumed.server.state.keys()


@pytest.mark.parametrize("name", OPTIONS)
def test_options_work_through_a_lossy_link_and_can_be_estimated(tmp_path, name):
    loop = toy(tmp_path, upload=[Quantize(8)], **OPTIONS[name]())
    estimated = estimate_bytes(loop)
    loop.run()
    assert all(record["refused"] == {} for record in loop.history)
    assert estimated
    assert torch.isfinite(weight(loop.server.student)).all()


@pytest.mark.parametrize(
    "options",
    [
        {"features": FeatureTransfer(layers=0, weight=0), "prototypes": PrototypeTransfer(weight=0)},
        {"curriculum": Curriculum(start=1.0)},
        {"proxy_fraction": 1.0, "soft_label_cache_rounds": 3},
        {"upload_policy": UploadOnChange(threshold=0.0)},
        {"alpha": 1.0, "adapter": "film"},
    ],
)
def test_an_option_that_does_nothing_changes_nothing(tmp_path, options):
    plain, optional = ran(tmp_path / "a"), ran(tmp_path / "b", **options)
    assert outcome(plain) == outcome(optional)


def test_the_identity_adapter_is_no_adapter(tmp_path):
    features = FeatureTransfer(layers=0, loss="mse")
    without = ran(tmp_path / "a", features=features)
    identity = ran(tmp_path / "b", features=features, adapter="identity")
    assert outcome(without) == outcome(identity)
    assert "participants" not in identity.server.state


def test_parts_of_the_loss_add_up(tmp_path):
    loop = ran(
        tmp_path,
        alpha=0.5,
        features=FeatureTransfer(layers=0, loss="cosine", weight=2.0),
        prototypes=PrototypeTransfer(floor=1, count=1, weight=0.25),
        adapter="film",
    )
    for record in loop.history:
        part = {name: record["metrics"][f"distil/{name}"] for name in ("response", "feature", "prototype", "adapter")}
        total = 0.5 * part["response"] + 2 * part["feature"] + 0.25 * part["prototype"] + part["adapter"]
        assert record["metrics"]["distil/loss"] == pytest.approx(total, rel=1e-5)


def test_every_kind_is_counted_under_its_name(tmp_path):
    loop = ran(tmp_path, features=FeatureTransfer(layers=0), prototypes=PrototypeTransfer(floor=1, count=1))
    kinds = loop.ledger.by_kind()
    assert {"up/responses", "up/features", "up/prototypes", "down/responses"} <= kinds.keys()


def test_projectors_and_adapter_are_saved_and_left_behind(tmp_path):
    loop = ran(tmp_path, features=FeatureTransfer(layers=0, loss="cosine"), adapter="film")
    assert set(loop.server.state["heads"]) == {"adapter"}
    assert loop.server.state["heads"]["adapter"]["adapter.scale"].shape[0] == 2
    assert [name for name, _ in loop.server.student.named_parameters()] == ["linear.weight"]


def test_sharpening_makes_the_targets_ds_fl_s(tmp_path):
    # both rows: mean probability a of the right class; softmax((a, 1 - a) / T) with T = 0.1
    plain, sharp = (federation(FederatedDistillation(sharpen=t), tmp_path / str(t)) for t in (None, 0.1))
    plain.run(), sharp.run()
    a = plain.server.state["answers"][0, 0].item()
    expected = 1 / (1 + math.exp(-(2 * a - 1) / 0.1))
    assert sharp.server.state["answers"][0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_sharpening_by_a_power_is_scarlet_s(tmp_path):
    power = {"sharpen": 2.0, "sharpening": "power"}
    plain, sharp = (ran(tmp_path / name, rounds=1, **args) for name, args in (("plain", {}), ("sharp", power)))
    p = plain.server.state["answers"]
    torch.testing.assert_close(sharp.server.state["answers"], p**2 / (p**2).sum(1, keepdim=True))


def test_restarted_specialists_know_only_what_came_back(tmp_path):
    loop = toy(tmp_path, rounds=2, reinitialize_clients=True)
    seen = []
    digest = loop.clients[0].fit
    loop.clients[0].fit = lambda module, samples, config, objective, name: (
        seen.append((name, weight(module).clone())) or digest(module, samples, config, objective, name)
    )
    loop.run()
    # round 1 trains; round 2 begins at a new model, here zeros again, digests and trains
    assert [name for name, _ in seen] == ["fit", "digest", "fit"]
    assert not seen[1][1].any() and seen[2][1].any()


def test_specialists_begin_with_labelled_public_samples_once(tmp_path):
    loop = toy(tmp_path, rounds=2, pretrain=3)
    for participant in (loop.server, *loop.clients):
        participant.public = samples([E0, E1], [0, 1])
    loop.run()
    assert "public" in loop.method.requires
    assert ["pretrain/loss" in record["clients"]["0"] for record in loop.history] == [True, False]
    # three full-batch steps on both samples, each of which moves a margin z by (1 - σ(2z)) / 2
    z, losses = 0.0, []
    for _ in range(3):
        losses.append(math.log(1 + math.exp(-2 * z)))
        z += (1 - 1 / (1 + math.exp(-2 * z))) / 2
    assert loop.history[0]["clients"]["0"]["pretrain/loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    # the student begins likewise, once, before it first learns from answers
    assert loop.history[0]["metrics"]["pretrain/loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert "pretrain/loss" not in loop.history[1]["metrics"]
    assert loop.ledger.by_kind()["setup/public"] == 2 * (2 * 2 * 4 + 2)


def test_an_unchanged_client_sends_a_few_bytes_and_still_teaches(tmp_path):
    loop = ran(tmp_path, rounds=3, upload_policy=UploadOnChange(threshold=10.0, expiry=5))
    plain = ran(tmp_path / "plain", rounds=1)
    up = [row for row in loop.ledger.rows() if row.direction == "up"]
    assert [row.kind for row in up] == ["responses"] * 2 + ["standing"] * 4
    # the answers of round 1 are what the server goes on with
    assert torch.equal(loop.server.state["answers"], plain.server.state["answers"])


def test_held_answers_expire(tmp_path):
    loop = ran(tmp_path, rounds=5, upload_policy=UploadOnChange(threshold=10.0, expiry=2))
    sent = [row.round for row in loop.ledger.rows() if row.direction == "up" and row.kind == "responses"]
    assert sent == [1, 1, 4, 4]


def test_a_lost_upload_is_noticed_and_made_up_for(tmp_path):
    loop = toy(tmp_path, rounds=3, upload_policy=UploadOnChange(threshold=10.0))
    transmit = loop.channel.transmit

    def damaged(data, client, round, direction):
        data = transmit(data, client, round, direction)
        return data[:-1] if (client, round, direction) == (1, 1, "up") else data

    loop.channel.transmit = damaged
    loop.run()
    kinds = {(row.round, row.client): row.kind for row in loop.ledger.rows() if row.direction == "up"}
    assert [kinds[r, 1] for r in (1, 2, 3)] == ["responses", "responses", "standing"]
    assert [kinds[r, 0] for r in (1, 2, 3)] == ["responses", "standing", "standing"]
    assert [list(record["refused"]) for record in loop.history] == [["1"], [], []]


def test_a_claim_that_nothing_changed_needs_something_held(tmp_path):
    loop = toy(tmp_path, upload_policy=UploadOnChange())
    loop.start_round(3)
    collection = loop.method.aggregate(loop.server)
    with pytest.raises(RejectedMessageError, match="answers of round 2 are not held, but none"):
        collection.add(UploadStatus(2), 0)
    with pytest.raises(RejectedMessageError, match="expected responses, got standing"):
        toy(tmp_path).method.aggregate(loop.server).add(UploadStatus(2), 0)


def test_at_a_plateau_clients_are_not_asked(tmp_path):
    loop = toy(tmp_path, rounds=5, upload_policy=UploadOnChange(threshold=1e-9, patience=1, expiry=50))
    loop.start_round(1)
    loop.server.state["plateau"] = {"loss": -1.0, "rounds": 0}
    loop.run_round(1)
    before = {client.id: client.state["specialist"]["linear.weight"].clone() for client in loop.clients}
    loop.run_round(2)
    assert all(torch.equal(client.state["specialist"]["linear.weight"], before[client.id]) for client in loop.clients)
    assert {row.kind for row in loop.ledger.rows() if row.direction == "up" and row.round == 2} == {"standing"}


def test_all_clients_answer_the_same_rows_and_the_cache_fills(tmp_path):
    loop = toy(tmp_path, rounds=6, proxy_fraction=0.5, soft_label_cache_rounds=6)
    seen = []
    make = loop.method.aggregate

    def watched(server):
        collection = make(server)
        add = collection.add
        collection.add = lambda message, client: (seen.append((server.round, message.rows)), add(message, client))
        return collection

    loop.method.aggregate = watched
    loop.run()
    by_round = {}
    for round, rows in seen:
        by_round.setdefault(round, []).append(rows.tolist())
    assert all(len(rows) == 2 and rows[0] == rows[1] and len(rows[0]) == 1 for rows in by_round.values())
    assert len({rows[0][0] for rows in by_round.values()}) == 2
    assert (loop.server.state["cache"]["round"] > 0).all()
    assert loop.history[-1]["metrics"]["student/test/accuracy"] == 1.0


def test_gains_follow_the_answers_that_help(tmp_path):
    loop = toy(tmp_path, adaptive_client_weights=AdaptiveWeights(rate=0.5, limit=0.3))
    loop.start_round(1)
    loop.method.setup(loop.server, loop.clients)
    collection = loop.method.aggregate(loop.server)
    right = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    before = weight(loop.server.student).clone()
    collection.add(Responses(right, "probabilities"), 0)
    collection.add(Responses(right.flip(1), "probabilities"), 1)
    assert torch.equal(weight(loop.server.student), before)
    gains = collection.result().gains
    assert gains[0] == pytest.approx(1, abs=1e-3) and gains[1] == pytest.approx(-1, abs=1e-3)
    log = loop.method.adaptive_client_weights.update(loop.server, gains)
    # ± ½ by rate, centred at 0, clipped at 0.3
    assert log == {"weights/0": 0.3, "weights/1": -0.3}
    mean = loop.method.aggregate(loop.server)
    mean.add(Responses(right, "probabilities"), 0)
    mean.add(Responses(right.flip(1), "probabilities"), 1)
    share = 1 / (1 + math.exp(-0.6))
    expected = share * 0.9 + (1 - share) * 0.1
    assert mean.result().responses.values[0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_a_personal_download_is_what_the_others_say(tmp_path):
    loop = ran(tmp_path, rounds=1, personalization=Similarity())
    loop.start_round(2)
    for me, other in ((0, 1), (1, 0)):
        got = loop.download_for(me)
        with loop.clients[other].turn():
            specialist = loop.clients[other].specialist()
            expected = torch.softmax(loop.clients[other].predict(specialist, loop.server.proxy), 1)
        torch.testing.assert_close(got.values, expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"alpha": -1.0}, "alpha must be"),
        ({"sharpen": 0.0}, "sharpen must be"),
        ({"sharpening": "hammer"}, "sharpening must be one of entropy_reduction, power"),
        ({"pretrain": -1}, "pretrain must be at least 0"),
        ({"proxy_fraction": 0.0}, "proxy_fraction must be"),
        ({"soft_label_cache_rounds": 0}, "soft_label_cache_rounds must be"),
        ({"adapter": "fylm"}, "adapter must be one of identity, linear"),
        ({"prototypes": PrototypeTransfer(floor=1, space="embedding")}, "adapter: identity"),
        ({"personalization": Similarity(by="prototypes")}, "prototypes are switched off"),
        ({"personalization": Similarity(), "feedback": "none"}, "feedback is none"),
        ({"loss": "mse", "space": "logits", "sharpen": 0.1}, "unsharpened"),
    ],
)
def test_options_that_do_not_go_together(options, reason):
    with pytest.raises(UserError, match=reason):
        FederatedDistillation(**options)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: parts_of(m)[Responses], "expected features and prototypes and responses, got responses"),
        (lambda m: swapped(m, Features, layers={"embedding": torch.zeros(3, 2)}), "all 2 proxy rows, got 3"),
        (lambda m: swapped(m, Features, layers={"embedding": torch.zeros(2, 1 << 17)}), "131072 features of a sample"),
        (lambda m: swapped(m, Features, rows=torch.tensor([0, 2])), "row of features lies outside"),
        (lambda m: swapped(m, Features, rows=torch.tensor([0, 0])), "sent twice"),
        (lambda m: swapped(m, Prototypes, labels=torch.tensor([2])), "class lies outside of 0 … 1"),
        (lambda m: swapped(m, Prototypes, values=torch.zeros(1, 3)), r"expected prototypes \[m, 2\]"),
    ],
)
def test_an_upload_that_does_not_fit_is_refused_whole(tmp_path, spoil, reason):
    options = {"features": FeatureTransfer(layers=0), "prototypes": PrototypeTransfer(floor=1, count=1)}
    loop, alone = toy(tmp_path / "a", rounds=1, **options), toy(tmp_path / "b", rounds=1, **options)
    update = loop.method.local_update

    def bad(client, download):
        message = yield from update(client, download)
        return spoil(message) if client.id == 1 else message

    loop.method.local_update = bad
    loop.run()
    assert reason.split("\\")[0] in loop.history[0]["refused"]["1"]
    alone.cohort = lambda round: ([0], [])
    alone.run()
    assert torch.equal(weight(loop.server.student), weight(alone.server.student))


def swapped(message, kind, **changes):
    return Bundle(tuple(dataclasses.replace(part, **changes) if type(part) is kind else part for part in message.parts))

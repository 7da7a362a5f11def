import math

import numpy as np
import pytest
import torch

from fdl.attacks.audit import audit
from fdl.attacks.base import AttackTarget
from fdl.attacks.candidates import candidates
from fdl.attacks.membership import RMIA, LiRA, LossThreshold, proven_epsilon
from fdl.attacks.roc import Roc
from fdl.attacks.shadows import run_shadow_federation, run_shadow_federations
from fdl.errors import UserError
from fdl.messages import Responses, parts_of
from fdl.privacy.accounting import Policy, event, spend
from fdl.state.weights import module_state
from tests.attacks.runs import FIT, finished, recipe


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("run"))


def frozen(loop):
    states = [module_state(loop.server.student)] + [client.state["specialist"] for client in loop.clients]
    return [{name: tensor.clone() for name, tensor in state.items()} for state in states]


def listen(loop):
    """Keep what the server receives, by client."""
    heard, send = {}, loop.channel.upload

    def upload(message, client, round):
        heard[client] = send(message, client, round)
        return heard[client]

    loop.channel.upload = upload
    return heard


@pytest.mark.parametrize(
    "args",
    [
        {"confidence": "entropy", "calibrate": True},
        {"reinitialize_clients": True, "space": "logits"},
        {"upload_policy": {"target": "on_change", "args": {"threshold": 0.01}}, "proxy_fraction": 0.5},
    ],
    ids=["calibrated", "restarted", "on_change"],
)
def test_answers_are_those_that_the_server_received_last(args, tmp_path):
    from fdl.build import build

    loop = build(recipe(method={"target": "federated_distillation", "args": args}), tmp_path)
    heard = listen(loop)
    loop.run()
    subject, compared = AttackTarget(loop), 0
    for client in loop.clients:
        sent = parts_of(heard[client.id]).get(Responses)
        if sent is not None:  # else it said that nothing has changed
            compared += 1
            again = subject.received_responses(client)
            assert torch.equal(again.values, sent.values)
            assert (again.rows is None) == (sent.rows is None)
            assert again.rows is None or torch.equal(again.rows, sent.rows)
    assert compared


def test_an_audit_leaves_the_run_as_it_was(loop):
    before, sent, history = frozen(loop), loop.ledger.totals(), len(loop.history)
    audit(loop, [LossThreshold(), LiRA(shadows=2)])
    assert loop.ledger.totals() == sent and len(loop.history) == history
    for now, then in zip(frozen(loop), before):
        assert all(torch.equal(now[name], then[name]) for name in then)


def test_states_on_disk_are_read_and_not_written(tmp_path):
    found = {}
    for where in ("memory", "disk"):
        loop = finished(tmp_path / where, federation={"clients": 2, "rounds": 1, "client_state": where})
        before = sorted((tmp_path / where / "clients").glob("*"))
        found[where] = audit(loop, [LiRA(shadows=2)]).metrics()
        assert sorted((tmp_path / where / "clients").glob("*")) == before
        assert len(before) == (2 if where == "disk" else 0)
    assert found["disk"] == found["memory"]


def test_shadows_differ_from_the_run_and_from_each_other_and_come_again(loop):
    subject = AttackTarget(loop)
    found = run_shadow_federations(subject, 2, neighbours=2)
    assert set(found.signals) == {"student", "specialists", "responses"}
    assert (found.inside[0] ^ found.inside[1]).all(), "complementary"
    for phi in found.signals.values():
        assert np.isfinite(phi).all() and not np.allclose(phi[0], phi[1])
    again = run_shadow_federations(AttackTarget(loop), 2, neighbours=2)
    assert all(np.array_equal(again.signals[name], phi) for name, phi in found.signals.items())
    assert run_shadow_federations(subject, 2, neighbours=2).signals["student"] is not None  # kept, not run again
    asked = candidates(subject)
    shadow = run_shadow_federation(subject, asked, found.inside[1], 1)
    assert [len(c.train) for c in shadow.clients] == [len(c.train) for c in loop.clients]
    weights = [torch.nn.utils.parameters_to_vector(s.student.parameters()) for s in (shadow.server, loop.server)]
    assert not torch.equal(*weights)


def test_what_is_known_by_heart_is_found(tmp_path):
    """With labels at random a model can only learn its samples by heart, and every attack sees that."""
    loop = finished(
        tmp_path,
        trained=False,
        data={"target": "digits", "args": {"proxy": 20, "validation": 80, "test": 100, "limit": 400}},
        federation={"clients": 2, "rounds": 1},
        specialists=[{"target": "mlp", "args": {"hidden": [128]}}],
        local_training=FIT | {"steps": 150},
    )
    draw = torch.Generator().manual_seed(0)
    for part in (loop.server.test, loop.server.validation, *(c.train for c in loop.clients)):
        part.labels = part.labels[torch.randperm(len(part), generator=draw)]
    loop.history.clear()
    loop.run()
    found = audit(loop, [LossThreshold(), LiRA(shadows=4), LiRA(shadows=4, online=False, label="off"), RMIA(shadows=4)])
    metrics = found.metrics()
    for attack in ("loss_threshold", "lira", "off", "rmia"):
        assert metrics[f"{attack}/specialists/auc"] > 0.75, metrics
        assert metrics[f"{attack}/specialists/epsilon_lower"] > 0.5
    assert found.passed, "nothing was promised"
    spend(loop.clients[0], event("dp_sgd", 10.0, 0.01, 10))  # a lie
    spend(loop.clients[1], event("dp_sgd", 10.0, 0.01, 10))
    found = audit(loop, [LossThreshold(targets=["specialists"])])
    assert not found.passed
    assert "loss_threshold on the specialists: shows ε ≥" in found.violations[0]


def test_each_target_is_covered_by_what_protects_it(loop):
    subject, client, policy = AttackTarget(loop), loop.clients[0], Policy(1e-5)
    claims = lambda: [proven_epsilon(subject, client, t, policy) for t in ("student", "specialists", "responses")]  # noqa: E731
    try:
        assert claims() == [math.inf] * 3
        spend(loop.server, event("gnmax", 5.0, count=3, level="institution"))
        assert math.isfinite(claims()[0]) and claims()[1:] == [math.inf] * 2
        spend(client, event("gaussian", 5.0, level="institution"))
        assert math.isfinite(claims()[2]) and claims()[2] < claims()[0] and claims()[1] == math.inf
        client.state["privacy"]["events"] = [event("dp_sgd", 2.0, 0.1, 10)]
        assert claims()[1] == claims()[2] < math.inf
    finally:
        loop.server.state.pop("privacy"), client.state.pop("privacy")


def test_scores_come_with_who_they_are_of(loop):
    findings = LossThreshold(targets=["student"]).run(AttackTarget(loop))
    asked = candidates(AttackTarget(loop))
    (curve,) = findings.curves
    scores = findings.arrays["student/scores"]
    assert np.array_equal(curve.members, scores[asked.member])
    logits = loop.server.predict(loop.server.student, asked.samples)
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(asked.labels), reduction="none")
    np.testing.assert_allclose(scores, -losses.numpy(), rtol=1e-4, atol=1e-6)
    assert 0 <= Roc.of(curve.members, curve.non_members).auc <= 1


@pytest.mark.parametrize("method", ["fedavg", "centralized", "single_site"])
def test_methods_without_answers_are_attacked_where_they_can_be(method, tmp_path):
    loop = finished(tmp_path, method=method, channel={}, federation={"clients": 2, "rounds": 1})
    found = audit(loop, [LiRA(shadows=2)])
    targets = {curve.target for curve in found.findings["lira"].curves}
    assert targets == ({"specialists"} if method == "single_site" else {"student"})
    with pytest.raises(UserError, match="no responses that could be attacked"):
        audit(loop, [LossThreshold(targets=["responses"])])


@pytest.mark.parametrize("shadows", [0, 3])
def test_shadows_come_in_pairs(shadows):
    with pytest.raises(UserError, match="shadows must be"):
        LiRA(shadows=shadows)

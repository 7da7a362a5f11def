"""Attacks on confidences, against what is known of them beforehand."""

import dataclasses

import numpy as np
import pytest
import torch

from fdl.attacks.audit import audit
from fdl.attacks.base import AttackTarget
from fdl.attacks.confidence_inference import ConfidenceInference, likelihood_ratio
from fdl.attacks.confidence_inversion import ConfidenceInversion
from fdl.attacks.roc import Roc
from fdl.build import build
from fdl.errors import UserError
from fdl.knowledge.confidence.base import public_space
from fdl.knowledge.confidence.density import Density
from fdl.messages import QuantizedLogWeights
from fdl.recipe import from_mapping
from fdl.runs.audit import _recipe

FIT = {"steps": 1, "batch_size": 16, "optimizer": {"target": "sgd", "args": {"lr": 0.1}}}


def federation(folder, confidence, clients=3, **changes):
    tree = {
        "name": "told",
        "method": {"target": "federated_distillation", "args": {"confidence": confidence}},
        "data": {"target": "digits", "args": {"proxy": 200, "validation": 340, "test": 360}},
        "partition": {"target": "dirichlet", "args": {"alpha": 0.5}},
        "federation": {"clients": clients, "rounds": 1, "calibration_fraction": 0.0},
        "specialists": [{"target": "mlp", "args": {"hidden": [4]}}],
        "student": {"target": "mlp", "args": {"hidden": [4]}},
        "local_training": FIT,
        "server_distil": FIT,
        "evaluation": {"every": 9, "specialists": False},
        "callbacks": [],
        "fabric": {"threads": 1, "accelerator": "cpu"},
    }
    loop = build(from_mapping(tree | changes), folder)
    loop.run()
    return loop


def auc(loop, **settings):
    curve = ConfidenceInference(**settings).run(AttackTarget(loop)).curves[0]
    return Roc.of(curve.members, curve.non_members).auc


@pytest.mark.parametrize("confidence", ["uniform", "sample_count", "entropy"])
def test_a_confidence_that_is_not_made_of_samples_tells_nothing(tmp_path, confidence):
    assert auc(federation(tmp_path, confidence), simulations=4) == 0.5


def test_distances_to_single_samples_give_members_away_and_those_to_groups_less(tmp_path):
    single, groups = (
        auc(federation(tmp_path / str(floor), {"target": "density", "args": {"floor": floor}}, 12), simulations=40)
        for floor in (0, 10_000)
    )
    assert single > 0.75 and groups < 0.7


def test_the_ratio_of_likelihoods_by_hand():
    # one row and one candidate: N(1, 1) with it, N(0, 1) without, so the log-ratio at w is w - 1/2
    simulated = np.array([[0.0], [2.0], [-1.0], [1.0]])
    inside = np.array([[True], [True], [False], [False]])
    for seen in (-1.0, 0.5, 3.0):
        found = likelihood_ratio(np.array([seen]), simulated, inside, np.array([[0]]), 0.0)
        assert found == pytest.approx([seen - 0.5])


def test_the_default_audit_looks_at_confidences_that_are_made_of_samples(tmp_path):
    for name, expected in (("density", 1), ("entropy", 0)):
        loop = federation(tmp_path / name, name)
        (tmp_path / f"{name}.yaml").write_text(_yaml(loop.recipe))
        attacks = [a.target for a in _recipe(tmp_path / f"{name}.yaml", (), ()).evaluation.attacks]
        assert attacks.count("confidence_inference") == expected and "lira" in attacks
    found = audit(federation(tmp_path / "audited", "density"), [ConfidenceInference(simulations=4)])
    assert "confidences/auc" in found.findings["confidence_inference"].metrics and found.passed


def _yaml(recipe):
    import yaml

    return yaml.safe_dump(recipe.to_dict())


def test_no_confidences_are_nothing_to_attack(tmp_path):
    loop = federation(tmp_path, None)
    for attack in (ConfidenceInference(), ConfidenceInversion()):
        with pytest.raises(UserError, match="send no confidences"):
            attack.run(AttackTarget(loop))
    with pytest.raises(UserError, match="no distances to nearest samples"):
        ConfidenceInversion().run(AttackTarget(federation(tmp_path / "other", "entropy")))
    with pytest.raises(UserError, match="must be even"):
        ConfidenceInference(simulations=5)


def site(loop, count):
    """A client with so many of its samples, and what it would send."""
    return loop.clients[0].clone(train=loop.clients[0].train.subset(np.arange(count)))


def inverted(loop, confidence, owner, **settings):
    sent = QuantizedLogWeights.quantize(confidence.log_weights(owner, torch.zeros(len(owner.proxy), 10)))
    rows = np.arange(len(owner.proxy))
    attack = ConfidenceInversion(**{"steps": 600, "starts": 1} | settings)
    return attack.attack(confidence, owner, rows, sent.values().double().numpy(), 0)


def test_a_single_sample_is_rebuilt_and_with_a_floor_it_is_not(tmp_path):
    loop = federation(tmp_path, "density")
    owner = site(loop, 1)
    bare = inverted(loop, Density(floor=0), owner)
    assert bare.measured["distance"].max() < 0.05 < bare.measured["distance_public"].min()
    # as near as the public space lets it come
    space, pixels = public_space(owner), owner.train.batch(torch.arange(1))[0].flatten(1).double().numpy()
    best = -10 * np.log10(np.square(pixels - space.decode(space.encode(owner.train))).mean())
    assert bare.measured["psnr"][0] == pytest.approx(best, abs=0.5)
    assert bare.measured["psnr"][0] > bare.measured["psnr_public"][0] + 5
    covered = inverted(loop, Density(), owner)
    assert covered.measured["distance"].min() > covered.measured["distance_public"].max()


def test_small_clients_of_a_run_are_attacked(tmp_path):
    loop = federation(tmp_path, {"target": "density", "args": {"floor": 0}}, clients=40)
    small = [client for client in loop.clients if 0 < client.samples <= 3]
    if not small:
        loop.clients[0]._train = loop.clients[0].train.subset(np.arange(3))
        loop.clients[0].update_data()
        small = [loop.clients[0]]
    found = ConfidenceInversion(largest=3, steps=200, starts=1).run(AttackTarget(loop))
    assert found.metrics["clients"] == len(small) and 0 <= found.metrics["found"] <= 1
    assert {"distance", "distance_public", "psnr", "psnr_public"} <= found.metrics.keys()
    none = ConfidenceInversion(largest=1).run(AttackTarget(federation(tmp_path / "large", "density")))
    assert none.metrics == {"clients": 0.0} and none.notes
    dataclasses.asdict(none)

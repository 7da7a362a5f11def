"""Which private samples are held out from training, and that centralised training has no others than the clients."""

import pytest
import torch

from fdl.build import build
from fdl.knowledge.transfer.features import FeatureTransfer
from fdl.knowledge.transfer.layer_selection import LayerSelection
from fdl.methods.federated_distillation import FederatedDistillation
from fdl.recipe import from_mapping

COUNT = 1797 - 40 - 40 - 60  # digits less those of the server


def built(folder, method, **changes):
    tree = {
        "name": "t",
        "method": method,
        "data": {"target": "digits", "args": {"proxy": 40, "validation": 40, "test": 60}},
        "partition": {"target": "dirichlet", "args": {"alpha": 0.3}},
        "federation": {"clients": 6, "rounds": 1},
        "specialists": [{"target": "mlp", "args": {"hidden": [8]}}],
        "student": {"target": "mlp", "args": {"hidden": [8]}},
        "teacher": {"target": "mlp", "args": {"hidden": [8]}},
        "callbacks": [],
        "fabric": {"accelerator": "cpu", "threads": 1},
    }
    for key, value in changes.items():
        tree["federation"][key] = value
    return build(from_mapping(tree), folder)


def images(samples):
    """Samples as a sorted list of their bytes."""
    inputs = samples.batch(torch.arange(len(samples)))[0]
    return sorted(image.numpy().tobytes() for image in inputs)


def distilled(**args):
    return {"target": "federated_distillation", "args": args}


@pytest.mark.parametrize(
    "method", ["fedavg", "single_site", "fedproto", distilled(), distilled(confidence="density")], ids=str
)
def test_what_nobody_looks_at_is_trained_on(tmp_path, method):
    loop = built(tmp_path, method)
    assert sum(client.samples for client in loop.clients) == COUNT
    assert all(len(client.calibration) == 0 for client in loop.clients)


@pytest.mark.parametrize(
    "method",
    [
        distilled(calibrate=True),
        distilled(confidence="validation"),
        distilled(confidence={"target": "product", "args": {"factors": ["density", "validation"]}}),
    ],
    ids=str,
)
def test_a_tenth_is_held_out_for_a_method_that_looks_at_it(tmp_path, method):
    loop = built(tmp_path, method)
    for client in loop.clients:
        whole = client.samples + len(client.calibration)
        assert len(client.calibration) == min(round(0.1 * whole), whole - 1)
    assert sum(client.samples + len(client.calibration) for client in loop.clients) == COUNT


def test_what_the_recipe_says_holds_for_every_method(tmp_path):
    for share, method in ((0.0, distilled(calibrate=True)), (0.5, "fedavg")):
        loop = built(tmp_path, method, calibration_fraction=share)
        held = sum(len(client.calibration) for client in loop.clients)
        assert held == pytest.approx(share * COUNT, abs=6)


@pytest.mark.parametrize("share", [None, 0.2])
@pytest.mark.parametrize("method", ["centralized", "distillation"])
def test_centralised_training_has_what_all_clients_train_on_and_nothing_else(tmp_path, method, share):
    central = built(tmp_path, method, calibration_fraction=share)
    federated = built(tmp_path, "fedavg", calibration_fraction=share)
    theirs = [image for client in federated.clients for image in images(client.train)]
    assert images(central.server.pooled) == sorted(theirs)
    assert len(theirs) == pytest.approx((1 - (share or 0)) * COUNT, abs=6)


@pytest.mark.parametrize("toward", ["answers", "labels"])
def test_layers_that_are_chosen_by_their_alignment_with_labels_need_some(toward):
    features = FeatureTransfer(select=LayerSelection(toward=toward))
    assert FederatedDistillation(features=features).needs_calibration == (toward == "labels")

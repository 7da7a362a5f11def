"""Phases of centralised and of federated training on the toy federation; the server's samples are (1, 0) and (0, 1)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fdl.build import build
from fdl.datamodules.digits import Digits
from fdl.datamodules.samples import TensorSamples
from fdl.errors import UserError
from fdl.federation.traffic_estimate import estimate_bytes
from fdl.knowledge.aggregation.server_optimizers import Adam
from fdl.knowledge.distillation.phase_schedule import FixedPhases, PlateauPhases, SinglePhase
from fdl.methods.centralized import Centralized
from fdl.methods.fedavg import FedAvg
from fdl.methods.federated_foundation import FederatedFoundation
from fdl.recipe import from_mapping, load
from tests.test_loop import Crash, outcome
from tests.toy import E0, E1, federation, samples, weight

ROOT = Path(__file__).parents[2]
PUBLIC = samples([E0, E1], [0, 1])


def toy(method, folder, **settings):
    loop = federation(method, folder, **settings)
    loop.server.public = loop.server.pooled = loop.server.validation = PUBLIC
    return loop


def run(method, folder, **settings):
    loop = toy(method, folder, **settings)
    loop.run()
    return loop


def rounds(loop, key):
    return [record["metrics"][key] for record in loop.history]


def test_one_round_of_either_phase(tmp_path):
    # public: half a step on either sample, W = [[¼, -¼], [-¼, ¼]]; then each client moves its own column by 1 - σ(½),
    # of which the mean takes ¼ and ¾
    loop = run(FederatedFoundation(switch=FixedPhases(1, 1)), tmp_path, rounds=2)
    missing = 1 - 1 / (1 + math.exp(-0.5))
    first, second = 0.25 + 0.25 * missing, 0.25 + 0.75 * missing
    torch.testing.assert_close(weight(loop.server.student), torch.tensor([[first, -second], [-first, second]]))
    assert rounds(loop, "phase") == [0.0, 1.0]


def test_nothing_is_sent_in_a_centralised_phase(tmp_path):
    loop = run(FederatedFoundation("fine_tuning", FixedPhases(2, 1)), tmp_path, rounds=5)
    assert rounds(loop, "phase") == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert {row.round for row in loop.ledger.rows()} == {1, 4}
    assert loop.history[1]["metrics"]["fit/loss"] > 0 and loop.history[1]["clients"]["0"] == {}


def test_a_first_phase_that_never_ends_is_one_of_the_two_alone(tmp_path):
    common = {"rounds": 3, "local_training": 2, "server_distil": 2}
    alone = run(FederatedFoundation("pre_training", SinglePhase()), tmp_path / "a", **common)
    central = run(Centralized(), tmp_path / "b", **common)
    assert torch.equal(weight(alone.server.student), weight(central.server.student))
    assert alone.ledger.rows() == []
    for name, optimizer in (("mean", None), ("adam", Adam())):
        method = FederatedFoundation("fine_tuning", SinglePhase(), optimizer)
        federated = run(method, tmp_path / name / "c", **common)
        averaged = run(FedAvg(optimizer), tmp_path / name / "d", **common)
        assert torch.equal(weight(federated.server.student), weight(averaged.server.student))
        assert [list(row) for row in federated.ledger.rows()] == [list(row) for row in averaged.ledger.rows()]


def test_a_plateau_of_the_validation_score_switches(tmp_path):
    # one public step puts every validation sample right, and then no accuracy is gained: round 1 has no gain to look
    # at, round 2 gains nothing and ends the phase, as does every round from then on
    method = FederatedFoundation(switch=PlateauPhases(threshold=0.1, patience=1, smoothing=0.0, min_rounds=1))
    loop = run(method, tmp_path, rounds=4)
    assert rounds(loop, "phase") == [0.0, 0.0, 1.0, 0.0]
    assert rounds(loop, "switch/smoothed") == [1.0] * 4


@pytest.mark.parametrize(
    "switch", [FixedPhases(2, 2), PlateauPhases(threshold=0.1, patience=2, smoothing=0.5), SinglePhase()]
)
@pytest.mark.parametrize("crash_in", [2, 4])
def test_a_run_resumed_within_a_phase_equals_the_straight_one(tmp_path, switch, crash_in):
    settings = {"rounds": 6, "local_training": 2, "client_fraction": 0.5, "dropout": 0.2}
    method = FederatedFoundation(switch=switch)
    straight = run(method, tmp_path / "straight", **settings)
    crashed = toy(method, tmp_path / "crashed", callbacks=[Crash(crash_in)], **settings)
    with pytest.raises(RuntimeError, match="crash"):
        crashed.run()
    resumed = toy(method, tmp_path / "crashed", **settings)
    resumed.run(resume=True)
    assert outcome(resumed) == outcome(straight)
    assert resumed.server.state == straight.server.state


def test_a_dry_run_measures_a_federated_round(tmp_path):
    method = FederatedFoundation(switch=FixedPhases(1, 1))
    loop = toy(method, tmp_path, rounds=2)
    sizes = estimate_bytes(loop)
    loop.run()
    sent = {d: {r.client: r.bytes for r in loop.ledger.rows() if r.direction == d} for d in ("down", "up")}
    assert sizes == sent
    never = toy(FederatedFoundation(switch=SinglePhase()), tmp_path / "never")
    assert estimate_bytes(never) == {"down": {0: 0, 1: 0}, "up": {0: 0, 1: 0}}


def test_what_it_cannot_do_without(tmp_path):
    loop = toy(FederatedFoundation(), tmp_path)
    loop.server.validation = samples([E0], [0]).subset(torch.arange(0))
    with pytest.raises(
        UserError, match=r"plateau watches the validation set, which is empty; set data.args.validation"
    ):
        loop.run()
    with pytest.raises(UserError, match="mode must be one of pre_training, fine_tuning"):
        FederatedFoundation("backwards")
    recipe = from_mapping(
        {"name": "none", "method": "federated_foundation", "data": "digits", "student": "mlp", "callbacks": []}
    )
    with pytest.raises(UserError, match=r"data.args.public: the server has no labelled samples"):
        build(recipe, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers102"])
def test_the_recipes_for_photographs_run_with_a_small_network(tmp_path, name):
    import timm
    from safetensors.torch import save_file

    classes, side = {"cifar10": (10, 32), "cifar100": (100, 32), "flowers102": (102, 32)}[name]
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "images.npz",
        x_train=rng.integers(0, 256, (6 * classes, side, side, 3), dtype=np.uint8),
        y_train=np.arange(6 * classes) % classes,
        x_test=rng.integers(0, 256, (classes, side, side, 3), dtype=np.uint8),
        y_test=np.arange(classes),
    )
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0, img_size=side).state_dict(), tmp_path / "vit.safetensors")
    arguments = {"path": tmp_path / "images.npz", "proxy": 0, "validation": classes, "public": classes}
    inner = ", ".join(f"{key}: {value}" for key, value in arguments.items())
    model = f"{{model: test_vit, checkpoint: {tmp_path / 'vit.safetensors'}, tuning: lora, lora: {{rank: 16}}}}"
    overrides = [
        f"data={{target: arrays, args: {{{inner}, augment: crop_flip}}}}",
        f"student.args={model}",
        "federation={clients: 3, rounds: 2}",
        "local_training={epochs: null, steps: 1, batch_size: 8}",
        "server_distil={epochs: null, steps: 1, batch_size: 8}",
        "evaluation={metrics: [accuracy]}",
        "method.args.switch={target: fixed_phases, args: {centralized: 1, federated: 1}}",
        "fabric={accelerator: cpu, threads: 1}",
        "callbacks=[]",
    ]
    recipe = load(ROOT / f"recipes/methods/federated_foundation_{name}.yaml")
    assert recipe.data.target == name and recipe.data.args["public"] and recipe.student.args["tuning"] == "lora"
    timm_name = recipe.student.args["model"]
    assert timm_name in timm.list_models(f"{timm_name.partition('.')[0]}.*", pretrained=True)
    loop = build(load(ROOT / f"recipes/methods/federated_foundation_{name}.yaml", overrides), tmp_path / "run")
    loop.run()
    assert rounds(loop, "phase") == [1.0, 0.0]
    trained = sum(p.numel() for p in loop.server.student.parameters() if p.requires_grad)
    up = sum(row.bytes for row in loop.ledger.rows() if row.direction == "up")
    assert up == pytest.approx(3 * 4 * trained, rel=0.1)


# -- the server's own samples


def pixels(part: TensorSamples) -> list[bytes]:
    return [row.tobytes() for row in part.batch(torch.arange(len(part)))[0].numpy()]


def digits(**arguments):
    data = Digits(**{"proxy": 100, "validation": 50, "test": 100, **arguments})
    data.setup()
    return data


def test_public_samples_come_out_of_the_private_ones_and_change_nothing_else():
    without, with_public = digits(), digits(public=200)
    for split in ("proxy", "validation", "test"):
        assert pixels(getattr(without, split)) == pixels(getattr(with_public, split))
    taken, left = pixels(with_public.public), pixels(with_public.train)
    assert len(taken) == 200 and sorted(taken + left) == sorted(pixels(without.train))
    assert len(without.public) == 0 and without.fingerprint() != with_public.fingerprint()
    # in proportion to the classes only where that is asked for, without an effect on the other sets
    asked = digits(public=200, stratify_public=True)
    assert pixels(asked.test) == pixels(without.test) and pixels(asked.public) != taken
    before = digits(stratify_public=True).train.labels.numpy()
    counts = np.bincount(asked.public.labels.numpy(), minlength=10)
    shares = np.bincount(before, minlength=10) / len(before)
    assert np.abs(counts - 200 * shares).max() <= 1
    assert pixels(digits(public=200, seed=0).public) == taken != pixels(digits(public=200, seed=1).public)


def test_public_as_a_share_and_too_much_of_it():
    without, half = digits(), digits(public=0.5)
    assert len(half.public) == round(0.5 * len(without.train))
    with pytest.raises(UserError, match="digits: public 1600 leaves nothing to train on of 1547 training samples"):
        digits(public=1600)
    with pytest.raises(UserError, match="public must be a whole number of samples or a fraction below 1"):
        Digits(public=-1)

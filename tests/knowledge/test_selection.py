"""The measured choice of layers."""

from types import SimpleNamespace

import pytest
import torch

from fdl.datamodules.samples import TensorSamples
from fdl.engine.runtime import Runtime
from fdl.errors import UserError
from fdl.knowledge.transfer.extraction import Extracted
from fdl.knowledge.transfer.features import FeatureTransfer, principal
from fdl.knowledge.transfer.layer_selection import LayerSelection, dependence, select
from fdl.losses.features import linear_cka
from fdl.modules.small_classifiers import CNN


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_quadruples(x, y):
    """The criterion as a mean over all quadruples of different rows, straight from its definition."""
    k, m = x @ x.T, y @ y.T
    i, j, q, r = torch.meshgrid(*[torch.arange(len(x))] * 4, indexing="ij")
    different = (i != j) & (i != q) & (i != r) & (j != q) & (j != r) & (q != r)
    i, j, q, r = (index[different] for index in (i, j, q, r))
    return (k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])).mean().item()


def classes(count=120, kinds=4):
    return torch.nn.functional.one_hot(torch.arange(count) % kinds, kinds).double()


def rotation(width, seed=3):
    return torch.linalg.qr(draw(width, width, seed=seed)).Q


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_dependence_is_the_mean_over_quadruples(shift):
    x = draw(9, 5)
    y = x[:, :2] @ draw(2, 7, seed=1) + draw(9, 7, seed=2)
    assert dependence(x + shift, y) == pytest.approx(by_quadruples(x, y), rel=1e-6)
    assert dependence(x, x) == pytest.approx(by_quadruples(x, x), rel=1e-9)


def test_alignment_of_many_samples_is_cka_and_that_of_noise_is_none():
    x = draw(4000, 3)
    layers = {"some": torch.cat([x, draw(4000, 3, seed=1)], 1), "noise": draw(4000, 40, seed=2)}
    _, scores = select(layers, x, {"some": 6, "noise": 40}, 46)
    some = (layers["some"] - layers["some"].mean(0)) / layers["some"].std(0)
    assert scores["some"] == pytest.approx(1 - linear_cka(some, x).item(), abs=1e-3)
    few = {"noise": draw(20, 200, seed=3)}
    _, unbiased = select(few, classes(20), {"noise": 200}, 200)
    # with more features than samples the plain estimate calls any noise a good layer
    assert abs(unbiased["noise"]) < 0.1 < 0.3 < 1 - linear_cka(few["noise"], classes(20)).item()


def test_the_informative_layer_is_found_and_what_repeats_it_is_left_out():
    target = classes()
    told = target @ rotation(4) + 0.05 * draw(120, 4, seed=1)
    layers = {"noise": draw(120, 4, seed=2), "wide": told.repeat(1, 4), "told": told}
    widths = {name: values.shape[1] for name, values in layers.items()}
    chosen, scores = select(layers, target, widths, budget=100)
    assert chosen == ["told"] and scores["told"] > 0.9 > 0.1 > abs(scores["noise"])
    assert scores["wide"] == pytest.approx(scores["told"], rel=0.02)


def test_layers_that_complete_each_other_are_sent_together_as_far_as_the_budget_goes():
    target = classes(kinds=3)
    halves = {"b": target[:, 1:2], "a": target[:, :1], "noise": draw(120, 1, seed=1)}
    noisy = {name: values + 0.1 * draw(120, 1, seed=i) for i, (name, values) in enumerate(halves.items())}
    widths = dict.fromkeys(noisy, 1)
    assert select(noisy, target, widths, 3)[0] == ["b", "a"]
    assert len(select(noisy, target, widths, 1)[0]) == 1


def test_one_good_layer_takes_the_place_of_cheap_ones_that_use_its_budget_up():
    target = classes(kinds=4)
    cheap = target[:, :1] + 0.8 * draw(120, 1, seed=1)
    layers = {"cheap": cheap, "good": target @ rotation(4)}
    # by the number, the cheap one tells more; then the good one does not fit any more
    scores = select(layers, target, {"cheap": 1, "good": 100}, 100)[1]
    assert scores["cheap"] / 1 > scores["good"] / 100 and scores["good"] > scores["cheap"]
    assert select(layers, target, {"cheap": 1, "good": 100}, 100)[0] == ["good"]


def test_a_layer_is_sent_even_where_none_tells_anything():
    flat = {"a": torch.ones(8, 2), "b": torch.ones(8, 3)}
    assert select(flat, classes(8), {"a": 2, "b": 3}, 5) == (["a"], {"a": 0.0, "b": 0.0})


SHAPE = {"num_classes": 4, "input_shape": (1, 8, 8)}


def client(labels):
    """A client whose convolutional specialist sees images; held-out labels as given."""
    runtime = Runtime(accelerator="cpu", batch_size=16)
    torch.manual_seed(0)
    module = CNN([4, 8], embedding=6, **SHAPE)
    images = torch.rand(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return SimpleNamespace(
        id=5,
        num_classes=4,
        calibration=TensorSamples(images, torch.tensor(labels, dtype=torch.int64)),
        predict=runtime.predict,
        specialist=lambda: module,
        state={},
        metrics={},
    )


def seen(count=30):
    return Extracted(draw(count, 4).float(), draw(count, 6).float(), _layers(count))


def _layers(count):
    p = torch.softmax(draw(count, 4).float(), 1)
    return {"trunk.0": draw(count, 4, seed=1).float(), "trunk.1": p @ draw(4, 8, seed=2).float()}


def test_a_message_holds_the_chosen_layers_only_whatever_else_is_done_to_them():
    at, known = client([0, 1, 2, 3]), seen()
    message = FeatureTransfer(select=LayerSelection(), components=3).message(at, known, torch.tensor([0, 5]))
    assert list(message.layers) == ["trunk.1"] and at.metrics["features/columns"] == 3
    values = known.layers["trunk.1"]
    values = (values - values.mean(0)) / values.std(0, correction=0)
    torch.testing.assert_close(message.layers["trunk.1"], (values @ principal(values, 3))[[0, 5]])
    assert list(FeatureTransfer().message(at, known, None).layers) == ["trunk.0", "trunk.1"]
    again = FeatureTransfer(select=LayerSelection(), components=3).message(at, known, torch.tensor([0, 5]))
    assert torch.equal(again.layers["trunk.1"], message.layers["trunk.1"])


def test_toward_labels_the_held_out_samples_decide_where_there_are_enough():
    plain = client([0, 1, 2, 3])
    LayerSelection().choose(plain, seen(), {"trunk.0": 4, "trunk.1": 8})
    by_labels = client([0, 1, 2, 3] * 10)
    module, held_out = by_labels.specialist(), by_labels.calibration
    LayerSelection(toward="labels").choose(by_labels, seen(), {"trunk.0": 4, "trunk.1": 8})
    first = module.backbone.trunk[0](held_out.batch(torch.arange(40))[0]).mean((2, 3)).detach()
    expected = select({"trunk.0": first}, torch.nn.functional.one_hot(held_out.labels, 4), {"trunk.0": 4}, 4)[1]
    assert by_labels.metrics["features/alignment/trunk.0"] == pytest.approx(expected["trunk.0"], abs=1e-5)
    for few in ([0, 1, 2], [1] * 10):
        alone = client(few)
        LayerSelection(toward="labels").choose(alone, seen(), {"trunk.0": 4, "trunk.1": 8})
        assert alone.metrics == plain.metrics != by_labels.metrics


def test_a_budget_that_nothing_fits_is_refused_by_name():
    with pytest.raises(UserError, match=r"client 5: no layer fits a budget of 3 numbers; .* trunk\.0, has 4"):
        FeatureTransfer(select=LayerSelection(budget=3)).message(client([0]), seen(), None)
    for wrong in ({"budget": 0}, {"toward": "loss"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            LayerSelection(**wrong)


def test_a_recipe_can_ask_for_it(tmp_path):
    from fdl.build import build
    from fdl.recipe import from_mapping

    recipe = from_mapping(
        {
            "method": {
                "target": "federated_distillation",
                "args": {
                    "features": {
                        "target": "feature_transfer",
                        "args": {
                            "layers": 3,
                            "components": 4,
                            "select": {"target": "layer_selection", "args": {"budget": 8, "toward": "labels"}},
                        },
                    }
                },
            },
            "data": {"target": "digits", "args": {"proxy": 40, "validation": 20, "test": 20}},
            "federation": {"clients": 2, "rounds": 2},
            "specialists": ["cnn", "mlp"],
            "student": {"target": "mlp", "args": {"hidden": [16]}},
            "local_training": {"steps": 2},
            "server_distil": {"steps": 2},
            "evaluation": {"specialists": False},
            "fabric": {"threads": 1},
            "callbacks": [],
        }
    )
    loop = build(recipe, tmp_path / "run")
    loop.run()
    measured = loop.history[-1]["clients"]
    assert {key for key in measured["0"] if "alignment" in key} == {
        f"features/alignment/trunk.{block}" for block in (0, 1, 3)
    }
    assert all(0 < measured[client]["features/columns"] <= 8 for client in ("0", "1"))

import math

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

from fdl.attacks.audit import audit
from fdl.attacks.base import AttackTarget
from fdl.attacks.gradient_inversion import GradientInversion
from fdl.attacks.image_quality import Scale, draw_same_classes, match_by_psnr, psnr, ssim
from fdl.attacks.matching import gradients, infer_labels, solve_analytically, total_variation
from fdl.attacks.updates import observe_update
from fdl.datamodules.samples import TensorSamples
from fdl.errors import UserError
from fdl.modules.classifier import ImageClassifier
from fdl.modules.small_classifiers import MLP, BackboneWithHead
from fdl.state.weights import module_state
from fdl.utils.seeding import stream_seed
from tests.attacks.runs import finished

SHAPE = (1, 8, 8)
TANH = {"target": "mlp", "args": {"hidden": [48], "activation": "tanh"}}
ONE_STEP = {"steps": 1, "batch_size": 1, "optimizer": {"target": "sgd", "args": {"lr": 0.1}}}


class LowRank(ImageClassifier):
    """A perceptron of which low-rank updates and the head alone are trained; the same frozen weights everywhere."""

    def __init__(self, num_classes: int, input_shape: tuple[int, int, int]):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            trunk = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), 96), nn.Tanh())
            backbone = BackboneWithHead(trunk, 96, num_classes)
            super().__init__(
                backbone,
                num_classes=num_classes,
                input_shape=input_shape,
                head="head",
                pretrained=True,
                tuning="lora",
                lora={"rank": 8, "targets": ["trunk.1"]},
            )


class Prompted(nn.Module):
    """Frozen layers around a vector that is trained."""

    def __init__(self, inputs: int, classes: int):
        super().__init__()
        self.first, self.head = nn.Linear(inputs, 48), nn.Linear(48, classes)
        self.requires_grad_(False)
        self.prompt = nn.Parameter(torch.zeros(48))

    def forward(self, x):
        embedding = torch.tanh(self.first(x.flatten(1)) * (1 + self.prompt))
        return self.head(embedding), embedding


class PromptedClassifier(ImageClassifier):
    """A classifier that sends a prompt and nothing else."""

    def __init__(self, num_classes: int, input_shape: tuple[int, int, int]):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            backbone = Prompted(math.prod(input_shape), num_classes)
        super().__init__(backbone, num_classes=num_classes, input_shape=input_shape)
        self.frozen = frozenset(name for name, p in self.named_parameters() if not p.requires_grad)


def fedavg(folder, trained=False, **changes):
    """A federation whose clients each take one step on one image."""
    plain = {"method": "fedavg", "student": TANH, "specialists": [], "channel": {}, "local_training": ONE_STEP}
    return finished(folder, trained, **(plain | changes))


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return AttackTarget(fedavg(tmp_path_factory.mktemp("run")))


# -- metrics


def test_psnr_is_ten_logarithms_of_the_inverse_squared_error():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.rand(3, 1, 8, 8, generator=draw), torch.rand(4, 1, 8, 8, generator=draw)
    expected = [[-10 * math.log10(float(((x - y) ** 2).mean())) for y in b] for x in a]
    torch.testing.assert_close(psnr(a, b), torch.tensor(expected), rtol=1e-5, atol=1e-4)
    assert psnr(a, a).diagonal().tolist() == [100.0] * 3


def by_hand(a, b, window):
    """Mean over windows around all pixels of Wang et al.'s equation 13, borders reflected."""
    side, c1, c2, found = len(window), 0.01**2, 0.03**2, []
    a, b = (np.pad(x, side // 2, mode="reflect") for x in (a, b))
    for i in range(a.shape[0] - side + 1):
        for j in range(a.shape[1] - side + 1):
            p, q = a[i : i + side, j : j + side], b[i : i + side, j : j + side]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * p**2).sum() - mp**2, (window * q**2).sum() - mq**2
            both = (window * p * q).sum() - mp * mq
            found.append((2 * mp * mq + c1) * (2 * both + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(found)


@pytest.mark.parametrize("side", [3, 8, 20])
def test_ssim_is_the_mean_over_windows(side):
    draw = np.random.default_rng(side)
    a = draw.random((side, side))
    b = np.clip(a + 0.3 * draw.normal(size=a.shape), 0, 1)
    bell = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(bell, bell) if side >= 16 else np.ones((min(side, 7),) * 2)
    images = [torch.tensor(x, dtype=torch.float32)[None, None] for x in (a, b)]
    assert float(ssim(*images)) == pytest.approx(by_hand(a, b, window / window.sum()), abs=1e-3)
    assert float(ssim(images[0], images[0])) == pytest.approx(1, abs=1e-5)


def test_images_are_paired_each_once_and_shown_as_they_were():
    pixels = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    samples = TensorSamples(pixels, mean=[0.3], std=[0.2])
    scale = Scale(samples)
    images = scale.to_pixels(samples.batch(torch.arange(5))[0])
    torch.testing.assert_close(images, pixels / 255, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        scale.to_pixels(torch.stack([scale.low, scale.high])).flatten(), torch.tensor([0.0, 1.0])
    )
    rows, matches = match_by_psnr(images[[3, 0, 4]], images)
    assert rows.tolist() == [0, 1, 2] and matches.tolist() == [3, 0, 4]
    twice = match_by_psnr(images[[2, 2]], images)[1].tolist()
    assert 2 in twice and len(set(twice)) == 2


def test_as_many_of_each_class_are_drawn():
    labels, pool = torch.tensor([1, 1, 0, 3]), torch.tensor([0, 0, 1, 2, 1, 1])
    rows = draw_same_classes(labels, pool, np.random.default_rng(0))
    assert sorted(pool[rows].tolist()) == [0, 1, 1] and len(set(rows.tolist())) == 3


def test_inversion_is_for_images():
    with pytest.raises(UserError, match="inversion is for images"):
        Scale(TensorSamples(torch.zeros(2, 5)))


# -- formulas


def test_the_input_of_a_linear_layer_is_a_quotient_of_its_gradients():
    torch.manual_seed(0)
    for activation in ("relu", "tanh"):
        model = MLP([32], activation, num_classes=10, input_shape=SHAPE)
        x, labels = torch.randn(1, *SHAPE), torch.tensor([7])
        seen = gradients(model, dict(model.named_parameters()), x, labels)
        torch.testing.assert_close(solve_analytically(model, seen, SHAPE), x, rtol=0, atol=1e-5)
        weight, bias = seen["backbone.trunk.1.weight"], seen["backbone.trunk.1.bias"]
        row = int(bias.abs().argmax())
        torch.testing.assert_close(weight[row] / bias[row], x.flatten(), rtol=0, atol=1e-5)
        assert infer_labels(model, seen, 1, 10).tolist() == [7]
        del seen["backbone.head.bias"]
        if activation == "relu":  # then the embedding is not negative
            assert infer_labels(model, seen, 1, 10).tolist() == [7]
    assert solve_analytically(model, {"backbone.head.weight": torch.zeros(10, 32)}, SHAPE) is None


def test_labels_of_a_batch_are_read_off_the_bias():
    torch.manual_seed(1)
    model = MLP([32], "tanh", num_classes=10, input_shape=SHAPE)
    labels = torch.tensor([3, 3, 8, 0, 3, 5])
    seen = gradients(model, dict(model.named_parameters()), torch.randn(6, *SHAPE), labels)
    assert sorted(infer_labels(model, seen, 6, 10).tolist()) == sorted(labels.tolist())


def test_total_variation_of_a_ramp():
    assert float(total_variation(torch.arange(5.0).expand(1, 1, 5, 5))) == 1.0
    assert float(total_variation(torch.ones(1, 1, 5, 5))) == 0.0


# -- attacks


def test_an_update_of_one_step_is_the_gradient_of_the_image_behind_it(subject):
    client = subject.clients[0]
    turn = observe_update(subject, client, first=True)
    assert turn.steps == len(turn.rows) == 1 and turn.plain_sgd
    exact = gradients(turn.model, turn.mean_gradient, *client.train.batch(turn.rows))
    for name, gradient in exact.items():
        torch.testing.assert_close(turn.mean_gradient[name], gradient, rtol=1e-4, atol=2e-6)
    fresh = subject.runtime.create("student", stream_seed(subject.seed, "init"))
    for name, tensor in module_state(fresh).items():
        assert torch.equal(turn.model.state_dict()[name], tensor)


def test_one_step_on_one_image_gives_it_away(subject):
    before = {name: tensor.clone() for name, tensor in module_state(subject.server.student).items()}
    random = torch.get_rng_state()
    exact = GradientInversion(matching="analytic").run(subject)
    assert exact.metrics["update/psnr"] > 40 and exact.metrics["gradient/psnr"] > 40
    assert exact.metrics["update/psnr_held_out"] < 25
    for matching, steps in (("l2", 60), ("cosine", 100)):
        found = GradientInversion(["update"], matching=matching, steps=steps, clients=1).run(subject)
        assert found.metrics["update/psnr"] > 20 > found.metrics["update/psnr_held_out"]
        assert found.metrics["update/ssim"] > 0.9
    short = GradientInversion(["update"], steps=5, clients=1)
    assert short.run(subject).metrics == short.run(subject).metrics
    assert all(torch.equal(tensor, module_state(subject.server.student)[name]) for name, tensor in before.items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(not client.state and not client.metrics for client in subject.clients)


def test_rounding_and_more_images_hide_some_of_it(subject, tmp_path):
    attack = GradientInversion(["update"], matching="analytic")
    eight = fedavg(tmp_path / "8", channel={"upload": [{"target": "quantize", "args": {"bits": 8}}]})
    many = fedavg(tmp_path / "many", local_training=ONE_STEP | {"batch_size": 32})
    plain, rounded, mixed = (
        attack.run(s).metrics["update/psnr"] for s in (subject, AttackTarget(eight), AttackTarget(many))
    )
    assert rounded < plain - 20 and mixed < 25
    notes = attack.run(AttackTarget(many)).notes
    assert any("an update is of 1 step(s) on 32 private image(s)" in note for note in notes)


def test_the_last_model_is_attacked_from_where_it_ended(tmp_path):
    subject = AttackTarget(fedavg(tmp_path, trained=True, local_training=ONE_STEP | {"steps": 5}))
    turn = observe_update(subject, subject.clients[1], first=False)
    for name, tensor in module_state(subject.server.student).items():
        assert torch.equal(turn.model.state_dict()[name], tensor)
    assert turn.steps == len(turn.rows) == 5
    found = GradientInversion(moment="last", matching="analytic").run(subject)
    assert found.metrics["gradient/psnr"] > 40 and any("after the last round" in note for note in found.notes)


def test_low_rank_updates_are_matched_by_what_is_sent(tmp_path):
    student = {"target": "tests.attacks.test_gradient_inversion.LowRank"}
    subject = AttackTarget(fedavg(tmp_path, method="fedlora", student=student))
    turn = observe_update(subject, subject.clients[0], first=True)
    assert {name.rpartition("backbone.")[2] for name in turn.mean_gradient} == {
        "trunk.1.lora_A.default.weight",
        "trunk.1.lora_B.default.weight",
        "head.weight",
        "head.bias",
    }
    found = GradientInversion(["gradient"], matching="l2", steps=80, clients=1).run(subject)
    # the head's gradients alone hold all 96 numbers of the embedding, and an image has 64
    assert found.metrics["gradient/labels"] == 1 and found.metrics["gradient/psnr"] > 25
    with pytest.raises(UserError, match="needs a student whose first layer is linear with a bias"):
        GradientInversion(matching="analytic").run(subject)


def test_prompts_are_matched_by_what_is_sent(tmp_path):
    student = {"target": "tests.attacks.test_gradient_inversion.PromptedClassifier"}
    subject = AttackTarget(fedavg(tmp_path, method="federated_prompts", student=student))
    turn = observe_update(subject, subject.clients[0], first=True)
    assert list(turn.mean_gradient) == ["backbone.prompt"]
    found = GradientInversion(steps=5, clients=1).run(subject)
    assert "gradient/labels" not in found.metrics and any("classes were given" in note for note in found.notes)
    assert found.metrics["update/psnr"] < 60


def test_changes_of_prompts_are_gradients_too(tmp_path):
    student = {"target": "tests.attacks.test_gradient_inversion.PromptedClassifier"}
    method = {"target": "pfedpg", "args": {"prompts": ["backbone.prompt"]}}
    subject = AttackTarget(fedavg(tmp_path, method=method, student=student))
    turn = observe_update(subject, subject.clients[0], first=True)
    exact = gradients(turn.model, turn.mean_gradient, *subject.clients[0].train.batch(turn.rows))
    torch.testing.assert_close(turn.mean_gradient, exact, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("target", ["fml", "feddf"])
def test_models_of_other_architectures_than_the_students_are_known(target, tmp_path):
    args = {"architectures": "specialists"} if target == "feddf" else {}
    specialists = [{"target": "mlp", "args": {"hidden": [30]}}]
    subject = AttackTarget(fedavg(tmp_path, method={"target": target, "args": args}, specialists=specialists))
    found = GradientInversion(matching="analytic", clients=1).run(subject)
    assert found.metrics["update/psnr"] > 40 > found.metrics["update/psnr_held_out"]


def test_there_is_nothing_to_invert_where_no_parameters_are_sent(tmp_path):
    subject = AttackTarget(finished(tmp_path, trained=False))
    with pytest.raises(UserError, match="not applicable: under federated_distillation clients send no parameters"):
        GradientInversion().run(subject)


def test_images_are_drawn_for_tensorboard(subject):
    result = audit(subject.loop, [GradientInversion(["gradient"], batch_size=3, steps=5, clients=1)])
    (draw,) = result.figures().values()
    figure = draw()
    FigureCanvasAgg(figure).draw()
    assert len(figure.axes) == 6 and "gradient_inversion/gradient/ssim" in result.metrics()
    assert result.findings["gradient_inversion"].arrays["gradient/private"].shape == (3, *SHAPE)


def test_settings_are_checked():
    with pytest.raises(UserError, match="analytic solves for one image, so batch_size must be 1, got 2"):
        GradientInversion(matching="analytic", batch_size=2)
    for wrong in ({"matching": "sine"}, {"targets": ["logits"]}, {"steps": 0}, {"tv": -1.0}, {"moment": "middle"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            GradientInversion(**wrong)

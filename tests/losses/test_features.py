"""Feature and prototype losses against closed forms and invariances."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from fdl.losses import features as feature_losses
from fdl.losses import prototypes as prototype_losses
from fdl.losses.responses import RESPONSE_LOSSES


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size, seed=1):
    return torch.linalg.qr(draw(size, size, seed=seed))[0]


@pytest.mark.parametrize("name", sorted(feature_losses.FEATURE_LOSSES))
def test_equal_features_cost_nothing(name):
    features = draw(7, 5)
    features = torch.nn.functional.layer_norm(features, (5,))  # smooth_l1 brings the teacher's rows to this
    assert feature_losses.FEATURE_LOSSES[name](features, features).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", sorted(feature_losses.FEATURE_LOSSES))
def test_gradients_of_feature_losses(name):
    teacher = draw(5, 4, seed=1)
    student = draw(5, 4).requires_grad_()
    assert gradcheck(lambda s: feature_losses.FEATURE_LOSSES[name](s, teacher), student)


@pytest.mark.parametrize("name", sorted(feature_losses.FEATURE_LOSSES))
def test_only_relational_losses_ignore_a_rotation(name):
    teacher = draw(8, 5)
    student = 3 * teacher @ rotation(5) + 2
    loss = feature_losses.FEATURE_LOSSES[name]
    value = float(loss(student, teacher))
    assert value > 0.05 if loss.projected else value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", [n for n, loss in feature_losses.FEATURE_LOSSES.items() if not loss.projected])
def test_relational_losses_take_other_widths_and_small_batches(name):
    loss = feature_losses.FEATURE_LOSSES[name]
    assert torch.isfinite(loss(draw(6, 3), draw(6, 9, seed=1)))
    for rows in (1, 2):
        student = draw(rows, 3).requires_grad_()
        loss(student, draw(rows, 9, seed=1)).backward()
        assert torch.isfinite(student.grad).all()


def test_values_by_hand():
    student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]])
    assert feature_losses.feature_mse(student, teacher).item() == pytest.approx((9 + 9) / 2)
    assert feature_losses.feature_cosine(student, teacher).item() == pytest.approx(1 - 0.8)
    assert feature_losses.feature_normalized_mse(student, teacher).item() == pytest.approx(2 * (1 - 0.8) / 2)
    # the teacher's row becomes (-1, 1); |3 + 1| - ½ and |4 - 1| - ½
    assert feature_losses.feature_smooth_l1(student, teacher).item() == pytest.approx((3.5 + 2.5) / 2, rel=1e-4)


def test_distances_by_hand():
    # 3-4-5 triangle against an equilateral one: relative distances (3, 4, 5) / 4 against 1, Huber ½ (¼)² for two
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    assert feature_losses.relational_distance(student, teacher).item() == pytest.approx(2 * 0.5 * 0.25**2 / 3, rel=1e-5)


def test_angles_by_hand():
    # cosines of the 3-4-5 triangle: 0, 3/5, 4/5; of the equilateral one ½ everywhere
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    expected = (0.5 * 0.5**2 + 0.5 * 0.1**2 + 0.5 * 0.3**2) / 3
    assert feature_losses.relational_angle(student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_cka_is_the_definition_and_between_0_and_1():
    x, y = draw(9, 4), draw(9, 6, seed=1)
    xc, yc = x - x.mean(0), y - y.mean(0)
    expected = 1 - (yc.T @ xc).norm() ** 2 / ((xc.T @ xc).norm() * (yc.T @ yc).norm())
    assert feature_losses.linear_cka(x, y).item() == pytest.approx(expected.item())
    assert feature_losses.linear_cka(torch.ones(5, 2), y[:5].float()).item() == 1
    # columns that are orthogonal after centring have nothing in common
    a, b = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assert feature_losses.linear_cka(a, b).item() == pytest.approx(1)


@pytest.mark.parametrize("count", [2, 10])
def test_contrast_of_equal_prototypes_is_log_of_their_number(count):
    prototypes = draw(1, 4).expand(count, -1)
    assignment = torch.softmax(draw(6, count, seed=2), 1)
    for temperature in (0.1, 1.0):
        value = prototype_losses.prototype_infonce(draw(6, 4, seed=1), prototypes, assignment, temperature)
        assert value.item() == pytest.approx(math.log(count))


def test_contrast_with_orthogonal_prototypes():
    value = prototype_losses.prototype_infonce(
        torch.tensor([[5.0, 0.0]]), torch.eye(2), torch.tensor([[1.0, 0.0]]), 0.5
    )
    assert value.item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_distance_to_prototypes_by_shares():
    # ¼ · |(1, 0) - (1, 0)|² + ¾ · |(1, 0) - (0, 2)|² = ¾ · 5, over two dimensions
    value = prototype_losses.prototype_mse(
        torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.25, 0.75]])
    )
    assert value.item() == pytest.approx(0.75 * 5 / 2)


@pytest.mark.parametrize("name", sorted(prototype_losses.PROTOTYPE_LOSSES))
def test_gradients_of_prototype_losses(name):
    prototypes, assignment = draw(3, 4, seed=1), torch.softmax(draw(5, 3, seed=2), 1)
    student = draw(5, 4).requires_grad_()
    assert gradcheck(lambda s: prototype_losses.PROTOTYPE_LOSSES[name](s, prototypes, assignment), student)


def test_hard_labels_are_the_likeliest_class():
    logits, teacher = draw(4, 3), torch.softmax(draw(4, 3, seed=1), 1)
    expected = torch.nn.functional.cross_entropy(logits, teacher.argmax(1))
    assert RESPONSE_LOSSES["hard"](logits, teacher, 2.0).item() == pytest.approx(expected.item())

"""Each loss against its closed form, against an independent formula in numpy, and against its own gradient."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import entropy
from torch.autograd import gradcheck

from fdl.losses import responses as losses
from fdl.losses.proximal import proximal

HINTON = {1: (-0.38080, 0.32781), 4: (-0.48984, 0.48480)}  # temperature: gradient of z0, T² KL


def draw(seed: int, rows: int = 7, classes: int = 5, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


@pytest.fixture
def student() -> torch.Tensor:
    return draw(0)


@pytest.fixture
def teacher() -> torch.Tensor:
    return draw(1).softmax(1)


# --- distributions


def test_softening_probabilities_is_softmax_of_the_logits_over_the_temperature():
    logits = draw(2)
    for temperature in (0.5, 1.0, 3.0):
        expected = torch.from_numpy(softmax(logits.numpy() / temperature, axis=1))
        torch.testing.assert_close(losses.soften(logits.softmax(1), temperature), expected)


def test_softening_keeps_exact_zeros():
    one_hot = torch.tensor([[0.0, 1.0, 0.0]])
    assert losses.soften(one_hot, 4.0).tolist() == one_hot.tolist()


def test_entropy_reduction_is_a_softmax_of_probabilities():
    reduced = losses.entropy_reduction(torch.tensor([[0.6, 0.4]]), 0.1)
    assert reduced[0, 0].item() == pytest.approx(0.88080, abs=5e-6)
    assert reduced[0, 0].item() == pytest.approx(1 / (1 + math.exp(-2)), rel=1e-6)


def test_power_sharpening_squares_and_renormalises():
    probabilities = torch.tensor([[0.6, 0.4]])
    assert losses.power_sharpening(probabilities, 2)[0, 0].item() == pytest.approx(0.69231, abs=5e-6)
    assert losses.power_sharpening(probabilities, 1) is probabilities


def test_mean_logits_and_mean_probabilities_are_different_teachers():
    logits = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    assert logits.mean(0).softmax(0)[0].item() == pytest.approx(0.8176, abs=5e-5)
    assert logits.softmax(1).mean(0)[0].item() == pytest.approx(0.6255, abs=5e-5)


# --- Hinton's loss


@pytest.mark.parametrize("temperature", [1, 4])
def test_hinton_value_and_gradient_of_two_classes(temperature):
    gradient, value = HINTON[temperature]
    z = torch.zeros(1, 2, requires_grad=True)
    loss = losses.kd_loss(z, torch.tensor([[2.0, 0.0]]).softmax(1), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=5e-6)
    assert z.grad[0].tolist() == pytest.approx([gradient, -gradient], abs=5e-6)


def test_hinton_gradient_tends_to_half_the_difference_of_two_logits():
    z = torch.zeros(1, 2, requires_grad=True, dtype=torch.float64)
    losses.kd_loss(z, torch.tensor([[2.0, 0.0]], dtype=torch.float64).softmax(1), 1000).backward()
    assert z.grad[0, 0].item() == pytest.approx(-0.5, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kd_loss_equals_scipy(student, teacher, temperature):
    p = softmax(np.log(teacher.numpy()) / temperature, axis=1)
    q = softmax(student.numpy() / temperature, axis=1)
    expected = entropy(p, q, axis=1).mean()
    assert losses.kd_loss(student, teacher, temperature, scale=False).item() == pytest.approx(expected, rel=1e-10)
    assert losses.kd_loss(student, teacher, temperature).item() == pytest.approx(temperature**2 * expected, rel=1e-10)


def test_kd_gradient_is_the_difference_of_probabilities_over_the_batch(student, teacher):
    z = student.requires_grad_()
    losses.kd_loss(z, teacher).backward()
    torch.testing.assert_close(z.grad, (z.detach().softmax(1) - teacher) / len(z))


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_divergence_is_zero_with_zero_gradient_where_both_agree_and_ignores_a_shift(
    student, teacher, name, temperature
):
    loss = losses.RESPONSE_LOSSES[name]
    z = student.clone().requires_grad_()
    same = loss(z, student.softmax(1), temperature)
    same.backward()
    assert same.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(z.grad, torch.zeros_like(z))
    shifted = loss(student + 3.7, teacher, temperature)
    torch.testing.assert_close(shifted, loss(student, teacher, temperature))
    assert shifted.item() > 0.01


@pytest.mark.parametrize("name", sorted(losses.RESPONSE_LOSSES))
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_of_every_response_loss_agree_with_finite_differences(student, teacher, name, temperature):
    assert gradcheck(lambda z: losses.RESPONSE_LOSSES[name](z, teacher, temperature), student.requires_grad_())


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd", "cross_entropy"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_one_hot_responses_give_finite_losses_and_gradients(student, name, temperature):
    votes = torch.nn.functional.one_hot(torch.arange(len(student)) % 5, 5).double()
    z = student.requires_grad_()
    loss = losses.RESPONSE_LOSSES[name](z, votes, temperature)
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("name", sorted(losses.RESPONSE_LOSSES))
def test_16_bit_inputs_are_computed_in_float32(student, teacher, name):
    loss = losses.RESPONSE_LOSSES[name]
    z, p = student.bfloat16(), teacher.half()
    half = loss(z, p, 2.0)
    assert half.dtype is torch.float32
    torch.testing.assert_close(half, loss(z.float(), p.float(), 2.0))


# --- the other responses


def test_reverse_kl_equals_scipy(student, teacher):
    expected = entropy(softmax(student.numpy(), axis=1), teacher.numpy(), axis=1).mean()
    assert losses.reverse_kl(student, teacher).item() == pytest.approx(expected, rel=1e-10)
    assert losses.reverse_kl(student, losses.soften(teacher, 0.5), 2.0, scale=True).item() == pytest.approx(
        4 * entropy(softmax(student.numpy() / 2, axis=1), teacher.numpy(), axis=1).mean(), rel=1e-10
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalized_jsd_equals_its_formula(student, teacher, beta):
    s, t = softmax(student.numpy(), axis=1), teacher.numpy()
    mixture = (1 - beta) * s + beta * t
    expected = (beta * rel_entr(t, mixture) + (1 - beta) * rel_entr(s, mixture)).sum(1).mean()
    assert losses.generalized_jsd(student, teacher, beta).item() == pytest.approx(expected, rel=1e-10)


def test_generalized_jsd_ends_in_the_two_kl_divergences(student, teacher):
    assert losses.generalized_jsd(student, teacher, 0.0) == losses.kd_loss(student, teacher, scale=False)
    assert losses.generalized_jsd(student, teacher, 1.0) == losses.reverse_kl(student, teacher)


def test_jsd_is_symmetric_at_one_half_and_bounded_by_ln_2(student, teacher):
    swapped = losses.generalized_jsd(teacher.log(), student.softmax(1))
    torch.testing.assert_close(losses.generalized_jsd(student, teacher), swapped)
    opposite = losses.generalized_jsd(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert opposite.item() == pytest.approx(math.log(2), rel=1e-6)
    wild = [losses.generalized_jsd(draw(i, spread=30), draw(i + 50, spread=30).softmax(1)).item() for i in range(20)]
    assert max(wild) <= math.log(2)


def test_soft_cross_entropy_is_the_kl_plus_the_teachers_entropy(student, teacher):
    expected = -(teacher.numpy() * log_softmax(student.numpy(), axis=1)).sum(1).mean()
    value = losses.soft_cross_entropy(student, teacher).item()
    assert value == pytest.approx(expected, rel=1e-10)
    kl = losses.kd_loss(student, teacher, scale=False).item()
    assert value == pytest.approx(kl + entropy(teacher.numpy(), axis=1).mean(), rel=1e-10)


def test_logit_losses_average_over_rows_and_classes(student):
    other = draw(3)
    difference = student.numpy() - other.numpy()
    assert losses.mse_logits(student, other).item() == pytest.approx((difference**2).mean(), rel=1e-10)
    assert losses.mae_logits(student, other).item() == pytest.approx(np.abs(difference).mean(), rel=1e-10)
    assert losses.mae_logits(student, student).item() == 0


def test_the_table_says_which_form_each_loss_wants():
    forms = {name: loss.form for name, loss in losses.RESPONSE_LOSSES.items()}
    assert {name for name, form in forms.items() if form == "logits"} == {"mse", "mae"}
    assert losses.RESPONSE_LOSSES["jsd"](draw(0), draw(1).softmax(1), beta=0.0) == losses.kd_loss(
        draw(0), draw(1).softmax(1)
    )


# --- labels and a teacher together


def test_distillation_weighs_labels_against_the_teacher(student):
    z, v, labels = student.requires_grad_(), draw(4), torch.arange(7) % 5
    parts = losses.distillation(z, v, labels, alpha=0.3, temperature=4.0)
    hard = -log_softmax(student.detach().numpy(), axis=1)[np.arange(7), labels.numpy()].mean()
    p, q = softmax(v.numpy() / 4, axis=1), softmax(student.detach().numpy() / 4, axis=1)
    soft = 16 * entropy(p, q, axis=1).mean()
    assert parts["cross_entropy"].item() == pytest.approx(hard, rel=1e-10)
    assert parts["distillation"].item() == pytest.approx(soft, rel=1e-10)
    assert parts["loss"].item() == pytest.approx(0.7 * hard + 0.3 * soft, rel=1e-10)
    assert [name for name, value in parts.items() if value.requires_grad] == ["loss"]
    assert gradcheck(lambda z: losses.distillation(z, v, labels, 0.3, 4.0)["loss"], z)


def test_distillation_keeps_a_tail_that_float32_probabilities_lose():
    teacher = torch.tensor([[0.0, -200.0]])
    value = losses.distillation(torch.zeros(1, 2), teacher, torch.tensor([0]), 1.0, 100.0)["distillation"]
    p = softmax(np.array([0.0, -2.0]))
    assert value.item() == pytest.approx(1e4 * entropy(p, [0.5, 0.5]), rel=1e-5)


# --- the proximal term


def weights(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (4,), ())]


def test_proximal_is_half_mu_times_the_squared_distance():
    w, anchor = [t.requires_grad_() for t in weights(0)], weights(1)
    value = proximal(w, anchor, 0.3)
    value.backward()
    distance = sum(((a.detach() - b) ** 2).sum().item() for a, b in zip(w, anchor))
    assert value.item() == pytest.approx(0.15 * distance, rel=1e-12)
    for tensor, centre in zip(w, anchor):
        torch.testing.assert_close(tensor.grad, 0.3 * (tensor.detach() - centre))


def test_proximal_gradient_agrees_with_finite_differences_and_is_zero_at_the_anchor():
    anchor = weights(1)
    assert gradcheck(lambda *w: proximal(w, anchor, 0.7), [t.requires_grad_() for t in weights(0)])
    here = [t.clone().requires_grad_() for t in anchor]
    proximal(here, anchor, 1.0).backward()
    assert all((t.grad == 0).all() for t in here)


def test_fedprox_on_a_quadratic_stops_between_optimum_and_anchor():
    a, c, mu = 2.0, torch.tensor([3.0, -1.0], dtype=torch.float64), 0.5
    anchor = [torch.tensor([0.5, 0.5], dtype=torch.float64)]
    w = anchor[0].clone().requires_grad_()
    optimizer = torch.optim.SGD([w], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (a / 2 * (w - c).square().sum() + proximal([w], anchor, mu)).backward()
        optimizer.step()
    torch.testing.assert_close(w.detach(), (a * c + mu * anchor[0]) / (a + mu))


def test_mu_zero_adds_nothing():
    w = [t.requires_grad_() for t in weights(0)]
    value = proximal(w, weights(1), 0.0)
    value.backward()
    assert value.item() == 0
    assert all((t.grad == 0).all() for t in w)


def test_proximal_refuses_lists_that_do_not_match():
    with pytest.raises(ValueError, match="3 parameters and 2 anchors"):
        proximal(weights(0), weights(1)[:2], 1.0)

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy

from fdl.knowledge.aggregation.means import ResponseMean
from fdl.knowledge.confidence.calibration import LIMITS, fit_temperature
from fdl.messages import Responses


def calibrated(n=1000, classes=5, seed=0):
    """Logits whose softmax is the true distribution of the labels."""
    torch.manual_seed(seed)
    logits = torch.randn(n, classes) * 2
    return logits, torch.distributions.Categorical(logits=logits).sample()


@pytest.mark.parametrize("factor", [0.1, 1.0, 3.0, 10.0])
def test_it_finds_the_factor_by_which_a_model_is_over_confident(factor):
    logits, labels = calibrated()
    assert fit_temperature(logits * factor, labels) == pytest.approx(factor, rel=0.1)


@pytest.mark.parametrize("n", [1, 5, 200])
def test_it_minimises_likelihood_with_the_prior(n):
    logits, labels = calibrated(n, seed=3)
    logits = logits.double() * 4

    def objective(log_t):
        log_t = torch.tensor(log_t)
        return float(cross_entropy(logits / log_t.exp(), labels, reduction="sum") + log_t**2 / 2)

    best = minimize_scalar(objective, bounds=(-4, 4), method="bounded", options={"xatol": 1e-8})
    assert fit_temperature(logits.float(), labels) == pytest.approx(float(torch.tensor(best.x).exp()), rel=1e-3)


def test_no_samples_no_change():
    assert fit_temperature(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)) == 1


def test_few_samples_all_right_or_all_wrong_stay_sensible():
    logits = torch.tensor([[9.0, 0.0, 0.0]] * 3)
    right, wrong = (fit_temperature(logits, torch.full((3,), label)) for label in (0, 1))
    assert 0.3 < right <= 1 < wrong < 30


@pytest.mark.parametrize(("factor", "bound"), [(1e-3, LIMITS[0]), (1e6, LIMITS[1])])
def test_extremes_are_bounded(factor, bound):
    logits, labels = calibrated(20_000)
    assert fit_temperature(logits * factor, labels) == bound


def test_it_lowers_the_loss_of_a_real_mistake_and_no_gradient_leaks():
    logits, labels = calibrated()
    logits = (logits * 6).requires_grad_()
    temperature = fit_temperature(logits, labels)
    assert cross_entropy(logits / temperature, labels) < cross_entropy(logits, labels) and logits.grad is None


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="do not fit"):
        fit_temperature(torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64))


def test_an_over_confident_teacher_does_not_win_once_calibrated():
    """Three teachers of equal skill; one multiplies its logits by 10. In the mean of logits it decides alone."""
    torch.manual_seed(0)
    truth, labels = calibrated(600)
    teachers = [truth + torch.randn_like(truth) for _ in range(3)]
    teachers[0] = teachers[0] * 10
    shares = {}
    for calibrate in (False, True):
        mean = ResponseMean(300, 5, "logits")
        for i, logits in enumerate(teachers):
            held_out, asked = logits[:300], logits[300:]
            mean.add(Responses(asked / (fit_temperature(held_out, labels[:300]) if calibrate else 1), "logits"), i)
        follows = mean.result().values.argmax(1) == teachers[0][300:].argmax(1)
        honest = (teachers[1] + teachers[2])[300:].argmax(1)
        differs = honest != teachers[0][300:].argmax(1)
        shares[calibrate] = float(follows[differs].float().mean())
    assert shares[False] > 0.85 and shares[True] < 0.5

import math

import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from fdl.encoders.base import Pixels
from fdl.errors import UserError
from fdl.knowledge.confidence.base import (
    LIMIT,
    Confidence,
    Entropy,
    Margin,
    MaxProbability,
    Product,
    SampleCount,
    Uniform,
    Validation,
)
from fdl.knowledge.confidence.density import Density
from fdl.knowledge.confidence.domain_classifier import DomainClassifier
from fdl.messages import QuantizedLogWeights
from tests.knowledge.clients import client

LOGITS = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)) * 3
ON_ANSWERS = [Entropy(), MaxProbability(), Margin()]


def someone(n=6, **options):
    return client(torch.randn(n, 3), torch.randn(20, 3), num_classes=5, **options)


def test_uniform_is_zero():
    assert torch.equal(Uniform().log_weights(someone(), LOGITS), torch.zeros(20))


def test_sample_count_gives_the_weights_of_fedavg():
    scores = torch.stack([SampleCount().log_weights(someone(n), LOGITS) for n in (1, 3, 12)])
    torch.testing.assert_close(scores.softmax(0)[:, 0], torch.tensor([1.0, 3.0, 12.0]) / 16)


def test_validation_weighs_by_accuracy_and_silences_who_is_below_chance():
    accuracies = (0.8, 0.2, 0.19)
    scores = torch.stack([Validation().log_weights(someone(accuracy=a), LOGITS) for a in accuracies])
    torch.testing.assert_close(scores.softmax(0)[:, 0], torch.tensor([0.8, 0.2, 0.0]))
    assert scores[2, 0] == -LIMIT


def test_formulas():
    p = softmax(LOGITS.double().numpy(), axis=1)
    ordered = -torch.sort(-torch.as_tensor(p), dim=1).values
    expected = {
        Entropy(0.5): -entropy(p, axis=1) / 0.5,
        MaxProbability(2.0): 2 * ordered[:, 0].log().numpy(),
        Margin(0.1): ((ordered[:, 0] - ordered[:, 1]) / 0.1).numpy(),
    }
    for confidence, values in expected.items():
        found = confidence.log_weights(someone(), LOGITS)
        torch.testing.assert_close(found, torch.as_tensor(values).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("confidence", ON_ANSWERS, ids=lambda c: c.name)
def test_the_surer_an_answer_the_more_it_counts(confidence):
    sharper = torch.tensor([[3.0, 1.0, 0.0]]) * torch.linspace(0, 4, 9).unsqueeze(1)
    assert (confidence.log_weights(someone(), sharper).diff() > 0).all()


@pytest.mark.parametrize("confidence", ON_ANSWERS, ids=lambda c: c.name)
def test_constants_and_the_order_of_classes_do_not_matter(confidence):
    changed = LOGITS[:, torch.randperm(5)] + torch.randn(20, 1) * 10
    found, expected = confidence.log_weights(someone(), changed), confidence.log_weights(someone(), LOGITS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("confidence", ON_ANSWERS, ids=lambda c: c.name)
def test_extreme_answers_stay_finite(confidence):
    extreme = torch.tensor([[1e30, -1e30], [0.0, 0.0], [-1e4, 1e4]])
    assert torch.isfinite(confidence.log_weights(someone(), extreme)).all()


def test_product_is_the_sum_of_log_weights():
    encoder = Pixels()
    factors = [Density(), DomainClassifier(), Entropy(), SampleCount()]
    owner = someone(encoder=encoder)
    expected = sum(factor.log_weights(owner, LOGITS) for factor in factors)
    torch.testing.assert_close(Product(factors).log_weights(owner, LOGITS), expected.clamp(-LIMIT, LIMIT))
    assert Product(factors).needs_encoder and not Product([Entropy()]).needs_encoder


class Extreme(Confidence):
    def score(self, client, logits):
        return torch.tensor([-math.inf, math.inf, 1e9, 0.5, math.nan])


def test_scores_are_clipped_to_a_range_that_8_bits_resolve():
    found = Extreme().log_weights(someone(), torch.zeros(5, 2))
    assert found[:4].tolist() == [-LIMIT, LIMIT, LIMIT, 0.5] and math.isnan(found[4])
    spread = torch.linspace(-LIMIT, LIMIT, 1000)
    assert (QuantizedLogWeights.quantize(spread).values() - spread).abs().max() < 0.13


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Entropy(0.0), "temperature must be a number > 0, got 0.0"),
        (lambda: Margin(-1.0), "temperature must be a number > 0, got -1.0"),
        (lambda: MaxProbability(math.nan), "power must be a number > 0, got nan"),
        (lambda: Product([]), "factors must name at least one confidence"),
        (lambda: Density(k=0), "k must be at least 1, got 0"),
        (lambda: Density(method="nearest"), "method must be one of neighbours, centroids, got 'nearest'"),
        (lambda: Density(centroids_per_class=0), "centroids_per_class must be at least 1, got 0"),
        (lambda: Density(sharpness=0.0), "sharpness must be a number > 0, got 0.0"),
        (lambda: Density(scale=-2.0), "scale must be a number > 0, got -2.0"),
        (lambda: DomainClassifier(strength=0.0), "strength must be a number > 0, got 0.0"),
        (lambda: DomainClassifier(sharpness=math.inf), "sharpness must be a number > 0, got inf"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()

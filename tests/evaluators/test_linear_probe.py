"""The linear probe against scikit-learn by hand, on real digits and features that are known."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fdl.datamodules.digits import Digits
from fdl.datamodules.samples import TensorSamples
from fdl.errors import UserError
from fdl.evaluators.labelled import labelled_samples
from fdl.evaluators.linear_probe import LinearProbe
from fdl.modules.output import Output
from fdl.modules.small_classifiers import MLP
from tests.evaluators.models import Towers
from tests.evaluators.pairs import Pairs
from tests.evaluators.worlds import server

NAMES = ["zero", "one", "two"]


class Identity(torch.nn.Module):
    def forward(self, x, features=()):
        return Output(x.flatten(1), x.flatten(1), {})


def clusters(per_class, spread, seed, classes=3):
    """Classes on the corners of a triangle, [n, 1, 1, 2]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(per_class)
    angle = 2 * math.pi * labels / classes
    x = torch.stack([angle.cos(), angle.sin()], 1) + spread * torch.randn(len(labels), 2, generator=generator)
    return TensorSamples(x.view(-1, 1, 1, 2), labels)


@pytest.fixture(scope="module")
def digits():
    data = Digits(validation=0.4, seed=0)
    data.setup()
    return data


def test_it_is_scikit_learn_s_logistic_regression_on_the_first_shots():
    world = server(clusters(40, 0.6, 1), clusters(9, 0.6, 2), classes=NAMES, seed=3)
    probe = LinearProbe(shots=[2, 5], c=[1.0])
    got = probe.evaluate(world, Identity())
    x, y = world.validation._x.flatten(1).numpy(), world.validation.labels.numpy()
    z, truth = world.test._x.flatten(1).numpy(), world.test.labels.numpy()
    for k in (2, 5):
        scores = []
        for shots, _ in probe._draws(world):
            rows = shots[:, :k].ravel()
            scale = math.sqrt((x[rows] ** 2).sum(1).mean())
            reference = LogisticRegression(C=1.0, max_iter=1000).fit(x[rows] / scale, y[rows])
            scores.append(float((reference.predict(z / scale) == truth).mean()))
        assert got[f"accuracy_{k}_shot"] == pytest.approx(np.mean(scores))
        assert got[f"accuracy_{k}_shot_std"] == pytest.approx(np.std(scores, ddof=1))
    assert len(set(scores)) > 1


def test_draws_are_stratified_nested_by_order_and_apart_from_those_that_choose_c():
    world = server(clusters(5, 0.1, 1), clusters(9, 0.1, 2), classes=NAMES)
    labels = world.validation.labels.numpy()
    draws = LinearProbe(shots=[1, 4])._draws(world)
    assert len(draws) == 3
    for shots, others in draws:
        assert shots.shape == (3, 4)
        assert [set(labels[row]) for row in shots] == [{0}, {1}, {2}]
        assert np.bincount(labels[others]).tolist() == [4, 4, 4]
        assert not set(shots.ravel()) & set(others)
    assert len({tuple(shots.ravel()) for shots, _ in draws}) == 3
    again = LinearProbe(shots=[1, 4])._draws(world)
    assert all((a[0] == b[0]).all() for a, b in zip(draws, again))


def test_c_is_chosen_by_the_samples_that_were_not_trained_on():
    """Nine shots of each class and three wrong labels far out: a weak penalty follows those, a strong one does not."""
    probe = LinearProbe(c=[1e-3, 1e3])
    generator = np.random.default_rng(0)
    x = np.concatenate([generator.normal([-1, 0], 0.3, (9, 2)), generator.normal([1, 0], 0.3, (9, 2))])
    y = np.repeat([0, 1], 9)
    others, theirs = generator.normal(0, 1, (50, 2)), np.zeros(50, dtype=int)
    theirs[others[:, 0] > 0] = 1
    noisy_x, noisy_y = np.concatenate([x, [[0.2, 6], [0.2, 7], [-6, 6]]]), np.concatenate([y, [0, 0, 1]])
    scores = [LogisticRegression(C=c, max_iter=1000).fit(noisy_x, noisy_y).score(others, theirs) for c in probe.c]
    assert scores[0] != scores[1]
    assert probe.c[int(np.argmax(scores))] == probe._fit(noisy_x, noisy_y, others, theirs).C
    assert probe.c[int(np.argmin(scores))] == probe._fit(noisy_x, noisy_y, others, 1 - theirs).C
    assert probe._fit(x, y, x, y).C == 1e-3  # equally good: the smallest


def test_the_scale_of_features_does_not_matter(digits):
    class Scaled(Identity):
        def forward(self, x, features=()):
            return Output(x.flatten(1), 1000 * x.flatten(1), {})

    world = server(digits.test, digits.validation, classes=digits.classes)
    probe = LinearProbe(shots=[4], c=[0.1, 10.0])
    assert probe.evaluate(world, Identity()) == pytest.approx(probe.evaluate(world, Scaled()), abs=0.01)


def test_more_shots_of_digits_are_better_and_the_module_stays_as_it_was(digits):
    torch.manual_seed(0)
    module = MLP(num_classes=10, input_shape=(1, 8, 8))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    world = server(digits.test, digits.validation, classes=digits.classes, batch_size=100)
    probe = LinearProbe(shots=[1, 16], c=[1.0, 100.0])
    got = probe.evaluate(world, module)
    assert list(got)[:2] == ["accuracy_1_shot", "accuracy_1_shot_std"]
    assert 0.3 < got["accuracy_1_shot"] < got["accuracy_16_shot"]
    assert got["accuracy_16_shot"] > 0.8
    assert got == probe.evaluate(world, module)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_a_dual_encoder_is_probed_by_its_image_tower_on_further_data(digits):
    class Tower(Towers):
        def encode_image(self, images):
            return torch.nn.functional.normalize(images.flatten(1), dim=1)

    module = Tower(torch.eye(2), torch.eye(2))
    pairs = server(Pairs([[0], [1]]), task="image_text", model_kwargs={"input_shape": (1, 8, 8)})
    with pytest.raises(UserError, match="linear_probe: the data have no labels; name labelled images in its data"):
        LinearProbe(shots=[1]).prepare(pairs)
    probe = LinearProbe(shots=[8], data=Digits(seed=1))
    probe.prepare(pairs)
    assert probe.evaluate(pairs, module)["accuracy_8_shot"] > 0.75


def test_further_images_are_normalised_as_the_model_knows_them():
    data = Digits(normalize=True, mean=[0.0], std=[2.0])
    asked = server(Pairs([[0]]), model_kwargs={"input_shape": (1, 8, 8), "normalization": ([0.5], [0.25])})
    pool, test, _ = labelled_samples(asked, data, "x")
    plain = Digits()
    plain.setup()
    for given, raw in ((pool, plain.train), (test, plain.test)):
        x, expected = given.batch(torch.arange(5))[0], raw.batch(torch.arange(5))[0]
        torch.testing.assert_close(x, (expected - 0.5) / 0.25)
    del asked.model_kwargs["normalization"]
    torch.testing.assert_close(labelled_samples(asked, data, "x")[1].batch(torch.arange(5))[0], expected)


def test_further_data_must_have_images_of_the_model_s_size():
    probe = LinearProbe(shots=[1], data=Digits())
    with pytest.raises(UserError, match="digits has images of 1×8×8, but the model takes 3×32×32"):
        probe.prepare(server(Pairs([[0]]), model_kwargs={"input_shape": (3, 32, 32)}))
    with pytest.raises(UserError, match="further data are for models of images only"):
        probe.prepare(server(Pairs([[0]]), model_kwargs={"tokenizer": None}))


def test_too_few_samples_of_a_class_are_named():
    world = server(clusters(4, 0.1, 1), clusters(9, 0.1, 2).subset(range(20)), classes=NAMES)
    LinearProbe(shots=[1, 5]).prepare(world)
    expected = "6 shots and one more .* need 7 samples of every class, but the validation set has 6 of 'two'"
    with pytest.raises(UserError, match=expected):
        LinearProbe(shots=[6, 1]).prepare(world)
    with pytest.raises(UserError, match="has 0 of 'three'"):
        LinearProbe(shots=[1]).prepare(server(world.test, world.validation, classes=[*NAMES, "three"]))
    with pytest.raises(UserError, match="needs a test set"):
        LinearProbe(shots=[1]).prepare(server(world.test.subset([]), world.validation, classes=NAMES))


def test_features_of_a_model_that_has_diverged_have_no_accuracy():
    class Lost(Identity):
        def forward(self, x, features=()):
            return Output(x, x.flatten(1) * math.nan, {})

    world = server(clusters(4, 0.1, 1), clusters(4, 0.1, 2), classes=NAMES)
    got = LinearProbe(shots=[1]).evaluate(world, Lost())
    assert list(got) == ["accuracy_1_shot", "accuracy_1_shot_std"]
    assert all(math.isnan(value) for value in got.values())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"shots": []}, "shots must name"),
        ({"shots": [0]}, "shots must be at least 1"),
        ({"seeds": 2}, "seeds must be at least 3"),
        ({"c": [0.0, 1.0]}, "c must name numbers > 0"),
        ({"every": -1}, "every must be at least 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        LinearProbe(**arguments)

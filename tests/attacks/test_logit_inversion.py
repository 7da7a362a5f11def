import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fdl.attacks.audit import audit
from fdl.attacks.base import AttackTarget
from fdl.attacks.inversion_network import LEAST, Inversion, mean_public_images, target_pairs
from fdl.attacks.logit_inversion import LogitInversion, compare_class
from fdl.errors import UserError
from tests.attacks.runs import finished

CLASSES, EACH = 2, 40


def shapes(seed, count=EACH):
    """Noisy bars, upright for class 0 and lying for class 1: images [2 · count, 1, 8, 8] and labels."""
    draw = torch.Generator().manual_seed(seed)
    upright = torch.zeros(8, 8)
    upright[:, 3:5] = 0.8
    images = torch.stack([upright, upright.T]).repeat_interleave(count, 0)[:, None]
    return (images + 0.1 * torch.rand(images.shape, generator=draw)), torch.arange(2).repeat_interleave(count)


def sure(labels, level):
    """Probabilities of so much on the label."""
    return torch.full((len(labels), CLASSES), 1 - level, dtype=torch.float64).scatter(1, labels[:, None], level)


def gains(theirs):
    """What is gained over both baselines on private bars that are white on black, as half of the public ones are.

    Public bars are of both kinds, and so are held-out ones; the server tells classes but not kinds.
    """
    bars, labels = shapes(0)
    public, labels = torch.cat([bars, 1 - bars]), labels.repeat(2)
    ours = sure(labels, 0.8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Inversion(ours, theirs, (1, 8, 8), 64)
    network.learn(ours, theirs, public, 120, 32, 0.01, torch.Generator().manual_seed(0))
    recovered, means = network(*target_pairs(ours, theirs, 0.0)), mean_public_images(ours, public)
    private, held = shapes(1, 10)[0], shapes(2, 5)[0]
    found = []
    for label in range(CLASSES):
        own = private[10 * label : 10 * label + 10]
        dark = 1 - held[5 * label : 5 * label + 5]
        found.append(
            compare_class(0, label, recovered[label], means[label], own, torch.cat([dark, dark])).scores["ssim"]
        )
    return [(own - held_out, own - mean) for own, held_out, mean in found]


def test_a_client_that_is_sure_of_what_it_has_seen_shows_it():
    _, labels = shapes(0)
    theirs = torch.cat([sure(labels, 0.99), sure(labels, 0.5)])  # it knows white bars, and no black ones
    for over_held_out, over_mean in gains(theirs):
        assert over_held_out > 0.3 and over_mean > 0.3


def test_a_client_that_says_nothing_shows_no_more_than_the_public_mean():
    for _, over_mean in gains(torch.full((4 * EACH, CLASSES), 0.5, dtype=torch.float64)):
        assert abs(over_mean) < 0.1


def test_baselines_of_known_images():
    draw = torch.Generator().manual_seed(3)
    private, held_out = torch.rand(4, 1, 8, 8, generator=draw), torch.rand(4, 1, 8, 8, generator=draw)
    copied = compare_class(2, 1, private[3], held_out[0], private, held_out)
    assert copied.scores["ssim"][0] == pytest.approx(1, abs=1e-5) and copied.scores["psnr"][0] == 100
    assert torch.equal(copied.private, private[3]) and (copied.client, copied.label) == (2, 1)
    assert copied.scores["ssim"][1] < 0.5 and copied.scores["psnr"][1] < 15
    public = compare_class(0, 0, held_out[2], held_out[2], private, held_out)
    assert public.scores["ssim"][0] == pytest.approx(public.scores["ssim"][2]), "the mean gains nothing over itself"
    assert public.scores["psnr"][1] == 100


def test_pairs_are_as_sure_as_they_should_be():
    ours = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], dtype=torch.float64)
    theirs = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.8, 0.2]], dtype=torch.float64)  # never the second class
    server, client = target_pairs(ours, theirs, 0.0)
    assert torch.equal(client, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(server[0], ours.log().mean(0).exp())
    torch.testing.assert_close(server[1], ours[2])
    everywhere = target_pairs(ours, theirs, 1.0)[0]
    torch.testing.assert_close(everywhere[0], everywhere[1])
    assert float(ours.min()) > LEAST


def test_answers_lie_within_what_was_seen():
    theirs = torch.tensor([[0.7, 0.3], [0.6, 0.4]], dtype=torch.float64)
    network = Inversion(theirs, theirs, (1, 3, 3), 8)
    beyond = torch.tensor([[0.99, 0.01]], dtype=torch.float64)
    edge = torch.tensor([[0.7, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(network(beyond, beyond), network(edge, edge))


def test_classes_that_the_server_never_sees_have_the_mean_of_all():
    images = torch.rand(3, 1, 3, 3)
    ours = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.1, 0.9, 0.0]])
    found = mean_public_images(ours, images)
    torch.testing.assert_close(found, torch.stack([images[:2].mean(0), images[2], images.mean(0)]))


def test_answers_of_a_run_are_inverted(tmp_path):
    loop = finished(tmp_path, federation={"clients": 2, "rounds": 1})
    attack = LogitInversion(steps=20, clients=1)
    result = audit(loop, [attack])
    own = result.findings["logit_inversion"].metrics
    for name in ("ssim", "psnr"):
        best = max(own[f"{name}_held_out"], own[f"{name}_public_mean"])
        assert own[f"{name}_gain"] == pytest.approx(own[name] - best, abs=1e-5)
    quiet = any("no leakage found" in note for note in result.findings["logit_inversion"].notes)
    assert quiet == (own["ssim_gain"] <= 2 * own["ssim_gain_error"])
    assert attack.run(AttackTarget(loop)).metrics == own
    (draw,) = result.figures().values()
    figure = draw()
    FigureCanvasAgg(figure).draw()
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == [
        "nearest private",
        "reconstructed",
        "public mean",
    ]


def test_there_is_nothing_to_invert_where_no_answers_are_sent(tmp_path):
    subject = AttackTarget(finished(tmp_path, trained=False, method="fedavg", specialists=[], channel={}))
    with pytest.raises(UserError, match="not applicable: no client sends answers"):
        LogitInversion().run(subject)
    with pytest.raises(UserError, match=r"gap must be in \[0, 1\], got 2"):
        LogitInversion(gap=2)

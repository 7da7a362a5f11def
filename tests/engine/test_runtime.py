import pytest
import torch
from torch import nn

from fdl.datamodules.samples import TensorSamples
from fdl.engine.batches import batches
from fdl.engine.inference import prefetch
from fdl.engine.runtime import Runtime, seed_everything
from fdl.errors import UserError
from fdl.modules.output import Output
from fdl.recipe import Component, Fit, Scheduler
from fdl.utils.seeding import torch_stream


class Net(nn.Module):
    """A small network that notes the type in which it computed."""

    def __init__(self, norm=False):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
        self.seen = set()

    def forward(self, x):
        z = self.norm(self.linear(x))
        self.seen.add(z.dtype)
        return Output(z, x, {})

    def training_step(self, batch):
        return {"loss": nn.functional.cross_entropy(self(batch[0]).logits.float(), batch[1])}


def data(count=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorSamples(torch.randn(count, 4, generator=generator), torch.randint(3, (count,), generator=generator))


def sgd(lr=0.1, **settings):
    return Fit(optimizer=Component("sgd", {"lr": lr}), **settings)


def fitted(config, round=1, runtime=None, net=None, times=1):
    torch.manual_seed(0)
    net = net or Net()
    for _ in range(times):
        (runtime or Runtime(accelerator="cpu")).fit(net, data(), config, torch_stream(0, "fit"), round=round)
    return net.linear.weight.detach().clone()


def by_hand(rates, batch_size=8, clip=None):
    torch.manual_seed(0)
    net, samples, generator = Net(), data(), torch_stream(0, "fit")
    rates = iter(rates)
    left = True
    while left:
        for indices in torch.randperm(20, generator=generator).split(batch_size):
            rate = next(rates, None)
            if rate is None:
                left = False
                break
            net.zero_grad()
            net.training_step(samples.batch(indices))["loss"].backward()
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= rate * parameter.grad
    return net.linear.weight.detach()


def test_fit_is_the_loop_that_one_would_write_by_hand():
    torch.testing.assert_close(fitted(sgd(epochs=2, batch_size=8)), by_hand([0.1] * 6))
    torch.testing.assert_close(fitted(sgd(epochs=None, steps=4, batch_size=8)), by_hand([0.1] * 4))
    clipped = sgd(epochs=1, batch_size=8, gradient_clip=0.05)
    torch.testing.assert_close(fitted(clipped), by_hand([0.1] * 3, clip=0.05))


@pytest.mark.parametrize(
    ("interval", "round", "rates"),
    [
        ("step", 1, [0.1, 0.05, 0.025, 0.0125, 0.00625, 0.003125]),
        ("epoch", 1, [0.1] * 3 + [0.05] * 3),
        ("round", 1, [0.1] * 6),
        ("round", 3, [0.025] * 6),
    ],
)
def test_schedules_step_when_the_recipe_says(interval, round, rates):
    halve = Scheduler("step_lr", {"step_size": 1, "gamma": 0.5}, interval=interval)
    torch.testing.assert_close(fitted(sgd(epochs=2, batch_size=8, scheduler=halve), round), by_hand(rates))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_an_optimiser_that_is_used_again_remembers_nothing(optimizer):
    args = {"lr": 0.01, "momentum": 0.9} if optimizer == "sgd" else {"lr": 0.01}
    config = Fit(epochs=2, batch_size=8, optimizer=Component(optimizer, args))
    runtime, net = Runtime(accelerator="cpu"), Net()
    start = {name: value.clone() for name, value in net.state_dict().items()}
    weights = []
    for _ in range(3):
        net.load_state_dict(start)
        runtime.fit(net, data(), config, torch_stream(0, "fit"))
        weights.append(net.linear.weight.detach().clone())
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16)]
)
def test_precision_is_felt_in_training_and_inference(precision, dtype):
    runtime = Runtime(accelerator="cpu", precision=precision)
    net = runtime.place(Net())
    runtime.fit(net, data(), sgd(), torch_stream(0, "fit"))
    logits = runtime.predict(net, data())
    assert net.seen == {dtype}
    assert logits.dtype == torch.float32 and logits.shape == (20, 3) and not logits.is_inference()


def test_batch_normalisation_never_trains_on_one_sample():
    runtime, net = Runtime(accelerator="cpu"), Net(norm=True)
    runtime.fit(net, data(9), sgd(batch_size=4), torch_stream(0, "fit"))
    assert net.norm.num_batches_tracked == 2
    with pytest.raises(UserError, match="batch normalisation"):
        runtime.fit(net, data(1), sgd(batch_size=4), torch_stream(0, "fit"))


def test_predict_in_pieces_equals_predict_at_once():
    net = Net()
    whole, pieces = Runtime(accelerator="cpu"), Runtime(accelerator="cpu", batch_size=3)
    torch.testing.assert_close(whole.predict(net, data()), pieces.predict(net, data()))
    assert len(whole.predict(net, data().subset(torch.arange(0)))) == 0


def test_a_dry_run_trains_nothing():
    runtime, net = Runtime(accelerator="cpu"), Net()
    before = net.linear.weight.detach().clone()
    with runtime.dry_run():
        assert runtime.fit(net, data(), sgd(), torch_stream(0, "fit")) == {}
    assert torch.equal(before, net.linear.weight)


def test_every_epoch_visits_every_sample_once():
    drawn = list(batches(10, sgd(epochs=3, batch_size=4), torch_stream(0, "fit")))
    assert [ended for ended, _ in drawn] == [False, False, True] * 3
    for epoch in range(3):
        seen = torch.cat([indices for _, indices in drawn[3 * epoch : 3 * epoch + 3]])
        assert sorted(seen.tolist()) == list(range(10))


def seen_batches(monkeypatch, config, staged=None, device="cpu"):
    """What an objective gets to see, and the state in which the fit leaves its stream."""
    if staged is not None:
        monkeypatch.setattr("fdl.engine.training_loop.prefetch_to_device", staged)
    runtime, generator, seen = Runtime(accelerator=device), torch_stream(0, "fit"), []
    images = torch.randn(21, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = runtime.place(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))

    def objective(module, batch):
        seen.append((batch[0].cpu(), batch[1].cpu()))
        return {"loss": nn.functional.cross_entropy(module(batch[0]), batch[1])}

    samples = TensorSamples(images, torch.arange(21) % 3, augment="crop_flip")
    runtime.fit(net, samples, config, generator, objective)
    return seen, generator.get_state(), net[1].weight.detach().cpu()


@pytest.mark.parametrize("length", [{"epochs": 3}, {"epochs": None, "steps": 7}])
def test_batches_made_ahead_draw_as_those_made_in_turn(length, monkeypatch):
    config = sgd(batch_size=8, **length)
    plain = seen_batches(monkeypatch, config)
    threaded = seen_batches(monkeypatch, config, lambda device, place, items: prefetch(place, items, 2))
    assert len(plain[0]) == len(threaded[0]) == (9 if length["epochs"] else 7)
    for (x, y), (a, b) in zip(plain[0], threaded[0]):
        assert torch.equal(x, a) and torch.equal(y, b)
    assert torch.equal(plain[1], threaded[1]) and torch.equal(plain[2], threaded[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_trains_on_the_batches_of_a_cpu(monkeypatch):
    config = sgd(batch_size=8, epochs=3)
    plain, staged = seen_batches(monkeypatch, config), seen_batches(monkeypatch, config, device="gpu")
    for (x, y), (a, b) in zip(plain[0], staged[0], strict=True):
        assert torch.equal(x, a) and torch.equal(y, b)
    assert torch.equal(plain[1], staged[1])
    torch.testing.assert_close(plain[2], staged[2], rtol=1e-3, atol=1e-4)


def test_creating_a_module_leaves_the_random_state_alone():
    runtime = Runtime(accelerator="cpu")
    runtime.factories["net"] = Net
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second = runtime.create("net", 7), runtime.create("net", 7)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.linear.weight, second.linear.weight)


def test_seeding_depends_on_all_that_names_a_stream():
    drawn = set()
    for arguments in [(0, "a", 1, 2), (1, "a", 1, 2), (0, "b", 1, 2), (0, "a", 2, 2), (0, "a", 1, 3)]:
        seed_everything(*arguments)
        drawn.add(torch.rand(1).item())
        seed_everything(*arguments)
        assert torch.rand(1).item() in drawn
    assert len(drawn) == 5

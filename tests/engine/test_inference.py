"""One pass over samples gives what a plain loop gives, in whatever order and by whatever way."""

import threading

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from fdl.datamodules.samples import TensorSamples
from fdl.datamodules.text import TextSamples
from fdl.engine.inference import _convolutional, _order, predict, prefetch
from fdl.engine.prediction_cache import PredictionCache, fingerprint
from fdl.modules.input_adapter import InputAdapter
from fdl.modules.output import Output
from fdl.modules.small_classifiers import CNN, MLP, ViT

GREY = {"num_classes": 10, "input_shape": (1, 8, 8)}


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def images(count=50, seed=0):
    return TensorSamples(torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)))


def plain_loop(module, samples, what, batch_size):
    module.eval()
    with torch.inference_mode():
        parts = [getattr(module(samples.batch(i)[0]), what) for i in torch.arange(len(samples)).split(batch_size)]
        return torch.cat(parts).clone()


class Words(nn.Module):
    """A text classifier by the mean of its words, that notes the shapes it sees."""

    def __init__(self):
        super().__init__()
        self.words, self.seen = nn.Embedding(20, 6), []

    def forward(self, tokens):
        self.seen.append(tuple(tokens.shape))
        there = (tokens >= 0).unsqueeze(2)
        mean = (self.words(tokens.clamp_min(0)) * there).sum(1) / there.sum(1)
        return Output(mean[:, :3], mean, {})


def texts(count=23, width=None):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 30, (count,), generator=generator).numpy()
    return TextSamples(torch.randint(20, (lengths.sum(),), generator=generator).numpy(), lengths, width=width)


@pytest.mark.parametrize("make", [MLP, CNN, ViT])
@pytest.mark.parametrize("batch_size", [7, 50, 64])
def test_answers_are_those_of_a_plain_loop_to_the_last_bit(fabric, make, batch_size):
    module, samples = make(**GREY), images()
    for what in ("logits", "embedding"):
        found = predict(fabric, module, samples, what, batch_size)
        assert torch.equal(found, plain_loop(module, samples, what, batch_size))
        assert found.dtype == torch.float32 and not found.is_inference() and not module.training


def test_a_question_may_be_a_function_and_nothing_to_ask_is_no_error(fabric):
    module, samples = MLP(**GREY), images()
    norms = predict(fabric, module, samples, lambda m, x: m(x).embedding.norm(dim=1), 8)
    torch.testing.assert_close(norms, predict(fabric, module, samples, "embedding", 8).norm(dim=1))
    assert predict(fabric, module, samples.subset([])).shape == (0,)


def test_precision_is_the_fabrics():
    module, samples = MLP(**GREY), images()
    half = predict(Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"), module, samples)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = module(samples.batch(torch.arange(50))[0]).logits
    assert expected.dtype == torch.bfloat16 and torch.equal(half, expected.float())


def test_texts_are_answered_longest_first_and_come_back_in_their_own_order(fabric):
    module, samples = Words(), texts()
    found = predict(fabric, module, samples, "embedding", 4)
    alone = torch.cat([module(samples.batch(torch.tensor([i]))[0]).embedding for i in range(len(samples))])
    torch.testing.assert_close(found, alone.detach())
    widths = [width for _, width in module.seen[:6]]
    assert widths == sorted(widths, reverse=True)
    in_order = sum(4 * samples.lengths[i : i + 4].max().item() for i in range(0, 23, 4))
    assert sum(rows * width for rows, width in module.seen[:6]) < 0.8 * in_order


def test_batches_of_one_width_keep_their_order():
    assert _order(images()) is None and _order(texts(width=30)) is None and _order(texts().subset([3])) is None
    assert sorted(_order(texts()).tolist()) == list(range(23))


def test_answers_of_different_shapes_are_refused(fabric):
    with pytest.raises(ValueError, match=r"shape \[B, \d+, 6\] in one batch and \[B, 2\d, 6\] in another"):
        predict(fabric, Words(), texts(), lambda m, tokens: m.words(tokens.clamp_min(0)), 4)


def test_answers_may_live_in_a_file(fabric, tmp_path):
    module, samples, path = MLP(**GREY), images(), tmp_path / "deep" / "answers.bin"
    for count in (50, 20):
        found = predict(fabric, module, samples.subset(range(count)), "logits", 8, into=path)
        assert torch.equal(found, predict(fabric, module, samples.subset(range(count)), "logits", 8))
        assert path.stat().st_size == count * 10 * 4
        assert torch.equal(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32), found.flatten())


def test_progress_is_told_after_every_batch(fabric):
    told = []
    predict(fabric, MLP(**GREY), images(), batch_size=20, progress=lambda done, total: told.append((done, total)))
    assert told == [(20, 50), (40, 50), (50, 50)]


def test_a_thread_works_ahead_but_not_further_than_asked():
    made, gate = [], threading.Event()

    def make(item):
        made.append(item)
        if item == 2:
            gate.set()
        return item * item

    found = prefetch(make, range(10), 2)
    assert next(found) == 0 and gate.wait(5) and max(made) == 2
    assert list(found) == [i * i for i in range(1, 10)] and made == list(range(10))


def test_a_thread_hands_on_errors_and_stops_with_its_reader():
    def broken(item):
        if item == 3:
            raise RuntimeError("damaged")
        return item

    found = prefetch(broken, range(10), 2)
    with pytest.raises(RuntimeError, match="damaged"):
        list(found)
    threads = prefetch(lambda item: item, range(1000), 2)
    next(threads)
    threads.close()
    assert not any(thread.name.startswith("fdl-batches") for thread in threading.enumerate())


def test_only_networks_of_convolutions_count_as_such():
    assert _convolutional(CNN(**GREY)) and not _convolutional(ViT(**GREY)) and not _convolutional(MLP(**GREY))


@pytest.mark.slow
def test_compiled_modules_answer_the_same(fabric):
    samples = images()
    for module in (MLP([8], **GREY), CNN([8], **GREY)):
        found = predict(fabric, module, samples, "embedding", 16, compile=True)
        torch.testing.assert_close(found, plain_loop(module, samples, "embedding", 16), rtol=1e-4, atol=1e-5)


def test_a_function_gets_the_module_itself_though_it_is_compiled(fabric):
    module, samples = MLP(**GREY), images()
    found = predict(fabric, module, samples, lambda m, x: m.backbone.trunk(x), compile=True)
    assert torch.equal(found, predict(fabric, module, samples, "embedding"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("make", [CNN, ViT])
def test_a_gpu_answers_as_the_cpu_does(fabric, make):
    module, samples = make(**GREY), images(1000)
    expected = predict(fabric, module, samples, batch_size=64)
    gpu = Fabric(accelerator="gpu", devices=1)
    before = [p.stride() for p in module.parameters()]
    found = predict(gpu, gpu.to_device(module), samples, batch_size=64)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert [p.stride() for p in module.parameters()] == before


# -- the cache ---------------------------------------------------------------------------------------------------


class Counting(MLP):
    """Notes how often it is asked."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self._asked = [0]

    def forward(self, x, features=()):
        self._asked[0] += 1
        return super().forward(x, features)


def first_two(module, inputs):
    return module(inputs).logits[:, :2]


def asked(fabric, module, cache, samples=None, what="logits", batch_size=50):
    before = module._asked[0]
    found = predict(fabric, module, images() if samples is None else samples, what, batch_size, cache=cache)
    return module._asked[0] > before, found


def test_a_model_is_asked_once_until_something_changes(fabric):
    module, cache = Counting(**GREY), PredictionCache()
    first = asked(fabric, module, cache)
    again = asked(fabric, module, cache)
    assert first[0] and not again[0] and torch.equal(first[1], again[1])
    again[1].zero_()  # a caller's own copy
    assert torch.equal(asked(fabric, module, cache)[1], first[1])
    for other in (
        asked(fabric, module, cache, images(seed=1)),
        asked(fabric, module, cache, what="embedding"),
        asked(fabric, module, cache, what=first_two),
        asked(fabric, module, cache, batch_size=49),
    ):
        assert other[0]
    assert not asked(fabric, module, cache, what=first_two)[0]
    with torch.no_grad():
        next(module.parameters())[0, 0] += 1
    changed = asked(fabric, module, cache)
    assert changed[0] and not torch.equal(changed[1], first[1])


def test_functions_without_a_name_of_their_own_are_asked_every_time(fabric):
    module, cache = Counting(**GREY), PredictionCache()
    for _ in range(2):
        assert asked(fabric, module, cache, what=lambda m, x: m(x).logits)[0]
    assert cache.key(module, images(), module.forward) is None


def test_a_folder_serves_other_runs(fabric, tmp_path):
    module = Counting(**GREY)
    _, first = asked(fabric, module, PredictionCache(tmp_path / "answers"))
    again, found = asked(fabric, module, PredictionCache(tmp_path / "answers"))
    assert not again and torch.equal(found, first)
    assert [path.suffix for path in (tmp_path / "answers").iterdir()] == [".safetensors"]


def flip_a_bit(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], flip_a_bit])
def test_a_damaged_file_is_made_again_with_a_warning(fabric, tmp_path, damage, caplog):
    module = Counting(**GREY)
    _, first = asked(fabric, module, PredictionCache(tmp_path))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again, found = asked(fabric, module, PredictionCache(tmp_path))
    assert path.name in caplog.text and "is made again" in caplog.text
    assert again and torch.equal(found, first) and path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_a_warning_only(fabric, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    _, found = asked(fabric, Counting(**GREY), PredictionCache(tmp_path / "file"))
    assert found.shape == (50, 10) and "answers are not stored" in caplog.text


def test_memory_keeps_what_was_used_last(fabric):
    module, cache = Counting(**GREY), PredictionCache(limit=2 * 50 * 10 * 4)
    sets = [images(seed=seed) for seed in range(3)]
    asked(fabric, module, cache, sets[0])
    asked(fabric, module, cache, sets[1])
    asked(fabric, module, cache, sets[0])
    asked(fabric, module, cache, sets[2])
    assert [asked(fabric, module, cache, s)[0] for s in (sets[0], sets[2], sets[1])] == [False, False, True]
    tiny = PredictionCache(limit=8)
    assert [asked(fabric, module, tiny)[0] for _ in range(2)] == [True, True]


def test_settings_without_weights_change_the_fingerprint():
    small, large = (InputAdapter((3, 32, 32), size=(side, side)) for side in (48, 64))
    assert fingerprint(small) == fingerprint(InputAdapter((3, 32, 32), size=(48, 48))) != fingerprint(large)
    torch.manual_seed(0)
    two = ViT(heads=2, **GREY)
    torch.manual_seed(0)
    four = ViT(heads=4, **GREY)
    assert all(torch.equal(a, b) for a, b in zip(two.parameters(), four.parameters()))
    assert fingerprint(two) != fingerprint(four)
    two.train(), (before := fingerprint(two)), two.eval()
    assert fingerprint(two) == before

"""Teacher inference: fdl.engine.inference.predict against the plain loop that each library's users write.

    python benchmarks/teacher_inference.py [--device cpu] [--precision 32-true] [--repeats 5] [--output FILE.md]

The job: a teacher with random weights answers a proxy set. timm: logits of images; transformers: the embedding of texts
of 4 to 128 words by BERT, and the mean negative log-likelihood of windows of 128 tokens by GPT-2; open_clip: the
embedding of images. On a CPU the models are small ones of these architectures, on a GPU the published sizes, in
bfloat16. The plain loop: evaluation mode, inference mode, autocast, one batch after another in the set's own order, to
the device, through the library's own model, and back at the end. The same answers are asserted before anything is
timed. Times are medians over repeats, the two taking turns; a ratio above 1 says that fdl is faster.

On a CPU, seconds are the process's own, so that other processes on the machine do not count; on a GPU they are those of
the clock. MFU is the share of the device's peak that fdl's pass uses: its multiplications and additions, as
torch.utils.flop_counter counts them, a second, over those of a large matrix product on the same device in the same
precision. Padding that fdl leaves out is in the ratio, not in the MFU.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fdl.datamodules.samples import Samples, TensorSamples
from fdl.datamodules.text import TextSamples
from fdl.engine.inference import OutputSelector, predict
from fdl.modules.timm_model import Timm


class Job(NamedTuple):
    """A teacher and what it is asked.

    Attributes:
        name: library and model.
        module: as fdl has it.
        what: the question to fdl.
        network: as the library has it; of the same weights.
        ask: what the plain loop calls with the network and a batch.
        samples: what is answered.
        units: how many images or tokens these are.
        unit: ``"images"`` or ``"tokens"``.
        batch_size: samples a forward pass.
    """

    name: str
    module: nn.Module
    what: OutputSelector
    network: nn.Module
    ask: Callable[[nn.Module, Any], Tensor]
    samples: Samples
    units: int
    unit: str
    batch_size: int


def images(count: int, side: int) -> TensorSamples:
    """Random pixels, stored in bytes as photographs are."""
    pixels = torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return TensorSamples(pixels, mean=[0.5] * 3, std=[0.5] * 3)


def texts(count: int, shortest: int, longest: int, vocabulary: int) -> TextSamples:
    """Random tokens; lengths follow an exponential law, as those of reviews and questions roughly do."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.exponential((longest - shortest) / 4, count).astype(int) + shortest, shortest, longest)
    return TextSamples(rng.integers(0, vocabulary, lengths.sum()), lengths)


def windows(count: int, width: int, vocabulary: int) -> TextSamples:
    """Random tokens in windows of one width."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, count * width)
    return TextSamples(tokens, np.full(count, width), width=width)


def first(model: nn.Module, inputs: Any) -> Tensor:
    """The library's model, called with images."""
    return model(inputs)


def text_embedding(model: nn.Module, tokens: Tensor) -> Tensor:
    """What BERT's head sees of padded texts: the first token's state."""
    there = tokens >= 0
    return model(input_ids=tokens.clamp_min(0), attention_mask=there.long()).last_hidden_state[:, 0]


def window_nll(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of the tokens of each window, [B]."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").float().mean(1)


def image_embedding(model: nn.Module, inputs: Tensor) -> Tensor:
    """CLIP's embedding of images."""
    return model.encode_image(inputs)


def timm_job(model: str, count: int, side: int, batch_size: int) -> Job:
    """Logits of a timm model."""
    samples = images(count, side)
    module = Timm(model, num_classes=100, input_shape=(3, side, side))
    return Job(f"timm {model}", module, "logits", module.backbone, first, samples, count, "images", batch_size)


def bert_job(count: int, batch_size: int, **size: int) -> Job:
    """Embeddings of texts of many lengths."""
    from transformers import BertConfig, BertModel

    model, samples = BertModel(BertConfig(**size)), texts(count, 4, 128, 30_000)
    name = f"transformers BERT {model.config.num_hidden_layers}×{model.config.hidden_size}"
    tokens = int(samples.lengths.sum())
    return Job(name, model, text_embedding, model, text_embedding, samples, tokens, "tokens", batch_size)


def gpt_job(count: int, batch_size: int, **size: int) -> Job:
    """Likelihoods of windows of text."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model, samples = GPT2LMHeadModel(GPT2Config(**size)), windows(count, 128, 50_000)
    name = f"transformers GPT-2 {model.config.n_layer}×{model.config.n_embd}"
    return Job(name, model, window_nll, model, window_nll, samples, count * 128, "tokens", batch_size)


def clip_job(model: str, count: int, batch_size: int) -> Job:
    """Embeddings of images by one tower of CLIP."""
    import open_clip

    network, samples = open_clip.create_model(model), images(count, 224)
    return Job(
        f"open_clip {model}", network, image_embedding, network, image_embedding, samples, count, "images", batch_size
    )


_MINI = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
JOBS: dict[str, list[Callable[[], Job]]] = {
    "quick": [
        lambda: timm_job("test_resnet", 24, 32, 8),
        lambda: bert_job(24, 8, num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64),
    ],
    "cpu": [
        lambda: timm_job("resnet18", 64, 64, 16),
        lambda: timm_job("mobilenetv3_small_100", 64, 96, 16),
        lambda: timm_job("vit_tiny_patch16_224", 16, 224, 8),
        lambda: bert_job(128, 16, **_MINI),
        lambda: gpt_job(8, 4, n_layer=4, n_embd=256, n_head=4),
        lambda: clip_job("ViT-S-32", 16, 8),
    ],
    "cuda": [
        lambda: timm_job("resnet50", 20_000, 224, 512),
        lambda: timm_job("vit_base_patch16_224", 8_000, 224, 512),
        lambda: timm_job("vit_large_patch16_224", 4_000, 224, 512),
        lambda: bert_job(50_000, 512),
        lambda: gpt_job(4_000, 64),
        lambda: clip_job("ViT-B-32", 20_000, 1024),
    ],
}


def plain(job: Job, fabric: Fabric) -> Tensor:
    """The loop that one writes by hand."""
    job.network.eval()
    parts = []
    with torch.inference_mode(), fabric.autocast():
        for rows in torch.arange(len(job.samples)).split(job.batch_size):
            parts.append(job.ask(job.network, job.samples.batch(rows)[0].to(fabric.device)))
        return torch.cat(parts).float().cpu()


def ours(job: Job, fabric: Fabric) -> Tensor:
    """The same by fdl."""
    return predict(fabric, job.module, job.samples, job.what, job.batch_size)


def assert_same_answers(job: Job, fabric: Fabric) -> None:
    """Both give the same answers, within what the precision allows."""
    rough = fabric.strategy.precision.precision != "32-true" or fabric.device.type != "cpu"
    tolerance = {"rtol": 0.05, "atol": 0.05} if rough else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(ours(job, fabric), plain(job, fabric), **tolerance)


def flops(job: Job, fabric: Fabric) -> int:
    """Multiplications and additions of fdl's pass."""
    with FlopCounterMode(display=False) as counter:
        ours(job, fabric)
    return counter.get_total_flops()


def peak_flops(fabric: Fabric, size: int) -> float:
    """Multiplications and additions a second in a large product of matrices: the best of ten."""
    dtype = torch.float32 if fabric.strategy.precision.precision.startswith("32") else torch.bfloat16
    a, b = (torch.randn(size, size, device=fabric.device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b, fabric)[0] for _ in range(10))


def seconds(run: Callable[[], Any], fabric: Fabric) -> tuple[float, float]:
    """How long a call takes, and the megabytes that it needs at most: of the device, or of the process on a CPU."""
    gpu = fabric.device.type == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        _reset_peak()
    clock = time.perf_counter if gpu else time.process_time
    start = clock()
    run()
    if gpu:
        torch.cuda.synchronize()
    taken = clock() - start
    return taken, torch.cuda.max_memory_allocated() / 1e6 if gpu else _peak()


def _reset_peak() -> None:
    # on another system, or where it is not allowed, the figure is the process's since its start
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    status = Path("/proc/self/status")
    found = [line for line in status.read_text().splitlines() if "VmHWM" in line] if status.is_file() else []
    return int(found[0].split()[1]) / 1e3 if found else float("nan")


def measure(make: Callable[[], Job], fabric: Fabric, repeats: int, peak: float) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    job = make()
    fabric.to_device(job.module)
    assert_same_answers(job, fabric)
    work = flops(job, fabric)
    runs: dict[Callable, list[tuple[float, float]]] = {plain: [], ours: []}
    for i in range(repeats):
        for run in sorted(runs, key=lambda run: (run is ours) == (i % 2 == 0)):  # the two take turns to go first
            runs[run].append(seconds(lambda run=run: run(job, fabric), fabric))
    theirs, own = ([taken for taken, _ in found] for found in runs.values())
    memory = [max(most for _, most in found) for found in runs.values()]
    return (
        f"| {job.name} | {job.unit} | {_spread([job.units / s for s in theirs], 0)} "
        f"| {_spread([job.units / s for s in own], 0)} | {_spread([a / b for a, b in zip(theirs, own)], 2)} "
        f"| {100 * work / statistics.median(own) / peak:.0f} % | {memory[0]:.0f} → {memory[1]:.0f} |"
    )


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}–{max(values):.{digits}f}]"


def main(arguments: list[str] | None = None) -> str:
    """Measure, print the table and return it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", help="as Lightning's; default 32-true on a CPU, bf16-mixed on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="models of a few thousand weights, to see that it runs")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    precision = options.precision or {"cpu": "32-true", "cuda": "bf16-mixed"}[options.device]
    fabric = Fabric(accelerator=options.device, devices=1, precision=precision)
    peak = peak_flops(fabric, 256 if options.quick else {"cpu": 2048, "cuda": 8192}[options.device])
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    table = [
        f"Teacher inference on {where}, {precision}, torch {torch.__version__}, {options.repeats} repeats, "
        f"matrix products at {peak / 1e12:.3g} TFLOP/s.",
        "",
        "| teacher | unit | plain, a second, median [min–max] | fdl, a second | ratio | MFU | peak MB, plain → fdl |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(table), flush=True)
    for make in JOBS["quick" if options.quick else options.device]:
        table.append(measure(make, fabric, options.repeats, peak))
        print(table[-1], flush=True)
    text = "\n".join(table)
    if options.output:
        options.output.write_text(text + "\n")
    return text


if __name__ == "__main__":
    main()

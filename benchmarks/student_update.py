"""The student's training step: fdl's Runtime.fit against the plain loop that each library's users write.

    python benchmarks/student_update.py [--device cpu] [--precision 32-true] [--compile default] [--repeats 5] [--quick]
        [--output FILE.md]

Two tables.

Steps: the same network, from the same weights, on the same batches in the same order, with the same optimiser and loss:
cross entropy of images (timm), next tokens (transformers), and image-text contrast (open_clip). The plain loop sends a
batch to the device, calls the library's own model under autocast, and steps; fdl runs its rounds' training loop.
The same weights afterwards are asserted before anything is timed (exactly on a CPU, within what the precision allows on
a GPU). A ratio above 1 says that fdl is faster; the plain loop of a language model forms all logits at once, as
transformers does, and fdl a chunk at a time. With ``--compile`` a third loop takes its turn: fdl's with compiled steps,
which must end at the same weights, too. Its ratio is to fdl's loop without; compiling itself is not timed.

Sparse losses: forward and backward of a language model's distillation loss alone, from last hidden states: dense (all
of the teacher's probabilities are there, and so are both full tables of logits) against top-k with a tail bucket, a
chunk of tokens at a time.

Times are medians over repeats, the two taking turns, of the process's own seconds on a CPU and of the clock on a GPU.
MFU is the share of the device's measured matrix-product peak that fdl's steps use.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fdl.datamodules.pairs import PairSamples
from fdl.datamodules.samples import Samples
from fdl.datamodules.text import TextSamples
from fdl.engine.batches import batches
from fdl.engine.runtime import Runtime
from fdl.losses.tokens import sparse_distillation
from fdl.modules.language_model import LanguageModel
from fdl.modules.open_clip_model import OpenClip
from fdl.modules.timm_model import Timm
from fdl.modules.tokenizers import make_tokenizer
from fdl.recipe import Component, Fit
from fdl.state.weights import load_into, module_state

Loop = Callable[["Job", Runtime], None]
"""Trains a job's module."""


class Job(NamedTuple):
    """A student and what it learns from.

    Attributes:
        name: library and model.
        module: as fdl has it.
        loss: the plain loop's loss of the module's network and a batch on the device.
        samples: what is learnt.
        units: images, tokens or pairs of one step.
        unit: what they are.
        fit: steps, batch size and optimiser.
    """

    name: str
    module: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    samples: Samples
    units: int
    unit: str
    fit: Fit


def neighbour() -> ModuleType:
    """The neighbouring script, whose clock, peaks and random data these tables share."""
    spec = importlib.util.spec_from_file_location("teacher_inference", Path(__file__).with_name("teacher_inference.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


teacher = neighbour()


def settings(steps: int, batch_size: int) -> Fit:
    """AdamW, as foundation models are trained."""
    return Fit(steps=steps, batch_size=batch_size, optimizer=Component("adamw", {"lr": 1e-4}))


def timm_job(model: str, side: int, batch_size: int, steps: int) -> Job:
    """Cross entropy of images in 100 classes."""
    samples = teacher.images(4 * batch_size, side)
    labels = torch.randint(100, (len(samples),), generator=torch.Generator().manual_seed(1))
    samples = samples._changed(labels=labels)
    module = Timm(model, num_classes=100, input_shape=(3, side, side))

    def loss(module: nn.Module, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(module.backbone(images), labels)

    return Job(f"timm {model}", module, loss, samples, batch_size, "images", settings(steps, batch_size))


def gpt_job(width: int, batch_size: int, steps: int, vocabulary: str = "bytes", **size: int) -> Job:
    """Next tokens of windows."""
    tokenizer = make_tokenizer(vocabulary)
    config = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, **size}
    module = LanguageModel("gpt2", config=config, tokenizer=tokenizer, context=width)
    samples: TextSamples = teacher.windows(4 * batch_size, width, tokenizer.vocab_size)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        tokens = batch[0]
        return module.network(input_ids=tokens, labels=tokens, use_cache=False).loss

    name = f"transformers GPT-2 {module.network.config.n_layer}×{module.network.config.n_embd}"
    return Job(name, module, loss, samples, width * batch_size, "tokens", settings(steps, batch_size))


def clip_job(batch_size: int, steps: int, side: int, **config: Any) -> Job:
    """Image-text contrast."""
    tokenizer = make_tokenizer("bytes")
    module = OpenClip(config=config, input_shape=(3, side, side), tokenizer=tokenizer, context=30)
    texts = teacher.texts(4 * batch_size, 5, 30, 256)
    samples = PairSamples(teacher.images(4 * batch_size, side), texts)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        images, tokens = batch[0]
        left, right = (F.normalize(v, dim=1) for v in (module.image_vectors(images), module.text_vectors(tokens)))
        logits = module.logit_scale.exp() * left @ right.T
        truth = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2

    return Job("open_clip CLIP", module, loss, samples, batch_size, "pairs", settings(steps, batch_size))


_TOWERS = {
    "embed_dim": 64,
    "vision_cfg": {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"layers": 2, "width": 64, "heads": 2},
}
_BASE = {
    "embed_dim": 512,
    "vision_cfg": {"layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"layers": 12, "width": 512, "heads": 8},
}
JOBS: dict[str, list[Callable[[], Job]]] = {
    "quick": [
        lambda: timm_job("test_resnet", 32, 4, 2),
        lambda: gpt_job(16, 2, 2, n_layer=1, n_embd=16, n_head=2),
        lambda: clip_job(4, 2, 32, **_TOWERS),
    ],
    "cpu": [
        lambda: timm_job("resnet18", 64, 16, 4),
        lambda: timm_job("vit_tiny_patch16_224", 224, 4, 4),
        lambda: gpt_job(128, 8, 4, n_layer=4, n_embd=256, n_head=4),
        lambda: clip_job(16, 4, 64, **_TOWERS),
    ],
    "cuda": [
        lambda: timm_job("vit_base_patch16_224", 224, 128, 40),
        lambda: timm_job("vit_large_patch16_224", 224, 64, 40),
        lambda: gpt_job(1024, 8, 40, n_layer=24, n_embd=1024, n_head=16, vocab_size=50304),
        lambda: clip_job(512, 40, 224, **_BASE),
    ],
}


def plain(job: Job, runtime: Runtime) -> None:
    """The loop that one writes by hand, on the batches that fdl draws."""
    fabric, module, generator = runtime.fabric, job.module, torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], **job.fit.optimizer.args)
    module.train()
    for _, indices in batches(len(job.samples), job.fit, generator):
        batch = runtime.to_device(job.samples.batch(indices, generator))
        with fabric.autocast():
            loss = job.loss(module, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def ours(job: Job, runtime: Runtime) -> None:
    """The same by fdl."""
    runtime.fit(job.module, job.samples, job.fit, torch.Generator().manual_seed(0))


def compiled(mode: str, job: Job) -> Loop:
    """The same with compiled steps."""
    fit = dataclasses.replace(job.fit, compile=mode)
    return lambda job, runtime: ours(job._replace(fit=fit), runtime)


def is_compiled(job: Job, runtime: Runtime) -> bool:
    """Whether its steps could be compiled."""
    return None not in runtime.steps.compiler._steps[job.module].values()


def trained(job: Job, runtime: Runtime, start: dict[str, Tensor], run: Loop) -> Any:
    """The weights after a run from `start`."""
    load_into(job.module, start)
    run(job, runtime)
    return {name: tensor.detach().clone() for name, tensor in module_state(job.module).items()}


def assert_same_weights(job: Job, runtime: Runtime, start: dict[str, Tensor], run: Loop = ours) -> None:
    """A loop ends at the weights of the plain one: apart by a small share of the way that they went.

    Not tensor by tensor: where a gradient is almost nothing, rounding decides which way Adam goes.
    """
    names = [name for name, _ in job.module.named_parameters() if name in start]
    begin, expected, found = (
        torch.cat([tensors[name].flatten().double().cpu() for name in names])
        for tensors in (start, *(trained(job, runtime, start, loop) for loop in (plain, run)))
    )
    exact = runtime.device.type == "cpu" and runtime.fabric.strategy.precision.precision == "32-true"
    way, apart = float((expected - begin).norm()), float((found - expected).norm())
    if not way > 0 or not apart <= (0.05 if exact else 0.5) * way:
        raise AssertionError(f"{job.name}: the two loops went {way:.3g} and ended {apart:.3g} apart")


def measure(make: Callable[[], Job], runtime: Runtime, repeats: int, peak: float, mode: str = "none") -> str:
    """One row of the first table; with two columns more where steps are to be compiled."""
    torch.manual_seed(0)
    job, fabric = make(), runtime.fabric
    job = job._replace(module=runtime.place(job.module))
    start = {name: tensor.detach().clone() for name, tensor in module_state(job.module).items()}
    loops = [plain, ours] if mode == "none" else [plain, ours, compiled(mode, job)]
    for run in loops[1:]:
        assert_same_weights(job, runtime, start, run)
    with FlopCounterMode(display=False) as counter:
        ours(job, runtime)
    work = counter.get_total_flops()
    times: dict[Loop, list[tuple[float, float]]] = {run: [] for run in loops}
    for i in range(repeats):
        for k in range(len(loops)):  # they take turns to go first
            run = loops[(i + k) % len(loops)]
            times[run].append(teacher.seconds(lambda run=run: run(job, runtime), fabric))
    theirs, own, *more = ([taken for taken, _ in found] for found in times.values())
    memory = [max(most for _, most in found) for found in times.values()]
    units = job.units * job.fit.steps
    row = (
        f"| {job.name} | {job.unit} | {spread([units / s for s in theirs], 0)} | {spread([units / s for s in own], 0)} "
        f"| {spread([a / b for a, b in zip(theirs, own)], 2)} | {100 * work / statistics.median(own) / peak:.0f} % "
        f"| {memory[0]:.0f} → {memory[1]:.0f} |"
    )
    for found in more:
        if not is_compiled(job, runtime):  # the log says why
            return f"{row} not compiled | |"
        ratio = spread([a / b for a, b in zip(own, found)], 2)
        row += f" {spread([units / s for s in found], 0)} | {ratio} |"
    return row


def sparse_row(tokens: int, width: int, vocabulary: int, k: int, fabric: Fabric, repeats: int) -> str:
    """One row of the second table: the dense loss against the sparse one in chunks."""
    device = fabric.device
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, width, device=device, requires_grad=True)
    head = nn.Linear(width, vocabulary, bias=False, device=device)
    with torch.no_grad():
        answers = torch.softmax(2 * torch.randn(1, tokens, vocabulary, device=device), -1)
    top = answers.topk(k, -1)

    def dense() -> None:
        with fabric.autocast():
            logits = head(hidden)
        loss = F.kl_div(torch.log_softmax(logits.float(), -1), answers, reduction="none").sum(-1).mean()
        loss.backward()

    def sparse() -> None:
        with fabric.autocast():
            loss = sparse_distillation(hidden, head, top.indices, top.values)
        loss.backward()

    found: dict[Callable, list[float]] = {dense: [], sparse: []}
    largest = {}
    for run in found:
        run()
        largest[run] = live_bytes(run)
    for i in range(repeats):
        for run in sorted(found, key=lambda run: (run is sparse) == (i % 2 == 0)):
            hidden.grad = head.weight.grad = None
            found[run].append(teacher.seconds(run, fabric)[0])
    return (
        f"| {tokens} | {vocabulary:,} | {k} | {spread([tokens / s for s in found[dense]], 0)} "
        f"| {spread([tokens / s for s in found[sparse]], 0)} "
        f"| {largest[dense] / 1e6:.1f} → {largest[sparse] / 1e6:.1f} |"
    )


def live_bytes(run: Callable[[], None]) -> int:
    """The most bytes that a run keeps from its forward for its backward pass."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.untyped_storage().nbytes() if not isinstance(tensor, nn.Parameter) else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept


def spread(values: list[float], digits: int) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}–{max(values):.{digits}f}]"


def main(arguments: list[str] | None = None) -> str:
    """Measure, print the tables and return them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", help="as Lightning's; default 32-true on a CPU, bf16-mixed on a GPU")
    parser.add_argument("--compile", choices=["none", "default", "reduce-overhead"], default="none", dest="mode")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="models of a few thousand weights, to see that it runs")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    options = parser.parse_args(arguments)
    precision = options.precision or {"cpu": "32-true", "cuda": "bf16-mixed"}[options.device]
    torch.set_num_threads(options.threads)
    runtime = Runtime(accelerator=options.device, precision=precision)
    gpu = options.device == "cuda"
    peak = teacher.peak_flops(runtime.fabric, 256 if options.quick else 8192 if gpu else 2048)
    where = torch.cuda.get_device_name() if gpu else f"CPU, {options.threads} thread(s)"
    lines: list[str] = []

    def say(*rows: str) -> None:
        lines.extend(rows)
        print("\n".join(rows), flush=True)

    more = "" if options.mode == "none" else f" fdl, compile: {options.mode}, a second | ratio to fdl |"
    say(
        f"Student update on {where}, {precision}, torch {torch.__version__}, {options.repeats} repeats, "
        f"matrix products at {peak / 1e12:.3g} TFLOP/s.",
        "",
        "| student | unit | plain, a second, median [min–max] | fdl, a second | ratio | MFU | peak MB, plain → fdl |"
        + more,
        "|---|---|---|---|---|---|---|" + "---|---|" * bool(more),
    )
    for make in JOBS["quick" if options.quick else options.device]:
        say(measure(make, runtime, options.repeats, peak, options.mode))
    say(
        "",
        "| tokens | vocabulary | k | dense loss, tokens a second | sparse, in chunks | MB kept for the backward pass |",
        "|---|---|---|---|---|---|",
    )
    sizes = (
        [(64, 16, 500)] if options.quick else [(8192, 1024, 50304)] if gpu else [(1024, 256, 8192), (1024, 256, 50257)]
    )
    for tokens, width, vocabulary in sizes:
        say(sparse_row(tokens, width, vocabulary, 16, runtime.fabric, options.repeats))
    text = "\n".join(lines)
    if options.output:
        options.output.write_text(text + "\n")
    return text


if __name__ == "__main__":
    main()

"""One pass of a model over many samples: what teachers and specialists spend most of their time with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fdl.engine.prediction_cache import PredictionCache

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from fdl.datamodules.samples import Samples

T = TypeVar("T")
OutputSelector = str | Callable[[nn.Module, Any], Tensor]
"""A field of a model's `Output`, or a function (module, inputs) to a tensor [B, …]."""
Progress = Callable[[int, int], None]
"""Told after every batch: samples done, samples in all."""

PREFETCH_BATCHES = 2
"""Batches that are gathered and copied to a GPU while it works on another."""


def predict(
    fabric: Fabric,
    module: nn.Module,
    samples: Samples,
    what: OutputSelector = "logits",
    batch_size: int = 512,
    compile: bool = False,
    into: Path | None = None,
    cache: PredictionCache | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Ask a model about samples, without gradients, in evaluation mode and the precision of `fabric`.

    Texts of different lengths are answered longest first, so that batches hold little padding, and come back in their
    own order. On a GPU the next batches are gathered and copied, and the last answers brought back, while it computes;
    convolutional networks get images in channels-last layout. On a CPU the answers are, to the last bit, those of a
    plain loop over batches of the same size.

    Args:
        fabric: device and precision; the module is on its device.
        module: left in evaluation mode.
        samples: n samples.
        what: the field of `Output` to collect, or a function of module and inputs; in a set whose inputs differ in
            length, its result must not.
        batch_size: samples a forward pass.
        compile: run the module through ``torch.compile``, which pays off in long passes only; functions are called
            with the module as it is.
        into: a file that backs the result, for answers larger than memory; it is overwritten.
        cache: where the answer is looked up first and kept afterwards; closures and bound methods have no name to be
            kept under, and are asked every time.
        progress: called after every batch.

    Returns:
        float32 on the CPU, [n, …]; empty, [0], where there are no samples.

    Raises:
        ValueError: batches are answered in different shapes.
    """
    how = (fabric.strategy.precision.precision, fabric.device.type, batch_size, compile)
    key = None if cache is None else cache.key(module, samples, what, how)
    if key is not None and (known := cache.get(key, len(samples))) is not None:
        return known
    if module.training:
        module.eval()
    run = partial(_compiled(), module) if compile else module
    results = _Results(len(samples), into)
    done = 0
    for rows, inputs in _on_device(fabric, module, samples, batch_size):
        with torch.inference_mode(), fabric.autocast():
            values = getattr(run(inputs), what) if isinstance(what, str) else what(module, inputs)
        results.write(rows, values)
        done += len(values)
        if progress is not None:
            progress(done, len(samples))
    answers = results.finish()
    if key is not None:
        cache.put(key, answers)
    return answers


def _order(samples: Samples) -> Tensor | None:
    """The longest texts first: a batch too large for memory fails at once; None keeps the order of the samples."""
    lengths = samples.lengths
    if lengths is None or samples.width is not None or len(samples) == 0:
        return None
    lengths = torch.as_tensor(lengths)
    return None if bool((lengths == lengths[0]).all()) else lengths.argsort(descending=True, stable=True)


def _convolutional(module: nn.Module) -> bool:
    """Whether convolutions do the work; a transformer's one that cuts patches does not count."""
    return sum(isinstance(part, nn.Conv2d) for part in module.modules()) > 1


@cache
def _compiled() -> Callable[[nn.Module, Any], Any]:
    # one function for all modules: those of one architecture share the compiled code, and nothing keeps them alive
    return torch.compile(lambda module, inputs: module(inputs))


def _on_device(
    fabric: Fabric, module: nn.Module, samples: Samples, batch_size: int
) -> Iterator[tuple[slice | Tensor, Any]]:
    """Batches of inputs on the device, and which samples they are."""
    device, convert, count = fabric.device, fabric.strategy.precision.convert_input, len(samples)
    order = _order(samples)
    starts = [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]

    def rows_of(part: slice) -> Tensor:
        return torch.arange(part.start, part.stop) if order is None else order[part]

    if device.type != "cuda":
        for part in starts:
            rows = rows_of(part)
            inputs = map_tensors(samples.batch(rows)[0], lambda t: t.to(device))
            yield part if order is None else rows, convert(inputs)
        return
    convolutional = _convolutional(module)

    def placed(part: slice) -> tuple[slice | Tensor, Any]:
        rows = rows_of(part)
        # images travel as bytes and become numbers on the device
        inputs = samples.normalised(map_tensors(samples.stored(rows), lambda t: to_device(t, device)))
        if convolutional:  # only the images: other strides of the weights would cut them off from their template
            inputs = map_tensors(
                inputs, lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t
            )
        return part if order is None else rows, convert(inputs)

    yield from prefetch_to_device(device, placed, starts)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; a GPU gets it from pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def prefetch_to_device(device: torch.device, place: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """Map over items in order, where what is made of them lies on a device.

    On a GPU one thread draws the items and places them on a stream of its own, `PREFETCH_BATCHES` ahead of the
    consumer: gathering and copying overlap with the work on earlier items.

    Args:
        device: where results are used.
        place: makes a tensor, or a tuple of tensors, tuples and other things, of an item.
        items: may be a generator that draws random numbers: nobody else advances it.
    """
    if device.type != "cuda":
        yield from map(place, items)
        return
    side = torch.cuda.Stream(device)

    def made(item: Any) -> tuple[T, torch.cuda.Event]:
        with torch.cuda.device(device), torch.cuda.stream(side):
            return place(item), side.record_event()

    with closing(prefetch(made, items, PREFETCH_BATCHES)) as results:
        for result, ready in results:
            now = torch.cuda.current_stream(device)
            now.wait_event(ready)
            # the memory is not given away before `now` is through
            map_tensors(
                result, lambda t, now=now: t.record_stream(now) if isinstance(t, Tensor) and t.is_cuda else None
            )
            yield result


def map_tensors(inputs: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to a tensor, or to every tensor of a tuple."""
    return tuple(map_tensors(part, function) for part in inputs) if isinstance(inputs, tuple) else function(inputs)


def prefetch(function: Callable[[Any], T], items: Iterable[Any], count: int) -> Iterator[T]:
    """Map over items in order, with one thread that is at most `count` items ahead of whoever takes the results.

    The thread draws the items, too, so that what a generator and `function` do alternates as in a plain loop.
    """
    source, end = iter(items), object()

    def step() -> Any:
        item = next(source, end)
        return end if item is end else function(item)

    worker = ThreadPoolExecutor(1, thread_name_prefix="fdl-batches")
    try:
        waiting = deque(worker.submit(step) for _ in range(count))
        while (result := waiting.popleft().result()) is not end:
            waiting.append(worker.submit(step))
            yield result
    finally:
        worker.shutdown(cancel_futures=True)


class _Results:
    """Collects answers in one float32 tensor on the CPU.

    A GPU's answers are copied without waiting for them, and written one batch later, when they are there.

    Args:
        count: rows in all.
        into: a file to back the tensor; None: memory.
    """

    def __init__(self, count: int, into: Path | None):
        self._count, self._into = count, into
        self._whole: Tensor | None = None
        self._coming: tuple[slice | Tensor, Tensor, torch.cuda.Event] | None = None

    def write(self, rows: slice | Tensor, values: Tensor) -> None:
        """Take one batch of answers."""
        if self._whole is None:
            # allocated outside inference mode: knowledge made of it is differentiated through later
            self._whole = self._allocate(values.shape[1:])
        if values.shape[1:] != self._whole.shape[1:]:
            raise ValueError(
                f"answers have shape [B, {', '.join(map(str, values.shape[1:]))}] in one batch and "
                f"[B, {', '.join(map(str, self._whole.shape[1:]))}] in another"
            )
        if values.device.type != "cuda":
            self._whole[rows] = values.to("cpu", torch.float32)
            return
        values = values.float()
        host = torch.empty(values.shape, pin_memory=True)
        host.copy_(values, non_blocking=True)
        before, self._coming = self._coming, (rows, host, torch.cuda.current_stream(values.device).record_event())
        self._settle(before)

    def finish(self) -> Tensor:
        """All answers."""
        self._settle(self._coming)
        return torch.empty(0) if self._whole is None else self._whole

    def _settle(self, coming: tuple[slice | Tensor, Tensor, torch.cuda.Event] | None) -> None:
        if coming is not None:
            rows, host, ready = coming
            ready.synchronize()
            self._whole[rows] = host

    def _allocate(self, shape: torch.Size) -> Tensor:
        if self._into is None:
            return torch.empty(self._count, *shape)
        self._into.parent.mkdir(parents=True, exist_ok=True)
        self._into.unlink(missing_ok=True)  # a longer file would keep its length
        whole = torch.from_file(str(self._into), shared=True, size=self._count * shape.numel(), dtype=torch.float32)
        return whole.reshape(self._count, *shape)

"""Inference: one pass of a model over many samples, which dominates the time of teachers and specialists."""

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
"""Called after every batch with the number of samples done, and of all."""

PREFETCH_BATCHES = 2
"""Batches that are gathered and copied to a GPU while it computes an earlier one."""


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
    """Compute a model's predictions, without gradients, in evaluation mode and the precision of `fabric`.

    Texts of different lengths are processed longest first, so that batches hold little padding, and returned in their
    original order. On a GPU, gathering and copying the next batches, and copying the last predictions back, overlap
    with its computation; convolutional networks get images in channels-last layout. On a CPU the predictions are, to
    the last bit, those of a plain loop over batches of the same size.

    Args:
        fabric: device and precision; the module is on its device.
        module: left in evaluation mode.
        samples: n samples.
        what: the field of `Output` to collect, or a function of module and inputs whose result has the same shape for
            inputs of any length.
        batch_size: samples per forward pass.
        compile: run the module through ``torch.compile``, which pays off in long passes only; functions are called
            with the uncompiled module.
        into: a file that backs the result, for predictions larger than memory; it is overwritten.
        cache: looked up first, and filled afterwards; closures and bound methods have no name for a key, so their
            results are computed every time.
        progress: called after every batch.

    Returns:
        float32 on the CPU, [n, …]; empty, [0], if there are no samples.

    Raises:
        ValueError: batches give predictions of different shapes.
    """
    settings = (fabric.strategy.precision.precision, fabric.device.type, batch_size, compile)
    key = None if cache is None else cache.key(module, samples, what, settings)
    if key is not None and (cached := cache.get(key, len(samples))) is not None:
        return cached
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
    predictions = results.finish()
    if key is not None:
        cache.put(key, predictions)
    return predictions


def _order(samples: Samples) -> Tensor | None:
    """Order texts longest first, so that a batch too large for memory fails at once; None keeps the samples' order."""
    lengths = samples.lengths
    if lengths is None or samples.width is not None or len(samples) == 0:
        return None
    lengths = torch.as_tensor(lengths)
    return None if bool((lengths == lengths[0]).all()) else lengths.argsort(descending=True, stable=True)


def _convolutional(module: nn.Module) -> bool:
    """Return True if a module has several convolutions; a transformer has one at most, for its patch embedding."""
    return sum(isinstance(part, nn.Conv2d) for part in module.modules()) > 1


@cache
def _compiled() -> Callable[[nn.Module, Any], Any]:
    # one function for all modules: those of one architecture share the compiled code, and none is kept alive by it
    return torch.compile(lambda module, inputs: module(inputs))


def _on_device(
    fabric: Fabric, module: nn.Module, samples: Samples, batch_size: int
) -> Iterator[tuple[slice | Tensor, Any]]:
    """Yield batches of inputs on the device, with the rows of their samples."""
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
        # images are copied as bytes and normalised on the device
        inputs = samples.normalised(map_tensors(samples.stored(rows), lambda t: to_device(t, device)))
        if convolutional:  # only the images: other strides would detach the weights from their flat vector
            inputs = map_tensors(
                inputs, lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t
            )
        return part if order is None else rows, convert(inputs)

    yield from prefetch_to_device(device, placed, starts)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; to a GPU from pinned memory, asynchronously."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def prefetch_to_device(device: torch.device, place: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """Map a function that places its result on a device over items, in order.

    On a GPU one thread draws the items and places them on a stream of its own, `PREFETCH_BATCHES` ahead of the
    consumer: gathering and copying overlap with the work on earlier items.

    Args:
        device: the device that uses the results.
        place: returns a tensor, or a tuple of tensors, tuples and other objects, for an item.
        items: may be a generator that draws random numbers: only this function advances it.
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
            # the memory is not reused before the stream `now` is done with it
            map_tensors(
                result, lambda t, now=now: t.record_stream(now) if isinstance(t, Tensor) and t.is_cuda else None
            )
            yield result


def map_tensors(inputs: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to a tensor, or to every tensor of a nested tuple.

    Args:
        inputs: a tensor, or a tuple of tensors and tuples.
        function: called with each tensor.
    """
    return tuple(map_tensors(part, function) for part in inputs) if isinstance(inputs, tuple) else function(inputs)


def prefetch(function: Callable[[Any], T], items: Iterable[Any], count: int) -> Iterator[T]:
    """Map a function over items in order, in one thread that is at most `count` items ahead of the consumer.

    The thread draws the items, too, so that calls of a generator and of `function` alternate as in a plain loop.

    Args:
        function: called with each item.
        items: may be a generator that draws random numbers: only this function advances it.
        count: number of results computed in advance, ≥ 1.
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
    """Collects predictions in one float32 tensor on the CPU.

    Predictions from a GPU are copied asynchronously, and written one batch later, when they have arrived.

    Args:
        count: total number of rows.
        into: a file that backs the tensor; None: memory.
    """

    def __init__(self, count: int, into: Path | None):
        self._count, self._into = count, into
        self._whole: Tensor | None = None
        self._coming: tuple[slice | Tensor, Tensor, torch.cuda.Event] | None = None

    def write(self, rows: slice | Tensor, values: Tensor) -> None:
        """Write one batch of predictions.

        Args:
            rows: their rows in the result.
            values: the predictions [B, …], of any floating-point type and device.

        Raises:
            ValueError: earlier batches had another shape.
        """
        if self._whole is None:
            # allocated outside of inference mode: results computed from it are differentiated later
            self._whole = self._allocate(values.shape[1:])
        if values.shape[1:] != self._whole.shape[1:]:
            raise ValueError(
                f"predictions have shape [B, {', '.join(map(str, values.shape[1:]))}] in one batch and "
                f"[B, {', '.join(map(str, self._whole.shape[1:]))}] in another"
            )
        if values.device.type != "cuda":
            self._whole[rows] = values.to("cpu", torch.float32)
            return
        values = values.float()
        host = torch.empty(values.shape, pin_memory=True)
        host.copy_(values, non_blocking=True)
        before, self._coming = self._coming, (rows, host, torch.cuda.current_stream(values.device).record_event())
        self._finish_copy(before)

    def finish(self) -> Tensor:
        """Return all predictions."""
        self._finish_copy(self._coming)
        return torch.empty(0) if self._whole is None else self._whole

    def _finish_copy(self, coming: tuple[slice | Tensor, Tensor, torch.cuda.Event] | None) -> None:
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

"""Clients as a confidence sees them, without a federation around."""

from types import SimpleNamespace

import torch

from fdl.datamodules.samples import TensorSamples


def samples(x, y=None):
    return TensorSamples(torch.as_tensor(x, dtype=torch.float32), None if y is None else torch.as_tensor(y))


def client(train, proxy, labels=None, encoder=None, num_classes=2, accuracy=0.5):
    labels = torch.zeros(len(train), dtype=torch.int64) if labels is None else labels
    return SimpleNamespace(
        train=samples(train, labels),
        calibration=samples(train[:0], labels[:0]),
        proxy=samples(proxy),
        encoder=encoder,
        num_classes=num_classes,
        samples=len(train),
        cache={},
        calibration_accuracy=lambda: accuracy,
    )

"""What all systems of peers.py have in common; needs torch and numpy only.

A job is a file JOB.npz with x_train, y_train, x_test, y_test and `share`, the client of every training sample: FedAvg,
SGD 0.1, batches of 32, one local epoch, the global model evaluated on the test set every round, one CPU thread.
"""

import resource
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

BATCH, RATE = 32, 0.1


def mlp() -> nn.Module:
    """A perceptron for 8 × 8 digits, 17,226 parameters."""
    sizes = (64, 128, 64, 10)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def cnn() -> nn.Module:
    """A small convolutional network for 32 × 32 photographs, 62,006 parameters (LeNet's layout)."""
    convolutions = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    dense = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*convolutions, nn.Flatten(), *dense)


MODELS = {"mlp": mlp, "cnn": cnn}


def load(path: str) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and labels of every client, and of the test set."""
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    x, y, share = arrays["x_train"], arrays["y_train"], arrays["share"]
    clients = [(x[share == i], y[share == i]) for i in range(int(share.max()) + 1)]
    return clients, (arrays["x_test"], arrays["y_test"])


@torch.no_grad()
def accuracy(model: nn.Module, test: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Share of the test set that is right."""
    model.eval()
    return float((model(test[0]).argmax(1) == test[1]).float().mean())


def peak_bytes() -> int:
    """Most memory that this process has held; without /proc as the system says, which counts its parent in."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

"""The smallest federation whose every number can be checked by hand.

Two clients, two inputs, two classes, a linear model that starts at zero, full batches, learning rate 1. Client 0 holds
one sample x = (1, 0) of class 0, client 1 three samples x = (0, 1) of class 1; the proxy set is {(1, 0), (0, 1)}.
"""

import torch
from torch import nn

from fdl.callbacks.base import CallbackList
from fdl.comm.channel import Channel
from fdl.comm.codec import Codec
from fdl.comm.ledger import Ledger
from fdl.datamodules.samples import TensorSamples
from fdl.engine.runtime import Runtime
from fdl.federation.executors import Sequential
from fdl.loop import FederatedLoop
from fdl.modules.base import FederatedModule
from fdl.modules.output import Output
from fdl.participants import Client, Server
from fdl.recipe import Component, Fit, Recipe
from fdl.recipe.config import Evaluation, FederationConfig

E0, E1 = [1.0, 0.0], [0.0, 1.0]


class Linear(FederatedModule):
    """A linear classifier without bias that starts at zero."""

    def __init__(self, scale: float = 0.0):
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        nn.init.constant_(self.linear.weight, scale)

    def forward(self, x, features=()):
        x = x.flatten(1)
        return Output(logits=self.linear(x), embedding=x, features={})

    def training_step(self, batch, batch_idx=0):
        x, y = batch
        return {"loss": nn.functional.cross_entropy(self(x).logits, y)}


def samples(rows, labels=None):
    return TensorSamples(torch.tensor(rows), None if labels is None else torch.tensor(labels))


def steps(count, lr=1.0):
    """Full-batch gradient descent."""
    return Fit(epochs=None, steps=count, batch_size=64, optimizer=Component("sgd", {"lr": lr}))


def federation(
    method,
    folder,
    rounds=1,
    local_training=1,
    server_distil=1,
    client_distil=1,
    seed=0,
    callbacks=(),
    upload=(),
    module=None,
    private=(((E0,), (0,)), ((E1, E1, E1), (1, 1, 1))),
    **federation,
):
    """A loop over the two toy clients, or as many as have private samples, each with inputs and labels."""
    runtime = Runtime(accelerator="cpu")
    for name in ("student", "teacher", "linear"):
        runtime.factories[name] = module or Linear
    proxy = samples([E0, E1])
    common = {
        "runtime": runtime,
        "seed": seed,
        "local_training": steps(local_training),
        "server_distil": steps(server_distil),
        "client_distil": steps(client_distil),
        "proxy": proxy,
        "num_classes": 2,
        "encoder": None,
    }
    none = samples([E0], [0]).subset(torch.arange(0))
    clients = [
        Client(id=i, architecture="linear", train=samples(rows, labels), calibration=none, **common)
        for i, (rows, labels) in enumerate(private)
    ]
    server = Server(
        validation=none,
        test=samples([E0, E1], [0, 1]),
        student=runtime.create("student", 0) if "student" in method.requires else None,
        teacher=runtime.create("teacher", 0) if "teacher" in method.requires else None,
        pooled=samples([E0] + [E1] * 3, [0] + [1] * 3),
        **common,
    )
    recipe = Recipe(
        name="toy",
        seed=seed,
        method=Component(method.name),
        federation=FederationConfig(clients=len(private), rounds=rounds, **federation),
        evaluation=Evaluation(metrics=["accuracy"]),
    )
    channel = Channel(Codec(upload), Codec(), Ledger(), seed)
    return FederatedLoop(recipe, folder, method, server, clients, channel, Sequential(), CallbackList(callbacks))


def weight(module):
    """The linear model's weights as nested lists."""
    return module.linear.weight.detach()

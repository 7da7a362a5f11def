"""The smallest federation of language models whose every number can be checked by hand.

A bigram model over five tokens: the logits of what follows token v are row v of a table. Windows have four tokens.
Client 0 holds two windows of the cycle 0 1 2 3, client 1 six of the cycle 3 2 1 0; the proxy set has both and a third
window that ends early.
"""

import numpy as np
import torch
from torch import nn

from fdl.callbacks.base import CallbackList
from fdl.comm.channel import Channel
from fdl.comm.codec import Codec
from fdl.comm.ledger import Ledger
from fdl.datamodules.text import TextSamples
from fdl.engine.runtime import Runtime
from fdl.federation.executors import Sequential
from fdl.loop import FederatedLoop
from fdl.modules.base import FederatedModule
from fdl.modules.output import Output
from fdl.participants import Client, Server
from fdl.recipe import Component, Recipe
from fdl.recipe.config import Evaluation, FederationConfig
from tests.toy import steps

VOCAB, LENGTH = 5, 4
UP, DOWN, SHORT = [0, 1, 2, 3], [3, 2, 1, 0], [0, 2]


class Letters:
    """A tokenizer whose tokens are bytes."""

    vocab_size, eos, fingerprint = VOCAB, None, "letters"

    def token_bytes(self, ids):
        return len(ids)

    def matches(self, other):
        return self.fingerprint == other.fingerprint


class Bigram(FederatedModule):
    """Log-probabilities of the next token from a table, [V, V]."""

    tokenizer = data_tokenizer = Letters()

    def __init__(self, table=None, vocab_size=VOCAB):
        super().__init__()
        self.vocab_size = vocab_size
        self.table = nn.Parameter(torch.zeros(vocab_size, vocab_size) if table is None else table.clone())
        self.head = nn.Identity()

    def hidden(self, tokens):
        return self.table[tokens.clamp_min(0)]

    def forward(self, tokens, features=()):
        logits = self.hidden(tokens)
        return Output(logits=logits, embedding=logits.mean(1), features={})

    def token_nll(self, tokens):
        targets = tokens[:, 1:]
        nll = nn.functional.cross_entropy(self.hidden(tokens)[:, :-1].mT, targets.clamp_min(0), reduction="none")
        return nll * (targets >= 0)

    def next_log_probabilities(self, tokens, temperature=1.0):
        """As `LanguageModel.next_log_probabilities`, three positions at a time."""
        for where in (tokens >= 0).flatten().nonzero().squeeze(1).split(3):
            logits = self.hidden(tokens).flatten(0, 1)[where, :VOCAB]
            yield where, torch.log_softmax(logits / temperature, dim=1)

    def training_step(self, batch, batch_idx=0):
        tokens, _ = batch
        return {"loss": self.token_nll(tokens).sum() / (tokens[:, 1:] >= 0).sum()}


def windows(*texts):
    return TextSamples(np.concatenate(texts).astype(np.uint16), [len(text) for text in texts], width=LENGTH)


def table(seed, scale=1.0):
    return scale * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


def federation(
    method, folder, rounds=1, local_training=1, server_distil=1, upload=(), download=(), tables=None, clients=2
):
    """A loop over two toy clients, with tables of first weights by client where given."""
    runtime = Runtime(accelerator="cpu")
    runtime.factories |= {"student": Bigram, "bigram": Bigram}
    common = {
        "runtime": runtime,
        "seed": 0,
        "local_training": steps(local_training),
        "server_distil": steps(server_distil),
        "client_distil": steps(1, lr=0.5),
        "proxy": windows(UP, DOWN, SHORT),
        "num_classes": 0,
        "task": "language",
        "model_kwargs": {"tokenizer": Letters(), "context": LENGTH},
    }
    private = [windows(UP, UP), windows(*[DOWN] * 6), *[windows(UP)] * 9][:clients]
    none = windows(UP).subset(torch.arange(0))
    members = [
        Client(id=i, architecture="bigram", train=own, calibration=none, **common) for i, own in enumerate(private)
    ]
    for client, weights in zip(members, tables or ()):
        client.state["specialist"] = {"table": weights.clone()}
    server = Server(validation=none, test=windows(UP, DOWN), student=runtime.create("student", 0), **common)
    recipe = Recipe(
        name="toy",
        method=Component(method.name),
        federation=FederationConfig(clients=clients, rounds=rounds),
        evaluation=Evaluation(metrics=["nll"]),
    )
    channel = Channel(Codec(upload), Codec(download), Ledger(), 0)
    return FederatedLoop(recipe, folder, method, server, members, channel, Sequential(), CallbackList())

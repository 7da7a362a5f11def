"""Image–text pairs and a federation of dual encoders, small enough to check by hand."""

import torch
from torch import nn

from fdl.callbacks.base import CallbackList
from fdl.comm.channel import Channel
from fdl.comm.codec import Codec
from fdl.comm.ledger import Ledger
from fdl.datamodules.samples import Samples
from fdl.engine.runtime import Runtime
from fdl.federation.executors import Sequential
from fdl.loop import FederatedLoop
from fdl.modules.dual_encoder import DualEncoder
from fdl.modules.small_dual_encoder import SmallDualEncoder
from fdl.modules.tokenizers import ByteTokenizer
from fdl.participants import Client, Server
from fdl.recipe import Component, Fit, Recipe
from fdl.recipe.config import Evaluation, FederationConfig


class PairSamples(Samples):
    """Images and their texts in memory."""

    labels = None

    def __init__(self, images, tokens):
        self.images, self.tokens = images, tokens

    def __len__(self):
        return len(self.images)

    @property
    def nbytes(self):
        return self.images.nbytes + self.tokens.nbytes

    def batch(self, indices, generator=None):
        return (self.images[indices], self.tokens[indices]), None

    def subset(self, indices):
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return PairSamples(self.images[indices], self.tokens[indices])

    def unlabelled(self):
        return self

    def content_hash(self):
        return f"{self.images.sum().item()}/{self.tokens.sum().item()}/{len(self)}"


class Given(DualEncoder):
    """Its images are vectors already, text i is the i-th unit vector, and only its scale is trained; it starts at 2."""

    def __init__(self):
        super().__init__()
        self.backbone, self.embedding_dim = nn.Identity(), 2
        with torch.no_grad():
            self.logit_scale.copy_(torch.tensor(2.0).log())

    def image_vectors(self, images):
        return images.flatten(1)

    def text_vectors(self, tokens):
        return torch.eye(2, device=tokens.device)[tokens[:, 0]]


def given(texts):
    """The images e0 and e1, with these texts."""
    return PairSamples(torch.eye(2), torch.tensor(texts).unsqueeze(1))


def blobs(count, seed=0, kinds=4):
    """Noisy images of a few kinds, captioned by their kind."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(kinds, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    kind = torch.randint(kinds, (count,), generator=generator)
    images = patterns[kind] + 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    words = [list(f"kind {chr(ord('a') + k)}".encode()) for k in kind.tolist()]
    return PairSamples(images, torch.tensor(words))


def tiny(dim=16, **settings):
    """What makes a tiny dual encoder for `blobs`."""
    settings = {"image": "mlp", "widths": [32], "text": "bag", "width": 16, **settings}
    return lambda: SmallDualEncoder(dim, **settings, input_shape=(1, 8, 8), tokenizer=ByteTokenizer(), context=12)


def fit(steps, lr, batch_size=64, optimizer="sgd"):
    return Fit(epochs=None, steps=steps, batch_size=batch_size, optimizer=Component(optimizer, {"lr": lr}))


def federation(
    method,
    folder,
    student,
    specialists,
    private,
    proxy,
    local_training,
    server_distil,
    test=None,
    calibration=None,
    upload=(),
    **more,
):
    """A loop over clients with one architecture each."""
    runtime = Runtime(accelerator="cpu")
    runtime.factories["student"] = student
    for i, factory in enumerate(specialists):
        runtime.factories[f"specialist-{i}"] = factory
    common = {
        "runtime": runtime,
        "seed": more.get("seed", 0),
        "local_training": local_training,
        "server_distil": server_distil,
        "client_distil": more.get("client_distil", server_distil),
        "proxy": proxy,
        "num_classes": 0,
        "task": "image_text",
    }
    test = proxy if test is None else test
    none = test.subset([])
    clients = [
        Client(
            id=i,
            architecture=f"specialist-{i % len(specialists)}",
            train=own,
            calibration=none if calibration is None else calibration,
            **common,
        )
        for i, own in enumerate(private)
    ]
    server = Server(validation=none, test=test, student=runtime.create("student", 1), classes=[], **common)
    recipe = Recipe(
        name="pairs",
        seed=common["seed"],
        method=Component(method.name),
        federation=FederationConfig(clients=len(clients), rounds=more.get("rounds", 1)),
        evaluation=Evaluation(metrics=["mean_recall"]),
    )
    channel = Channel(Codec(upload), Codec(), Ledger(), common["seed"])
    return FederatedLoop(recipe, folder, method, server, clients, channel, Sequential(), CallbackList())

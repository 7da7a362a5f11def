"""Initial weights of specialists and student."""

from __future__ import annotations

from dataclasses import replace

from lightning import LightningModule

from fdl.engine.requests import FitRequest, Requests
from fdl.knowledge.aggregation.pools import labelled_bytes
from fdl.participants import Client, Server
from fdl.state.weights import load_into
from fdl.utils.arguments import at_least
from fdl.utils.seeding import stream_seed


class Initialization:
    """Initialisation of specialists: pretraining on public labels (FedMD), and reinitialisation per round (CFD).

    Args:
        pretrain: epochs on the server's labelled public samples before the first round, ≥ 0, with the settings of
            private training.
        reinitialize: reinitialise a specialist before it learns from the server's soft labels.

    Raises:
        UserError: `pretrain` is negative.
    """

    def __init__(self, pretrain: int, reinitialize: bool):
        self.pretrain, self.reinitialize = at_least("pretrain", pretrain, 0), reinitialize

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """Bytes of the labelled public samples, which every client downloads if specialists are pretrained.

        Args:
            server: holds the samples.
        """
        return {"public": labelled_bytes(server.public, server.num_classes)} if self.pretrain else {}

    def specialist(self, client: Client, has_download: bool) -> Requests[LightningModule]:
        """Prepare a client's model at the beginning of its local update; to be called with ``yield from``.

        Args:
            client: the client.
            has_download: whether the client is about to learn from the server's soft labels.
        """
        new, specialist = "specialist" not in client.state, client.specialist()
        if self.pretrain and new:
            pretraining = replace(client.local_training, epochs=self.pretrain, steps=None)
            yield FitRequest(specialist, client.public, pretraining, name="pretrain")
        elif self.reinitialize and has_download:
            seed = stream_seed(client.seed, "restart", client.round, client.id)
            load_into(specialist, client.runtime.first_weights(client.architecture, seed))
        return specialist

    def pretrain_student(self, server: Server) -> None:
        """Pretrain the student with the settings of specialists, before it first learns from them; once per run.

        Args:
            server: holds the student and the public samples.
        """
        if self.pretrain and "pretrained" not in server.state:
            settings = replace(server.local_training, epochs=self.pretrain, steps=None)
            server.fit(server.student, server.public, settings, name="pretrain")
            server.state["pretrained"] = True

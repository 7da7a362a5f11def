"""Federated distillation of dual encoders: specialists embed public pairs, a student mimics their affinities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fdl.errors import UserError
from fdl.knowledge.aggregation.shares import Cap
from fdl.knowledge.confidence.base import Confidence
from fdl.knowledge.confidence.pairs import confidences
from fdl.knowledge.distillation.affinity import AffinityLosses
from fdl.knowledge.transfer.embeddings import EmbeddingPool, TeacherEmbeddings, answers, temperature_of
from fdl.messages import Message, Responses
from fdl.methods.base import Method
from fdl.participants import Client, Server


class AffinityDistillation(Method):
    """Private dual encoders of any architecture embed the proxy pairs; the student learns how alike they find them.

    Up go, for each public pair, the image's and the text's vector, scaled by the specialist's own certainty, and how
    much the answer should count. In every batch the server turns each client's vectors into probabilities of texts for
    images and of images for texts, mixes them by softmax over clients of their log-weights, and brings the student's
    own closer by KL: affinity mimicking (Wu et al., "TinyCLIP") from many teachers (Yang et al., "CLIP-KD", call it
    contrastive relational distillation). Widths and rotations of embeddings do not matter.

    The aggregate cannot come back: affinities of n pairs are n² numbers a direction. The student's vectors can, and
    teach the specialists by the same loss.

    Args:
        confidence: how much a client's answer to a proxy pair counts; None weighs all alike. It sees a pair's
            similarities to others in the place of logits, and of samples the images.
        contrastive: weight of the student's own contrastive loss on the proxy pairs, whose captions are public; ≥ 0.
        features: weight of the distance between the student's vectors, projected into each client's space, and the
            client's; ≥ 0. Each client gets a linear projector, which the server keeps.
        interactive: weight of the contrast between the projected vectors of one side and the client's of the other;
            ≥ 0.
        calibrate: divide each specialist's logits by a temperature fitted on its held-out private pairs.
        feedback: what clients receive from the second round on: the student's vectors of the proxy pairs, or nothing.
        max_client_share: equal shares of the weight of a round that one client may have at most, whatever confidence it
            declares, ≥ 1; None for any.
        max_client_share_over: whether the limit holds over a round, or for each proxy pair.
    """

    name = "affinity_distillation"
    sends = (Responses,)
    tasks = ("image_text",)
    requires = ("student", "specialists", "proxy")

    def __init__(
        self,
        confidence: Confidence | None = None,
        contrastive: float = 0.0,
        features: float = 0.0,
        interactive: float = 0.0,
        calibrate: bool = False,
        feedback: Literal["student", "none"] = "none",
        max_client_share: float | None = 2.0,
        max_client_share_over: Literal["round", "row"] = "round",
    ):
        self.confidence, self.calibrate, self.feedback = confidence, calibrate, feedback
        self.mimicry, self.cap = (
            AffinityLosses(contrastive, features, interactive),
            Cap.of(max_client_share, max_client_share_over),
        )
        self.needs_calibration = calibrate or (confidence is not None and confidence.needs_calibration)

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Look whether there are pairs to embed.

        Raises:
            UserError: the data are of another kind.
        """
        if server.task != "image_text":
            raise UserError(f"{self.name} needs images with captions; these are {server.task} data")

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """The proxy pairs, and the public encoder where confidence is measured in its space."""
        costs = {"proxy": server.proxy.nbytes}
        if server.encoder is not None and self.confidence is not None and self.confidence.needs_encoder:
            costs["encoder"] = server.encoder.nbytes()
        return costs

    def download(self, server: Server, client: int) -> Message | None:
        """The student's vectors, once it has been taught."""
        if self.feedback == "none" or "taught" not in server.state:
            return None
        return server.cached_download(
            "answers", lambda: Responses(answers(server, server.student, server.proxy), "embeddings")
        )

    def local_update(self, client: Client, download: Responses | None) -> Responses:
        """Learn from what came back, train on private pairs, embed the public ones."""
        specialist = client.specialist()
        if download is not None:
            student = EmbeddingPool(len(client.proxy), weighted=False)
            student.add(download, -1)
            AffinityLosses().learn(client, specialist, student.result(), client.client_distil, "digest")
        client.fit(specialist, client.train, client.local_training)
        client.save_specialist(specialist)
        temperature = temperature_of(client, specialist) if self.calibrate else 1.0
        given = answers(client, specialist, client.proxy, temperature)
        sure = None if self.confidence is None else confidences(self.confidence, client, given)
        return Responses(given, "embeddings", None, sure)

    def aggregate(self, server: Server) -> EmbeddingPool:
        """All answers of the round, in 16 bits."""
        return EmbeddingPool(len(server.proxy), self.confidence is not None, self.cap)

    def server_update(self, server: Server, knowledge: TeacherEmbeddings) -> dict[str, float]:
        """Bring the student's affinities closer to the clients'."""
        self.mimicry.learn(server, server.student, knowledge, server.server_distil, "distil")
        server.state["taught"] = True
        return {}

"""Federated distillation of dual encoders: specialists embed public pairs, a student learns their affinities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fdl.engine.requests import FitRequest, PredictRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.shares import Cap
from fdl.knowledge.confidence.base import Confidence
from fdl.knowledge.confidence.pairs import confidences
from fdl.knowledge.distillation.affinity import AffinityLosses
from fdl.knowledge.transfer.embeddings import EmbeddingPool, TeacherEmbeddings, answers, scaled, temperature_of
from fdl.messages import Message, Responses
from fdl.methods.base import Method
from fdl.participants import Client, Server


class AffinityDistillation(Method):
    """Private dual encoders of any architecture embed public pairs; the student learns their image–text affinities.

    Clients upload, per public pair, the image's and the text's vector, scaled by the specialist's logit scale, and a
    confidence. In each batch the server turns each client's vectors into probabilities of texts given images and of
    images given texts, averages them with weights that are the softmax over clients of their log-weights, and minimises
    the KL of the student's own: affinity mimicking (Wu et al., "TinyCLIP") from many teachers (Yang et al., "CLIP-KD",
    call it contrastive relational distillation). Widths and rotations of embeddings do not matter.

    The aggregate is not downloaded: affinities of n pairs are n² numbers per direction. The student's vectors can be,
    and then teach the specialists by the same loss.

    Args:
        confidence: weight of a client's prediction of a proxy pair; None weights all alike. It receives a pair's
            similarities to others instead of logits, and of samples the images.
        contrastive: weight of the student's own contrastive loss on the proxy pairs, whose captions are public; ≥ 0.
        features: weight of the distance between the student's vectors, projected into each client's space, and the
            client's; ≥ 0. Each client gets a linear projector, which the server keeps.
        interactive: weight of the contrast between the projected vectors of one side and the client's of the other;
            ≥ 0.
        calibrate: divide each specialist's logits by a temperature fitted on its held-out private pairs.
        feedback: download of the clients from the second round on: the student's vectors of the proxy pairs
            (``"student"``), or nothing.
        max_client_share: largest weight of one client in a round, in equal shares, whatever confidence it uploads, ≥ 1;
            None: no limit.
        max_client_share_over: apply the limit over a round, or per proxy pair (``"row"``).
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
        """Check that the data are pairs of images and texts.

        Raises:
            UserError: the data are of another kind.
        """
        if server.task != "image_text":
            raise UserError(f"{self.name} needs images with captions; these are {server.task} data")

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """Return the bytes of the proxy pairs, and of the public encoder if confidence is measured in its space."""
        costs = {"proxy": server.proxy.nbytes}
        if server.encoder is not None and self.confidence is not None and self.confidence.needs_encoder:
            costs["encoder"] = server.encoder.nbytes()
        return costs

    def download(self, server: Server, client: int) -> Message | None:
        """Return the student's vectors once it has been trained; None before, or without feedback."""
        if self.feedback == "none" or "student_trained" not in server.state:
            return None
        return server.cached_download(
            "answers", lambda: Responses(answers(server, server.student, server.proxy), "embeddings")
        )

    def local_update(self, client: Client, download: Responses | None) -> Requests[Responses]:
        """Learn from the download, train on private pairs, embed the public ones."""
        specialist = client.specialist()
        if download is not None:
            student = EmbeddingPool(len(client.proxy), weighted=False)
            student.add(download, -1)
            yield from AffinityLosses().learn(client, specialist, student.result(), client.client_distil, "digest")
        yield FitRequest(specialist, client.train, client.local_training)
        client.save_specialist(specialist)
        temperature = temperature_of(client, specialist) if self.calibrate else 1.0
        embedding = yield PredictRequest(specialist, client.proxy, "embedding")
        vectors = scaled(embedding, specialist, temperature)
        confidence = None if self.confidence is None else confidences(self.confidence, client, vectors)
        return Responses(vectors, "embeddings", None, confidence)

    def aggregate(self, server: Server) -> EmbeddingPool:
        """Return an empty collection of the round's vectors, kept in 16 bits."""
        return EmbeddingPool(len(server.proxy), self.confidence is not None, self.cap)

    def server_update(self, server: Server, knowledge: TeacherEmbeddings) -> dict[str, float]:
        """Train the student towards the clients' affinities."""
        server.run_all(self.mimicry.learn(server, server.student, knowledge, server.server_distil, "distil"))
        server.state["student_trained"] = True
        return {}

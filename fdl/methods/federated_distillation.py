"""Federated distillation: clients predict a public proxy set, a student learns from their aggregated predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from fdl.engine.requests import FitRequest, Requests
from fdl.knowledge.aggregation.bundle import CompositeAggregate, RoundKnowledge
from fdl.knowledge.aggregation.shares import Cap
from fdl.knowledge.confidence.base import Confidence
from fdl.knowledge.distillation.client_upload import UploadBuilder
from fdl.knowledge.distillation.curriculum import Curriculum
from fdl.knowledge.distillation.feedback import Feedback, SoftLabels
from fdl.knowledge.distillation.initialization import Initialization
from fdl.knowledge.distillation.personalization import AdaptiveWeights, Similarity, ValidationGains
from fdl.knowledge.distillation.proxy_subsampling import SoftLabelCache, rows_of_round
from fdl.knowledge.distillation.student import DistillationConfig
from fdl.knowledge.distillation.targets import ResponseObjective, SoftLabelled
from fdl.knowledge.distillation.upload_on_change import UploadOnChange
from fdl.knowledge.release import Release
from fdl.knowledge.transfer.features import FeatureTransfer
from fdl.knowledge.transfer.prototypes import PrototypeTransfer
from fdl.messages import Bundle, Features, Message, Prototypes, Responses, UploadStatus, parts_of
from fdl.methods.base import Method
from fdl.participants import Client, Server
from fdl.robust.answers import RobustAnswers
from fdl.robust.base import RobustRule


class FederatedDistillation(Method):
    """Private specialists of any architecture predict the proxy set; a student is distilled from the aggregate.

    Clients upload predictions with a confidence per row, a log-weight whose softmax over clients weights the mean, and
    download the aggregate; neither data nor weights leave a site. Options below `feedback` are off by default.

    Args:
        confidence: weight of a client's prediction of a proxy sample; None weighs all alike.
        space: average probabilities, as DS-FL does, or logits, as FedMD and FedDF do.
        temperature: T > 0 of targets and predictions in the loss.
        calibrate: divide each specialist's logits by a temperature fitted on its held-out private samples.
        loss: response loss of the student, and of specialists on what they download.
        feedback: download of the clients from the second round on.
        alpha: weight of the response loss besides those of features and prototypes, ≥ 0.
        sharpen: temperature or exponent of `sharpening`, which sharpens the aggregate; None leaves it.
        sharpening: DS-FL's entropy reduction softmax(p / T), e.g. 0.1, or SCARLET's power p^b / Σ p^b, e.g. 1.5.
        pretrain: epochs of every new specialist and the student on public labelled samples, sent to all, as in FedMD.
        reinitialize_clients: reinitialise a specialist before it learns from its download, as in CFD.
        features: activations that are uploaded, too.
        prototypes: centroids of private samples that are uploaded, too.
        adapter: maps each client's features, and prototypes of its embedding, to the student's space.
        adaptive_client_weights: weights of clients that follow the phase of training.
        personalization: each client downloads its own mixture of the others' predictions.
        curriculum: order in which the student meets the proxy samples.
        proxy_fraction: fraction of the proxy set that is predicted in a round, the same samples by all clients.
        soft_label_cache_rounds: rounds in which a sample's soft labels teach; 1 is their own round only.
        upload_policy: upload only on change; None uploads in each round.
        private_release: noise that makes the predictions private.
        robust: rule instead of the mean, against Byzantine clients; it has a limit of its own for a client's weight.
        max_client_share: equal shares a client may have, ≥ 1: moves rows by ≤ √2 share / K on average; None: any.
        max_client_share_over: apply the limit per round, or per row, which is safer if sites have the same classes.
    """

    name = "federated_distillation"
    sends = (Responses, Features, Prototypes, UploadStatus)
    tasks = ("classification",)
    requires: ClassVar[tuple[str, ...]] = ("student", "specialists", "proxy")

    def __init__(
        self,
        confidence: Confidence | None = None,
        space: Literal["probabilities", "logits"] = "probabilities",
        temperature: float = 1.0,
        calibrate: bool = False,
        loss: str = "kl",
        feedback: Literal["aggregate", "student", "none"] = "aggregate",
        alpha: float = 1.0,
        sharpen: float | None = None,
        sharpening: Literal["entropy_reduction", "power"] = "entropy_reduction",
        pretrain: int = 0,
        reinitialize_clients: bool = False,
        features: FeatureTransfer | None = None,
        prototypes: PrototypeTransfer | None = None,
        adapter: Literal["identity", "linear", "affine", "film", "low_rank"] = "identity",
        adaptive_client_weights: AdaptiveWeights | None = None,
        personalization: Similarity | None = None,
        curriculum: Curriculum | None = None,
        proxy_fraction: float = 1.0,
        soft_label_cache_rounds: int = 1,
        upload_policy: UploadOnChange | None = None,
        private_release: Release | None = None,
        robust: RobustRule | None = None,
        max_client_share: float | None = 2.0,
        max_client_share_over: Literal["round", "row"] = "round",
    ):
        self.objective = ResponseObjective(loss, temperature)
        self.labels = SoftLabels(loss, space, sharpen, sharpening, Cap.of(max_client_share, max_client_share_over))
        self.soft_label_cache = SoftLabelCache(soft_label_cache_rounds)
        self.initialization = Initialization(pretrain, reinitialize_clients)
        self.requires = (*type(self).requires, "public") if pretrain else type(self).requires
        features = features if features is not None and features.weight > 0 else None
        prototypes = prototypes if prototypes is not None and prototypes.weight > 0 else None
        self.curriculum = curriculum if curriculum is not None and curriculum.start < 1 else None
        self.upload_policy = upload_policy if upload_policy is not None and upload_policy.threshold > 0 else None
        self.feedback = Feedback(feedback, self.labels, personalization, self.upload_policy, prototypes is not None)
        shared = features, prototypes, proxy_fraction, self.upload_policy, private_release
        self.uploads = UploadBuilder(space, calibrate, confidence, *shared)
        self.distillation = DistillationConfig(loss, temperature, alpha, features, prototypes, adapter)
        self.adaptive_client_weights, self.robust, self.confidence = adaptive_client_weights, robust, confidence
        self.needs_calibration = self.uploads.needs_calibration
        others = {"features": features, "prototypes": prototypes, "personalization": personalization}
        if private_release is not None:
            more = {"upload_policy": self.upload_policy, "adaptive_client_weights": adaptive_client_weights}
            private_release.check(space, confidence is not None, others | more)
        if robust is not None:
            RobustAnswers.check(others, private_release is not None and private_release.by == "server")

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Count the participants if an adapter has parameters for each."""
        if self.distillation.adapts:
            server.state["participants"] = len(clients)

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """Return the bytes of the proxy set, and of the public encoder if confidence or prototypes need it."""
        return self.uploads.setup_bytes(server) | self.initialization.setup_bytes(server)

    def download(self, server: Server, client: int) -> Message | Bundle | None:
        """Return soft labels of the proxy set, one message for all clients unless they are personalised."""
        return self.feedback.download(server, client)

    def local_update(self, client: Client, download: Message | Bundle | None) -> Requests[Message | Bundle | None]:
        """Learn from the downloaded soft labels, train on private data, predict the proxy set."""
        labels, status = (parts_of(download).get(kind) for kind in (Responses, UploadStatus))
        if self.upload_policy is not None and self.upload_policy.may_skip(client, status):
            return UploadStatus(status.round)
        specialist = yield from self.initialization.specialist(client, labels is not None)
        if labels is not None:
            samples = SoftLabelled(client.proxy, labels.values, labels.rows)
            yield FitRequest(specialist, samples, client.client_distil, self.objective, name="digest")
        yield FitRequest(specialist, client.train, client.local_training)
        client.save_specialist(specialist)
        return (yield from self.uploads.upload(client, specialist, status))

    def aggregate(self, server: Server) -> CompositeAggregate:
        """Return empty means over clients, weighted per row."""
        adaptive, release = self.adaptive_client_weights, self.uploads.release
        # a client without a confidence that all must send would have log-weight 0, more than most honest ones
        weighted = None if adaptive is not None and self.confidence is None else self.confidence is not None
        mean, rows = self.labels.mean(server, weighted), rows_of_round(server, self.uploads.proxy_fraction)
        mean = mean if self.robust is None else RobustAnswers(self.robust, server, self.labels.space, weighted)
        return CompositeAggregate(
            mean if release is None else release.collect(mean, server, rows),
            self.distillation.feature_mean(server, mean.cap),
            self.distillation.prototype_pool(server, self.labels.cap),
            adaptive.current(server) if adaptive else None,
            ValidationGains(server) if adaptive else None,
            self.feedback.last_uploads(server) if self.feedback.needs_last_uploads else None,
            rows,
            reuse=self.upload_policy is not None,
        )

    def server_update(self, server: Server, knowledge: RoundKnowledge) -> dict[str, float]:
        """Distil the student from the aggregate, and keep the next download."""
        self.initialization.pretrain_student(server)
        fresh = self.labels.of(knowledge.responses)
        rows, targets = self.soft_label_cache.update(server, fresh)
        self.distillation.teach(server, knowledge, targets, rows, self.curriculum)
        self.feedback.keep(server, fresh)
        log = self.adaptive_client_weights.update(server, knowledge.gains) if self.adaptive_client_weights else {}
        return log | (self.upload_policy.update_plateau(server) if self.upload_policy else {})

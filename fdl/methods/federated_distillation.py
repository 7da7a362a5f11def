"""Federated distillation: specialists answer a public proxy set, a student learns from their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from lightning import LightningModule

from fdl.engine.requests import FitRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.bundle import CompositeAggregate, RoundKnowledge
from fdl.knowledge.aggregation.last_uploads import LastAnswers
from fdl.knowledge.aggregation.means import AggregatedResponses, ResponseMean
from fdl.knowledge.aggregation.pools import labelled_bytes
from fdl.knowledge.aggregation.shares import Cap
from fdl.knowledge.confidence.base import Confidence
from fdl.knowledge.distillation.client_upload import UploadBuilder
from fdl.knowledge.distillation.curriculum import Curriculum
from fdl.knowledge.distillation.personalization import AdaptiveWeights, Similarity, ValidationGains
from fdl.knowledge.distillation.proxy_subsampling import SoftLabelCache, rows_of_round
from fdl.knowledge.distillation.student import DistillationConfig
from fdl.knowledge.distillation.targets import ResponseObjective, SoftLabelled
from fdl.knowledge.distillation.upload_on_change import UploadOnChange
from fdl.knowledge.release import Release
from fdl.knowledge.transfer.features import FeatureMean, FeatureTransfer
from fdl.knowledge.transfer.prototypes import PrototypePool, PrototypeTransfer
from fdl.losses.responses import RESPONSE_LOSSES, entropy_reduction, power_sharpening
from fdl.messages import Bundle, Message, Responses, UploadStatus, parts_of
from fdl.methods.base import Method
from fdl.participants import Client, Server
from fdl.recipe.config import Fit
from fdl.robust.answers import RobustAnswers
from fdl.robust.base import RobustRule
from fdl.state.weights import load_into
from fdl.utils.arguments import at_least, one_of
from fdl.utils.seeding import stream_seed

_SHARPENINGS = {"entropy_reduction": entropy_reduction, "power": power_sharpening}


class FederatedDistillation(Method):
    """Private specialists of any architecture answer the proxy set; the student is distilled from what they agree on.

    Up go responses and, row by row, each client's confidence in them; down go responses. Neither data nor weights
    leave a site. Answers are weighted by softmax over clients of their confidences, which are log-weights, up to two
    equal shares of a round (`cap`). Everything below `feedback` is off unless it is named.

    Args:
        confidence: how much a client's answer to a proxy sample counts; None weighs all alike.
        space: average probabilities, as DS-FL does, or logits, as FedMD and FedDF do.
        temperature: that softens both the targets and the learner's answers in the loss; > 0.
        calibrate: divide each specialist's logits by a temperature fitted on its held-out private share.
        loss: response loss of the student and of specialists that learn from what comes back.
        feedback: what clients receive from the second round on: the aggregate, the student's answers, or nothing.
        alpha: weight of the response loss beside those of features and prototypes, ≥ 0.
        sharpen: how much to sharpen the aggregate: a temperature or an exponent, as `sharpening` says; None leaves it.
        sharpening: by DS-FL's entropy reduction, softmax(p / T), e.g. T = 0.1, or by SCARLET's power, p^b / Σ p^b,
            e.g. b = 1.5.
        pretrain: epochs on the server's labelled public samples, with the `local` settings, that every new specialist
            begins with, as in FedMD, and the student as well. These samples are then sent to all clients.
        restart: draw a specialist new weights before it learns from what comes back, as in CFD.
        features: activations that go up, too.
        prototypes: centroids of the clients' data that go up, too.
        adapter: maps each participant's features, and prototypes of its embedding, to the student's space; without
            such it has nothing to do.
        weights: clients' weights that follow the phase of training.
        personal: each client gets its own mixture of the others' answers, in the place of the aggregate.
        curriculum: in what order the student meets the proxy samples.
        subsample: share of the proxy set that is answered in a round, the same samples by all clients.
        cache: for how many rounds a sample's answers go on teaching; 1 is for their own round only.
        frequency: when a client has something new to say.
        release: makes the answers private.
        robust: a rule in the place of the mean of answers, which holds where some clients lie; None is the mean.
        cap: equal shares of the weight of a round that one client may have at most, of answers, features and
            prototypes, whatever confidence it declares, ≥ 1: of K clients none moves a row of probabilities by more
            than √2 cap / K on average. None for any. A robust rule has a cap of its own.
        cap_over: whether the cap holds over a round, or in each row: then no row can be one client's, which is safer
            where sites have the same classes, and costs accuracy where only one of them knows a class.
    """

    name = "federated_distillation"
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
        restart: bool = False,
        features: FeatureTransfer | None = None,
        prototypes: PrototypeTransfer | None = None,
        adapter: Literal["identity", "linear", "affine", "film", "low_rank"] = "identity",
        weights: AdaptiveWeights | None = None,
        personal: Similarity | None = None,
        curriculum: Curriculum | None = None,
        subsample: float = 1.0,
        cache: int = 1,
        frequency: UploadOnChange | None = None,
        release: Release | None = None,
        robust: RobustRule | None = None,
        cap: float | None = 2.0,
        cap_over: Literal["round", "row"] = "round",
    ):
        for key, value in (("temperature", temperature), ("sharpen", sharpen)):
            if value is not None and not value > 0:
                raise UserError(f"{key} must be > 0, got {value}")
        if not 0 < subsample <= 1:
            raise UserError(f"subsample must be in (0, 1], got {subsample}")
        if cache < 1:
            raise UserError(f"cache must be at least 1 round, got {cache}")
        self.objective = ResponseObjective(loss, temperature)
        self.form = RESPONSE_LOSSES[loss].form
        if self.form == "logits" and (space == "probabilities" or sharpen is not None):
            raise UserError(f"loss {loss} compares logits, so space must be logits, unsharpened; got {space}")
        self.confidence, self.space, self.feedback = confidence, space, feedback
        self.sharpen, self.sharpening = sharpen, _SHARPENINGS[one_of("sharpening", sharpening, _SHARPENINGS)]
        self.pretrain, self.restart = at_least("pretrain", pretrain, 0), restart
        self._pretraining: dict[int, tuple[Fit, Fit]] = {}
        if pretrain:
            self.requires = (*type(self).requires, "public")
        self.weights, self.personal, self.subsample, self.cache = weights, personal, subsample, cache
        self.features = features if features is not None and features.weight > 0 else None
        self.prototypes = prototypes if prototypes is not None and prototypes.weight > 0 else None
        self.curriculum = curriculum if curriculum is not None and curriculum.start < 1 else None
        self.frequency = frequency if frequency is not None and frequency.threshold > 0 else None
        what = self.features, self.prototypes
        self.release, self.robust, self.cap = release, robust, Cap.of(cap, cap_over)
        self.answering = UploadBuilder(space, calibrate, confidence, *what, subsample, self.frequency, release)
        self.teaching = DistillationConfig(loss, temperature, alpha, *what, adapter)
        if personal is not None and feedback == "none":
            raise UserError("personal says what comes back, but feedback is none")
        if personal is not None and personal.by == "prototypes" and self.prototypes is None:
            raise UserError("personal compares prototypes, but prototypes are switched off")
        if release is not None:
            beside = {"features": self.features, "prototypes": self.prototypes, "frequency": self.frequency}
            release.check(space, confidence is not None, beside | {"weights": weights, "personal": personal})

        selected = None if self.features is None else self.features.select
        self.needs_calibration = (
            calibrate
            or (confidence is not None and confidence.needs_calibration)
            or (selected is not None and selected.toward == "labels")
        )
        if robust is not None:
            beside = {"features": self.features, "prototypes": self.prototypes, "personal": personal}
            RobustAnswers.check(beside, release is not None and release.by == "server")

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Count the participants where an adapter has parameters for each."""
        if self.teaching.adapts:
            server.state["participants"] = len(clients)

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """The proxy set, and the public encoder where confidence or prototypes are measured in its space."""
        costs = {"proxy": server.proxy.nbytes}
        if self.pretrain:
            costs["public"] = labelled_bytes(server.public, server.num_classes)
        users = (self.confidence, self.prototypes)
        if server.encoder is not None and any(user is not None and user.needs_encoder for user in users):
            costs["encoder"] = server.encoder.nbytes()
        return costs

    def download(self, server: Server, client: int) -> Message | Bundle | None:
        """What the server holds for true of the proxy set, one message for all clients unless it is personal."""
        answers = None
        if self.personal is not None:
            answers = self.personal.mixture(client, self._last(server), lambda: self._mean(server), self._answers)
        if answers is None and "answers" in server.state:
            rows = server.state.get("rows")
            answers = server.say("answers", lambda: Responses(server.state["answers"], form=self.form, rows=rows))
        if self.frequency is None:
            return answers
        standing = self.frequency.standing(server, self._last(server).round(client))
        return Bundle((standing,) if answers is None else (answers, standing))

    def local_update(self, client: Client, download: Message | Bundle | None) -> Requests[Message | Bundle | None]:
        """Learn from what came back, train on private data, answer the proxy set."""
        received = parts_of(download)
        answers, standing = received.get(Responses), received.get(UploadStatus)
        if self.frequency is not None and self.frequency.idle(client, standing):
            return UploadStatus(standing.round)
        specialist = yield from self._specialist(client, answers is not None)
        if answers is not None:
            answered = SoftLabelled(client.proxy, answers.values, answers.rows)
            yield FitRequest(specialist, answered, client.digest, self.objective, name="digest")
        yield FitRequest(specialist, client.train, client.local)
        client.keep(specialist)
        return (yield from self.answering.upload(client, specialist, standing))

    def aggregate(self, server: Server) -> CompositeAggregate:
        """Means over clients, weighted row by row."""
        count, seed, width = len(server.proxy), server.seed, self.teaching.width
        # who leaves out a confidence that all must send would have log-weight 0, more than most honest ones
        weighted = None if self.weights is not None and self.confidence is None else self.confidence is not None
        mean, rows = self._mean(server, weighted), rows_of_round(server, self.subsample)
        if self.robust is not None:
            mean = RobustAnswers(self.robust, server, self.space, weighted)
        return CompositeAggregate(
            mean if self.release is None else self.release.collect(mean, server, rows),
            FeatureMean(count, width, seed, self.teaching.adapts, mean.cap) if self.features else None,
            PrototypePool(server, self.prototypes, width, self.cap) if self.prototypes else None,
            self.weights.current(server) if self.weights else None,
            ValidationGains(server) if self.weights else None,
            self._last(server) if self.personal or self.frequency else None,
            rows,
            reuse=self.frequency is not None,
        )

    def server_update(self, server: Server, knowledge: RoundKnowledge) -> dict[str, float]:
        """Distil the student from what was collected, and keep what is to be sent back."""
        self._pretrain_student(server)
        fresh = self._answers(knowledge.responses)
        rows, targets = SoftLabelCache(self.cache).update(server, fresh)
        self.teaching.teach(server, knowledge, targets, rows, self.curriculum)
        if self.feedback != "none":
            server.state["answers"], server.state["rows"] = fresh.values, fresh.rows
        if self.feedback == "student":
            logits = server.predict(server.student, server.proxy)
            answers = logits if self.form == "logits" else torch.softmax(logits, dim=1)
            server.state["answers"] = answers if fresh.rows is None else answers[fresh.rows]
        log = self.weights.update(server, knowledge.gains) if self.weights else {}
        return log | (self.frequency.watch(server) if self.frequency else {})

    def _specialist(self, client: Client, taught: bool) -> Requests[LightningModule]:
        """The client's model as it begins the round: a new one where it has none, or where CFD would draw one."""
        new, specialist = "specialist" not in client.state, client.specialist()
        if self.pretrain and new:
            # one object for all clients that train alike: an optimiser is built once for each
            own = client.local
            if id(own) not in self._pretraining:
                self._pretraining[id(own)] = own, replace(own, epochs=self.pretrain, steps=None)
            yield FitRequest(specialist, client.public, self._pretraining[id(own)][1], name="pretrain")
        elif self.restart and taught:
            seed = stream_seed(client.seed, "restart", client.round, client.id)
            load_into(specialist, client.runtime.first_weights(client.architecture, seed))
        return specialist

    def _pretrain_student(self, server: Server) -> None:
        """Let the student begin as specialists do, before it first learns from what they answer."""
        if self.pretrain and "pretrained" not in server.state:
            settings = replace(server.local, epochs=self.pretrain, steps=None)
            server.fit(server.student, server.public, settings, name="pretrain")
            server.state["pretrained"] = True

    def _mean(self, server: Server, weighted: bool | None = None) -> ResponseMean:
        return ResponseMean(len(server.proxy), server.num_classes, self.space, weighted, self.cap)

    def _last(self, server: Server) -> LastAnswers:
        return LastAnswers(server, None if self.frequency is None else self.frequency.expiry)

    def _answers(self, knowledge: AggregatedResponses) -> Responses:
        """What clients say together, in the form that the loss compares, of those samples that anybody answered."""
        values = knowledge.values if self.form == self.space else knowledge.probabilities
        values = values if self.sharpen is None else self.sharpening(knowledge.probabilities, self.sharpen)
        answered = knowledge.coverage > 0
        rows = None if bool(answered.all()) else answered.nonzero().squeeze(1)
        return Responses(values if rows is None else values[rows], self.form, rows)

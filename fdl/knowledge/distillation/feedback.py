"""Soft labels of a round, aggregated from the clients' predictions and downloaded in the next round."""

from __future__ import annotations

from typing import Literal

import torch

from fdl.errors import UserError
from fdl.knowledge.aggregation.last_uploads import LastUploads
from fdl.knowledge.aggregation.means import AggregatedResponses, ResponseMean
from fdl.knowledge.aggregation.shares import Cap
from fdl.knowledge.distillation.personalization import Similarity
from fdl.knowledge.distillation.upload_on_change import UploadOnChange
from fdl.losses.responses import RESPONSE_LOSSES, entropy_reduction, power_sharpening
from fdl.messages import Bundle, Message, Responses
from fdl.participants import Server
from fdl.utils.arguments import one_of

_SHARPENINGS = {"entropy_reduction": entropy_reduction, "power": power_sharpening}


class SoftLabels:
    """Conversion of the clients' mean prediction to soft labels of the form that a loss compares.

    Args:
        loss: a name among `fdl.losses.responses.RESPONSE_LOSSES`.
        space: average probabilities or logits.
        sharpen: temperature or exponent of the sharpening, > 0; None leaves the mean unsharpened.
        sharpening: sharpen by entropy reduction or by power.
        cap: the most weight that one client may have; None for no limit.

    Raises:
        UserError: a value is out of range, or the loss compares logits and `space` is probabilities.
    """

    def __init__(
        self,
        loss: str,
        space: Literal["probabilities", "logits"],
        sharpen: float | None,
        sharpening: Literal["entropy_reduction", "power"],
        cap: Cap | None,
    ):
        if sharpen is not None and not sharpen > 0:
            raise UserError(f"sharpen must be > 0, got {sharpen}")
        self.space, self.form, self.cap = space, RESPONSE_LOSSES[loss].form, cap
        if self.form == "logits" and (space == "probabilities" or sharpen is not None):
            raise UserError(f"loss {loss} compares logits, so space must be logits, unsharpened; got {space}")
        self.sharpen, self.sharpening = sharpen, _SHARPENINGS[one_of("sharpening", sharpening, _SHARPENINGS)]

    def mean(self, server: Server, weighted: bool | None = None) -> ResponseMean:
        """An empty mean of predictions.

        Args:
            server: gives the numbers of proxy samples and classes.
            weighted: whether clients upload confidences; None where they may.
        """
        return ResponseMean(len(server.proxy), server.num_classes, self.space, weighted, self.cap)

    def of(self, knowledge: AggregatedResponses) -> Responses:
        """Soft labels of the proxy samples that at least one client predicted.

        Args:
            knowledge: the mean over clients.
        """
        values = knowledge.values if self.form == self.space else knowledge.probabilities
        values = values if self.sharpen is None else self.sharpening(knowledge.probabilities, self.sharpen)
        answered = knowledge.coverage > 0
        rows = None if bool(answered.all()) else answered.nonzero().squeeze(1)
        return Responses(values if rows is None else values[rows], self.form, rows)


class Feedback:
    """Downloads of the clients from the second round on.

    Args:
        source: the aggregate, the student's predictions, or nothing.
        labels: converts mean predictions to soft labels.
        personalization: gives each client its own mixture of the others' predictions; None broadcasts the same to all.
        policy: upload policy, whose status goes with every download; None where clients always upload.
        prototypes: whether clients upload prototypes, which personalisation may compare.

    Raises:
        UserError: personalisation without feedback, or by prototypes that are not uploaded.
    """

    def __init__(
        self,
        source: Literal["aggregate", "student", "none"],
        labels: SoftLabels,
        personalization: Similarity | None,
        policy: UploadOnChange | None,
        prototypes: bool,
    ):
        if personalization is not None and source == "none":
            raise UserError("personalization says what comes back, but feedback is none")
        if personalization is not None:
            personalization.check(prototypes)
        self.source, self.labels, self.personalization, self.policy = source, labels, personalization, policy

    @property
    def needs_last_uploads(self) -> bool:
        """True if the server must keep every client's last upload."""
        return self.personalization is not None or self.policy is not None

    def last_uploads(self, server: Server) -> LastUploads:
        """Every client's last upload, for personalisation and the upload policy.

        Args:
            server: keeps the uploads in its state.
        """
        return LastUploads(server, None if self.policy is None else self.policy.expiry)

    def keep(self, server: Server, fresh: Responses) -> None:
        """Store the soft labels for the next round's download in the server's state.

        Args:
            server: the server, with the student after the round.
            fresh: soft labels of the round.
        """
        if self.source != "none":
            server.state["answers"], server.state["rows"] = fresh.values, fresh.rows
        if self.source == "student":
            logits = server.predict(server.student, server.proxy)
            answers = logits if self.labels.form == "logits" else torch.softmax(logits, dim=1)
            server.state["answers"] = answers if fresh.rows is None else answers[fresh.rows]

    def download(self, server: Server, client: int) -> Message | Bundle | None:
        """The download of one client; the same message for all unless it is personalised.

        Args:
            server: the server, whose state `keep` has filled.
            client: id of the client.
        """
        answers = None
        if self.personalization is not None:
            last, labels = self.last_uploads(server), self.labels
            answers = self.personalization.mixture(client, last, lambda: labels.mean(server), labels.of)
        if answers is None and "answers" in server.state:
            state, form = server.state, self.labels.form
            make = lambda: Responses(state["answers"], form=form, rows=state.get("rows"))  # noqa: E731
            answers = server.cached_download("answers", make)
        if self.policy is None:
            return answers
        status = self.policy.status_for(server, self.last_uploads(server).round(client))
        return Bundle((status,) if answers is None else (answers, status))

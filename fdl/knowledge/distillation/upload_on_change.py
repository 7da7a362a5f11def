"""Uploads on change: clients upload only new predictions, and stop once the student no longer improves."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from fdl.errors import UserError
from fdl.losses.responses import kd_loss
from fdl.messages import UploadStatus
from fdl.participants import Client, Server
from fdl.utils.arguments import at_least, not_negative, one_of

MEASURES = {
    "kl": lambda now, before: kd_loss(now.clamp_min(1e-8).log(), before, scale=False),
    "l1": lambda now, before: (now - before).abs().sum(1).mean(),
}
"""Distances between predictions and earlier ones, both probabilities [n, C]: a mean over rows."""


class UploadOnChange:
    """Clients upload only if their predictions have changed enough since their last accepted upload.

    Otherwise they upload a status of a few bytes, and the server reuses the stored predictions. Each download names the
    round of the client's last accepted upload, so that a lost or rejected upload is noticed and sent again.

    Args:
        threshold: smallest change that is uploaded, ≥ 0; at 0 each client always uploads.
        measure: mean over proxy samples of KL(before ‖ now) in nats (``"kl"``), or of the L1 distance (``"l1"``), at
            most 2.
        expiry: rounds after its own for which a prediction is valid, whatever the change.
        patience: rounds in a row without a lower validation loss of the student after which clients no longer train
            and upload, as long as their last upload has not expired; None: they do to the end.
    """

    name = "on_change"

    def __init__(
        self,
        threshold: float = 0.05,
        measure: Literal["kl", "l1"] = "kl",
        expiry: int = 10,
        patience: int | None = None,
    ):
        self.threshold, self.measure = not_negative("threshold", threshold), one_of("measure", measure, MEASURES)
        self.expiry = at_least("expiry", expiry, 1)
        self.patience = None if patience is None else at_least("patience", patience, 1)

    def status_for(self, server: Server, held: int) -> UploadStatus:
        """Return the status that the server sends to a client.

        Args:
            server: the server, whose state holds the plateau.
            held: round of the client's last accepted upload, 0 for none.
        """
        stale = server.state.get("plateau", {}).get("rounds", 0)
        expired = server.round - held > self.expiry
        return UploadStatus(held, requests_upload=self.patience is None or stale < self.patience or expired)

    def may_skip(self, client: Client, status: UploadStatus | None) -> bool:
        """Return True if a client need not even train: the server has its last upload and wants no other.

        Args:
            client: the client, whose state holds its last upload.
            status: status received from the server, None if there was none.
        """
        last = client.state.get("last_upload", {"round": 0})
        return status is not None and not status.requests_upload and status.round == last["round"] > 0

    def is_unchanged(self, client: Client, status: UploadStatus | None, logits: Tensor, rows: Tensor | None) -> bool:
        """Compare a client's predictions with its last accepted upload; record them as uploaded if they have changed.

        Args:
            client: the client, whose state holds its last upload.
            status: status received from the server, None if there was none.
            logits: predictions of the whole proxy set, [n, C].
            rows: rows of the proxy set to upload, None for all.

        Returns:
            True if nothing need be uploaded.
        """
        now, last = torch.softmax(logits, dim=1), _last_accepted(client, status)
        chosen = torch.arange(len(now)) if rows is None else rows
        if last is not None:
            valid = bool((last["rounds"][chosen] >= max(1, client.round - self.expiry)).all())
            if valid and float(MEASURES[self.measure](now[chosen], last["predictions"][chosen])) < self.threshold:
                client.state["last_upload"] = last
                return True
        predictions, rounds = torch.zeros_like(now), torch.zeros(len(now), dtype=torch.int64)
        if last is not None:
            predictions, rounds = last["predictions"].clone(), last["rounds"].clone()
        predictions[chosen], rounds[chosen] = now[chosen], client.round
        # the last accepted upload is kept until the server confirms that it has accepted this one, too
        client.state["last_upload"] = {
            "round": client.round,
            "predictions": predictions,
            "rounds": rounds,
            "previous": last,
        }
        return False

    def update_plateau(self, server: Server) -> dict[str, float]:
        """Record if the student's validation loss still falls, and return it to be logged.

        Args:
            server: the server, whose state holds the plateau.

        Raises:
            UserError: there is no validation set.
        """
        if self.patience is None:
            return {}
        if len(server.validation) == 0:
            raise UserError("on_change: patience needs a validation set; set data.args.validation")
        logits = server.predict(server.student, server.validation)
        loss = float(torch.nn.functional.cross_entropy(logits, server.validation.labels))
        before: dict[str, Any] = server.state.get("plateau", {"loss": math.inf, "rounds": 0})
        better = loss < before["loss"]
        server.state["plateau"] = {"loss": min(loss, before["loss"]), "rounds": 0 if better else before["rounds"] + 1}
        return {"plateau/validation_loss": loss, "plateau/rounds": float(server.state["plateau"]["rounds"])}


def _last_accepted(client: Client, status: UploadStatus | None) -> dict[str, Any] | None:
    """Return a client's last upload that the server has accepted; None if client and server do not agree on one."""
    last = client.state.get("last_upload")
    for upload in (last, last and last.get("previous")):
        if upload and status is not None and 0 < status.round == upload["round"]:
            return {key: value for key, value in upload.items() if key != "previous"}
    return None

"""When a client has something new to say: uploads on change, and an end to questions once nothing is gained."""

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
"""How far answers lie from earlier ones, both probabilities [n, C]: a mean over rows."""


class UploadOnChange:
    """A client uploads only when what it would say has changed enough since the server last heard it of the same.

    Else it says so in a few bytes, and the server goes on with the answers that it holds. With each download the server
    names the round of the client's last accepted upload, so one that was lost or refused is noticed and made up for.

    Args:
        threshold: least change that is worth an upload, ≥ 0; at 0 every client always uploads.
        measure: mean over proxy samples of KL(before ‖ now) in nats, or of the L1 distance, at most 2.
        expiry: for how many rounds after its own an answer holds, whatever the change.
        patience: after how many rounds in a row without a lower validation loss of the student clients are no longer
            asked to train and answer, as long as their last upload has not expired; None asks to the end.
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
        """What the server tells a client.

        Args:
            server: in whose state the plateau is.
            held: the round of the client's last accepted upload, 0 for none.
        """
        stale = server.state.get("plateau", {}).get("rounds", 0)
        expired = server.round - held > self.expiry
        return UploadStatus(held, requests_upload=self.patience is None or stale < self.patience or expired)

    def may_skip(self, client: Client, standing: UploadStatus | None) -> bool:
        """Whether a client need not even train: the server has its last upload and wants no other."""
        said = client.state.get("said", {"round": 0})
        return standing is not None and not standing.requests_upload and standing.round == said["round"] > 0

    def is_unchanged(self, client: Client, standing: UploadStatus | None, logits: Tensor, rows: Tensor | None) -> bool:
        """Whether what a client would say is what it has said; if not, note that it says it in this round.

        Args:
            client: its state holds what it has said.
            standing: what the server told it.
            logits: its answers to the whole proxy set, [n, C].
            rows: of the proxy set that it would send, None for all.
        """
        now, said = torch.softmax(logits, dim=1), _accepted(client, standing)
        asked = torch.arange(len(now)) if rows is None else rows
        if said is not None:
            known = bool((said["since"][asked] >= max(1, client.round - self.expiry)).all())
            if known and float(MEASURES[self.measure](now[asked], said["answers"][asked])) < self.threshold:
                client.state["said"] = said
                return True
        answers, since = torch.zeros_like(now), torch.zeros(len(now), dtype=torch.int64)
        if said is not None:
            answers, since = said["answers"].clone(), said["since"].clone()
        answers[asked], since[asked] = now[asked], client.round
        # what was accepted before stays known until this upload is known to have been accepted, too
        client.state["said"] = {"round": client.round, "answers": answers, "since": since, "before": said}
        return False

    def update_plateau(self, server: Server) -> dict[str, float]:
        """Note whether the student's validation loss still falls; returns it for the log."""
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


def _accepted(client: Client, standing: UploadStatus | None) -> dict[str, Any] | None:
    """What a client has said and the server has taken in; None where they do not agree on that."""
    said = client.state.get("said")
    for version in (said, said and said.get("before")):
        if version and standing is not None and 0 < standing.round == version["round"]:
            return {key: value for key, value in version.items() if key != "before"}
    return None

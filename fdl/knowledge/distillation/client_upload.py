"""A client's upload for the proxy set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from lightning import LightningModule

from fdl.engine.requests import PredictRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.confidence.base import Confidence
from fdl.knowledge.confidence.calibration import fit_temperature
from fdl.knowledge.distillation.proxy_subsampling import rows_of_round
from fdl.knowledge.distillation.upload_on_change import UploadOnChange
from fdl.knowledge.transfer.extraction import Extracted, extract
from fdl.knowledge.transfer.features import FeatureTransfer
from fdl.knowledge.transfer.prototypes import PrototypeTransfer
from fdl.messages import Bundle, Message, QuantizedLogWeights, Responses, UploadStatus
from fdl.participants import Client, Server

if TYPE_CHECKING:
    from fdl.knowledge.release import Release


@dataclass(frozen=True)
class UploadBuilder:
    """Builder of a client's upload from its specialist's predictions; settings only.

    Args:
        space: upload probabilities or logits.
        calibrate: divide logits by a temperature fitted on the held-out private samples.
        confidence: weighs each prediction; None uploads no confidence.
        features: settings of uploaded activations; None for none.
        prototypes: settings of uploaded class centroids; None for none.
        proxy_fraction: fraction of the proxy set that is predicted per round, in (0, 1].
        frequency: skips uploads of predictions that have hardly changed; None always uploads.
        release: makes the predictions differentially private; None leaves them exact.

    Raises:
        UserError: `proxy_fraction` is out of (0, 1].
    """

    space: Literal["probabilities", "logits"]
    calibrate: bool
    confidence: Confidence | None
    features: FeatureTransfer | None
    prototypes: PrototypeTransfer | None
    proxy_fraction: float
    frequency: UploadOnChange | None
    release: Release | None = None

    def __post_init__(self) -> None:
        """Check the fraction of the proxy set."""
        if not 0 < self.proxy_fraction <= 1:
            raise UserError(f"proxy_fraction must be in (0, 1], got {self.proxy_fraction}")

    @property
    def needs_calibration(self) -> bool:
        """True if clients use their held-out private samples."""
        confident = self.confidence is not None and self.confidence.needs_calibration
        selected = None if self.features is None else self.features.select
        return self.calibrate or confident or (selected is not None and selected.toward == "labels")

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """Bytes of the proxy set, and of the public encoder where confidence or prototypes are measured in its space.

        Args:
            server: holds the proxy set and the encoder.
        """
        costs, users = {"proxy": server.proxy.nbytes}, (self.confidence, self.prototypes)
        if server.encoder is not None and any(user is not None and user.needs_encoder for user in users):
            costs["encoder"] = server.encoder.nbytes()
        return costs

    def upload(
        self, client: Client, specialist: LightningModule, standing: UploadStatus | None
    ) -> Requests[Message | Bundle | None]:
        """Predict the proxy set; or report that nothing has changed. Call it with ``yield from``.

        Args:
            client: the client.
            specialist: its model, trained.
            standing: status of its last upload at the server; None where uploads never depend on it.

        Returns:
            The upload; the status alone if predictions have hardly changed; None if the privacy budget is spent.
        """
        if self.features is None and self.prototypes is None:
            logits = yield PredictRequest(specialist, client.proxy)
            known = Extracted(logits, logits[:, :0], {})
        else:
            known = extract(client, specialist, client.proxy, self.features.names(client) if self.features else [])
        logits = known.logits
        if self.calibrate and len(client.calibration):
            held_out = client.predict(specialist, client.calibration)
            logits = logits / fit_temperature(held_out, client.calibration.labels)
        rows = rows_of_round(client, self.proxy_fraction)
        if self.frequency is not None and self.frequency.is_unchanged(client, standing, logits, rows):
            return UploadStatus(standing.round)
        chosen = slice(None) if rows is None else rows
        values = logits if self.space == "logits" else torch.softmax(logits, dim=1)
        weights = None if self.confidence is None else self.confidence.log_weights(client, logits)[chosen]
        if self.release is not None:
            return self.release.message(client, Responses(values[chosen], self.space, rows), weights)
        sure = None if weights is None else QuantizedLogWeights.quantize(weights)
        parts: list[Message] = [Responses(values[chosen], self.space, rows, sure)]
        if self.features is not None:
            parts.append(self.features.message(client, known, rows))
        if self.prototypes is not None:
            parts.append(self.prototypes.message(client, lambda: extract(client, specialist, client.train, []), known))
        return parts[0] if len(parts) == 1 else Bundle(tuple(parts))

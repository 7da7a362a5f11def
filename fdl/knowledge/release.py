"""Interface of noisy releases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from fdl.errors import UserError
from fdl.knowledge.aggregation.base import Aggregate
from fdl.knowledge.aggregation.means import ResponseMean
from fdl.messages import Responses
from fdl.participants import Client, Server


class Release(ABC):
    """Private release of predictions of the proxy set.

    Attributes:
        by: who adds the noise.
        space: what the clients have to send.
    """

    by: Literal["client", "server"]
    space: Literal["logits", "probabilities"]

    def check(self, space: str, weighted: bool, beside: Mapping[str, object]) -> None:
        """Refuse settings by which more would go out than this covers.

        Args:
            space: what the clients send.
            weighted: whether confidences go with the answers.
            beside: options by name, None where one is off.

        Raises:
            UserError: naming the option.
        """
        name = type(self).name
        if space != self.space:
            raise UserError(f"private_release: {name} is for {self.space}, and space is {space}")
        if weighted and self.by == "server":
            raise UserError(f"private_release: {name} counts all clients alike, so confidence must be left out")
        # what is sent, or left unsaid, without noise; and what is made of single clients' answers before the noise
        bare = (
            "features",
            "prototypes",
            "upload_policy",
            *(("adaptive_client_weights", "personalization") if self.by == "server" else ()),
        )
        for option in bare:
            if beside.get(option) is not None:
                raise UserError(f"private_release: {name} adds noise to answers, and {option} would go out without any")

    @abstractmethod
    def message(self, client: Client, said: Responses, log_weights: Tensor | None) -> Responses | None:
        """Build a client's upload; None if its budget is exhausted.

        Args:
            client: who answers.
            said: its exact answers, as many a row as there are classes.
            log_weights: how sure it is of each, [n]; None where no confidence is asked for.
        """

    def collect(self, mean: ResponseMean, server: Server, rows: Tensor | None) -> Aggregate:
        """Return the aggregate that takes the clients' predictions of a round.

        Args:
            mean: that averages them.
            server: who asks.
            rows: of the proxy set that are asked for, int64 [n], None for all.
        """
        return mean

"""Image–text retrieval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fdl.errors import UserError
from fdl.evaluators.base import Evaluator
from fdl.metrics.retrieval import captions, embed, match_ranks, recall
from fdl.utils.arguments import at_least

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.participants import Server


class Retrieval(Evaluator):
    """Image-to-text and text-to-image retrieval over the whole test set.

    Metrics: ``image_to_text_recall_at_<k>``, ``text_to_image_recall_at_<k>``, and per direction ``…_mean_rank`` and
    ``…_median_rank`` of the first match. Candidates that are as similar as the match rank before it.

    Args:
        k: numbers of candidates retrieved; None: 1, 5 and 10.
        same_caption: ``"match"`` if pairs with identical captions match each other, else ``"no match"``.
        every: number of rounds between two evaluations; 0: only after the last round.
        label: name under which the metrics are recorded; None: ``"retrieval"``.
    """

    name = "retrieval"
    tasks = ("image_text",)

    def __init__(
        self,
        k: list[int] | None = None,
        same_caption: Literal["match", "no match"] = "match",
        every: int = 0,
        label: str | None = None,
    ):
        super().__init__(every, label)
        self.k = [at_least("k", value, 1) for value in ([1, 5, 10] if k is None else k)]
        self.same_caption = same_caption

    def evaluate(self, server: Server, module: LightningModule) -> dict[str, float]:
        """Rank all test pairs in both directions."""
        if not len(server.test):
            raise UserError("retrieval needs a test set of image–text pairs, and it is empty")
        images, texts = embed(server, module, server.test)
        groups = captions(server.test) if self.same_caption == "match" else None
        metrics: dict[str, float] = {}
        for way, pair in (("image_to_text", (images, texts)), ("text_to_image", (texts, images))):
            ranks = match_ranks(*pair, groups)
            metrics.update({f"{way}_recall_at_{k}": recall(ranks, k) for k in self.k})
            metrics[f"{way}_mean_rank"] = float(ranks.double().mean())
            metrics[f"{way}_median_rank"] = float(ranks.double().quantile(0.5))
        return metrics

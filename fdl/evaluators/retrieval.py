"""Image–text retrieval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fdl.errors import UserError
from fdl.evaluators.base import Evaluator, at_least
from fdl.metrics.retrieval import captions, embed, match_ranks, recall

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.participants import Server


class Retrieval(Evaluator):
    """Images find their captions among all captions of the test set, and captions their images.

    Metrics: ``image_to_text_recall_at_<k>``, ``text_to_image_recall_at_<k>``, and for each way ``…_mean_rank`` and
    ``…_median_rank`` of the first match. Equally similar candidates come before the match.

    Args:
        k: where the lists are cut.
        same_caption: whether pairs with the same caption count as one another's match.
        every: as in `Evaluator`.
        label: as in `Evaluator`.
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
        """Rank all test pairs both ways."""
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

"""Base data module of language models: a tokenizer, documents, and windows of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fdl.datamodules.base import FederatedDataModule
from fdl.datamodules.source import Source
from fdl.datamodules.text import TextSamples, encoded, require_same_tokenizer
from fdl.errors import UserError
from fdl.utils.suggest import suggest


@dataclass
class Documents:
    """Texts and where each is from.

    Attributes:
        texts: the documents.
        groups: natural client, topic or source of each; empty where there are none.
    """

    texts: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def add(self, texts: Sequence[str], group: str | None = None) -> None:
        """Append documents of one group."""
        self.texts += texts
        self.groups += [] if group is None else [group] * len(texts)


class LanguageDataModule(FederatedDataModule):
    """Base of texts without labels, for language models.

    A document is never divided between two sets: the proxy set, validation and test are drawn document by document,
    and `proxy`, `validation`, `test` and `limit` count documents. What remains private, and each of the held-out
    sets, is then joined to windows of `context` tokens, with the tokenizer's end-of-text token after each document.
    No private window holds documents of two groups, so that ``partition: by_group`` gives every client whole groups.

    Args:
        context: tokens of a window, at least 2.
        tokenizer: ``"bytes"``, a local file or folder, or a name on the Hugging Face hub.
        proxy_groups: groups that are public: all of their training documents are the proxy set.
        common: the arguments of `FederatedDataModule`.

    Attributes:
        groups: group of each private window; the windows of the other sets have theirs in ``samples.groups``, except
            the proxy set's, which has none.

    Raises:
        UserError: for values out of range; from `setup` for groups that do not exist.
    """

    task = "language"
    counted = "documents"

    def __init__(self, context: int, tokenizer: str = "bytes", proxy_groups: list[str] | None = None, **common: Any):
        super().__init__(**common)
        if context < 2:
            raise UserError(f"context must be at least 2 tokens, got {context}")
        if proxy_groups and (self._public is not None or self._sizes["proxy"]):
            raise UserError("proxy_groups makes the proxy set, so proxy must not be set beside it")
        self.context, self._spec, self._proxy_groups = context, tokenizer, [str(g) for g in proxy_groups or []]

    @abstractmethod
    def documents(self) -> dict[str, Documents]:
        """Read the documents: those of split ``"train"``, and of ``"validation"`` and ``"test"`` where there are any.

        Raises:
            UserError: naming the file and what is wrong with it.
        """

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, made once."""
        from fdl.modules.tokenizers import make_tokenizer

        return make_tokenizer(self._spec)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Tokenizer and context."""
        return {"tokenizer": self.tokenizer, "context": self.context}

    def load(self) -> Source:
        """Read and tokenise; a sample is a document here, and becomes windows in `postprocess`."""
        splits = self.documents()
        samples = {
            split: encoded(
                self.tokenizer, documents.texts, groups=np.array(documents.groups) if documents.groups else None
            )
            for split, documents in splits.items()
            if documents.texts
        }
        if "train" not in samples:
            raise UserError(f"{self.name}: there are no training documents")
        train = self._without_public(samples["train"]) if self._proxy_groups else samples["train"]
        return Source(train, [], test=samples.get("test"), validation=samples.get("validation"), groups=train.groups)

    def postprocess(self) -> None:
        """Join the documents of each set to windows."""
        if self._proxy_groups:
            self.proxy = self._public_documents
        for split in ("train", "proxy", "validation", "test"):
            setattr(self, split, self._windows(getattr(self, split)))
        self.groups = self.train.groups
        if len(self.train) == 0:
            raise UserError(f"{self.name}: the training documents have too few tokens for one window")

    def _without_public(self, train: TextSamples) -> TextSamples:
        """Take the public groups out of the training documents, and keep them for the proxy set."""
        groups = np.full(len(train), "") if train.groups is None else train.groups
        known = np.unique(groups).tolist()
        for group in self._proxy_groups:
            if group not in known:
                raise UserError(f"proxy_groups: {self.name} has no group {group!r}{suggest(group, known)}")
        public = np.isin(groups, self._proxy_groups)
        if public.all():
            raise UserError(f"proxy_groups: they are all groups of {self.name}, and leave nothing to train on")
        self._public_documents = train.subset(np.flatnonzero(public)).unlabelled()
        return train.subset(np.flatnonzero(~public))

    def _windows(self, documents: TextSamples) -> TextSamples:
        return documents.packed(self.context, self.tokenizer.eos)

    def _proxy_from(self, public: FederatedDataModule) -> TextSamples:
        """The documents of another data set, in the order in which it has them."""
        require_same_tokenizer(self, public, self.name)
        return public.source(self.stratify_public).train.unlabelled()

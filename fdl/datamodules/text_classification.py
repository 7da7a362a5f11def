"""Texts, or pairs of texts, with classes."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fdl.datamodules.base import FederatedDataModule
from fdl.datamodules.classes import Classes
from fdl.datamodules.records import SKIP, Record, existing
from fdl.datamodules.source import Source
from fdl.datamodules.tables import Table, TableLayout, read_folders
from fdl.datamodules.text import TextSamples, from_ids, require_same_tokenizer, token_ids, token_limit
from fdl.errors import UserError
from fdl.utils.paths import expanded
from fdl.utils.seeding import numpy_stream

log = logging.getLogger("fdl")


class TextClassification(FederatedDataModule):
    """Labelled texts from JSONL, JSON, CSV, TSV or parquet files, from folders named after classes, or of Hugging Face.

    In folders, root/class/*.txt, there may be one more level, root/group/class/*.txt, if `group` is set to any name,
    and folders ``train``, ``test`` and ``val`` above all. Texts get what the tokenizer puts around them, such as
    ``[CLS]`` and ``[SEP]``, and are cut to `context` tokens; of a pair, the longer text is cut first. Scores, i.e.
    regression, are not supported.

    Args:
        path: as in `TableLayout`: a file, a folder with a file a split, or ``hub:name``; or a folder of folders.
        context: most tokens of a text, with the special ones.
        tokenizer: ``"bytes"``, a local file or folder, or a name on the Hugging Face hub.
        text: key of the text, or two keys for pairs, e.g. ``[sentence1, sentence2]``.
        label: key of the class: whole numbers or names. Numbers are classes in their order, so that 1 and 5 are classes
            0 and 1, which a line says; 1.0 is 1.
        classes: names of the classes in the order of their numbers, which then count from 0; None: the sorted names or
            numbers of the training texts.
        group: key of the natural client or domain; None: there are no groups.
        split: key of the split; records without it are training texts.
        splits: what the splits are called, by ``train``, ``validation`` and ``test``; None: the usual names.
        where: take only records with these values, by key; a list of values takes any of them.
        skip_empty: leave out records with an empty text or none; else an error names the first one.
        delimiter: what is between the columns of CSV and TSV files; None: found out from their first lines.
        encoding: of the files, such as ``cp1252``; None: UTF-8, or what a mark at their start says.
        common: the arguments of `FederatedDataModule`.

    Attributes:
        truncated: how many texts of each split were longer than the context.

    Raises:
        UserError: when there is nothing at the path; from `setup`, naming file and line, for what is wrong with it.
    """

    name = "text_classification"

    def __init__(
        self,
        path: str,
        context: int,
        tokenizer: str = "bytes",
        text: str | list[str] = "text",
        label: str = "label",
        classes: list[str] | None = None,
        group: str | None = None,
        split: str = "split",
        splits: dict[str, str] | None = None,
        where: dict[str, Any] | None = None,
        skip_empty: bool = False,
        delimiter: str | None = None,
        encoding: str | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        if context < 1:
            raise UserError(f"context must be at least 1 token, got {context}")
        self._texts = [text] if isinstance(text, str) else list(text)
        if len(self._texts) not in (1, 2):
            raise UserError(f"text must be one key, or two for pairs, got {text}")
        full = tuple(self._texts) if skip_empty else ()
        self._layout = TableLayout(path, split, splits, where, full, delimiter, encoding)
        self._folders = expanded(path).is_dir() and not (self._layout.is_saved or self._layout.files())
        self.context, self._spec = context, tokenizer
        self._label, self._classes, self._group = label, classes, group
        self.truncated: dict[str, int] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, made once."""
        from fdl.modules.tokenizers import make_tokenizer

        return make_tokenizer(self._spec)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Number of classes, tokenizer and context."""
        return {"num_classes": self.num_classes, "tokenizer": self.tokenizer, "context": self.context}

    def load(self) -> Source:
        """Read, label and tokenise all splits."""
        table = self._read()
        classes = Classes.of(table.splits, self._label, self._classes or table.names.get(self._label))
        samples = {split: self._samples(split, records, classes) for split, records in table.splits.items()}
        if cut := {split: count for split, count in self.truncated.items() if count}:
            parts = [f"{count:,} of {len(samples[split]):,} {split} texts" for split, count in cut.items()]
            log.warning("%s: cut to %s: %s", self.name, token_limit(self.context, self._spec), ", ".join(parts))
        train = samples["train"]
        return Source(
            train, classes.names, test=samples.get("test"), validation=samples.get("validation"), groups=train.groups
        )

    def _read(self) -> Table:
        if not self._folders:
            return self._layout.read()
        root, layout = existing(self._layout.path), self._layout
        records = read_folders(root, self._label, self._texts[0], layout.split, self._group, layout.encoding)
        return layout.sorted(records)

    def _samples(self, split: str, records: list[Record], classes: Classes) -> TextSamples:
        columns = [token_ids(self.tokenizer, [record.text(key, SKIP) for record in records]) for key in self._texts]
        before, after = _around(self.tokenizer)
        between = after or [self.tokenizer.eos or 0]
        room = self.context - len(before) - len(after) - (len(columns) - 1) * len(between)
        if room < len(columns):
            raise UserError(f"context {self.context} has no room for a text beside the tokenizer's special tokens")
        rows, cut = [], 0
        for record, *parts in zip(records, *columns):
            if not all(parts):
                raise UserError(f"{record.place}: the tokenizer makes nothing of the text")
            cut += sum(map(len, parts)) > room
            first, *second = _fitted(parts, room)
            rows.append([*before, *first, *(between + second[0] if second else []), *after])
        self.truncated[split] = cut
        labels = torch.tensor([classes.code(record) for record in records])
        groups = np.array([str(record[self._group]) for record in records]) if self._group else None
        return from_ids(self.tokenizer, rows, labels, groups)

    def _proxy_from(self, public: FederatedDataModule) -> TextSamples:
        """The texts of another data set, cut to this one's context, in random order."""
        require_same_tokenizer(self, public, self.name)
        texts = public.source(self.stratify_public).train.unlabelled().truncated(self.context)
        return texts.subset(numpy_stream(self.seed, "proxy order").permutation(len(texts)))


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer's own models expect before and after a text."""
    if not hasattr(tokenizer, "encode_batch"):
        return [], []
    plain, full = tokenizer.encode("a"), tokenizer.encode("a", special=True)
    at = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return full[:at], full[at + len(plain) :]


def _fitted(parts: list[list[int]], room: int) -> list[list[int]]:
    """A text, or the two of a pair, cut to `room` tokens together by shortening the longer one."""
    if len(parts) == 1:
        return [parts[0][:room]]
    first, second = map(len, parts)
    if first + second > room:
        half = room // 2
        first, second = (room - second, second) if second <= half else (min(first, room - half), second)
        second = min(second, room - first)
    return [parts[0][:first], parts[1][:second]]

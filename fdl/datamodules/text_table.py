"""Language data from tables with a text a line."""

from __future__ import annotations

from typing import Any

from fdl.datamodules.language import Documents, LanguageDataModule
from fdl.datamodules.records import SKIP, Record, checked_text
from fdl.datamodules.tables import TableLayout


class TextTable(LanguageDataModule):
    """Texts from JSONL, JSON, CSV, TSV or parquet files, one record a text, or from a data set of Hugging Face.

    Args:
        path: as in `TableLayout`: a file, a folder with a file a split, or ``hub:name``.
        context: tokens of a window.
        text: key of the text, or of a list of texts, of which each is then a document.
        group: key of the natural client, topic or source; None: there are no groups.
        split: key of the split; records without it are training documents.
        splits: what the splits are called, by ``train``, ``validation`` and ``test``; None: the usual names.
        where: take only records with these values, by key; a list of values takes any of them.
        skip_empty: leave out records with an empty text or none; else an error names the first one.
        delimiter: what is between the columns of CSV and TSV files; None: found out from their first lines.
        encoding: of the files, such as ``cp1252``; None: UTF-8, or what a mark at their start says.
        common: the other arguments of `LanguageDataModule`.

    Raises:
        UserError: when there is no such file; from `setup`, naming the line, for what is wrong with it.
    """

    name = "text_table"

    def __init__(
        self,
        path: str,
        context: int,
        text: str = "text",
        group: str | None = None,
        split: str = "split",
        splits: dict[str, str] | None = None,
        where: dict[str, Any] | None = None,
        skip_empty: bool = False,
        delimiter: str | None = None,
        encoding: str | None = None,
        **common: Any,
    ):
        super().__init__(context=context, **common)
        self._layout = TableLayout(path, split, splits, where, (text,) if skip_empty else (), delimiter, encoding)
        self._text, self._group = text, group

    def documents(self) -> dict[str, Documents]:
        """Read the table."""
        result: dict[str, Documents] = {}
        for split, records in self._layout.read().splits.items():
            result[split] = Documents()
            for record in records:
                result[split].add(self._texts(record), str(record[self._group]) if self._group else None)
        return result

    def _texts(self, record: Record) -> list[str]:
        texts = record[self._text]
        if not isinstance(texts, list):
            return [record.text(self._text, SKIP)]
        return [checked_text(text, f"{record.place}: {self._text!r}[{i}]") for i, text in enumerate(texts)]

"""Language data from files of plain text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from fdl.datamodules.decoding import checked_encoding
from fdl.datamodules.language import Documents, LanguageDataModule
from fdl.datamodules.records import TEXTS, ends_with, existing, read_text, stem
from fdl.datamodules.tables import SPLITS
from fdl.errors import UserError

_CUTS = {"file": None, "paragraph": r"\n[ \t\r]*\n\s*", "line": r"\n"}


class TextFiles(LanguageDataModule):
    """Plain text, .txt or .md, also with .gz: one file, or a folder of them.

    In a folder, each folder directly below it is a group, with all files in it; without such folders each file is a
    group. Folders ``train``, ``test`` and ``val`` (or ``dev``, ``valid``, ``validation``) are splits, and the groups
    are looked for in each of them; ``val`` without ``test`` is the test split.

    Args:
        path: the file or folder.
        context: tokens of a window.
        document: what a document is, of which no part goes to another set: a file, a paragraph (ended by an empty
            line), or a line.
        encoding: of the files, such as ``cp1252``; None: UTF-8, or what a mark at their start says.
        common: the other arguments of `LanguageDataModule`.

    Raises:
        UserError: when there is no such file or folder; from `setup` when there is no text in it.
    """

    name = "text_files"

    def __init__(
        self,
        path: str,
        context: int,
        document: Literal["file", "paragraph", "line"] = "file",
        encoding: str | None = None,
        **common: Any,
    ):
        super().__init__(context=context, **common)
        if document not in _CUTS:
            raise UserError(f"document must be one of {', '.join(_CUTS)}, got {document!r}")
        self._path, self._document, self._encoding = existing(path), document, checked_encoding(encoding)

    def documents(self) -> dict[str, Documents]:
        """Read all files, in the order of their names."""
        folders = {"train": self._path}
        if (self._path / "train").is_dir():
            places = {split: [self._path / name for name in names] for split, names in SPLITS.items()}
            found = {split: next((f for f in folders if f.is_dir()), None) for split, folders in places.items()}
            folders = {split: folder for split, folder in found.items() if folder is not None}
        result = {}
        for split, folder in folders.items():
            result[split] = Documents()
            for group, file in _files(folder):
                result[split].add(self._cut(read_text(file, self._encoding)), group)
        if "test" not in result and "validation" in result:
            result["test"] = result.pop("validation")
        return result

    def _advice(self) -> str:
        finer = {"file": "paragraph or line", "paragraph": "line"}.get(self._document)
        return super()._advice() + (f", or make more documents of the files with document: {finer}" if finer else "")

    def _cut(self, text: str) -> list[str]:
        pattern = _CUTS[self._document]
        return [text] if pattern is None else [part for part in re.split(pattern, text) if part.strip()]


def _files(path: Path) -> list[tuple[str | None, Path]]:
    """Group and file of all text files below a folder, or of the one file, which has no group."""
    if path.is_file():
        if not ends_with(path, TEXTS):
            raise UserError(f"{path}: expected a file of {', '.join(TEXTS)}")
        return [(None, path)]
    files = [file for file in sorted(path.rglob("*")) if ends_with(file, TEXTS)]
    if not files:
        raise UserError(f"{path}: no text in this folder ({', '.join(TEXTS)})")
    parts = [file.relative_to(path).parts for file in files]
    nested = any(len(part) > 1 for part in parts)
    return [(part[0] if nested and len(part) > 1 else stem(file), file) for part, file in zip(parts, files)]

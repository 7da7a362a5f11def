"""Decoding of text files, with advice in the error messages for a wrong encoding."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TextIO

from fdl.errors import UserError
from fdl.utils.suggest import suggest

# UTF-32's begins with UTF-16's
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_USUAL = ("utf-8", "utf-16-le", "utf-16-be", "latin-1", "cp1252", "cp1250", "cp1251", "gb18030", "shift_jis", "euc_kr")


def checked_encoding(encoding: str | None) -> str | None:
    """An encoding that Python knows.

    Raises:
        UserError: for any other.
    """
    try:
        "".encode(encoding or "utf-8")
    except LookupError:
        hint = suggest(encoding, _USUAL, few=0) or f"; for example {', '.join(_USUAL)}"
        raise UserError(f"encoding: there is no encoding of text {encoding!r}{hint}") from None
    return encoding


def read_decoded(path: Path, use: Callable[[TextIO], Any], encoding: str | None = None) -> Any:
    """Let a function read a file's text, unpacked where the file ends in .gz; line ends are left as they are.

    Args:
        path: the file.
        use: is given the open file, and may go back to its start.
        encoding: of the text; None: UTF-8. A mark of the byte order (BOM) at the start of the file goes before it.

    Returns:
        What the function returns.

    Raises:
        UserError: when the file cannot be read, or is of another encoding, with what to set.
    """
    try:
        with _opened(path) as binary:
            first = binary.read(4)
            marked = next((name for mark, name in _MARKS.items() if first.startswith(mark)), None)
            name = marked or encoding or "utf-8"
            if marked is None and encoding is None and (found := _unmarked(first)):
                raise UserError(
                    f"{path}: looks like UTF-16 without the mark that such files begin with; set encoding: {found}"
                )
            binary.seek(0)
            with io.TextIOWrapper(binary, encoding=name, newline="") as file:
                return use(file)
    except UnicodeDecodeError:
        raise UserError(_undecodable(path, name)) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _unmarked(first: bytes) -> str | None:
    """The kind of UTF-16 in which four bytes are two letters of English, if any."""
    zeros = [byte == 0 for byte in first]
    return {(False, True, False, True): "utf-16-le", (True, False, True, False): "utf-16-be"}.get(tuple(zeros))


def _undecodable(path: Path, name: str) -> str:
    """Compose the message for a file in another encoding; an incremental decoder counts from a position in the file."""
    with _opened(path) as file:
        content = file.read()
    try:
        content.decode(name)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        where = f"{path}: line {line}: not {name.removesuffix('-sig').upper()} text ({error.reason})"
        return f"{where}; set encoding to the file's own, such as cp1252 (Windows) or latin-1"
    return f"{path}: not {name} text"

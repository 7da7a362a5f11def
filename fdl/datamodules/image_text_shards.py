"""Images with captions in tar files, as webdataset names their members."""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fdl.datamodules.classes import Classes
from fdl.datamodules.files import decode_image, spread_of, survey
from fdl.datamodules.pairs import PairDataModule, PairSamples
from fdl.datamodules.records import SKIP, Record
from fdl.datamodules.source import Source
from fdl.errors import UserError
from fdl.utils.paths import expanded

log = logging.getLogger("fdl")

_IMAGES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif")
_MOST_BYTES = 16 << 30
_Pair = tuple[Record, np.ndarray]
_ENDS = re.compile(r"\.(tar|tar\.gz|tgz)$", re.IGNORECASE)


class ImageTextShards(PairDataModule):
    """Images with captions in tar files: members of one name with .jpg or .png, and with .txt or .json, are a pair.

    The .txt is the caption; a .json is an object with the caption and whatever else there is of the pair. Images are
    decoded at the start and kept in memory, 8 bits a channel; unpack shards that are too big for that, and use
    `image_text`.

    Args:
        path: a tar file (also .tar.gz and .tgz), a folder of them, or a pattern such as ``data/train-*.tar`` or
            ``data/train-{000..012}.tar``.
        size: images are cut to their central square and resized to size × size.
        test_path: tar files of the test split, likewise; None: there is none.
        caption: key of the caption in a .json.
        label: key of the class in a .json, a whole number or a name; None: there are no classes.
        classes: names of the classes in the order of their numbers.
        group: key of the natural client or domain in a .json, or ``"shard"`` for the tar file's name; None: there
            are no groups.
        skip_unreadable: leave out images that cannot be decoded, and log which; else an error names the first one.
        skip_empty: leave out images without a caption, and log how many; else an error names the first one.
        common: the other arguments of `PairDataModule`.

    Raises:
        UserError: when there are no such files; from `setup`, naming file and member, for what is wrong with them.
    """

    name = "image_text_shards"

    def __init__(
        self,
        path: str,
        size: int,
        test_path: str | None = None,
        caption: str = "caption",
        label: str | None = None,
        classes: list[str] | None = None,
        group: str | None = None,
        skip_unreadable: bool = False,
        skip_empty: bool = False,
        **common: Any,
    ):
        super().__init__(size=size, **common)
        self._shards = {"train": _shards(path)}
        if test_path is not None:
            self._shards["test"] = _shards(test_path)
        self._caption, self._label, self._classes, self._group = caption, label, classes, group
        self._skip, self._skip_empty = skip_unreadable, skip_empty

    def load(self) -> Source:
        """Read and decode all shards."""
        splits = self._levelled({split: self._read(shards) for split, shards in self._shards.items()})
        records = {split: [record for record, _ in pairs] for split, pairs in splits.items()}
        classes = Classes.of(records, self._label, self._classes) if self._label else None
        samples = {split: self._samples(pairs, classes) for split, pairs in splits.items()}
        train = samples["train"]
        return Source(train, classes.names if classes else [], test=samples.get("test"), groups=train.groups)

    def _samples(self, pairs: list[tuple[Record, np.ndarray]], classes: Classes | None) -> PairSamples:
        records = [record for record, _ in pairs]
        labels = None if classes is None else torch.tensor([classes.code(record) for record in records])
        images = self.in_memory(torch.from_numpy(np.stack([pixels for _, pixels in pairs])), labels)
        groups = np.array([str(record[self._group]) for record in records]) if self._group else None
        return self.pairs(images, [record.text(self._caption, SKIP) for record in records], groups)

    def _levelled(self, splits: dict[str, list[tuple[Record, np.ndarray | bytes]]]) -> dict[str, list[_Pair]]:
        """Decode also the images of more than 8 bits, now that the values of all of them are known."""
        deep = [(record, image) for pairs in splits.values() for record, image in pairs if isinstance(image, bytes)]
        if not deep:
            return splits
        spread = spread_of([io.BytesIO(image) for _, image in deep], [record.place for record, _ in deep])
        reading = self.reading_of(spread, len(deep), sum(map(len, splits.values())))
        return {
            split: [
                (record, decode_image(io.BytesIO(image), self.size, self.channels or 3, reading))
                if isinstance(image, bytes)
                else (record, image)
                for record, image in pairs
            ]
            for split, pairs in splits.items()
        }

    def _read(self, shards: list[Path]) -> list[tuple[Record, np.ndarray | bytes]]:
        """All pairs of some shards, with their decoded images, or the file's bytes of images of more than 8 bits."""
        channels, pairs, size, empty = self.channels or 3, [], 0, 0
        for shard in shards:
            for place, parts in _members(shard):
                record = self._record(place, shard, parts)
                if not str(record.fields.get(self._caption) or "").strip():
                    if not self._skip_empty:
                        raise UserError(f"{place}: no caption, neither .txt nor {self._caption!r} in a .json{SKIP}")
                    empty += 1
                    continue
                image = next((parts[kind] for kind in _IMAGES if kind in parts), None)
                if image is None:
                    raise UserError(f"{place}: no image with this caption ({', '.join(_IMAGES)})")
                try:
                    deep = self.value_range is None and bool(survey([io.BytesIO(image)]).deep)
                    pixels = (
                        image
                        if deep
                        else decode_image(io.BytesIO(image), self.size, channels, self.reading_of({}, 0, 0))
                    )
                except UserError as error:
                    reason = str(error).partition(": ")[2]
                    if not self._skip:
                        raise UserError(f"{place}: {reason}; set skip_unreadable: true to leave such out") from error
                    log.warning("%s: left out: %s", place, reason)
                    continue
                size += len(image) if deep else pixels.nbytes
                if size > _MOST_BYTES:
                    raise UserError(f"{shard}: the images need more than {_MOST_BYTES >> 30} GiB; unpack the shards")
                pairs.append((record, pixels))
        if empty:
            log.warning("%s: left out %d image(s) without a caption", shards[0].parent, empty)
        if not pairs:
            raise UserError(f"{shards[0]}: no images with captions in these shards")
        return pairs

    def _record(self, place: str, shard: Path, parts: dict[str, bytes]) -> Record:
        """What is said of a pair, beside its image."""
        fields: dict[str, Any] = {"shard": _ENDS.sub("", shard.name)}
        try:
            if "json" in parts:
                described = json.loads(parts["json"])
                if not isinstance(described, dict):
                    raise UserError(f"{place}.json: expected a JSON object")
                fields |= described
            if "txt" in parts:
                fields[self._caption] = parts["txt"].decode("utf-8-sig").strip()
        except ValueError as error:
            raise UserError(f"{place}: its text is not valid ({error})") from error
        return Record(place, fields)


def _shards(path: str) -> list[Path]:
    """The tar files that a path or pattern means, in the order of their names."""
    place = expanded(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        found = sorted(file for file in place.iterdir() if file.is_file() and _ENDS.search(file.name))
        if not found:
            raise UserError(f"{place}: no tar files in this folder (.tar, .tar.gz, .tgz)")
        return found
    found = []
    for pattern in _expanded(str(place)):
        one = Path(pattern)
        files = [one] if one.is_file() else sorted(one.parent.glob(one.name))
        if not files:
            raise UserError(f"{one}: no such tar file, nor a folder or pattern of some")
        found += files
    if not found:
        raise UserError(f"{place}: its braces mean no file: the smaller number comes first")
    return list(dict.fromkeys(found))


def _expanded(pattern: str) -> list[str]:
    """All that is meant by ``{000..012}`` and ``{a,b}``, as a shell and webdataset read them."""
    for braces in re.finditer(r"\{([^{}]*)\}", pattern):
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
        if ends:
            low, high = ends.groups()
            padded = any(len(end) > 1 and end[0] == "0" for end in (low, high))
            width = max(len(low), len(high)) if padded else 1
            choices = [str(number).zfill(width) for number in range(int(low), int(high) + 1)]
        elif "," in braces[1]:
            choices = braces[1].split(",")
        else:
            continue
        start, end = pattern[: braces.start()], pattern[braces.end() :]
        return [one for choice in choices for one in _expanded(f"{start}{choice}{end}")]
    return [pattern]


def _members(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The pairs of a shard: a place for messages, and contents by ending. A pair's members follow one another."""
    key, parts = None, {}
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, dot, kind = name.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                if (folder, stem) != key and parts:
                    yield f"{shard}: {'/'.join(filter(None, key))}", parts
                    parts = {}
                key = folder, stem
                parts[kind.lower()] = archive.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{shard}: cannot be read ({error})") from error
    if parts:
        yield f"{shard}: {'/'.join(filter(None, key))}", parts

"""Classes and domains of images in a tree of folders; every file that is not read is logged."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fdl.datamodules.splits import are_splits, split_folders, split_of
from fdl.errors import UserError

log = logging.getLogger("fdl")

_NO_PICTURES = {".h5", ".hdf", ".grib", ".bufr", ".eps", ".ps", ".wmf", ".emf", ".mpg", ".mpeg", ".fli", ".flc"}
"""Suffixes that Pillow lists, but that need further programs to read, or are not those of photographs."""

_USUAL = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

_OF_THE_SYSTEM = {"thumbs.db", "desktop.ini"}

_NAMED = 5
"""Maximum number of folders that a message names."""


class Photo(NamedTuple):
    """An image file, and where it belongs."""

    path: Path
    label: str
    domain: str


@cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of readable image files, in lower case."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN) - _NO_PICTURES


def read_tree(root: Path, domains: bool) -> dict[str, list[Photo]]:
    """List the images below a folder by split, class and domain, and log the files left out.

    Args:
        root: the folder of the data set: class/*, or split/class/*.
        domains: whether there is a level of domains above the classes.

    Returns:
        Images in the order of their names, by ``"train"``, ``"validation"`` and ``"test"`` as far as there are any.

    Raises:
        UserError: when folders are not so, saying what was found and what would help.
    """
    inside = folders(root)
    found = split_folders(root, inside, lambda folder: any(_holds_images(inner) for inner in folders(folder)))
    if found["train"] != root:
        beside = [f"{folder.name}/" for folder in inside if folder not in found.values() and _holds_images(folder)]
        beside += [image.name for image in _Tree(root, domains)._images(root)]
        if beside:
            log.warning("%s: not read, being in no folder of a split: %s", root, _list(beside))
    return {split: _Tree(folder, domains).photos() for split, folder in found.items()}


class _Tree:
    """One split's folders."""

    def __init__(self, root: Path, domains: bool):
        self.root, self.domains = root, domains
        self.others: Counter[str] = Counter()
        self.stray: list[Path] = []
        self.deeper: Counter[str] = Counter()
        self.empty: list[str] = []

    def photos(self) -> list[Photo]:
        """All images, after the folders were found to be as they should."""
        tops = [folder for folder in folders(self.root) if _holds_images(folder)]
        self.stray += self._images(self.root)
        if self.domains:
            self._require_domains(tops)
        else:
            self._require_classes(tops)
        found = [
            photo for domain in (folders(self.root) if self.domains else [self.root]) for photo in self._of(domain)
        ]
        if not found:
            raise UserError(self._nothing())
        labels = sorted({photo.label for photo in found})
        if are_splits(labels):
            problem = (
                "folders of splits have to lie above those of domains"
                if self.domains
                else "these hold images themselves; expected a folder for every class in each"
            )
            raise UserError(f"{self.root}: {_list([f'{label}/' for label in labels])}: {problem}")
        self._log_findings(labels, len(found))
        return found

    def _of(self, domain: Path) -> Iterator[Photo]:
        """The images of one domain, or of all where there are no domains."""
        if self.domains:
            self.stray += self._images(domain)
        for label in folders(domain):
            paths = list(self._below(label))
            if not paths:
                self.empty.append(f"{label.relative_to(self.root)}/")
            for path in paths:
                if path.parent != label:
                    self.deeper[f"{path.parent.relative_to(self.root)}/"] += 1
                yield Photo(path, label.name, domain.name)

    def _require_classes(self, tops: Sequence[Path]) -> None:
        """Refuse folders whose images lie a level deeper, in folders that look like the classes."""
        inner = {top.name: [f.name for f in folders(top) if _holds_images(f)] for top in tops}
        held = Counter(name for names in inner.values() for name in names)
        if any(self._images(top, count=False) for top in tops) or len(held) < 2:
            return
        if all(are_splits(names) for names in inner.values()):
            one = f"{tops[0].name}/{inner[tops[0].name][0]}/"
            raise UserError(f"{self.root}: folders of splits, such as {one}, have to lie above those of classes")
        if len(tops) > 1 and max(held.values()) == 1:
            return  # each has others of its own: kinds of one class
        raise UserError(
            f"{self.root}: the images lie one level deeper than {self._level('class')}, in {_list(sorted(held))} below "
            f"{_list([top.name for top in tops])}; if the upper folders are sites or domains, set domain_folders: true"
        )

    def _require_domains(self, tops: Sequence[Path]) -> None:
        flat = [top.name for top in tops if not any(_holds_images(inner) for inner in folders(top))]
        if flat and len(flat) == len(tops):
            raise UserError(
                f"{self._nothing()}; {_list(flat)} hold images themselves: without domains, leave out domain_folders"
            )

    def _below(self, folder: Path) -> Iterator[Path]:
        """All images in a folder and those in it, links followed, each folder once."""
        seen = set()
        for place, inner, _ in os.walk(folder, followlinks=True):
            real = os.path.realpath(place)
            inner[:] = [] if real in seen else sorted(name for name in inner if not name.startswith("."))
            if real not in seen:
                seen.add(real)
                yield from self._images(Path(place))

    def _images(self, folder: Path, count: bool = True) -> list[Path]:
        """The images that lie in a folder itself; other files are counted."""
        images = []
        for path in _sorted(folder):
            if not path.is_file():
                continue
            if path.suffix.lower() in suffixes():
                images.append(path)
            elif count and path.name.casefold() not in _OF_THE_SYSTEM:
                self.others[path.suffix.lower() or "no suffix"] += 1
        return images

    def _level(self, last: str) -> str:
        return f"{self.root.name}/{'domain/' if self.domains else ''}{last}/"

    def _nothing(self) -> str:
        others = f"; there are {self._others()}" if self.others else ""
        if self.stray and not self.domains:
            others += f"; {len(self.stray)} images lie in {self.root.name}/ itself, outside of a folder for their class"
        kinds = f"{', '.join(_USUAL)} and {len(suffixes() - set(_USUAL))} more"
        return f"{self.root}: no images in {self._level('class')} ({kinds}){others}"

    def _others(self) -> str:
        kinds = _list([f"{count} {kind}" for kind, count in self.others.most_common()])
        return f"{self.others.total()} files of other kinds ({kinds})"

    def _log_findings(self, labels: Sequence[str], count: int) -> None:
        """Log the files left out, and interpretations that may be unintended."""
        if self.deeper:
            named = _list([f"{place} ({number})" for place, number in sorted(self.deeper.items())])
            hint = "; if they are of sites or domains, set domain_folders: true" if self.deeper.total() == count else ""
            log.warning(
                "%s: images in folders below a class are taken for images of that class: %s%s", self.root, named, hint
            )
        if unsure := [f"{label}/" for label in labels if split_of(label)]:
            log.info("%s: taken for classes, since they hold images themselves: %s", self.root, _list(unsure))
        if self.empty:
            log.warning("%s: left out, holding no images: %s", self.root, _list(self.empty))
        if self.stray:
            log.warning(
                "%s: not read, lying outside of a folder for their class: %d images (%s)",
                *(self.root, len(self.stray), _list([path.name for path in self.stray])),
            )
        if self.others:
            log.warning("%s: not read: %s", self.root, self._others())


def folders(folder: Path) -> list[Path]:
    """The folders in a folder, in the order of their names, but for hidden ones."""
    return [path for path in _sorted(folder) if path.is_dir()]


def _holds_images(folder: Path) -> bool:
    """Test for images in a folder or below it."""
    return next(_Tree(folder, False)._below(folder), None) is not None


def _sorted(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")

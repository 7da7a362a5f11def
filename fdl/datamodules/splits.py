"""Usual names of the splits of a data set, and the folders of the splits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from fdl.errors import UserError

log = logging.getLogger("fdl")

SPLIT_NAMES = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}
"""Usual names of each split, in lower case."""

_SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}


def split_of(name: str) -> str | None:
    """Map a name, in any case, to ``"train"``, ``"validation"`` or ``"test"``; None for an unusual name."""
    return _SPLIT_OF.get(name.strip().casefold())


def are_splits(names: Iterable[str]) -> bool:
    """Test that all names are usual names of splits, a training split among them."""
    found = {split_of(name) for name in names}
    return None not in found and "train" in found


def split_folders(root: Path, folders: list[Path], divided: Callable[[Path], bool]) -> dict[str, Path]:
    """Find the folder of each split.

    Args:
        root: the folder of the data set.
        folders: the folders inside it.
        divided: predicate for folders that contain folders with images, as the folder of a split does.

    Returns:
        Folders by ``"train"``, ``"validation"`` and ``"test"``, as far as they exist. A single folder besides
        ``"train"`` is the test split. Without any folder of a split, `root` itself is the training split.

    Raises:
        UserError: two folders are one split, or there are others but none to train on.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        split = split_of(folder.name)
        if split is None or not divided(folder):
            continue
        if split in found:
            raise UserError(
                f"{root}: {found[split].name}/ and {folder.name}/ are both names of the {split} split; rename or "
                "remove one of them"
            )
        found[split] = folder
    if not found:
        return {"train": root}
    if "train" not in found:
        usual = ", ".join(f"{name}/" for name in SPLIT_NAMES["train"])
        raise UserError(f"{root}: there is {next(iter(found.values())).name}/, but no folder to train on ({usual})")
    if "validation" in found and "test" not in found:
        found["test"] = found.pop("validation")
        log.info("%s: %s/ is the test split, as there is no other", root, found["test"].name)
    return found

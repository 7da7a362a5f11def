"""Figures for TensorBoard, drawn without a display."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

MAX_ROWS, MAX_COLUMNS = 100, 26
"""Beyond either, cells get no numbers, as nobody could read them."""


MOST_CLASSES = 100
"""Beyond this many, a confusion matrix shows no single cell any more: its largest entries are drawn instead."""

MOST_BARS = 25
"""How many of them."""

MOST_COLUMNS = 400
"""Beyond this many, columns of a heat map would be narrower than the dots that draw them."""

MOST_LETTERS = 40
"""Longer names are cut."""


def label_histogram(counts: np.ndarray, classes: Sequence[str], names: Sequence[str] = ()) -> Figure:
    """Draw who holds how many samples of which class, as a heat-map.

    Args:
        counts: int [clients, classes].
        classes: a name a class.
        names: of the clients, where they have any.

    Returns:
        A figure with a row a client, and each client's total beside its name or number. Beyond `MOST_COLUMNS` classes,
        a column stands for several that follow one another.
    """
    named = [name or f"client {i}" for i, name in enumerate(names or [""] * len(counts))]
    rows = [f"{_short(name)}  (n = {total:,})" for name, total in zip(named, counts.sum(1).tolist())]
    together = -(-counts.shape[1] // MOST_COLUMNS)
    counts = np.add.reduceat(counts, np.arange(0, counts.shape[1], together), axis=1) if together > 1 else counts
    figure, axes = _canvas(counts.shape)
    # small counts must differ from none at all, beside a client that holds a thousand times as much
    _heat_map(axes, np.sqrt(counts / max(counts.max(), 1)), counts, "Blues")
    _label(axes, rows=rows, columns=[_short(name) for name in classes[::together]])
    axes.set_xlabel("class" if together == 1 else f"class (a column is {together} of {len(classes):,})")
    axes.set_title("Training samples by client and class")
    return figure


def sizes(counts: Sequence[int], names: Sequence[str] = ()) -> Figure:
    """Draw who holds how many samples, where samples have no classes.

    Args:
        counts: training samples of each client.
        names: of the clients, where they have any.
    """
    figure, axes = _canvas((min(len(counts), MAX_ROWS), 10))
    axes.barh(range(len(counts)), counts, color="tab:blue")
    axes.set_ylim(len(counts) - 0.5, -0.5)
    axes.set_xlabel("training samples")
    axes.set_ylabel("client")
    if any(names):
        _ticks(
            axes.yaxis, [_short(name or str(i)) for i, name in enumerate(names)], figure.get_size_inches()[1] * 72 / 12
        )
    else:
        cast("MaxNLocator", axes.yaxis.get_major_locator()).set_params(integer=True)
    axes.set_title("Training samples by client")
    return figure


def confusion(matrix: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix: colour by share of the true class, numbers by count.

    Args:
        matrix: int [classes, classes], true by predicted.
        classes: a name a class.
        title: above the figure.

    Returns:
        The matrix; beyond `MOST_CLASSES` classes, bars of the pairs that are confused most often.
    """
    if len(classes) > MOST_CLASSES:
        return _confusions(matrix, classes, title)
    figure, axes = _canvas(matrix.shape)
    _heat_map(axes, matrix / np.maximum(matrix.sum(1, keepdims=True), 1), matrix, "Greens")
    names = [_short(name) for name in classes]
    _label(axes, rows=names, columns=names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, parse_math=False)
    return figure


def _confusions(matrix: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Draw the largest entries of a confusion matrix beside its diagonal, the largest first, of equals by class."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    largest = np.argsort(-wrong, axis=None, kind="stable")[:MOST_BARS]
    largest = largest[wrong.flat[largest] > 0]
    pairs = [divmod(int(cell), len(classes)) for cell in largest]
    totals = matrix.sum(1)
    figure, axes = _canvas((max(len(pairs), 4), 14))
    counts = [int(wrong[pair]) for pair in pairs]
    bars = axes.barh(range(len(pairs)), counts, color="tab:red")
    shares = [f"{count:,} of {totals[true]:,}" for count, (true, _) in zip(counts, pairs)]
    axes.bar_label(bars, shares, padding=3, fontsize=8)
    axes.margins(x=0.25)
    axes.set_ylim(max(len(pairs), 1) - 0.5, -0.5)
    names = [f"{_short(classes[true], 24)} → {_short(classes[predicted], 24)}" for true, predicted in pairs]
    _ticks(axes.yaxis, names, len(names))
    cast("MaxNLocator", axes.xaxis.get_major_locator()).set_params(integer=True)
    axes.set_xlabel("samples of the first class that were taken for the second")
    right = int(np.trace(matrix))
    summary = f"{right:,} of {int(totals.sum()):,} right in {len(classes):,} classes; the {len(pairs)} largest errors"
    axes.set_title(f"{title}\n{summary}", parse_math=False)
    return figure


def roc(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    ceilings: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    resolved: float,
    title: str,
) -> Figure:
    """Draw ROC curves on logarithmic axes, where few false positives show.

    Args:
        curves: false- and true-positive rates by what each line is called.
        ceilings: likewise, the largest true-positive rate that may be as a function of the false-positive rate.
        resolved: below this false-positive rate there are too few non-members to tell; it is shaded.
        title: above the figure.
    """
    from matplotlib.figure import Figure

    floor = min([resolved, 1e-3, *(fpr[fpr > 0].min() for fpr, _ in curves.values())]) / 2
    figure = Figure(figsize=(6.4, 5.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(floor, resolved, color="0.93", lw=0, label="too few non-members to tell")
    grid = np.geomspace(floor, 1, 400)
    for name, (fpr, tpr) in curves.items():
        axes.plot(np.maximum(fpr, floor), np.maximum(tpr, floor), drawstyle="steps-post", lw=1.5, label=name)
    for i, (name, bound) in enumerate(ceilings.items()):
        axes.plot(grid, np.maximum(bound(grid), floor), color="black", ls=("--", "-.")[i % 2], lw=1.2, label=name)
    axes.plot(grid, grid, color="0.6", ls=":", lw=1, label="guessing")
    axes.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.05))
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="false-positive rate", ylabel="true-positive rate")
    axes.grid(which="major", color="0.88", lw=0.6)
    for text in axes.legend(loc="lower right", fontsize=8).get_texts():
        text.set_parse_math(False)
    return figure


def shares(tables: Mapping[str, np.ndarray], clients: Sequence[int], classes: Sequence[str]) -> Figure:
    """Draw several tables of who holds which share of which class beside each other.

    Args:
        tables: by title, each [clients, classes] in [0, 1].
        clients: the number of each.
        classes: a name a class.
    """
    from matplotlib.figure import Figure

    width = 1.2 + 0.2 * min(len(classes), 40)
    figure = Figure(figsize=(len(tables) * width, 1.6 + 0.22 * min(len(clients), 40)), dpi=100, layout="constrained")
    for axes, (title, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items()):
        axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        _label(axes, rows=[f"client {i}" for i in clients], columns=[_short(name) for name in classes])
        axes.set_title(title, fontsize=9, parse_math=False)
    return figure


def _canvas(shape: tuple[int, ...]) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # not pyplot: it would look for a display and keep every figure alive

    rows, columns = shape
    if _numbered(shape):
        width, height = 2.0 + 0.52 * columns, 1.4 + 0.30 * rows
    else:
        width, height = min(3.0 + 0.10 * columns, 14.0), min(2.0 + 0.10 * rows, 14.0)
    figure = Figure(figsize=(max(width, 6.0), max(height, 3.0)), dpi=100, layout="constrained")
    return figure, figure.add_subplot()


def _numbered(shape: tuple[int, ...]) -> bool:
    return shape[0] <= MAX_ROWS and shape[1] <= MAX_COLUMNS


def _heat_map(axes: Axes, shades: np.ndarray, counts: np.ndarray, colours: str) -> None:
    """Colour cells by `shades` in [0, 1]; write non-zero `counts` into them where there is room."""
    axes.imshow(shades, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if not _numbered(counts.shape):
        return
    for row, column in zip(*np.nonzero(counts)):
        ink = "white" if shades[row, column] > 0.6 else "black"
        axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=ink, fontsize=8)


def _label(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Name the ticks, thinned out so that they do not overlap."""
    width, height = (side * 72 for side in cast("Figure", axes.figure).get_size_inches())  # in points
    _ticks(axes.yaxis, rows, height / 12)
    columns = _ticks(axes.xaxis, columns, width / 22)
    if max(map(len, columns)) * 5 > 0.75 * width / len(columns) and max(map(len, columns)) > 3:
        axes.tick_params(axis="x", rotation=60)


def _ticks(axis: Axis, names: Sequence[str], room: float) -> list[str]:
    """Name every tick, or every second, …, so that there are at most `room`; returns the names as they are drawn."""
    step = max(-(-len(names) // max(int(room), 1)), 1)
    drawn = list(names[::step])
    # names are text: matplotlib would read what stands between two dollars as a formula
    axis.set_ticks(range(0, len(names), step), labels=drawn, fontsize=8, parse_math=False, family=_fonts())
    return drawn


def _short(name: str, letters: int = MOST_LETTERS) -> str:
    """A name on one line, its middle left out where it is long: what names differ in stands at either end."""
    name = " ".join(name.split()) or "(no name)"
    return name if len(name) <= letters else f"{name[: letters // 2]}…{name[-(letters // 2 - 1) :]}"


@cache
def _fonts() -> tuple[str, ...]:
    """The usual font, then those of this machine that know further scripts."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in _FURTHER_FONTS if name in installed))


_FURTHER_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Sans Symbols2",
    "Noto Emoji",
    "WenQuanYi Zen Hei",
    "Arial Unicode MS",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Segoe UI",
    "Segoe UI Symbol",
)

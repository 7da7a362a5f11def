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
"""Largest table whose cells are numbered; in larger ones, the numbers would be too small to read."""


MOST_CLASSES = 100
"""Largest number of classes drawn as a confusion matrix; with more, its largest entries are drawn as bars."""

MOST_BARS = 25
"""Number of these bars."""

MOST_COLUMNS = 400
"""Largest number of heat-map columns; more would be narrower than a pixel, so neighbours are merged."""

MOST_LETTERS = 40
"""Maximum length of a label in characters; longer names are shortened in the middle."""


def label_histogram(counts: np.ndarray, classes: Sequence[str], names: Sequence[str] = ()) -> Figure:
    """Draw the number of training samples per client and class as a heat map.

    Args:
        counts: int [clients, classes].
        classes: one name per class.
        names: one name per client; empty: clients are numbered.

    Returns:
        A figure with one row per client, labelled with the client's total. With more than `MOST_COLUMNS` classes, one
        column sums several consecutive classes.
    """
    named = [name or f"client {i}" for i, name in enumerate(names or [""] * len(counts))]
    rows = [f"{_short(name)}  (n = {total:,})" for name, total in zip(named, counts.sum(1).tolist())]
    together = -(-counts.shape[1] // MOST_COLUMNS)
    counts = np.add.reduceat(counts, np.arange(0, counts.shape[1], together), axis=1) if together > 1 else counts
    figure, axes = _canvas(counts.shape)
    # on a square-root scale, small counts still differ from zero next to a client with a thousand times as many
    _heat_map(axes, np.sqrt(counts / max(counts.max(), 1)), counts, "Blues")
    _label(axes, rows=rows, columns=[_short(name) for name in classes[::together]])
    axes.set_xlabel("class" if together == 1 else f"class (a column is {together} of {len(classes):,})")
    axes.set_title("Training samples by client and class")
    return figure


def sizes(counts: Sequence[int], names: Sequence[str] = ()) -> Figure:
    """Draw the number of training samples per client as bars, for data without classes.

    Args:
        counts: training samples per client.
        names: one name per client; empty: clients are numbered.
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
        matrix: int [classes, classes]; rows are true classes, columns predicted ones.
        classes: one name per class.
        title: the figure's title.

    Returns:
        The matrix; with more than `MOST_CLASSES` classes, bars of the most frequent confusions.
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
    """Draw the largest off-diagonal entries of a confusion matrix in decreasing order; ties are ordered by class."""
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
    axes.set_xlabel("samples of the first class predicted as the second")
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
    """Draw ROC curves on logarithmic axes, which resolve low false-positive rates.

    Args:
        curves: false- and true-positive rates by the line's label.
        ceilings: upper bounds of the true-positive rate as functions of the false-positive rate, by the line's label.
        resolved: lowest false-positive rate that the number of non-members resolves; rates below are shaded.
        title: the figure's title.
    """
    from matplotlib.figure import Figure

    floor = min([resolved, 1e-3, *(fpr[fpr > 0].min() for fpr, _ in curves.values())]) / 2
    figure = Figure(figsize=(6.4, 5.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(floor, resolved, color="0.93", lw=0, label="too few non-members to resolve")
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
    """Draw several tables of class shares per client side by side.

    Args:
        tables: shares in [0, 1] by title, each [clients, classes].
        clients: one id per row.
        classes: one name per class.
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
    """Colour cells by `shades` in [0, 1], and write non-zero `counts` into them if the table is small enough."""
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
    """Label every tick, or every second, third, …, so that at most `room` labels are drawn; return these labels."""
    step = max(-(-len(names) // max(int(room), 1)), 1)
    drawn = list(names[::step])
    # names are plain text; matplotlib would parse anything between two dollar signs as a formula
    axis.set_ticks(range(0, len(names), step), labels=drawn, fontsize=8, parse_math=False, family=_fonts())
    return drawn


def _short(name: str, letters: int = MOST_LETTERS) -> str:
    """Put a name on one line and cut the middle of long ones, since names usually differ at either end."""
    name = " ".join(name.split()) or "(no name)"
    return name if len(name) <= letters else f"{name[: letters // 2]}…{name[-(letters // 2 - 1) :]}"


@cache
def _fonts() -> tuple[str, ...]:
    """List matplotlib's default font, then installed fonts that cover further scripts."""
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

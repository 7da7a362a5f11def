"""Figures for TensorBoard, drawn without a display."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROWS, MAX_COLUMNS = 100, 26
"""Beyond either, cells get no numbers, as nobody could read them."""


def label_histogram(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw who holds how many samples of which class, as a heat-map.

    Args:
        counts: int [clients, classes].
        classes: a name a class.

    Returns:
        A figure with a row a client, and each client's total beside its number.
    """
    names = [f"client {i}  (n = {total:,})" for i, total in enumerate(counts.sum(1).tolist())]
    figure, axes = _canvas(counts.shape)
    # small counts must differ from none at all, beside a client that holds a thousand times as much
    _heat_map(axes, np.sqrt(counts / max(counts.max(), 1)), counts, "Blues")
    _label(axes, rows=names, columns=list(classes))
    axes.set_xlabel("class")
    axes.set_title("Training samples by client and class")
    return figure


def sizes(counts: Sequence[int]) -> Figure:
    """Draw who holds how many samples, where samples have no classes.

    Args:
        counts: training samples of each client.
    """
    figure, axes = _canvas((min(len(counts), MAX_ROWS), 10))
    axes.barh(range(len(counts)), counts, color="tab:blue")
    axes.set_ylim(len(counts) - 0.5, -0.5)
    axes.set_xlabel("training samples")
    axes.set_ylabel("client")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_title("Training samples by client")
    return figure


def confusion(matrix: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix: colour by share of the true class, numbers by count.

    Args:
        matrix: int [classes, classes], true by predicted.
        classes: a name a class.
        title: above the figure.
    """
    figure, axes = _canvas(matrix.shape)
    _heat_map(axes, matrix / np.maximum(matrix.sum(1, keepdims=True), 1), matrix, "Greens")
    _label(axes, rows=list(classes), columns=list(classes))
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title)
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
    axes.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.05), title=title)
    axes.set(xlabel="false-positive rate", ylabel="true-positive rate")
    axes.grid(which="major", color="0.88", lw=0.6)
    axes.legend(loc="lower right", fontsize=8)
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
        _label(axes, rows=[f"client {i}" for i in clients], columns=list(classes))
        axes.set_title(title, fontsize=9)
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
    width, height = (side * 72 for side in axes.figure.get_size_inches())  # in points
    for axis, names, room in ((axes.yaxis, rows, height / 12), (axes.xaxis, columns, width / 22)):
        step = -(-len(names) // int(room))
        axis.set_ticks(range(0, len(names), step), labels=list(names)[::step], fontsize=8)
    if max(map(len, columns)) * 5 > 0.75 * width / len(columns) and len(columns[-1]) > 3:
        axes.tick_params(axis="x", rotation=60)

import warnings
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fdl.utils.figures import MOST_COLUMNS, confusion, label_histogram, roc, shares, sizes


def texts(figure):
    """Numbers in the cells: {(row, column): text}."""
    return {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in figure.axes[0].texts}


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_label_histogram_names_clients_with_totals_and_writes_counts():
    figure = label_histogram(np.array([[3, 0], [1200, 5]]), ["a", "b"])
    assert texts(figure) == {(0, 0): "3", (1, 0): "1,200", (1, 1): "5"}
    assert ticks(figure.axes[0].yaxis) == ["client 0  (n = 3)", "client 1  (n = 1,205)"]
    assert ticks(figure.axes[0].xaxis) == ["a", "b"]


def test_confusion_shades_by_share_of_the_true_class():
    matrix = np.array([[1, 3], [0, 0]])
    figure = confusion(matrix, ["x", "y"], "a title")
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[0.25, 0.75], [0, 0]])
    assert texts(figure) == {(0, 0): "1", (0, 1): "3"}
    assert figure.axes[0].get_title() == "a title"


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (5, 10), (50, 10), (700, 3), (4, 200)])
def test_labels_never_overlap(clients, classes):
    counts = np.random.default_rng(0).integers(0, 900, (clients, classes))
    figure = label_histogram(counts, [str(i) for i in range(classes)])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert max(canvas.get_width_height()) <= 3300
    for axis, side in ((figure.axes[0].yaxis, 1), (figure.axes[0].xaxis, 0)):
        boxes = sorted((label.get_window_extent() for label in axis.get_ticklabels()), key=lambda b: b.min[side])
        assert all(a.max[side] <= b.min[side] for a, b in pairwise(boxes))
    for text in figure.axes[0].texts:
        assert text.get_window_extent().width < figure.axes[0].bbox.width / classes


def test_more_cells_than_can_be_read_get_no_numbers():
    assert not label_histogram(np.ones((200, 3), int), list("abc")).axes[0].texts
    assert not confusion(np.ones((60, 60), int), [str(i) for i in range(60)], "").axes[0].texts


NAMES = ["$5 to $10", "$20_to_$50", "100%", "a/b\\c", r"\frac{1}$x$", "日本", "حمى", "🫀", "", "two\nlines"]


def drawn(figure):
    """All texts of a figure as they are drawn, and whether any is read as a formula."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        canvas.draw()
    found = figure.findobj(lambda artist: hasattr(artist, "get_parse_math"))
    return {text.get_text(): text._preprocess_math(text.get_text())[1] for text in found if text.get_text()}


@pytest.mark.parametrize("count", [10, 130], ids=["matrix", "largest confusions"])
def test_class_names_are_text_and_no_formulas(count):
    names = [*NAMES, *map(str, range(count - len(NAMES)))]
    matrix = np.zeros((count, count), int)
    matrix[:, 1] = np.arange(count, 0, -1)
    confused = drawn(confusion(matrix, names, "$a_$"))
    held = drawn(label_histogram(matrix[:2], names, ["$ite_$", ""]))
    assert not any({**confused, **held}.values())
    assert any("$5 to $10" in text for text in confused)
    assert {"$5 to $10", "日本", "(no name)", "two lines"} <= held.keys() or count > 26
    assert any(text.startswith("$ite_$  (n = ") for text in held)
    assert any(text.startswith("client 1  (n = ") for text in held)


def test_names_of_clients_and_attacks_are_text_too():
    assert not any(drawn(sizes([3, 4], ["$a", "b$"])).values())
    assert not any(drawn(shares({"$t$": np.ones((1, 2))}, [0], ["$1", "2$"])).values())
    curve = np.array([0, 0.1, 1.0]), np.array([0, 0.5, 1.0])
    texts = drawn(roc({"$mia$_": curve}, {}, 0.01, "$title$"))
    assert texts["$mia$_"] is False and texts["$title$"] is False
    assert texts["$\\mathdefault{10^{0}}$"] == True  # noqa: E712  numbers on logarithmic axes are formulas


def test_many_classes_are_shown_by_their_largest_confusions():
    classes = 1000
    matrix = np.diag(np.full(classes, 7))
    matrix[3, 5], matrix[900, 2], matrix[2, 900] = 4, 3, 3
    figure = confusion(matrix, [f"class {i}" for i in range(classes)], "Student")
    axes = figure.axes[0]
    assert ticks(axes.yaxis) == ["class 3 → class 5", "class 2 → class 900", "class 900 → class 2"]
    assert [bar.get_width() for bar in axes.patches] == [4, 3, 3]
    assert [text.get_text() for text in axes.texts] == ["4 of 11", "3 of 10", "3 of 10"]
    assert axes.get_title() == "Student\n7,000 of 7,010 right in 1,000 classes; the 3 largest errors"
    assert drawn(confusion(np.diag(np.full(classes, 7)), [str(i) for i in range(classes)], "all right"))


def test_more_classes_than_dots_are_put_together_and_none_is_lost():
    counts = np.zeros((2, 1001), int)
    counts[0, 0], counts[1, 1000], counts[1, 999] = 5, 2, 1
    axes = label_histogram(counts, [str(i) for i in range(1001)]).axes[0]
    shades = axes.images[0].get_array()
    assert shades.shape == (2, 334) and shades.shape[1] <= MOST_COLUMNS
    assert np.flatnonzero(shades[0]).tolist() == [0] and np.flatnonzero(shades[1]).tolist() == [333]
    assert axes.get_xlabel() == "class (a column is 3 of 1,001)"
    assert ticks(axes.yaxis)[1] == "client 1  (n = 3)"


def test_long_names_keep_both_ends():
    name = "an extraordinarily long name of a class that ends in 17"
    (text,) = (t for t in drawn(label_histogram(np.ones((1, 2), int), [name, "b"])) if "…" in t)
    assert text.startswith("an extraordinarily") and text.endswith("ends in 17") and len(text) == 40

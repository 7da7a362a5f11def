from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fdl.callbacks.figures import confusion, label_histogram


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

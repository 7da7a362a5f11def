import numpy as np
import pytest

from fdl.datamodules.classes import class_codes, class_numbers, whole_numbers
from fdl.errors import UserError


@pytest.mark.parametrize(
    ("labels", "codes"),
    [([0, 1, 2], [0, 1, 2]), ([1, 2, 1], [0, 1, 0]), ([5, 1, 5], [1, 0, 1]), ([0, 900_000, 100_000], [0, 2, 1])],
)
def test_numbers_are_classes_in_their_order(labels, codes, caplog):
    """As numpy counts them: `unique` with the inverse is an independent formula."""
    caplog.set_level("INFO", "fdl")
    train = np.array(labels)
    found = class_numbers(train, "y")
    assert class_codes(train, found, "y").tolist() == codes == np.unique(train, return_inverse=True)[1].tolist()
    assert bool(caplog.messages) is (labels != codes)
    assert all("are classes 0 … " in line for line in caplog.messages)


def test_what_is_no_class():
    found = class_numbers(np.array([1, 5]), "y")
    with pytest.raises(UserError, match="t: class 3 is none of the classes of the training samples; list all"):
        class_codes(np.array([1, 3, 9]), found, "t")
    with pytest.raises(UserError, match="t: class 9 is none"):
        class_codes(np.array([5, 9]), found, "t")
    with pytest.raises(UserError, match="y: -1 is no class: labels must be ≥ 0"):
        class_numbers(np.array([0, -1]), "y")
    assert class_codes(np.array([], dtype=np.int64), found, "t").shape == (0,)


def test_whole_numbers_of_any_type():
    for labels in ([0.0, 1.0], [False, True], [0, 1]):
        assert whole_numbers(np.array(labels), "y").tolist() == [0, 1]
    for labels, message in (([0.0, 2.5], "y: 2.5 is no class"), ([np.nan], "y: nan is no class"), (["a"], "got <U1")):
        with pytest.raises(UserError, match=message):
            whole_numbers(np.array(labels), "y")


def test_many_numbers_that_occur_once_are_told(caplog):
    class_numbers(np.arange(30), "y")
    assert "y has 30 different values in 30 training samples: these look like identifiers" in caplog.text
    caplog.clear()
    class_numbers(np.arange(30) // 2, "y")
    class_numbers(np.arange(10), "y")
    assert caplog.text == ""

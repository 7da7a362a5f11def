"""Event files that TensorBoard reads in the order in which they were written."""

from fdl.utils.tensorboard import open_writer


def test_the_files_of_one_folder_are_named_in_order_however_quickly_they_follow(tmp_path):
    """Within one second a counter orders the names, which sort as text: 10 before 9."""
    for _ in range(2):
        open_writer(tmp_path).close()
    seconds = [int(path.name.split(".")[3]) for path in sorted(tmp_path.glob("events.out.tfevents.*"))]
    assert len(set(seconds)) == 2

"""What is said when memory runs out."""

import pytest
import torch

from fdl.errors import UserError, out_of_memory

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB"


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (torch.OutOfMemoryError(CUDA), ": CUDA out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), ": [enforce fail]"),
        (MemoryError(), ""),
    ],
)
def test_it_names_who_and_what_to_lower(error, found):
    said = out_of_memory(error, "client 3 (resnet50), training", "local_training.batch_size")
    assert isinstance(said, UserError)
    assert str(said).startswith(f"client 3 (resnet50), training: out of memory; lower local_training.batch_size{found}")


def test_a_real_one_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert out_of_memory(caught.value, "server", "server_distil.batch_size") is not None


def test_other_errors_are_left_alone():
    for error in (RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError("x")):
        assert out_of_memory(error, "server", "server_distil.batch_size") is None

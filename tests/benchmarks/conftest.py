"""Fixtures of the benchmarks' tests."""

import pytest
import torch


@pytest.fixture
def threads():
    """Restore the number of torch's threads, which benchmarks set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

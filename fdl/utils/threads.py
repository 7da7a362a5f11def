"""How many threads numerical libraries use: what the recipe says, on every machine.

Sums that several threads share are added up in another order, and matrices are cut into other blocks, so that the last
bits of a result depend on how many there are. Neither the number of cores nor variables such as ``OMP_NUM_THREADS`` may
decide on that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# scipy and scikit-learn bring a BLAS and an OpenMP of their own, which can be told only once they are there
import scipy.linalg  # noqa: F401
import sklearn.utils  # noqa: F401
import threadpoolctl
import torch
from threadpoolctl import ThreadpoolController, threadpool_limits

_LOCK = threading.Lock()
_AFTERWARDS = ExitStack()
"""What puts the process's own numbers back."""

_inside = 0


@contextmanager
def pinned(threads: int = 1) -> Iterator[None]:
    """Within this context torch computes with so many CPU threads, and numpy, scipy and scikit-learn with one.

    It holds for whatever is computed within it, by plug-ins too. Libraries with threads of their own that are first
    imported within it go by themselves. Contexts may be nested, and entered by several of Python's threads at once: the
    process's own numbers are back when the last of them is left.

    Args:
        threads: torch's, at least 1.
    """
    global _inside
    before = torch.get_num_threads()
    openmp, blas = (ThreadpoolController().select(user_api=api) for api in ("openmp", "blas"))
    with openmp.limit(limits=1):  # goes by the thread that says so, unlike all that follows
        with _LOCK:
            _AFTERWARDS.callback(torch.set_num_threads, before)
            _take_over()
            _AFTERWARDS.callback(blas.limit(limits=1).restore_original_limits)
            torch.set_num_threads(threads)
            _inside += 1
        try:
            yield
        finally:
            with _LOCK:
                _inside -= 1
                if _inside == 0:
                    _take_over()
                    _AFTERWARDS.close()
                    _take_over()


def _take_over() -> None:
    """Let any thread say how many OpenBLAS has: of newer versions of threadpoolctl only the first to do so may."""
    controller = getattr(threadpoolctl, "OpenBLASController", None)
    if controller is not None and hasattr(controller, "clear_controlling_thread"):
        controller.clear_controlling_thread(force=True)


def single() -> threadpool_limits:
    """Return a context within which all libraries use one thread, for those that add up in the order of arrival."""
    return threadpool_limits(1)

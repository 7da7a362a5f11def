"""Number of threads of the numerical libraries: set by the recipe, the same on every machine.

With another number of threads, sums are added in another order and matrices are split into other blocks, so the last
bits of a result depend on that number. Neither the number of cores nor variables such as ``OMP_NUM_THREADS`` may
therefore decide on it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# scipy and scikit-learn load a BLAS and an OpenMP of their own, which can be limited only once they are loaded
import scipy.linalg  # noqa: F401
import sklearn.utils  # noqa: F401
import threadpoolctl
import torch
from threadpoolctl import ThreadpoolController, threadpool_limits

_LOCK = threading.Lock()
_AFTERWARDS = ExitStack()
"""Callbacks that restore the process's own numbers of threads."""

_inside = 0


@contextmanager
def pinned(threads: int = 1) -> Iterator[None]:
    """Limit torch to a number of CPU threads, and numpy, scipy and scikit-learn to one, within a context.

    The limits hold for all code that runs in the context, plug-ins included, except libraries with thread pools of
    their own that are first imported in it. Contexts may be nested and entered by several Python threads at once; the
    process's own numbers are restored when the last one is left.

    Args:
        threads: number of torch's intra-op threads, at least 1.
    """
    global _inside
    before = torch.get_num_threads()
    openmp, blas = (ThreadpoolController().select(user_api=api) for api in ("openmp", "blas"))
    with openmp.limit(limits=1):  # this limit is per calling thread, unlike those below
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
    """Let the calling thread set OpenBLAS's limit, which newer versions of threadpoolctl leave to the first caller."""
    controller = getattr(threadpoolctl, "OpenBLASController", None)
    if controller is not None and hasattr(controller, "clear_controlling_thread"):
        controller.clear_controlling_thread(force=True)


def single() -> threadpool_limits:
    """Create a context in which all libraries use one thread, for code whose sums depend on the order of arrival."""
    return threadpool_limits(1)

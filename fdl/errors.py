"""What can go wrong, in the words of the person who has to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake in what the user gave us.

    The message is complete: it names the file, key or client and what was expected. The command line prints
    it without a traceback and exits with code 2.
    """


class MissingPathError(UserError):
    """There is nothing at a path that the user gave.

    Args:
        path: as given; a relative one starts where the process does.
        expected: what should be there.
    """

    def __init__(self, path: Path, expected: str = "file or folder"):
        self.path = path
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        super().__init__(f"{path}: no such {expected}{where}")


class RecipeError(UserError):
    """Everything that is wrong with a recipe, listed at once.

    Args:
        source: the recipe's file name.
        problems: one sentence each, with the full key first.

    Example:
        >>> print(RecipeError("recipe.yaml", ["seed: expected a whole number, got 'x'"]))
        recipe.yaml: one problem
          - seed: expected a whole number, got 'x'
    """

    def __init__(self, source: str, problems: list[str]):
        self.source, self.problems = source, list(problems)
        count = "one problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {p}" for p in self.problems)]))


class RejectedMessageError(Exception):
    """A message that the receiver will not use: damaged, not finite, or of a wrong shape.

    The round goes on without it; the ledger counts it under the client that sent it.

    Args:
        reason: what was wrong, without the sender's name.
    """

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


@contextmanager
def explain_out_of_memory(who: str, hint: str) -> Iterator[None]:
    """Within this context, memory that runs out ends in one message; arguments as in `out_of_memory`."""
    try:
        yield
    except Exception as error:
        if (known := out_of_memory(error, who, hint)) is not None:
            raise known from error
        raise


def out_of_memory(error: BaseException, who: str, hint: str) -> UserError | None:
    """What to tell somebody whose memory ran out.

    Args:
        error: what was raised.
        who: the participant and what it was doing, e.g. ``"client 3 (vit_large_patch16_224), training"``.
        hint: the keys of the recipe to lower, e.g. ``"local_training.batch_size"``.

    Returns:
        None for any other error, which must go on as it is.
    """
    text = " ".join(str(error).split())
    # torch.OutOfMemoryError by name: torch is not imported to report a mistake; on a CPU it is a plain RuntimeError
    exhausted = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not exhausted and not (isinstance(error, RuntimeError) and any(sign in text for sign in _EXHAUSTED)):
        return None
    found = f": {text.partition('. ')[0].rstrip('.')}" if text else ""
    return UserError(f"{who}: out of memory; lower {hint}{found}")


_EXHAUSTED = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")

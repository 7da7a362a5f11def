"""Errors with complete messages for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake in the user's input.

    The message is complete: it names the file, key or client and what was expected. The command line prints
    it without a traceback and exits with code 2.
    """


class MissingPathError(UserError):
    """A path of the user's that does not exist.

    Args:
        path: as given; a relative one starts at the working directory.
        expected: kind of the missing entry.
    """

    def __init__(self, path: Path, expected: str = "file or folder"):
        self.path = path
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        super().__init__(f"{path}: no such {expected}{where}")


class RecipeError(UserError):
    """All problems of a recipe, in one message.

    Args:
        source: the recipe's file name.
        problems: one sentence per problem, each starting with the full key.

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
    """A message that the receiver rejects: damaged, not finite, or of a wrong shape.

    The round continues without it; the ledger counts it for the client that sent it.

    Args:
        reason: the problem, without the sender's name.
    """

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


@contextmanager
def explain_out_of_memory(who: str, hint: str) -> Iterator[None]:
    """Turn an out-of-memory error in this context into a `UserError`.

    Args:
        who: the participant and its activity, e.g. ``"client 3 (vit_large_patch16_224), training"``.
        hint: the keys of the recipe to lower, e.g. ``"local_training.batch_size"``.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if (known := out_of_memory(error, who, hint)) is not None:
            raise known from error
        raise


def out_of_memory(error: BaseException, who: str, hint: str) -> UserError | None:
    """Return the message for an out-of-memory error.

    Args:
        error: the error that was raised.
        who: the participant and its activity, e.g. ``"client 3 (vit_large_patch16_224), training"``.
        hint: the keys of the recipe to lower, e.g. ``"local_training.batch_size"``.

    Returns:
        The error to raise instead; None for any other error, which must propagate unchanged.
    """
    text = " ".join(str(error).split())
    # torch.OutOfMemoryError by name: torch is not imported to report a mistake; on a CPU it is a plain RuntimeError
    exhausted = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not exhausted and not (isinstance(error, RuntimeError) and any(sign in text for sign in _EXHAUSTED)):
        return None
    found = f": {text.partition('. ')[0].rstrip('.')}" if text else ""
    return UserError(f"{who}: out of memory; lower {hint}{found}")


_EXHAUSTED = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")

"""Base class of callbacks and their hooks."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fdl.errors import UserError

if TYPE_CHECKING:
    from fdl.federation.state import Federation

log = logging.getLogger("fdl")


class Callback:
    """Base class of callbacks, which observe a run; every hook does nothing until a subclass overrides it.

    A subclass may override hooks and add methods of its own, but none whose name begins with ``on_``: a misspelt hook
    would never be called, so it is rejected when the class is defined, as is a hook with the wrong parameters.

    Attributes:
        name: the short name in recipes, and the key of this callback's state in a checkpoint.
        optional: True for a callback that only displays or records a run: if it fails, the run continues without it,
            with a warning. An exception of any other callback ends the run.

    Raises:
        TypeError: when a subclass with a misspelt hook is defined.
    """

    name: ClassVar[str] = ""
    optional: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for attribute in dir(cls):
            if not attribute.startswith("on_"):
                continue
            if attribute not in HOOKS:
                near = difflib.get_close_matches(attribute, HOOKS, n=1)
                hint = f'did you mean "{near[0]}"? ' if near else ""
                raise TypeError(f"{cls.__name__}.{attribute}: no such hook; {hint}hooks are {', '.join(HOOKS)}")
            try:
                inspect.signature(getattr(cls, attribute)).bind(*HOOKS[attribute])
            except TypeError as error:
                expected = ", ".join(HOOKS[attribute])
                raise TypeError(f"{cls.__name__}.{attribute} must take ({expected}): {error}") from None

    def on_fit_start(self, loop: Federation) -> None:
        """Run before the first round; in a resumed run, `loop.history` holds the completed rounds.

        Args:
            loop: the run.
        """

    def on_round_start(self, loop: Federation, round: int) -> None:
        """Run before the downloads of a round are sent.

        Args:
            loop: the run.
            round: the round, from 1.
        """

    def on_client_end(self, loop: Federation, round: int, client: int, metrics: dict[str, float]) -> None:
        """Run after a client's upload was received or rejected.

        Args:
            loop: the run.
            round: the round, from 1.
            client: the client's id.
            metrics: metrics of the client's local update, e.g. ``fit/loss``.
        """

    def on_round_end(self, loop: Federation, record: dict[str, Any]) -> None:
        """Run after a round was evaluated, before its checkpoint is saved.

        Args:
            loop: the run.
            record: the round's record, the last entry of `loop.history`.
        """

    def on_checkpoint(self, loop: Federation, path: Path) -> None:
        """Run after a checkpoint was written.

        Args:
            loop: the run.
            path: the checkpoint.
        """

    def on_fit_end(self, loop: Federation, summary: dict[str, Any]) -> None:
        """Run after the last round.

        Args:
            loop: the run.
            summary: the contents of ``summary.json``, which the callback may extend.
        """

    def on_exception(self, loop: Federation, error: BaseException) -> None:
        """Run when the run ends early.

        Args:
            loop: the run.
            error: the exception; a KeyboardInterrupt for Ctrl-C.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state to checkpoint: tensors, numbers, strings and nested containers of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a checkpointed state.

        Args:
            state: the return value of `state_dict`.
        """


HOOKS: dict[str, list[str]] = {
    name: list(inspect.signature(hook).parameters) for name, hook in vars(Callback).items() if name.startswith("on_")
}
"""Every hook and the names of its parameters."""


def _for_each_callback(hook: str) -> Callable[..., None]:
    """Return a hook that calls this hook of every callback in order."""
    nothing = getattr(Callback, hook)

    @functools.wraps(nothing)
    def call(self: CallbackList, *arguments: Any) -> None:
        for callback in self.callbacks:
            if getattr(type(callback), hook) is not nothing or hook in vars(callback):
                self.call(callback, hook, *arguments)

    return call


class CallbackList(Callback):
    """Callback that calls several callbacks in the order of the recipe.

    An exception of a callback is passed on to the caller with a note that names the callback; that of an `optional` one
    is logged as a warning, unless it is a `UserError`, and the callback is not called any more. At the end of a run, in
    `on_fit_end` and `on_exception`, every callback is called, even if others fail: the first error of `on_fit_end` is
    raised after all callbacks were called, and one in `on_exception` does not hide the error that ended the run.

    Args:
        callbacks: the callbacks, in the order in which they are called.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()):
        self.callbacks = list(callbacks)
        self._failed: list[Callback] = []

    def append(self, callback: Callback) -> None:
        """Add a callback, to be called after all others.

        Args:
            callback: the callback.
        """
        self.callbacks.append(callback)

    def __iter__(self) -> Iterator[Callback]:
        return iter(self.callbacks)

    def __len__(self) -> int:
        return len(self.callbacks)

    on_fit_start = _for_each_callback("on_fit_start")
    on_round_start = _for_each_callback("on_round_start")
    on_client_end = _for_each_callback("on_client_end")
    on_round_end = _for_each_callback("on_round_end")
    on_checkpoint = _for_each_callback("on_checkpoint")

    def on_fit_end(self, loop: Federation, summary: dict[str, Any]) -> None:
        """Call every callback after the last round, then raise the first error.

        Args:
            loop: the run.
            summary: the contents of ``summary.json``.
        """
        first: Exception | None = None
        for callback in self.callbacks:
            try:
                self.call(callback, "on_fit_end", loop, summary)
            except Exception as error:
                if first is None:
                    first = error
                else:
                    _add_note(first, f'callback "{_name(callback)}" failed as well, in on_fit_end: {error!r}')
        if first is not None:
            raise first

    def on_exception(self, loop: Federation, error: BaseException) -> None:
        """Call every callback when the run ends early, even if others fail.

        Args:
            loop: the run.
            error: the exception that ended the run.
        """
        for callback in self.callbacks:
            try:
                callback.on_exception(loop, error)
            except Exception as second:
                _add_note(error, f'callback "{_name(callback)}" failed as well, in on_exception: {second!r}')

    def call(self, callback: Callback, hook: str, *arguments: Any) -> None:
        """Call one hook of one callback; an optional callback that fails is not called again.

        Args:
            callback: one of the callbacks.
            hook: name of the hook.
            *arguments: arguments of the hook.
        """
        if any(callback is failed for failed in self._failed):
            return
        try:
            with _annotate_errors(callback, hook):
                getattr(callback, hook)(*arguments)
        except UserError:
            raise
        except Exception as error:
            if not callback.optional:
                raise
            self._failed.append(callback)
            log.warning('callback "%s" failed in %s, and the run goes on without it: %r', _name(callback), hook, error)
            log.debug("traceback of the callback", exc_info=error)
            with suppress(Exception):
                callback.on_exception(arguments[0], error)  # releases its resources, e.g. open files

    def state_dict(self) -> dict[str, Any]:
        """Return every callback's state by its name; the second callback of a name is called ``name.2`` etc."""
        return {key: state for key, callback in self._keys().items() if (state := callback.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore every callback's state; one without an entry in `state` keeps its initial state.

        Args:
            state: the return value of `state_dict`.
        """
        for key, callback in self._keys().items():
            if key in state:
                with _annotate_errors(callback, "load_state_dict"):
                    callback.load_state_dict(state[key])

    def _keys(self) -> dict[str, Callback]:
        keys: dict[str, Callback] = {}
        counts: dict[str, int] = {}
        for callback in self.callbacks:
            name = _name(callback)
            counts[name] = counts.get(name, 0) + 1
            keys[name if counts[name] == 1 else f"{name}.{counts[name]}"] = callback
        return keys


def _name(callback: Callback) -> str:
    return callback.name or type(callback).__name__


@contextmanager
def _annotate_errors(callback: Callback, hook: str) -> Iterator[None]:
    """Add the callback's name to its exceptions."""
    try:
        yield
    except BaseException as error:
        _add_note(error, f'in {hook} of callback "{_name(callback)}"')
        raise


def _add_note(error: BaseException, text: str) -> None:
    if hasattr(error, "add_note"):
        error.add_note(text)
    else:  # Python 3.10 has no add_note; traceback printers that support notes read this attribute
        error.__notes__ = [*getattr(error, "__notes__", []), text]

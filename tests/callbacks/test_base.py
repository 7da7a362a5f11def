import pytest

from fdl.callbacks.base import HOOKS, Callback, CallbackList
from fdl.errors import UserError


class Recorder(Callback):
    name = "recorder"

    def __init__(self, log, tag):
        self.log, self.tag = log, tag

    def on_fit_start(self, loop):
        self.log.append((self.tag, "on_fit_start", loop))

    def on_round_start(self, loop, round):
        self.log.append((self.tag, "on_round_start", loop, round))

    def on_client_end(self, loop, round, client, metrics):
        self.log.append((self.tag, "on_client_end", loop, round, client, metrics))

    def on_round_end(self, loop, record):
        self.log.append((self.tag, "on_round_end", loop, record))

    def on_checkpoint(self, loop, path):
        self.log.append((self.tag, "on_checkpoint", loop, path))

    def on_fit_end(self, loop, summary):
        self.log.append((self.tag, "on_fit_end", loop, summary))

    def on_exception(self, loop, error):
        self.log.append((self.tag, "on_exception", loop, error))


class Counter(Callback):
    name = "counter"

    def __init__(self, count=0):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Failing(Callback):
    name = "failing"

    def on_round_end(self, loop, record):
        raise ZeroDivisionError("by zero")

    def on_exception(self, loop, error):
        raise OSError("disk full")


def test_mistyped_hook_is_refused_with_a_suggestion():
    with pytest.raises(TypeError, match=r'Mistyped.on_round_ends: no such hook; did you mean "on_round_end"\?'):

        class Mistyped(Callback):
            def on_round_ends(self, loop, record):
                pass


def test_unknown_hook_without_a_near_name_lists_the_hooks():
    with pytest.raises(TypeError, match=r"no such hook; hooks are on_fit_start, .*on_exception"):

        class Strange(Callback):
            def on_zzz(self):
                pass


def test_mistyped_hook_of_a_mixin_is_refused_too():
    class Mixin:
        def on_fit_begin(self, loop):
            pass

    with pytest.raises(TypeError, match="on_fit_begin"):

        class Mixed(Mixin, Callback):
            pass


def test_hook_with_wrong_arguments_is_refused():
    with pytest.raises(TypeError, match=r"Short.on_round_start must take \(self, loop, round\)"):

        class Short(Callback):
            def on_round_start(self, loop):
                pass


def test_hooks_may_name_their_arguments_freely_and_other_methods_are_free():
    class Free(Callback):
        def on_round_end(self, *arguments):
            pass

        def once(self):
            pass

    assert Free.on_round_end is not Callback.on_round_end


def test_every_hook_reaches_every_callback_in_order():
    log = []
    callbacks = CallbackList([Recorder(log, "a"), Recorder(log, "b")])
    for hook, parameters in HOOKS.items():
        arguments = [object() for _ in parameters[1:]]
        getattr(callbacks, hook)(*arguments)
        assert log == [("a", hook, *arguments), ("b", hook, *arguments)]
        log.clear()
    assert len(HOOKS) == 7
    assert len(callbacks) == 2 and [c.tag for c in callbacks] == ["a", "b"]


def test_exception_carries_the_callbacks_name():
    with pytest.raises(ZeroDivisionError) as caught:
        CallbackList([Counter(), Failing()]).on_round_end(None, {})
    assert caught.value.__notes__ == ['in on_round_end of callback "failing"']


def test_failure_in_on_exception_hides_nothing_and_stops_nobody():
    log = []
    error = RuntimeError("the real one")
    CallbackList([Failing(), Recorder(log, "after")]).on_exception("loop", error)
    assert log == [("after", "on_exception", "loop", error)]
    assert "failing" in error.__notes__[0] and "disk full" in error.__notes__[0]


class Shows(Failing):
    name = "shows"
    optional = True
    given_back = 0

    def on_exception(self, loop, error):
        self.given_back += 1


def test_an_optional_callback_that_fails_is_left_out_and_the_run_goes_on(caplog):
    log, shows = [], Shows()
    callbacks = CallbackList([shows, Recorder(log, "after")])
    callbacks.on_round_end("loop", {"round": 1})
    assert (
        "\"shows\" failed in on_round_end, and the run goes on without it: ZeroDivisionError('by zero')" in caplog.text
    )
    assert shows.given_back == 1
    caplog.clear()
    callbacks.on_round_end("loop", {"round": 2})
    assert not caplog.text
    assert [entry[-1] for entry in log] == [{"round": 1}, {"round": 2}]


def test_what_an_optional_callback_says_of_a_recipe_ends_the_run():
    class Particular(Callback):
        optional = True

        def on_fit_start(self, loop):
            raise UserError("cannot be written")

    with pytest.raises(UserError, match="cannot be written"):
        CallbackList([Particular()]).on_fit_start(None)


def test_every_callback_is_told_of_the_end_before_an_error_is_raised():
    class Demanding(Callback):
        def __init__(self, wanted):
            self.wanted = wanted

        def on_fit_end(self, loop, summary):
            assert summary["accuracy"] > self.wanted, f"below {self.wanted}"

    log = []
    callbacks = CallbackList([Demanding(0.9), Demanding(0.8), Recorder(log, "after")])
    with pytest.raises(AssertionError, match=r"below 0\.9") as caught:
        callbacks.on_fit_end("loop", {"accuracy": 0.5})
    assert log == [("after", "on_fit_end", "loop", {"accuracy": 0.5})]
    assert caught.value.__notes__[0] == 'in on_fit_end of callback "Demanding"'
    assert "below 0.8" in caught.value.__notes__[1]


def test_states_are_kept_by_name_and_come_back():
    class Nameless(Counter):
        name = ""

    state = CallbackList([Counter(1), Callback(), Nameless(2), Counter(3)]).state_dict()
    assert state == {"counter": {"count": 1}, "Nameless": {"count": 2}, "counter.2": {"count": 3}}
    fresh = [Nameless(), Counter(), Counter()]
    CallbackList(fresh).load_state_dict(state)
    assert [callback.count for callback in fresh] == [2, 1, 3]


def test_callback_without_saved_state_starts_afresh():
    callback = Counter(5)
    CallbackList([callback]).load_state_dict({"gone": {"count": 9}})
    assert callback.count == 5

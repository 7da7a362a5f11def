import io
import re
import subprocess
import sys
import time

import pytest

from fdl.callbacks.progress import PipeSafeStream, ProgressBar
from tests.callbacks.fakes import FakeLoop, record


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Broken(io.StringIO):
    def write(self, text):
        raise OSError(5, "Input/output error")


@pytest.fixture
def terminal(monkeypatch):
    """A terminal, put in place within the test, since pytest sets its own output again for every phase."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)

    def put_in_place():
        monkeypatch.setattr(sys, "stdout", Terminal())
        return sys.stdout

    return put_in_place


def test_a_plain_line_a_round_where_there_is_no_terminal(tmp_path, capsys):
    FakeLoop(tmp_path).run(ProgressBar())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "round 1/4  student 0.600  specialists 0.400  up 6.1 kB  down 3.1 kB  1.5 s"
    assert lines[2] == "round 3/4  student 0.800  specialists 0.400  up 18.4 kB  down 9.2 kB  refused 1  1.5 s"
    assert len(lines) == 4


def test_a_dumb_terminal_gets_plain_lines(tmp_path, terminal, monkeypatch):
    screen = terminal()
    monkeypatch.setenv("TERM", "dumb")
    FakeLoop(tmp_path).run(ProgressBar())
    assert screen.getvalue().count("\n") == 4
    assert "\x1b" not in screen.getvalue()


def test_resumed_run_counts_its_own_seconds(tmp_path, capsys):
    loop = FakeLoop(tmp_path)
    loop.run(ProgressBar(), until=2)
    capsys.readouterr()
    loop.resume_after(2).run(ProgressBar(), first=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("round 3/4") and lines[0].endswith("  1.5 s")
    assert len(lines) == 2


def test_bar_on_a_terminal_ends_with_the_last_state(tmp_path, terminal):
    screen = terminal()
    FakeLoop(tmp_path).run(ProgressBar())
    last = screen.getvalue().rsplit("rounds", 1)[1]
    assert "4/4" in last and "student 0.900" in last and "up 24.6 kB" in last
    assert "\x1b[?25h" in screen.getvalue(), "the cursor must come back"
    assert sys.stdout is screen


def test_bar_fits_a_narrow_terminal(tmp_path, terminal, monkeypatch):
    """Everything that is shown is whole, and the bar is wide enough to be one."""
    screen = terminal()
    monkeypatch.setenv("COLUMNS", "80")
    FakeLoop(tmp_path).run(ProgressBar())
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue().rsplit("rounds", 1)[1]).splitlines()[0]
    assert re.fullmatch(r" ━{10} 4/4 student 0\.900  36\.9 kB \d:\d\d:\d\d \d:\d\d:\d\d\s*", last), last
    assert "…" not in screen.getvalue()


def test_bar_shows_the_clients_of_a_round(tmp_path, terminal):
    screen = terminal()
    loop, callback = FakeLoop(tmp_path), ProgressBar()
    callback.on_fit_start(loop)
    callback.on_round_start(loop, 1)
    callback.on_client_end(loop, 1, 0, {})
    callback._bar.refresh()
    assert "1/3" in screen.getvalue() and "server update" not in screen.getvalue()
    callback.on_client_end(loop, 1, 1, {})
    callback.on_client_end(loop, 1, 2, {})
    callback._bar.refresh()
    assert "3/3" in screen.getvalue() and "server update" in screen.getvalue()
    callback.on_exception(loop, KeyboardInterrupt())
    assert "\x1b[?25h" in screen.getvalue()
    assert sys.stdout is screen


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [closed(), Broken(), None], ids=["closed", "broken", "absent"])
def test_unusable_output_does_not_end_the_run(tmp_path, monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    loop = FakeLoop(tmp_path)
    loop.run(ProgressBar())
    assert loop.round == 4


def test_terminal_that_goes_away_does_not_end_the_run(tmp_path, terminal):
    screen = terminal()
    loop, callback = FakeLoop(tmp_path), ProgressBar()
    callback.on_fit_start(loop)
    screen.close()
    callback.on_round_start(loop, 1)
    callback.on_round_end(loop, record(1))
    callback.on_fit_end(loop, {})
    assert callback._bar is None


def test_reader_of_a_pipe_that_leaves_is_not_noticed(tmp_path):
    script = """
import sys
from types import SimpleNamespace
from fdl.callbacks.progress import ProgressBar
loop = SimpleNamespace(history=[], rounds=3, round=0)
sent = {"upload_bytes": 1, "download_bytes": 1}
bar = ProgressBar()
bar.on_fit_start(loop)
sys.stdin.read()  # until the reader is gone
for round in (1, 2, 3):
    bar.on_round_end(loop, {"round": round, "metrics": {}, "communication": sent, "refused": {}, "seconds": {}})
bar.on_fit_end(loop, {})
print("the end")
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    child.stdout.close()
    child.stdin.close()
    errors = child.stderr.read()
    child.stderr.close()
    assert (child.wait(30), errors) == (0, b"")


def test_steady_stream_passes_text_on():
    target = io.StringIO()
    stream = PipeSafeStream(target)
    assert stream.write("abc") == 3
    stream.flush()
    assert target.getvalue() == "abc"
    assert not stream.isatty() and PipeSafeStream(Terminal()).isatty()


def test_a_line_costs_less_than_a_millisecond(tmp_path, capsys):
    loop, callback = FakeLoop(tmp_path), ProgressBar()
    callback.on_fit_start(loop)
    start = time.perf_counter()
    for _ in range(500):
        callback.on_round_end(loop, record(1))
    assert (time.perf_counter() - start) / 500 < 1e-3

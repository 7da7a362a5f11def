"""What happens where the Hugging Face hub cannot be reached: it is said soon, and files go without it."""

import http.server
import threading
import time

import pytest
from huggingface_hub import constants

from fdl.errors import UserError
from fdl.modules import hub
from fdl.modules.text_classifier import TextClassifier
from fdl.modules.tokenizers import make_tokenizer
from tests.modules.text_models import BYTES, ENCODERS, saved

CLOSED = "http://127.0.0.1:9"  # the port of no service


@pytest.fixture(autouse=True)
def unasked(monkeypatch):
    hub._unreachable.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)
    yield
    hub._unreachable.cache_clear()


def test_an_unreachable_hub_is_said_soon_and_asked_once():
    start = time.monotonic()
    for _ in range(2):
        with pytest.raises(UserError, match=f"hub does not give it \\({CLOSED} cannot be reached from here\\)"):
            make_tokenizer("someone/something")
        with pytest.raises(UserError, match=f"hub does not give it \\({CLOSED} cannot be reached from here\\)"):
            TextClassifier("someone/something", pretrained=True, num_classes=2, tokenizer=BYTES, context=8)
    assert time.monotonic() - start < 10
    assert hub._unreachable.cache_info().misses == 1
    assert constants.HF_HUB_OFFLINE is False


def test_who_said_that_there_is_none_is_not_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        make_tokenizer("someone/something")
    assert hub._unreachable.cache_info().misses == 0
    assert constants.HF_HUB_OFFLINE is True


def test_folders_need_no_hub(tmp_path):
    module = TextClassifier("bert", config=ENCODERS["bert"], num_classes=2, tokenizer=BYTES, context=8)
    folder = saved(module, tmp_path)
    again = TextClassifier(folder, pretrained=True, num_classes=2, tokenizer=make_tokenizer(folder), context=8)
    assert again.num_classes == 2
    assert hub._unreachable.cache_info().misses == 0


def test_a_hub_that_answers_is_used(monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        with hub.hub_or_cache() as why:
            assert (why, constants.HF_HUB_OFFLINE) == ("", False)
        server.shutdown()

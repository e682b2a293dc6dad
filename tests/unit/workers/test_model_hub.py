"""Models by hub id, with a hub of the test's own."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from workers.engine.model_sources import ModelLoadError, resolve

asked: list[str] = []


class _Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):  # the library asks for other things too
            asked.append(self.path)
        there = self.path == "/api/models/there/model"
        body = b'{"id": "there/model", "modelId": "there/model", "siblings": []}' if there else b""
        self.send_response(200 if there else 404)
        if not there:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever).start()
    asked.clear()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_is_asked_for_once(hub):
    source = resolve("mine=there/model")
    assert (source.name, source.location, source.references) == (
        "mine",
        "there/model",
        ("there/model",),
    )
    assert asked == ["/api/models/there/model"]


def test_a_model_that_the_hub_has_not_is_told_as_such(hub):
    with pytest.raises(ModelLoadError, match=r"the hub has no model no/such.*HF_TOKEN") as caught:
        resolve("no/such")
    assert "--model such=/path/to/it" in str(caught.value)
    assert len(asked) == 1


def test_a_hub_out_of_reach_is_not_tried_again_and_again(hub):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ModelLoadError, match="the hub did not answer for there/model") as caught:
        resolve("there/model")
    assert "download there/model elsewhere" in str(caught.value)


def test_offline_only_the_cache_is_looked_at(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="HF_HUB_OFFLINE"):
        resolve("there/model")
    repository = tmp_path / "models--there--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "snapshots" / "c0ffee" / "config.json").write_text("{}")
    assert resolve("there/model").location == "there/model"
    assert asked == []

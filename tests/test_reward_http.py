"""scripts/rewards/http.py against a local endpoint that answers, is slow, wrong, busy or down."""

import http.server
import importlib.util
import json
import threading
import time
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[1] / "scripts" / "rewards" / "http.py"


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Answers each request with the next of `script`, (status, body, seconds of delay); the last for ever."""

    def do_POST(self):
        self.server.requests.append({"body": json.loads(self.rfile.read(int(self.headers["Content-Length"]))),
                                     "token": self.headers.get("Authorization"), "path": self.path})
        script = self.server.script
        status, body, delay = script.pop(0) if len(script) > 1 else script[0]
        time.sleep(delay)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.daemon_threads = True
    server.requests = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("REWARD_URL", f"http://127.0.0.1:{server.server_port}/score")
    monkeypatch.setenv("REWARD_DEADLINE", "10")
    for name in ("REWARD_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def score():
    """Imports the hook as ppo_llm.py does, and scores two responses."""
    spec = importlib.util.spec_from_file_location("hook", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reward(["prompt 0", "prompt 1"], ["a", "bb"], ["answer 0", "answer 1"])


def answer(*scores, **rest):
    return 200, json.dumps({"scores": scores, **rest}), 0


def test_the_batch_goes_out_and_the_scores_come_back(endpoint, monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    endpoint.script = [answer(0.5, -1)]
    assert score() == [0.5, -1]
    assert endpoint.requests == [{"path": "/score", "token": "Bearer s3cret", "body": {
        "prompts": ["prompt 0", "prompt 1"], "responses": ["a", "bb"], "answers": ["answer 0", "answer 1"]}}]


def test_without_a_token_in_the_environment_none_is_sent(endpoint):
    endpoint.script = [answer(0, 0)]
    score()
    assert endpoint.requests[0]["token"] is None


def test_metrics_of_the_endpoint_come_back_beside_the_scores(endpoint):
    endpoint.script = [answer(1, 2, metrics={"toxic": [0.0, 0.5]})]
    assert score() == ([1, 2], {"toxic": [0.0, 0.5]})


def test_a_score_that_is_no_number_comes_back_as_it_is_for_the_training_process_to_refuse(endpoint):
    endpoint.script = [answer(1, None)]
    assert score() == [1, None]


@pytest.mark.parametrize("status", [429, 500, 529])
def test_a_busy_endpoint_is_asked_again(endpoint, status):
    endpoint.script = [(status, "busy", 0), answer(1, 2)]
    assert score() == [1, 2]
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("reply", [(400, "bad request", 0), (401, "who?", 0), (302, "", 0)])
def test_a_refusal_is_an_error_at_once(endpoint, reply):
    endpoint.script = [reply]
    with pytest.raises(ValueError, match=f"status {reply[0]}"):
        score()
    assert len(endpoint.requests) == 1  # not followed to another address, where the token would go too


@pytest.mark.parametrize("body", ["not json", "[1, 2]", '{"rewards": [1, 2]}', '{"scores": 3}'])
def test_a_wrong_answer_is_an_error(endpoint, body):
    endpoint.script = [(200, body, 0)]
    with pytest.raises(ValueError, match="no list of scores|Expecting value"):
        score()


def test_an_endpoint_that_stays_busy_is_given_up_at_the_deadline_with_its_last_answer(endpoint, monkeypatch):
    monkeypatch.setenv("REWARD_DEADLINE", "1")
    endpoint.script = [(503, "busy", 0)]
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="/score: no scores within 1 s .*, at last status 503: "):
        score()
    assert time.monotonic() - began < 5
    assert len(endpoint.requests) == 2


def test_a_slow_endpoint_is_given_up_at_the_deadline(endpoint, monkeypatch):
    monkeypatch.setenv("REWARD_DEADLINE", "0.5")
    endpoint.script = [(200, "{}", 30)]
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no scores within 0.5 s"):
        score()
    assert time.monotonic() - began < 5


def test_an_answer_that_trickles_is_given_up_at_the_deadline(endpoint, monkeypatch):
    def post(handler):
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.1)

    monkeypatch.setenv("REWARD_DEADLINE", "0.5")
    endpoint.RequestHandlerClass = type("Slow", (Endpoint,), {"do_POST": post})
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="comes too slowly"):
        score()
    assert time.monotonic() - began < 5


def test_an_answer_that_breaks_off_is_asked_for_again(endpoint):
    def post(handler):
        handler.server.requests.append(handler.rfile.read(int(handler.headers["Content-Length"])))
        whole = len(handler.server.requests) > 1
        handler.send_response(200)
        handler.send_header("Content-Length", "20" if whole else "1000")
        handler.end_headers()
        handler.wfile.write(b'{"scores": [1, 2]}  ')

    endpoint.RequestHandlerClass = type("Broken", (Endpoint,), {"do_POST": post})
    assert score() == [1, 2]
    assert len(endpoint.requests) == 2


def test_a_forgotten_address_is_said_at_the_import(monkeypatch):
    monkeypatch.delenv("REWARD_URL", raising=False)
    with pytest.raises(RuntimeError, match="set REWARD_URL"):
        score()


def test_an_endpoint_that_is_down_is_an_error_with_its_address_but_not_its_key(endpoint, monkeypatch):
    monkeypatch.setenv("REWARD_URL", "http://127.0.0.1:9/score?key=s3cret")
    monkeypatch.setenv("REWARD_DEADLINE", "0.5")
    with pytest.raises(TimeoutError, match=r"127\.0\.0\.1:9/score: no scores within .*refused") as error:
        score()
    assert "s3cret" not in str(error.value)

"""scripts/rewards/http.py against a local endpoint that answers, is slow, wrong, busy or down."""

import http.server
import json
import threading
import time
from pathlib import Path

import pytest
import torch

import ppo_llm
from ppo_llm import Config, Example, UsageError

FILE = Path(__file__).resolve().parents[1] / "scripts" / "rewards" / "http.py"


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Answers with what `script` holds for each request: (status, body, seconds of delay); the last for ever."""

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
    server.daemon_threads, server.requests = True, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("REWARD_URL", f"http://127.0.0.1:{server.server_port}/score")
    monkeypatch.setenv("REWARD_DEADLINE", "2")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def score(texts=("a", "bb"), failed_score=None, env="REWARD_URL,REWARD_TOKEN,REWARD_DEADLINE", timeout=20.0):
    config = Config(reward=f"{FILE}:reward", reward_env=env, failed_score=failed_score, reward_timeout=timeout)
    examples = [Example(f"prompt {i}", f"answer {i}", [1]) for i in range(len(texts))]
    return ppo_llm.score_responses(ppo_llm.load_reward(config), examples, list(texts), failed_score)


def answer(*scores, **rest):
    return 200, json.dumps({"scores": scores, **rest}), 0


def test_the_batch_goes_out_and_the_scores_come_back(endpoint, monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    endpoint.script = [answer(0.5, -1)]
    scores, metrics = score()
    assert scores.tolist() == [0.5, -1] and metrics == {}
    assert endpoint.requests == [{"path": "/score", "token": "Bearer s3cret", "body": {
        "prompts": ["prompt 0", "prompt 1"], "responses": ["a", "bb"], "answers": ["answer 0", "answer 1"]}}]


def test_without_a_token_in_the_environment_none_is_sent(endpoint, monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    endpoint.script = [answer(0, 0)]
    score(env="REWARD_URL")  # the token is set, but not passed on
    assert endpoint.requests[0]["token"] is None


def test_metrics_of_the_endpoint_are_logged(endpoint):
    endpoint.script = [answer(1, 2, metrics={"toxic": [0.0, 0.5]})]
    assert score()[1]["toxic"].item() == 0.25


@pytest.mark.parametrize("status", [429, 500, 503, 529])
def test_a_busy_endpoint_is_asked_again(endpoint, status):
    endpoint.script = [(status, "busy", 0), answer(1, 2)]
    assert score()[0].tolist() == [1, 2]
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("reply", [(400, "bad request", 0), (401, "who?", 0), (302, "", 0)])
def test_a_refusal_is_an_error_at_once(endpoint, reply):
    endpoint.script = [reply]
    with pytest.raises(UsageError, match=f"status {reply[0]}"):
        score()
    assert len(endpoint.requests) == 1  # not followed to another address, where the token would go too


@pytest.mark.parametrize("body", ["not json", "[1, 2]", '{"rewards": [1, 2]}', '{"scores": 3}'])
def test_a_wrong_answer_is_an_error_that_shows_it(endpoint, body):
    endpoint.script = [(200, body, 0)]
    with pytest.raises(UsageError, match="no list of scores|JSONDecodeError|Expecting value"):
        score()


@pytest.mark.parametrize("scores", [[1], [1, 2, 3]])
def test_a_wrong_number_of_scores_is_refused(endpoint, scores):
    endpoint.script = [answer(*scores)]
    with pytest.raises(UsageError, match="must return 2 scores"):
        score()


def test_a_score_that_is_no_number_is_refused(endpoint):
    endpoint.script = [answer(1, None)]
    with pytest.raises(UsageError, match="None for row 1"):
        score()


def test_a_slow_endpoint_is_given_up_at_the_deadline(endpoint):
    endpoint.script = [(200, "{}", 30)]
    began = time.monotonic()
    with pytest.raises(UsageError, match="gave no scores before REWARD_DEADLINE"):
        score()
    assert time.monotonic() - began < 10


def test_an_answer_that_trickles_is_given_up_at_the_deadline(endpoint):
    def post(handler):
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.1)

    endpoint.RequestHandlerClass = type("Slow", (Endpoint,), {"do_POST": post})
    began = time.monotonic()
    with pytest.raises(UsageError, match="comes too slowly"):
        score()
    assert time.monotonic() - began < 8


def test_an_answer_that_breaks_off_is_asked_for_again(endpoint):
    def post(handler):
        handler.server.requests.append(handler.rfile.read(int(handler.headers["Content-Length"])))
        whole = len(handler.server.requests) > 1
        handler.send_response(200)
        handler.send_header("Content-Length", "20" if whole else "1000")
        handler.end_headers()
        handler.wfile.write(b'{"scores": [1, 2]}  ')

    endpoint.RequestHandlerClass = type("Broken", (Endpoint,), {"do_POST": post})
    assert score()[0].tolist() == [1, 2]
    assert len(endpoint.requests) == 2


def test_a_forgotten_address_is_said_at_the_start():
    with pytest.raises(UsageError, match="cannot be loaded.*set REWARD_URL"):
        score(env="")


def test_an_endpoint_that_is_down_is_an_error_with_its_address(endpoint, monkeypatch):
    monkeypatch.setenv("REWARD_URL", "http://127.0.0.1:9/score")
    with pytest.raises(UsageError, match=r"127\.0\.0\.1:9/score gave no scores"):
        score()


def test_what_fails_gets_the_failed_score_and_the_rest_its_own(endpoint):
    def post(handler):
        batch = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        bad = "bad" in batch["responses"]
        handler.send_response(400 if bad else 200)
        handler.end_headers()
        handler.wfile.write(json.dumps({"scores": [len(x) for x in batch["responses"]]}).encode())

    endpoint.RequestHandlerClass = type("Picky", (Endpoint,), {"do_POST": post})
    scores, metrics = score(("a", "bad", "ccc", "dddd"), failed_score=-5.0)
    assert torch.equal(scores, torch.tensor([1.0, -5.0, 3.0, 4.0]))
    assert metrics["failed"].item() == 0.25

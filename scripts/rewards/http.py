"""A reward behind an endpoint: the batch is posted as JSON, the scores come back.

    REWARD_URL=http://localhost:8000/score python ppo_llm.py --reward scripts/rewards/http.py:reward

Request: {"prompts": [...], "responses": [...], "answers": [...]}. Answer: {"scores": [...]}, one number per
response, and if you like "metrics": {name: [a number per response]}, whose means are logged.

REWARD_TOKEN, if set, is sent as a bearer token. It is read from the environment, never from the command line,
where other users of the machine would see it. A refused connection, a time-out and the codes 429 and 5xx are
tried again after 0.5, 1, 2, ... seconds, until REWARD_DEADLINE (60 s) has passed. Any other answer is an
error.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request

URL = os.environ.get("REWARD_URL")
TOKEN = os.environ.get("REWARD_TOKEN")
DEADLINE = float(os.environ.get("REWARD_DEADLINE", 60))
if not URL:
    raise RuntimeError("set REWARD_URL, the address of the endpoint that scores")
SHOWN = URL.partition("?")[0]  # in errors: what follows may be a key


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another address would get the token and the data too: a redirection is an error."""

    def redirect_request(self, *details):
        return None


def read_before(answer: http.client.HTTPResponse, deadline: float) -> str:
    """The text of the answer. Raises TimeoutError if it trickles, IncompleteRead if it breaks off."""
    parts = []
    while part := answer.read1(2**16):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError("the answer comes too slowly")
    if answer.length:  # what is still to come of the Content-Length
        raise http.client.IncompleteRead(b"".join(parts), answer.length)
    return b"".join(parts).decode()


def post(url: str, batch: dict, headers: dict, deadline: float) -> tuple[int, str]:
    """Status and text of the answer; status 0 and the reason if there was none."""
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(url, json.dumps(batch).encode(), headers)
    timeout = max(deadline - time.monotonic(), 0.1)
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=timeout) as answer:
            return answer.status, read_before(answer, deadline)
    except urllib.error.HTTPError as error:
        return error.code, str(error)
    except (OSError, http.client.HTTPException) as error:  # refused, timed out, broken off
        return 0, repr(error)


def reward(prompts: list[str], responses: list[str], answers: list[str]):
    """Scores, or (scores, metrics). Raises TimeoutError at the deadline, ValueError for any other answer."""
    deadline = time.monotonic() + DEADLINE
    pause = 0.5
    headers = {}
    if TOKEN:
        headers["Authorization"] = f"Bearer {TOKEN}"
    batch = {"prompts": prompts, "responses": responses, "answers": answers}
    while True:
        status, text = post(URL, batch, headers, deadline)
        if status == 200:
            break
        may_pass = status == 0 or status == 429 or status >= 500
        if not may_pass:
            raise ValueError(f"{SHOWN}: status {status}: {text[:200]!r}")
        if time.monotonic() + pause > deadline:
            reason = f"no scores within {DEADLINE:g} s (REWARD_DEADLINE), at last status {status}"
            raise TimeoutError(f"{SHOWN}: {reason}: {text[:200]}")
        time.sleep(pause)
        pause *= 2
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("scores"), list):
        raise ValueError(f"{SHOWN}: the answer has no list of scores: {text[:200]!r}")
    if content.get("metrics"):
        return content["scores"], content["metrics"]
    return content["scores"]

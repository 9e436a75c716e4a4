"""A reward behind an endpoint: the batch is posted as JSON, the scores come back.

    REWARD_URL=http://localhost:8000/score python ppo_llm.py --reward scripts/rewards/http.py:reward \
        --reward_env REWARD_URL,REWARD_TOKEN,REWARD_DEADLINE

Request: {"prompts": [...], "responses": [...], "answers": [...]}. Answer: {"scores": [...]}, one number per response,
and if you like "metrics": {name: [a number per response]}, which are logged. REWARD_TOKEN, if set, is sent as a bearer
token: it is read from the environment, never from the command line, where other users of the machine would see it.
A refused connection, a time-out and the codes 429 and 5xx are tried again after 0.5, 1, 2, ... seconds, until
REWARD_DEADLINE (60 s) has passed; any other answer is an error at once. Keep it below --reward_timeout, which kills
what hangs.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request

URL, TOKEN, DEADLINE = (os.environ.get(f"REWARD_{name}") for name in ("URL", "TOKEN", "DEADLINE"))
if not URL:
    raise RuntimeError("set REWARD_URL, and pass it on with --reward_env REWARD_URL,REWARD_TOKEN,REWARD_DEADLINE")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another address would get the token and the data too: a redirection is an error."""

    def redirect_request(self, *details):
        return None


def post(url: str, batch: dict, headers: dict, timeout: float) -> tuple[int, str]:
    """Status and text of the answer; status 0 and the reason if there was none."""
    request = urllib.request.Request(url, json.dumps(batch).encode(), {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=timeout) as answer:
            parts, end = [], time.monotonic() + timeout
            while part := answer.read1(2**16):
                parts.append(part)
                if time.monotonic() > end:
                    raise TimeoutError("the answer comes too slowly")
            if answer.length:  # what is still to come of the Content-Length
                raise http.client.IncompleteRead(b"".join(parts), answer.length)
            return answer.status, b"".join(parts).decode()
    except urllib.error.HTTPError as error:
        return error.code, str(error)
    except (OSError, http.client.HTTPException) as error:  # refused, timed out, broken off
        return 0, repr(error)


def reward(prompts: list[str], responses: list[str], answers: list[str]):
    deadline, pause = time.monotonic() + float(DEADLINE or 60), 0.5
    headers = {"Authorization": f"Bearer {TOKEN}"} if TOKEN else {}
    batch = {"prompts": prompts, "responses": responses, "answers": answers}
    while True:
        status, text = post(URL, batch, headers, timeout=max(deadline - time.monotonic(), 0.1))
        if status == 200:
            break
        if status and status != 429 and status < 500:
            raise ValueError(f"{URL}: status {status}: {text[:200]!r}")
        if time.monotonic() + pause > deadline:
            raise TimeoutError(f"{URL} gave no scores before REWARD_DEADLINE; at last: status {status}, {text[:200]}")
        time.sleep(pause)
        pause *= 2
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("scores"), list):
        raise ValueError(f"{URL}: the answer has no list of scores: {text[:200]!r}")
    return (content["scores"], content["metrics"]) if content.get("metrics") else content["scores"]

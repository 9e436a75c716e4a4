"""Any other reward in a process of its own, with a deadline and a clean environment.

    REWARD=my_reward.py:function REWARD_SECONDS=60 REWARD_ENV=API_KEY,OTHER \
        python ppo_llm.py --reward scripts/rewards/isolated.py:reward

The process starts with the first batch and is kept: imports and models are loaded once. REWARD_SECONDS (300)
are for a batch, the start included. When they have passed, a traceback on stderr shows where the function
hangs. A second later the process and all that it started are killed, also if the function holds the
interpreter or ignores signals. The next batch starts a new process. When the training process dies, however
it dies, this one ends at once.

The function sees PATH, HOME (where programs look for their settings) and the variables that REWARD_ENV names,
so no token by accident. Some installations also need LD_LIBRARY_PATH. This is no sandbox: the function reads
and writes files as you do, and a program that it starts in a session of its own is not killed. For Linux and
macOS.
"""

import contextlib
import faulthandler
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path


class IsolatedReward:
    """Calls FILE.py:function in another process; a batch is a line of JSON, and so is what comes back."""

    def __init__(self, reward: str, seconds: float, passed_on: list[str]):
        missing = [name for name in passed_on if name not in os.environ]
        if missing:
            raise RuntimeError(f"REWARD_ENV names variables that are not set: {', '.join(missing)}")
        if not Path(reward.rpartition(":")[0]).is_file():
            raise RuntimeError(f"REWARD must be FILE.py:function of a file that exists, not {reward!r}")
        self.reward = reward
        self.seconds = seconds
        self.passed_on = {name: os.environ[name] for name in passed_on}
        self.process = None

    def start(self) -> None:
        self.connection, theirs = socket.socketpair()
        command = [sys.executable, "-uP", __file__, self.reward, str(self.seconds), str(theirs.fileno())]
        always = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.process = subprocess.Popen(
            [*command, json.dumps(sys.path)], env=always | self.passed_on, pass_fds=[theirs.fileno()],
            stdin=subprocess.PIPE, start_new_session=True)
        theirs.close()  # now the connection ends when the process does

    def end(self) -> None:
        """Kills the process and what it started."""
        with contextlib.suppress(ProcessLookupError):  # nothing is left of them
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __call__(self, prompts: list[str], responses: list[str], answers: list[str]) -> tuple[list, dict]:
        """Scores and metrics. Raises RuntimeError if the function fails, or its process is late or dies."""
        began = time.monotonic()
        if self.process is None or self.process.poll() is not None:
            self.start()
        deadline = threading.Timer(self.seconds + 1, self.end)
        deadline.start()
        try:
            self.connection.sendall(json.dumps([prompts, responses, answers]).encode() + b"\n")
            line = self.connection.makefile("rb").readline()
        except OSError:  # the process has ended before it had read all
            line = b""
        deadline.cancel()
        if not line.endswith(b"\n"):
            self.end()
            what = f"its process ended with exit code {self.process.returncode}"
            if time.monotonic() - began > self.seconds:
                what = f"no scores within {self.seconds:g} seconds (REWARD_SECONDS), its process was killed"
            raise RuntimeError(f"reward {self.reward}: {what}")
        answer = json.loads(line)
        if "failure" in answer:
            its_traceback = self.without_secrets(answer["failure"]).strip()
            print(its_traceback, file=sys.stderr)
            raise RuntimeError(f"reward {self.reward} failed: {its_traceback.splitlines()[-1]}")
        return answer["scores"], answer["metrics"]

    def without_secrets(self, text: str) -> str:
        for name, secret in self.passed_on.items():
            if len(secret) >= 8:  # what is shorter is no secret, and may be part of any word
                text = text.replace(secret, f"<{name}>")
        return text


# ---- The other process -------------------------------------------------------------------------------------


def end_with_the_training_process(connection: socket.socket) -> None:
    """Starts a guard, which waits for the end of the training process and then kills all that is here."""
    # What is forked does not keep the connection open: it ends when this process does
    os.register_at_fork(after_in_child=lambda: os.close(connection.detach()))
    if os.fork() == 0:
        os.read(0, 1)  # nothing is ever sent: it returns when the training process has gone
        os.killpg(0, signal.SIGKILL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def load_function(reward: str):
    path, _, name = reward.rpartition(":")
    sys.path.append(str(Path(path).resolve().parent))  # as the last: its files may have the names of packages
    spec = importlib.util.spec_from_file_location("isolated_reward", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["isolated_reward"] = module  # where dataclasses and pickle look for it
    spec.loader.exec_module(module)
    return getattr(module, name)


def as_numbers(x):
    """Numbers of numpy and torch for JSON."""
    return x.tolist() if hasattr(x, "tolist") else float(x)


def serve(reward: str, seconds: float, connection: socket.socket) -> None:
    """Answers one batch after the other."""
    function = None
    for line in connection.makefile("rb"):
        faulthandler.dump_traceback_later(seconds)  # by a thread in C, whatever the function does
        try:
            function = function or load_function(reward)
            result = function(*json.loads(line))
            scores, metrics = result if isinstance(result, tuple) else (result, {})
            answer = json.dumps({"scores": scores, "metrics": metrics}, default=as_numbers)
        except BaseException:  # SystemExit too
            answer = json.dumps({"failure": traceback.format_exc()})
        faulthandler.cancel_dump_traceback_later()
        connection.sendall(answer.encode() + b"\n")


def main() -> None:
    reward, seconds, descriptor, folders = sys.argv[1:]
    connection = socket.socket(fileno=int(descriptor))
    end_with_the_training_process(connection)
    sys.path = json.loads(folders)  # it imports what the training process can import
    serve(reward, float(seconds), connection)


if __name__ == "__main__":
    main()
elif "REWARD" not in os.environ:
    raise RuntimeError("set REWARD=FILE.py:function, the reward that gets a process of its own")
else:
    reward = IsolatedReward(
        os.environ["REWARD"], float(os.environ.get("REWARD_SECONDS", 300)),
        os.environ.get("REWARD_ENV", "").replace(",", " ").split())

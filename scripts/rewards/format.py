"""A format reward that needs no answer: is the response laid out like a worked solution?

    python ppo_llm.py --dataset train.jsonl --eval_dataset test.jsonl \
        --reward scripts/rewards/format.py:reward

1.0 for a response that has at least two lines of reasoning, every one of them with one equation (`= NUMBER`),
and then, as its last line, `#### NUMBER` with the result of the last equation; 0.0 for any other. Whether the
arithmetic or the answer is right plays no role: this is what a format reward can and cannot teach.
"""

import re

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def score(response: str) -> float:
    *reasoning, last = response.strip().split("\n")
    results = [re.findall(rf"=\s*\$?({NUMBER})", line) for line in reasoning]
    if len(results) < 2 or any(len(found) != 1 for found in results):
        return 0.0
    return float(last == f"#### {results[-1][0]}")


def reward(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
    return [score(response) for response in responses]

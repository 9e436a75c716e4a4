r"""Mathematical equality by math-verify: 1/2 equals \frac{1}{2} and 0.5, x=3 equals 3, 1,100 equals 1100.

    pip install math-verify
    python ppo_llm.py --dataset train.jsonl --eval_dataset test.jsonl \
        --reward scripts/rewards/math_verify.py:reward

1.0 where the expression in \boxed{}, or else the last one of the response, equals that of the answer; 0.0
otherwise. An answer may be a plain expression or LaTeX, alone or as the last one of a text, GSM8K's too. The
metric `unreadable_answer` is the share of answers in which math-verify finds nothing: they score 0.
"""

try:
    from math_verify import parse, verify
except ImportError as error:
    raise RuntimeError("scripts/rewards/math_verify.py needs a package: pip install math-verify") from error

# Its time limits, 5 seconds for reading and for comparing, are alarm signals: they work in the main thread
# only. Many responses like 9^{9^9} add up; scripts/rewards/isolated.py around this reward limits the whole
# batch.


def read_answer(answer: str) -> list:
    if "$" not in answer and "\\[" not in answer:
        answer = f"${answer}$"  # without dollars it would not be read as LaTeX
    return parse(answer)


def reward(prompts: list[str], responses: list[str], answers: list[str]) -> tuple[list[float], dict]:
    expected = [read_answer(answer) for answer in answers]
    given = [parse(response) for response in responses]
    scores = [float(verify(*pair)) for pair in zip(expected, given, strict=True)]
    return scores, {"unreadable_answer": [float(not expressions) for expressions in expected]}

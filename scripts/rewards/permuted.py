"""Control reward: the strict GSM8K scores of a batch, dealt out to its responses at random.

    python scripts/gsm8k_prompts.py --source assets/demo --target output/prompts
    python ppo_llm.py --dataset output/prompts/train.jsonl --eval_dataset output/prompts/test.jsonl \
        --reward scripts/rewards/permuted.py:reward

The mean, and with it the evaluation, is that of the real score. What a response gets has nothing to do with
it. A policy that improves under this reward improves for another reason than the reward.
"""

import random

from ppo_llm import score_gsm8k_strict


def reward(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
    numbers = [answer.split("####")[-1].strip().replace(",", "") for answer in answers]
    scores = [score_gsm8k_strict(*pair) for pair in zip(responses, numbers, strict=True)]
    random.Random(repr(responses)).shuffle(scores)  # the same batch is always dealt the same way
    return scores

"""What one rank of test_multigpu.py does, in a process that it forks: importing takes longer than most cases.

The same cases with ppo_llm.py, in one process, give what is expected.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import matplotlib.figure
import torch
import transformers

STEPS_SAVED = 1, 3  # of the optimizer: after these its state is written


def run_rank(environment: dict[str, str], folder: Path, output: Path, arguments: list[str] | None) -> None:
    """ppo_llm_multigpu.py with these arguments, or without any the cases in cases.json."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.chdir(folder)
    import ppo_llm_multigpu  # reads RANK

    torch.set_num_threads(1)
    matplotlib.figure.Figure.savefig = lambda figure, path, **rest: Path(path).touch()  # drawing takes seconds
    if arguments is not None:
        sys.argv = ["ppo_llm_multigpu.py", *arguments]
        sys.exit(ppo_llm_multigpu.start())
    ppo_llm_multigpu.start_ranks(dataclasses.replace(ppo_llm_multigpu.DEMO, device="cpu", dist_timeout=120))
    run_cases(ppo_llm_multigpu, json.loads(Path("cases.json").read_text()), folder / "two")


def run_cases(module, cases: list[dict], folder: Path) -> None:
    real = {name: getattr(module, name) for name in ("in_step", "micro_batches") if hasattr(module, name)}
    for case in cases:
        if case.get("drop"):
            drop_a_pass(module)
        if case.get("ranks_order") and not hasattr(module, "WORLD"):
            take_ranks_order(module, case["ranks_order"])
        if "runs" in case:
            run_main(module, case, folder / case["name"])
        else:
            run_updates(module, case, folder / case["name"])
        for name, function in real.items():
            setattr(module, name, function)


def run_main(module, case: dict, folder: Path) -> None:
    """Whole runs, one after the other."""
    for changes in case["runs"]:
        run_dir = str(folder / changes.pop("run"))
        module.main(dataclasses.replace(module.DEMO, **changes, output_dir=run_dir))


def run_updates(module, case: dict, folder: Path) -> None:
    """The updates of a case on the stored rollout, and the final state and metrics of both learners."""
    config = dataclasses.replace(module.DEMO, **case["config"])
    if hasattr(module, "WORLD"):
        config = dataclasses.replace(config, **case.get("ranks", {}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    models = module.build_models(tokenizer, config)
    module.LOGITS_PER_CHUNK = len(tokenizer) * 7  # the head in three chunks or more
    learners = {"actor": models.actor}
    if models.critic:
        learners = {"critic": models.critic, "actor": models.actor}
    folder.mkdir(parents=True, exist_ok=True)
    for role, learner in learners.items():
        learner.save(folder / f"{role}_start.safetensors")
        watch_steps(learner, folder, role)
    metrics = []
    for step, change in enumerate(case.get("updates", [{}])):
        rollout = restore(module, Path(case["rollout"]), config)
        if change.pop("poison", False) and getattr(module, "RANK", 0) == 0:
            rollout.advantages[0] = float("nan")
            rollout.returns[0] = float("nan")
        for role in learners:
            done = module.update(role, models, rollout, step, 9, 0.05, dataclasses.replace(config, **change))
            metrics.append({name: float(x) for name, x in done.items() if "time/" not in name})
    for role, learner in learners.items():
        learner.save(folder / f"{role}_last.safetensors")
    if case.get("export"):
        module.export_models(folder, models, config)
    if not getattr(module, "RANK", 0):
        (folder / "metrics.json").write_text(json.dumps(metrics))


def restore(module, path: Path, config):
    """This rank's part of a stored rollout."""
    rank = getattr(module, "RANK", 0)
    size = config.rollout_size // getattr(module, "WORLD", 1)
    part = {}
    for name, x in torch.load(path, weights_only=True).items():
        rows = x[size * rank : size * (rank + 1)]
        part[name] = rows.clone() if isinstance(rows, torch.Tensor) else rows
    return module.Rollout(**part)


def watch_steps(learner, folder: Path, role: str) -> None:
    """Writes the learner's state after some of its steps."""
    real = learner.step
    done = []

    def step(*args):
        real(*args)
        done.append(1)
        if len(done) in STEPS_SAVED:
            learner.save(folder / f"{role}_{len(done)}.safetensors")

    learner.step = step


def drop_a_pass(module) -> None:
    """What must not go unnoticed: the last rank leaves out one micro-batch."""
    real = module.in_step

    def in_step(passes, rollout):
        passes = list(passes)
        is_last = module.RANK == module.WORLD - 1
        return real(passes[:-1] if is_last and len(passes) > 1 else passes, rollout)

    module.in_step = in_step


def take_ranks_order(module, half: int) -> None:
    """One process adds up gradients as two ranks do, those of one half of the rollout first.

    In bf16 another order flips a rounding here and there, and some steps later weights differ by a tenth and more.
    """
    real = module.micro_batches
    module.micro_batches = lambda *args: sorted(real(*args), key=lambda part: part[0][0] >= half)

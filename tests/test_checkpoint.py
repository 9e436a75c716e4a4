"""Resuming, refusing, keeping and exporting: what is on the disk is what was in memory."""

import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from conftest import make_config, make_lm, make_models, make_tokenizer, read_log, save_folder, take_steps

import ppo_llm
from ppo_llm import UsageError, main

pytestmark = pytest.mark.usefixtures("no_figures")
VARIANTS = {
    "separate": {"kl_ctrl_type": "adaptive", "kl_ctrl_horizon": 50, "lr_schedule": "cosine", "warmup_steps": 2},
    "shared": {"critic": "shared", "use_kl_loss": True, "reference": "mixed", "lr_schedule": "linear"},
    "grpo": {"adv_estimator": "grpo", "rollout_n": 2, "temperature": 0.8},
    "bfloat16": {"dtype": "bfloat16", "critic_warmup": 1},
}


class Killed(Exception):
    pass


def long_config(folder, run_dir, **changes):
    """Five steps of 4 of 10 prompts: an epoch ends after two. A checkpoint and an evaluation after every step."""
    settings = {"output_dir": str(run_dir), "train_batch_size": 4, "ppo_mini_batch_size": 2, "total_steps": 5,
                "save_every": 1, "save_total_limit": 9, "eval_every": 2, "eval_dataset": f"{folder}/prompts.jsonl",
                "eval_size": 3}
    return make_config(folder, **settings | changes)


def kill_at(step: int, monkeypatch) -> None:
    """Dies where the step's log is written and its checkpoint is not."""
    real = ppo_llm.save_checkpoint

    def save(run_dir, at, *rest):
        if at == step:
            raise Killed
        real(run_dir, at, *rest)

    monkeypatch.setattr(ppo_llm, "save_checkpoint", save)


def interrupted(config, step: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_at(step, monkeypatch)
        with pytest.raises(Killed):
            main(config)


def without_times(run_dir) -> list[dict]:
    return [{name: x for name, x in row.items() if "time/" not in name} for row in read_log(run_dir)]


def tree(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module", params=["separate", "shared", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("grpo", "bfloat16"))])
def straight(request, folder, no_figures, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    main(long_config(folder, run_dir, **VARIANTS[request.param]))
    return run_dir, VARIANTS[request.param]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_resumed_run_equals_a_straight_one_bit_by_bit(k, straight, folder, tmp_path):
    expected, variant = straight
    run_dir = tmp_path / "run"
    config = long_config(folder, run_dir, **variant)
    interrupted(config, k + 1)
    assert len(read_log(run_dir)) == k + 2  # step 0, and one step more than there are checkpoints
    main(config)
    assert without_times(run_dir) == without_times(expected)
    assert (run_dir / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()
    for name in ("checkpoints", "model"):
        assert tree(run_dir / name) == tree(expected / name)


def test_steps_of_a_resumed_log_rise_without_gap_or_repetition(folder, tmp_path):
    config = long_config(folder, tmp_path / "run", save_every=2)
    interrupted(config, 4)
    assert [row["step"] for row in read_log(tmp_path / "run")] == [0, 1, 2, 3, 4]
    main(config)
    assert [row["step"] for row in read_log(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


def test_the_same_command_again_trains_nothing_and_deletes_nothing(folder, tmp_path):
    config = long_config(folder, tmp_path / "run")
    main(config)
    before = tree(tmp_path / "run")
    main(config)
    assert tree(tmp_path / "run") == before


def test_more_steps_continue_a_finished_run(folder, tmp_path):
    config = long_config(folder, tmp_path / "run", total_steps=2)
    main(config)
    first = read_log(tmp_path / "run")
    main(dataclasses.replace(config, total_steps=4))
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[:3] == first


# ---------------------------------------------------------------------------------------------------------------------
# --resume.


def test_resume_must_needs_a_checkpoint(folder, tmp_path):
    with pytest.raises(UsageError, match="resume must: no checkpoint"):
        main(long_config(folder, tmp_path / "run", resume="must"))
    assert not (tmp_path / "run").exists()


def test_resume_must_continues_where_there_is_one(folder, tmp_path):
    config = long_config(folder, tmp_path / "run")
    interrupted(config, 3)
    main(dataclasses.replace(config, resume="must"))
    assert [row["step"] for row in read_log(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


def test_resume_never_leaves_an_existing_run_alone(folder, tmp_path):
    config = long_config(folder, tmp_path / "run", total_steps=1)
    main(config)
    before = tree(tmp_path / "run")
    with pytest.raises(UsageError, match="not empty"):
        main(dataclasses.replace(config, resume="never"))
    assert tree(tmp_path / "run") == before


@pytest.mark.parametrize("wrong", ["nowhere", "run/checkpoints"])
def test_resume_from_a_path_without_a_checkpoint_is_refused(wrong, folder, tmp_path):
    main(long_config(folder, tmp_path / "run", total_steps=1))
    with pytest.raises(UsageError, match="no checkpoint in"):
        main(long_config(folder, tmp_path / "other", resume=str(tmp_path / wrong)))
    assert not (tmp_path / "other").exists()


def test_resume_from_a_path_goes_on_in_another_folder(straight, folder, tmp_path):
    expected, variant = straight
    start = expected / "checkpoints" / "step_2"
    before = tree(expected)
    main(long_config(folder, tmp_path / "run", resume=str(start), **variant))
    assert without_times(tmp_path / "run") == without_times(expected)[3:]
    assert tree(tmp_path / "run" / "model") == tree(expected / "model") and tree(expected) == before


def test_resume_from_an_older_checkpoint_of_the_same_run_goes_on_from_there(folder, tmp_path):
    run_dir = tmp_path / "run"
    main(long_config(folder, run_dir))
    expected = without_times(run_dir)
    main(long_config(folder, run_dir, resume=str(run_dir / "checkpoints" / "step_2")))
    assert without_times(run_dir) == expected


def test_a_run_that_takes_another_course_drops_the_checkpoints_of_the_old_one(folder, tmp_path):
    run_dir = tmp_path / "run"
    main(long_config(folder, run_dir))
    interrupted(long_config(folder, run_dir, resume=str(run_dir / "checkpoints" / "step_2")), 4)
    left = [int(path.name[5:]) for path in ppo_llm.checkpoints(run_dir)]
    assert left == [1, 2, 3]  # with step_5 still there, the same command would go on from the abandoned course


def test_a_path_resumes_into_no_folder_that_holds_something_else(folder, tmp_path):
    main(long_config(folder, tmp_path / "a", total_steps=2))
    main(long_config(folder, tmp_path / "b", total_steps=3))
    before = tree(tmp_path / "b")
    start = str(ppo_llm.checkpoints(tmp_path / "a")[-1])
    with pytest.raises(UsageError, match="not empty"):
        main(long_config(folder, tmp_path / "b", resume=start))
    assert tree(tmp_path / "b") == before


def test_an_evaluation_of_a_run_leaves_its_folder_as_it_was(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = long_config(folder, tmp_path / "run", total_steps=2)
    main(config)
    before = tree(tmp_path / "run")
    main(dataclasses.replace(config, eval_only=True))
    assert tree(tmp_path / "run") == before
    (row,) = read_log(tmp_path / "output" / "ppo_metrics")
    assert row["step"] == 2 and row["eval/score"] == read_log(tmp_path / "run")[-1]["eval/score"]


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(folder, tmp_path):
    config = long_config(folder, tmp_path / "run")
    main(dataclasses.replace(config, output_dir=str(tmp_path / "straight")))
    interrupted(config, 1)
    assert ppo_llm.checkpoints(tmp_path / "run") == [] and len(read_log(tmp_path / "run")) == 2
    main(config)
    assert without_times(tmp_path / "run") == without_times(tmp_path / "straight")


def test_a_run_that_died_while_its_models_were_loaded_begins_anew(folder, tmp_path, monkeypatch):
    config = long_config(folder, tmp_path / "run", total_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(ppo_llm, "build_models", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(config)
    (tmp_path / "run" / "training_metrics.csv.tmp").write_text("step\n")  # killed while it wrote
    (tmp_path / "run" / "notes.txt").write_text("mine")
    main(config)
    assert [row["step"] for row in read_log(tmp_path / "run")] == [0, 1]
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_an_evaluation_is_not_overwritten_by_another(folder, tmp_path):
    config = long_config(folder, tmp_path / "run", eval_only=True)
    main(config)
    before = tree(tmp_path / "run")
    with pytest.raises(UsageError, match="not empty"):
        main(config)
    assert tree(tmp_path / "run") == before


def test_half_a_line_of_a_killed_run_is_dropped(folder, tmp_path):
    config = long_config(folder, tmp_path / "run")
    interrupted(config, 3)
    samples = tmp_path / "run" / "samples.jsonl"
    samples.write_text(samples.read_text() + '{"step": 1')
    main(config)
    steps = [json.loads(line)["step"] for line in samples.read_text().splitlines()]
    assert steps == sorted(steps) and set(steps) == {0, 1, 2, 3, 4, 5}


def test_an_empty_folder_is_used(folder, tmp_path):
    (tmp_path / "run").mkdir()
    main(long_config(folder, tmp_path / "run", total_steps=1))
    assert [row["step"] for row in read_log(tmp_path / "run")] == [0, 1]


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_that_is_no_run_is_refused_and_untouched(resume, folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not empty"):
        main(long_config(folder, tmp_path / "run", resume=resume))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints.


def test_the_newest_checkpoints_are_kept(folder, tmp_path):
    main(long_config(folder, tmp_path / "run", save_total_limit=2, total_steps=11, eval_every=0))
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step_10", "step_11"}


@pytest.mark.parametrize(("every", "names"), [(2, {"step_2", "step_4", "step_5"}), (0, {"step_5"}), (9, {"step_5"})])
def test_the_last_step_is_saved_whatever_save_every_is(every, names, folder, tmp_path):
    main(long_config(folder, tmp_path / "run", save_every=every, eval_every=0))
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == names


def test_a_half_written_checkpoint_is_ignored(folder, tmp_path):
    config = long_config(folder, tmp_path / "run")
    interrupted(config, 3)
    newest = tmp_path / "run" / "checkpoints" / "step_2"
    half = shutil.copytree(newest, newest.parent / "temporary")
    (half / "state.json").write_text(json.dumps({"step": 4, "kl_coef": 1.0}))
    main(config)
    assert [row["step"] for row in read_log(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]
    assert not half.exists()


def test_the_old_checkpoint_outlives_a_failed_write_of_the_next(folder, tmp_path, monkeypatch):
    config = long_config(folder, tmp_path / "run", save_total_limit=1)
    interrupted(config, 3)
    expected = tree(tmp_path / "run" / "checkpoints" / "step_2")

    def full(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as context:
        context.setattr(ppo_llm, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            main(config)
    assert tree(tmp_path / "run" / "checkpoints" / "step_2") == expected
    main(config)
    assert [row["step"] for row in read_log(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_every_learner_comes_back_with_weights_optimizer_and_counters(critic, folder, tmp_path):
    config = make_config(folder, critic=critic)
    models, fresh = make_models(config), make_models(config)
    take_steps(models, config, 2)
    models.actor.skipped_steps = 7
    ppo_llm.save_checkpoint(tmp_path, 2, models, 0.125, config)
    assert ppo_llm.load_checkpoint(tmp_path / "checkpoints" / "step_2", fresh, config) == (2, 0.125)
    assert fresh.actor.skipped_steps == 7
    prompts, responses, mask = [[5, 6, 9]], [[7, 8]], torch.ones(1, 2)
    part = ppo_llm.Rollout(prompts, responses, mask, mask * 0)
    for old, new in ((models.actor, fresh.actor), (models.critic, fresh.critic)):
        if old is None:
            continue
        for x, y in zip(old.masters, new.masters, strict=True):
            assert torch.equal(x, y)
            one, other = old.optimizer.state[x], new.optimizer.state[y]
            assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
        assert torch.equal(old.model.value_head.weight, new.model.value_head.weight) if old.model.value_head else True
        for x, y in zip(ppo_llm.forward(old.model, part, 1.0), ppo_llm.forward(new.model, part, 1.0), strict=True):
            assert x is None or torch.equal(x, y)


def test_masters_of_bf16_weights_come_back_with_all_their_bits(folder, tmp_path):
    config = make_config(folder, dtype="bfloat16", lr=1e-5)
    models, fresh = make_models(config), make_models(config)
    take_steps(models, config, 2)
    models.actor.save(tmp_path / "x.safetensors")
    fresh.actor.load(tmp_path / "x.safetensors")
    pairs = list(zip(models.actor.masters, fresh.actor.masters, strict=True))
    assert all(torch.equal(x, y) for x, y in pairs)
    assert any((x != x.bfloat16().float()).any() for x, _ in pairs)  # bf16 weights alone would have lost these


def test_a_checkpoint_of_another_shape_is_an_error(folder, tmp_path):
    config = make_config(folder)
    ppo_llm.save_checkpoint(tmp_path, 1, make_models(config), 0.0, config)
    other = save_folder(tmp_path / "m", make_lm(hidden_size=16))
    with pytest.raises(Exception, match="size|shape|must match"):
        models, config = make_models(make_config(other)), make_config(other)
        ppo_llm.load_checkpoint(tmp_path / "checkpoints" / "step_1", models, config)


@pytest.mark.parametrize("flags", [{"critic": "shared"}, {"adv_estimator": "rloo", "rollout_n": 2}])
def test_a_checkpoint_of_another_kind_of_run_is_refused_in_one_sentence(flags, folder, tmp_path):
    config = make_config(folder)
    ppo_llm.save_checkpoint(tmp_path, 1, make_models(config), 0.0, config)
    other = make_config(folder, **flags)
    with pytest.raises(ppo_llm.UsageError, match="was made with"):
        ppo_llm.load_checkpoint(tmp_path / "checkpoints" / "step_1", make_models(other), other)


def test_a_copy_that_somebody_kept_beside_the_checkpoints_is_left_alone(folder, tmp_path):
    config = make_config(folder, output_dir=str(tmp_path / "run"), total_steps=1)
    (tmp_path / "run" / "checkpoints" / "step_1.bak").mkdir(parents=True)
    with pytest.raises(ppo_llm.UsageError, match="not empty"):  # it is no checkpoint, and not ours to touch
        main(config)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_1.bak"]


# ---------------------------------------------------------------------------------------------------------------------
# The exported model.


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_exported_model_is_a_plain_one_with_the_trained_policys_logits(tied, critic, tmp_path, monkeypatch):
    start = save_folder(tmp_path / "m", make_lm(tie_word_embeddings=tied))
    kept, real = [], ppo_llm.build_models
    monkeypatch.setattr(ppo_llm, "build_models", lambda *args: (kept.append(real(*args)), kept[-1])[1])
    main(long_config(start, tmp_path / "run", critic=critic, eval_every=0, total_steps=2))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = torch.tensor([[5, 6, 9, 30]])
    with torch.no_grad():
        kept[0].actor.model.lm.set_attn_implementation("sdpa")
        logits, trained = exported(ids).logits, kept[0].actor.model.lm(ids).logits
        before = transformers.AutoModelForCausalLM.from_pretrained(start)(ids).logits
    assert torch.equal(logits, trained) and not torch.allclose(logits, before, atol=1e-3)
    assert "packed" not in (tmp_path / "run" / "model" / "config.json").read_text()
    assert (exported.get_output_embeddings().weight is exported.get_input_embeddings().weight) == tied
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer("abc").input_ids == make_tokenizer()("abc").input_ids
    assert tokenizer.chat_template == make_tokenizer().chat_template


def test_the_exported_model_can_be_trained_again(folder, tmp_path):
    main(long_config(folder, tmp_path / "one", total_steps=1))
    shutil.copy(folder / "reward.py", tmp_path / "one" / "model")
    shutil.copy(folder / "prompts.jsonl", tmp_path / "one" / "model")
    main(long_config(tmp_path / "one" / "model", tmp_path / "two", total_steps=1))
    assert len(read_log(tmp_path / "two")) == 2


def test_a_bf16_run_exports_bf16_weights(folder, tmp_path):
    main(long_config(folder, tmp_path / "run", dtype="bfloat16", total_steps=1))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    assert exported.dtype == torch.bfloat16


def test_sigterm_ends_the_run_after_its_step_with_a_checkpoint_from_which_it_goes_on(folder, tmp_path, monkeypatch):
    straight, run_dir, real = tmp_path / "straight", tmp_path / "run", ppo_llm.update
    main(long_config(folder, straight))
    with monkeypatch.context() as patch:
        patch.setattr(ppo_llm, "STOP", [])
        patch.setattr(ppo_llm, "update", lambda *args: (ppo_llm.STOP.append(15), real(*args))[1])
        with pytest.raises(SystemExit) as end:
            main(long_config(folder, run_dir, save_every=0))
    assert end.value.code == 143 and [path.name for path in ppo_llm.checkpoints(run_dir)] == ["step_1"]
    main(long_config(folder, run_dir))
    assert without_times(run_dir) == without_times(straight)

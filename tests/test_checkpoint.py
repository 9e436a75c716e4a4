"""Resuming, refusing, keeping and exporting: what is on the disk is what was in memory."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import make_config, make_lm, make_models, make_tokenizer, read_log, save_folder, take_steps

import ppo_llm
from ppo_llm import UsageError, main

pytestmark = pytest.mark.usefixtures("no_figures", "no_page")
VARIANTS = {
    "separate": {"kl_ctrl_type": "adaptive", "kl_ctrl_horizon": 50, "lr_schedule": "cosine", "warmup_steps": 2},
    "shared": {"critic": "shared", "use_kl_loss": True, "reference": "mixed", "lr_schedule": "linear"},
    "grpo": {"adv_estimator": "grpo", "rollout_n": 2, "temperature": 0.8},
    "bfloat16": {"dtype": "bfloat16", "critic_warmup": 1},
}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def no_page():
    """For tests that do not look at what a run prints at its end."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ppo_llm.Run, "print_end", lambda run: None)
        yield


def long_config(folder, run_dir, **changes):
    """Five steps of 4 of 10 prompts: an epoch ends after two. A checkpoint and an evaluation after every step."""
    settings = {"output_dir": str(run_dir), "train_batch_size": 4, "ppo_mini_batch_size": 2, "total_steps": 5,
                "save_every": 1, "save_total_limit": 9, "eval_every": 2, "eval_dataset": f"{folder}/prompts.jsonl",
                "eval_size": 3}
    return make_config(folder, **settings | changes)


def kill_at(step: int, monkeypatch) -> None:
    """Dies where the step's log is written and its checkpoint is not."""
    real = ppo_llm.save_checkpoint

    def save(run, at, *rest):
        if at == step:
            raise Killed
        real(run, at, *rest)

    monkeypatch.setattr(ppo_llm, "save_checkpoint", save)


def interrupted(config, step: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_at(step, monkeypatch)
        with pytest.raises(Killed):
            main(config)


def without_times(run_dir) -> list[dict]:
    return [{name: x for name, x in row.items() if "time/" not in name} for row in read_log(run_dir)]


def tree(folder, pattern: str = "*") -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob(pattern)) if path.is_file()}


def weights(run_dir) -> dict:
    """Of all checkpoints and exported models; a state.json also names the folder."""
    return tree(run_dir, "*.safetensors")


def make_run(folder, config, **rest) -> SimpleNamespace:
    """What save_checkpoint and load_checkpoint look at in a Run."""
    return SimpleNamespace(folder=folder, config=config, total=9, data_hash="data", tracker_id="id", continues=True,
                           settings_history=[{"step": 0, "config": dataclasses.asdict(config)}], **rest)


def load(folder, step, models, config) -> tuple[int, float]:
    run = make_run(folder, config, checkpoint=folder / "checkpoints" / f"step_{step}")
    return ppo_llm.load_checkpoint(run, models)


@pytest.fixture(scope="module", params=["separate", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("shared", "grpo", "bfloat16"))])
def straight(request, folder, no_figures, no_page, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    main(long_config(folder, run_dir, **VARIANTS[request.param]))
    return run_dir, VARIANTS[request.param]


@pytest.mark.parametrize("k", [2, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 3))])
def test_a_resumed_run_equals_a_straight_one_bit_by_bit(k, straight, folder, tmp_path):
    expected, variant = straight
    run_dir = tmp_path / "run"
    config = long_config(folder, run_dir, **variant)
    interrupted(config, k + 1)
    assert len(read_log(run_dir)) == k + 2  # step 0, and one step more than there are checkpoints
    main(config)
    assert without_times(run_dir) == without_times(expected)
    assert (run_dir / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()
    assert weights(run_dir) == weights(expected)


@pytest.mark.slow
def test_steps_of_a_resumed_log_rise_without_gap_or_repetition(folder, tmp_path):
    config = long_config(folder, tmp_path / "run", save_every=2)
    interrupted(config, 4)
    assert [row["step"] for row in read_log(tmp_path / "run")] == [0, 1, 2, 3, 4]
    main(config)
    assert [row["step"] for row in read_log(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_the_same_command_again_trains_nothing_and_deletes_nothing(folder, tmp_path):
    config = long_config(folder, tmp_path / "run")
    main(config)
    before = tree(tmp_path / "run")
    main(config)
    after = tree(tmp_path / "run")
    assert {path for path in before if before[path] != after.get(path)} <= {Path("summary.json")}  # its seconds
    assert set(after) == set(before)


@pytest.mark.slow
def test_more_steps_continue_a_finished_run(folder, tmp_path):
    config = long_config(folder, tmp_path / "run", total_steps=2)
    main(config)
    first = read_log(tmp_path / "run")
    main(dataclasses.replace(config, total_steps=4))
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[:3] == first


@pytest.mark.slow
def test_fewer_steps_than_a_run_has_made_are_refused_and_change_nothing(folder, tmp_path):
    config = long_config(folder, tmp_path / "run", total_steps=3)
    main(config)
    before = tree(tmp_path / "run")
    with pytest.raises(UsageError, match="step_3 is past step 2, the last: give more total_steps"):
        main(dataclasses.replace(config, total_steps=2))
    after = tree(tmp_path / "run")
    assert {path for path in before if before[path] != after.get(path)} <= {Path(".lock")}  # a process id


@pytest.mark.slow
def test_no_steps_evaluate_the_step_at_which_a_run_was_stopped(folder, tmp_path):
    config = long_config(folder, tmp_path / "run", eval_every=4)
    interrupted(config, 4)
    assert "eval/score" not in read_log(tmp_path / "run")[3]
    main(dataclasses.replace(config, total_steps=0))
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert 0 <= rows[3]["eval/score"] <= 1 and rows[3]["policy/loss"] != 0


@pytest.mark.slow
def test_other_evaluation_data_are_evaluated_and_not_mixed_with_the_old(folder, tmp_path, capsys):
    config = long_config(folder, tmp_path / "run", total_steps=2)
    main(config)
    before = json.loads((tmp_path / "run" / "summary.json").read_text())
    other = tmp_path / "other.jsonl"
    other.write_text("".join(f'{{"prompt": "{x}", "answer": "zz"}}\n' for x in "abc"))  # nothing is right
    main(dataclasses.replace(config, eval_dataset=str(other)))
    after = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [row["step"] for row in before["first_evaluation"]] == [0]
    assert after["first_evaluation"] == after["last_evaluation"] != before["last_evaluation"]
    assert [row["step"] for row in after["last_evaluation"]] == [2]
    assert "of other data or by another reward: the run is evaluated anew" in capsys.readouterr().err
    main(dataclasses.replace(config, eval_dataset=str(other)))  # B again is not evaluated again
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["last_evaluation"] == after["last_evaluation"]
    main(config)  # and A again is
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again["last_evaluation"] == before["last_evaluation"]


@pytest.mark.parametrize(("before", "now", "loaded"), [
    ("fixed", "fixed", 0.25), ("adaptive", "adaptive", 0.125), ("fixed", "adaptive", 0.25),
    ("adaptive", "fixed", 0.25)])
def test_a_fixed_kl_coefficient_is_that_of_the_options_and_a_steered_one_that_of_the_checkpoint(
        before, now, loaded, folder, tmp_path, capsys):
    config = make_config(folder, kl_ctrl_coef=0.001, kl_ctrl_type=before)
    models = make_models(config)
    ppo_llm.save_checkpoint(make_run(tmp_path, config), 1, models, 0.125)
    changed = dataclasses.replace(config, kl_ctrl_coef=0.25, kl_ctrl_type=now)
    assert load(tmp_path, 1, models, changed) == (1, loaded)
    assert "kl_ctrl_coef 0.001 → 0.25" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model", "critic_model"])
def test_an_adapter_is_not_put_on_other_weights_than_its_own(name, folder, tmp_path):
    config = make_config(folder, lora_rank=2, critic_model=str(folder))
    models = make_models(config)
    ppo_llm.save_checkpoint(make_run(tmp_path, config), 1, models, 0.0)
    with pytest.raises(UsageError, match=f"was made with {name} .*, not elsewhere"):
        load(tmp_path, 1, models, dataclasses.replace(config, **{name: "elsewhere"}))


# ---- --resume, and what a folder holds already -----------------------------------------------------------


@pytest.mark.parametrize("wrong", ["nowhere", "run/model"])
def test_resume_from_a_path_without_a_checkpoint_is_refused(wrong, folder, tmp_path):
    main(long_config(folder, tmp_path / "run", total_steps=1))
    with pytest.raises(UsageError, match=f"resume .*{wrong}: there is no whole checkpoint"):
        main(long_config(folder, tmp_path / "other", resume=str(tmp_path / wrong)))
    assert list(tree(tmp_path / "other")) == [Path(".lock")]


@pytest.mark.parametrize("which", ["run", "checkpoint"])
def test_resume_starts_from_the_weights_optimizer_and_step_of_another_run(which, straight, folder, tmp_path):
    expected, variant = straight
    source = expected / "checkpoints" / "step_2"
    if which == "run":
        source = shutil.copytree(expected, tmp_path / "source")
        for step in (3, 4, 5):
            shutil.rmtree(source / "checkpoints" / f"step_{step}")
    before = tree(expected)
    main(long_config(folder, tmp_path / "run", resume=str(source), **variant))
    rows = without_times(tmp_path / "run")  # step 2 is evaluated again
    assert rows[0]["step"] == 2 and rows[0]["eval/score"] == without_times(expected)[2]["eval/score"]
    assert rows[1:] == without_times(expected)[3:]
    assert tree(tmp_path / "run" / "model") == tree(expected / "model") and tree(expected) == before


def test_a_damaged_newest_checkpoint_of_another_run_is_passed_over(folder, tmp_path):
    main(long_config(folder, tmp_path / "one", total_steps=3, eval_every=0))
    (tmp_path / "one" / "checkpoints" / "step_3" / "actor.safetensors").write_bytes(b"")
    found = ppo_llm.find_checkpoint(tmp_path / "two", str(tmp_path / "one"))
    assert found == tmp_path / "one" / "checkpoints" / "step_2"
    assert ppo_llm.find_checkpoint(tmp_path / "two", str(found)) == found
    assert (tmp_path / "one" / "checkpoints" / "step_3").exists()  # of another run nothing is renamed


def test_the_command_that_began_with_resume_continues_its_own_run(straight, folder, tmp_path):
    expected, variant = straight
    config = long_config(folder, tmp_path / "run", resume=str(expected / "checkpoints" / "step_1"), **variant)
    interrupted(config, 4)
    assert [path.name for path in ppo_llm.checkpoints(tmp_path / "run")] == ["step_2", "step_3"]
    main(config)
    assert without_times(tmp_path / "run") == without_times(expected)[2:]
    assert weights(tmp_path / "run" / "model") == weights(expected / "model")


@pytest.mark.slow
def test_no_steps_evaluate_the_start_or_the_checkpoint_of_another_run(folder, tmp_path):
    config = long_config(folder, tmp_path / "run", total_steps=2)
    main(config)
    before = tree(tmp_path / "run")
    trained = read_log(tmp_path / "run")
    for name, resume, expected in (("start", None, trained[0]), ("end", str(tmp_path / "run"), trained[-1])):
        main(dataclasses.replace(config, output_dir=str(tmp_path / name), resume=resume, total_steps=0))
        (row,) = read_log(tmp_path / name)
        assert row == {"step": expected["step"], **{key: x for key, x in expected.items() if key.startswith("eval/")}}
        assert not (tmp_path / name / "model").exists() and not (tmp_path / name / "checkpoints").exists()
    assert tree(tmp_path / "run") == before


@pytest.mark.slow
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


def test_an_empty_folder_is_used(folder, tmp_path):
    (tmp_path / "run").mkdir()
    main(long_config(folder, tmp_path / "run", total_steps=1))
    assert [row["step"] for row in read_log(tmp_path / "run")] == [0, 1]


def test_a_folder_that_is_no_run_is_refused_and_untouched(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not empty"):
        main(long_config(folder, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


# ---- Checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_newest_checkpoints_are_kept(folder, tmp_path):
    main(long_config(folder, tmp_path / "run", save_total_limit=2, total_steps=11, eval_every=0))
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step_10", "step_11"}


@pytest.mark.parametrize(("every", "names"), [
    (2, {"step_2", "step_4", "step_5"}), pytest.param(0, {"step_5"}, marks=pytest.mark.slow),
    pytest.param(9, {"step_5"}, marks=pytest.mark.slow)])
def test_the_last_step_is_saved_whatever_save_every_is(every, names, folder, tmp_path):
    main(long_config(folder, tmp_path / "run", save_every=every, eval_every=0))
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == names


def test_what_is_kept_as_old_is_never_replaced(tmp_path, capsys):
    for text in ("first", "second", "third"):
        (tmp_path / "log.csv").write_text(text)
        ppo_llm.keep_old(tmp_path / "log.csv")
    assert (tmp_path / "log.csv.old").read_text() == "first"
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["first", "second", "third"]
    assert capsys.readouterr().err.count("is kept as log.csv.") == 3


def test_a_step_that_is_saved_twice_is_there_all_the_time(folder, tmp_path, monkeypatch):
    config = make_config(folder)
    models = make_models(config)
    ppo_llm.save_checkpoint(make_run(tmp_path, config), 1, models, 0.0)
    before = tree(tmp_path / "checkpoints" / "step_1")
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("the checkpoint is replaced"))
    ppo_llm.save_checkpoint(make_run(tmp_path, config), 1, models, 0.0)
    assert tree(tmp_path / "checkpoints" / "step_1") == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


@pytest.mark.parametrize("name", ["step_1-copy2", "step_1.bak", "step_", "step_2.old"])
def test_other_folders_beside_the_checkpoints_are_none(name, tmp_path):
    for each in ("step_1", "step_10", "step_2", name):
        (tmp_path / "checkpoints" / each).mkdir(parents=True)
    assert [path.name for path in ppo_llm.checkpoints(tmp_path)] == ["step_1", "step_2", "step_10"]


@pytest.mark.slow
def test_a_half_written_checkpoint_is_ignored(folder, tmp_path):
    config = long_config(folder, tmp_path / "run")
    interrupted(config, 3)
    newest = tmp_path / "run" / "checkpoints" / "step_2"
    half = shutil.copytree(newest, newest.parent / "temporary")
    (half / "state.json").write_text(json.dumps({"step": 4, "kl_coef": 1.0}))
    main(config)
    assert [row["step"] for row in read_log(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]
    assert not half.exists()


@pytest.mark.slow
def test_the_old_checkpoint_outlives_a_failed_write_of_the_next(folder, tmp_path, monkeypatch):
    config = long_config(folder, tmp_path / "run", save_total_limit=1)
    interrupted(config, 3)
    expected = tree(tmp_path / "run" / "checkpoints" / "step_2")

    def full(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as context:
        context.setattr(ppo_llm, "save_file", full)
        with pytest.raises(UsageError, match="run: No space"):
            main(config)
    assert tree(tmp_path / "run" / "checkpoints" / "step_2") == expected
    main(config)
    assert [row["step"] for row in read_log(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_every_learner_comes_back_with_weights_optimizer_and_counters(critic, folder, tmp_path):
    config = make_config(folder, critic=critic, kl_ctrl_type="adaptive")
    models = make_models(config)
    fresh = make_models(config)
    take_steps(models, config, 2)
    models.actor.skipped_steps = 7
    ppo_llm.save_checkpoint(make_run(tmp_path, config), 2, models, 0.125)
    assert load(tmp_path, 2, fresh, config) == (2, 0.125)
    assert fresh.actor.skipped_steps == 7
    mask = torch.ones(1, 2)
    part = ppo_llm.Rollout([[5, 6, 9]], [[7, 8]], mask, mask * 0)
    for old, new in ((models.actor, fresh.actor), (models.critic, fresh.critic)):
        if old is None:
            continue
        for x, y in zip(old.masters, new.masters, strict=True):
            assert torch.equal(x, y)
            one = old.optimizer.state[x]
            other = new.optimizer.state[y]
            assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
        before = ppo_llm.forward(old.model, part, config)
        after = ppo_llm.forward(new.model, part, config)
        assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_masters_of_bf16_weights_come_back_with_all_their_bits(folder, tmp_path):
    config = make_config(folder, dtype="bfloat16", lr=1e-5)
    models, fresh = make_models(config), make_models(config)
    take_steps(models, config, 2)
    models.actor.save(tmp_path / "x.safetensors")
    fresh.actor.load(tmp_path / "x.safetensors")
    pairs = list(zip(models.actor.masters, fresh.actor.masters, strict=True))
    assert all(torch.equal(x, y) for x, y in pairs)
    assert any((x != x.bfloat16().float()).any() for x, _ in pairs)  # bf16 weights alone would have lost these


def test_a_checkpoint_holds_these_files_and_no_pickle(folder, tmp_path):
    config = make_config(folder)
    ppo_llm.save_checkpoint(make_run(tmp_path, config), 1, make_models(config), 0.0)
    checkpoint = tmp_path / "checkpoints" / "step_1"
    names = {"actor.safetensors", "critic.safetensors", "state.json", "hashes.json"}
    assert {path.name for path in checkpoint.iterdir()} == names
    hashes = json.loads((checkpoint / "hashes.json").read_text())
    assert hashes == {name: ppo_llm.file_hash(checkpoint / name) for name in names - {"hashes.json"}}
    assert ppo_llm.is_whole(checkpoint)


def test_a_checkpoint_of_another_shape_is_an_error(folder, tmp_path):
    config = make_config(folder)
    ppo_llm.save_checkpoint(make_run(tmp_path, config), 1, make_models(config), 0.0)
    config = make_config(save_folder(tmp_path / "m", make_lm(hidden_size=16)))
    with pytest.raises(Exception, match="size|shape|must match"):
        load(tmp_path, 1, make_models(config), config)


@pytest.mark.parametrize("flags", [
    {"critic": "shared"}, {"adv_estimator": "rloo", "rollout_n": 2}, {"dtype": "bfloat16"}, {"value_pooling": "mean"}])
def test_a_checkpoint_of_another_kind_of_run_is_refused_in_one_sentence(flags, folder, tmp_path):
    config = make_config(folder)
    ppo_llm.save_checkpoint(make_run(tmp_path, config), 1, make_models(config), 0.0)
    other = make_config(folder, **flags)
    with pytest.raises(UsageError, match=f"was made with {next(iter(flags))} .*, not {next(iter(flags.values()))}"):
        load(tmp_path, 1, make_models(other), other)


def test_prompts_that_are_rendered_otherwise_than_before_are_said(folder, tmp_path, capsys):
    config = make_config(folder)
    models = make_models(config)
    ppo_llm.save_checkpoint(make_run(tmp_path, config), 1, models, 0.0)
    capsys.readouterr()
    load(tmp_path, 1, models, config)
    assert capsys.readouterr().err == ""
    run = make_run(tmp_path, config, checkpoint=tmp_path / "checkpoints" / "step_1")
    run.data_hash = "another day"
    ppo_llm.load_checkpoint(run, models)
    said = "warning: the prompts are not what they were: other rows, or a chat template that writes the date\n"
    assert capsys.readouterr().err == said


def test_a_copy_that_somebody_kept_beside_the_checkpoints_is_left_alone(folder, tmp_path):
    config = make_config(folder, output_dir=str(tmp_path / "run"), total_steps=1)
    (tmp_path / "run" / "checkpoints" / "step_1.bak").mkdir(parents=True)
    with pytest.raises(ppo_llm.UsageError, match="not empty"):  # it is no checkpoint, and not ours to touch
        main(config)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_1.bak"]


# ---- The exported model ----------------------------------------------------------------------------------


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
        logits, trained = exported(ids).logits, kept[0].actor.model.lm(ids).logits
        before = transformers.AutoModelForCausalLM.from_pretrained(start)(ids).logits
    assert torch.equal(logits, trained) and not torch.allclose(logits, before, atol=1e-3)
    assert (exported.get_output_embeddings().weight is exported.get_input_embeddings().weight) == tied
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer("abc").input_ids == make_tokenizer()("abc").input_ids
    assert tokenizer.chat_template == make_tokenizer().chat_template


@pytest.mark.slow
def test_the_exported_model_can_be_trained_again(folder, tmp_path):
    main(long_config(folder, tmp_path / "one", total_steps=1))
    shutil.copy(folder / "reward.py", tmp_path / "one" / "model")
    shutil.copy(folder / "prompts.jsonl", tmp_path / "one" / "model")
    main(long_config(tmp_path / "one" / "model", tmp_path / "two", total_steps=1))
    assert len(read_log(tmp_path / "two")) == 2


@pytest.mark.slow
def test_a_bf16_run_exports_bf16_weights(folder, tmp_path):
    main(long_config(folder, tmp_path / "run", dtype="bfloat16", total_steps=1))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    assert exported.dtype == torch.bfloat16

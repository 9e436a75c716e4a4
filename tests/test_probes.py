"""scripts/probes.py: the probes pass on the file as it is, and each fails where its part is broken."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import probes

import ppo_llm


@pytest.mark.parametrize("name", ["clip", "stop", "resume"])
def test_the_probe_passes(name):
    passed, found, _ = probes.PROBES[name]()
    assert passed, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["constant", "last", "first", "prompt", "opposite", "kl"])
def test_the_slow_probe_passes(name):
    passed, found, _ = probes.PROBES[name]()
    assert passed, found


@pytest.mark.slow
def test_a_policy_loss_with_the_wrong_sign_fails_the_probe_of_the_last_token(monkeypatch):
    right = ppo_llm.clipped_policy_loss
    monkeypatch.setattr(ppo_llm, "clipped_policy_loss", lambda *x: (-right(*x)[0], *right(*x)[1:]))
    assert not probes.probe_last()[0]


@pytest.mark.slow
def test_a_critic_that_sees_nothing_fails_the_probe_of_the_prompt(monkeypatch):
    monkeypatch.setattr(ppo_llm.LanguageModel, "values", lambda model, hidden: 0 * hidden.float().sum(-1))
    assert not probes.probe_prompt()[0]


def test_a_clip_that_does_nothing_fails_the_probe_of_the_clip(monkeypatch):
    right = ppo_llm.clipped_policy_loss
    monkeypatch.setattr(ppo_llm, "clipped_policy_loss", lambda a, b, c, *clips: right(a, b, c, 1e9, 1e9, None))
    assert not probes.probe_clip()[0]


def test_an_early_stop_that_does_nothing_fails_the_probe_of_the_stop(monkeypatch):
    kl = ppo_llm.estimate_kl
    monkeypatch.setattr(ppo_llm, "estimate_kl", lambda *x: 0 * kl(*x))
    assert not probes.probe_stop()[0]


@pytest.mark.slow
def test_a_policy_that_sees_no_prompt_fails_the_probe_of_opposite_answers(monkeypatch):
    right = ppo_llm.collect_rollout

    def blind(models, reward, examples, step, *rest):
        hidden = [ppo_llm.replace(example, prompt=[3]) for example in examples]
        return right(models, lambda _, responses: reward(examples, responses), hidden, step, *rest)

    monkeypatch.setattr(ppo_llm, "collect_rollout", blind)
    passed, found, _ = probes.probe_opposite()
    assert not passed, found


@pytest.mark.slow
def test_a_controller_that_is_not_saved_fails_the_probe_of_the_resume(monkeypatch):
    load = ppo_llm.load_checkpoint
    monkeypatch.setattr(ppo_llm, "load_checkpoint", lambda run, models: (load(run, models)[0], run.config.kl_coef))
    assert not probes.probe_resume()[0]


def test_a_probe_that_raises_fails_and_the_next_ones_are_made(monkeypatch, capsys):
    def broken():
        raise ValueError("no such tensor")

    monkeypatch.setattr(probes, "PROBES", {"first": broken, "last": lambda: (True, "fine", "")})
    with pytest.raises(SystemExit, match="True"):
        probes.main(probes.Options())
    printed = capsys.readouterr()
    assert "FAIL  first     raised ValueError('no such tensor')" in printed.out and "PASS  last" in printed.out
    assert "Traceback" in printed.err


@pytest.mark.slow
def test_a_shuffle_that_forgets_its_seed_fails_the_probe_of_the_resume(monkeypatch):
    generator = ppo_llm.torch.Generator
    monkeypatch.setattr(ppo_llm, "seeded", lambda device, *parts: generator(device).manual_seed(generator().seed()))
    assert not probes.probe_resume()[0]

"""LoRA: adapters of the policy and of the critic on one frozen trunk, which without them is the reference."""

import contextlib
import dataclasses
import io

import pytest
import torch
import transformers
from conftest import collect, make_config, make_lm, make_models, plain, save_folder, take_steps
from safetensors.torch import load_file

import ppo_llm
from ppo_llm import Config, UsageError, forward, score_tokens, update

LORA = {"lora_rank": 4, "lr": 1e-2, "kl_ctrl_coef": 0.1}


def logits_of(lm, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return lm(torch.tensor([ids])).logits


def snapshot(models: ppo_llm.Models, part: str) -> dict[str, torch.Tensor]:
    """Copies of the trunk's parameters whose name contains `part`."""
    return {name: w.detach().clone() for name, w in models.actor.model.lm.named_parameters() if part in name}


def moved(before: dict, after: dict) -> list[bool]:
    assert before and before.keys() == after.keys()
    return [not torch.equal(before[name], after[name]) for name in before]


def base_weights(models: ppo_llm.Models) -> dict[str, torch.Tensor]:
    return {name: w for name, w in snapshot(models, "").items() if "lora_" not in name}


def test_actor_critic_and_reference_share_one_trunk(folder):
    models = make_models(make_config(folder, **LORA))
    lm = models.actor.model.lm
    assert models.critic.model.lm is lm and models.reference.lm is lm
    nets = models.actor.model, models.critic.model, models.reference
    assert [net.adapter for net in nets] == ["policy", "critic", None]


def test_resident_weights_of_three_models_are_hardly_more_than_those_of_one(tmp_path):
    # the proportions of a real model: hidden size 512 and rank 4
    lm = make_lm(hidden_size=512, intermediate_size=2048, num_hidden_layers=2)
    config = make_config(save_folder(tmp_path / "m", lm), **LORA)
    models = make_models(config)
    nets = models.actor.model, models.critic.model, models.reference
    resident = {w.data_ptr(): w.nbytes for net in nets for w in net.parameters()}
    one = sum(w.nbytes for w in lm.parameters())
    assert one < sum(resident.values()) <= 1.15 * one


def test_at_the_start_the_policy_is_the_base_model_and_the_kl_is_0(folder):
    config = make_config(folder, **LORA)
    models = make_models(config)
    rollout, metrics = collect(models, config)
    assert abs(metrics["reward/kl"].item()) < 1e-6
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = [5, 9, 30]
    models.actor.model.select_adapter()
    torch.testing.assert_close(logits_of(models.actor.model.lm, ids), logits_of(plain(lm), ids), atol=1e-5, rtol=1e-5)


def test_training_moves_both_adapters_and_no_weight_of_the_trunk(folder):
    config = make_config(folder, **LORA)
    models = make_models(config)
    base, policy, critic = base_weights(models), snapshot(models, ".policy."), snapshot(models, ".critic.")
    head = models.critic.model.value_head.weight.detach().clone()
    take_steps(models, config, 2)
    assert not any(moved(base, base_weights(models)))
    assert all(moved(policy, snapshot(models, ".policy.")))
    assert all(moved(critic, snapshot(models, ".critic.")))
    assert not torch.equal(head, models.critic.model.value_head.weight)


@pytest.mark.parametrize(("role", "still"), [("actor", ".critic."), ("critic", ".policy.")])
def test_an_update_moves_the_adapter_of_its_role_only(folder, role, still):
    config = make_config(folder, **LORA)
    models = make_models(config)
    rollout, _ = collect(models, config)
    mine = ".policy." if role == "actor" else ".critic."
    before = snapshot(models, still)
    own = snapshot(models, mine)
    update(role, models, rollout, 0, 3, 0.0, config)
    assert not any(moved(before, snapshot(models, still)))
    assert any(moved(own, snapshot(models, mine)))


def test_after_training_the_trunk_without_adapters_is_still_the_reference(folder):
    config = make_config(folder, **LORA)
    models = make_models(config)
    rollout, _ = collect(models, config)
    before = score_tokens(models.reference, rollout, config)["logprobs"]
    take_steps(models, config, 2)
    assert torch.equal(score_tokens(models.reference, rollout, config)["logprobs"], before)
    trained = score_tokens(models.actor.model, rollout, config)["logprobs"]
    assert not torch.allclose(trained, before, atol=1e-3)
    assert collect(models, config)[1]["reward/kl"].item() != 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_and_log_probs_do_not_depend_on_which_model_computed_before(checkpointing, folder):
    config = make_config(folder, gradient_checkpointing=checkpointing, **LORA)
    models = make_models(config)
    take_steps(models, config, 2)
    rollout, _ = collect(models, config)
    nets = {"policy": (models.actor.model, "logprobs"), "critic": (models.critic.model, "values"),
            "reference": (models.reference, "logprobs")}
    with torch.no_grad():
        first = {name: forward(net, rollout, config)[head] for name, (net, head) in nets.items()}
        for name in ("reference", "critic", "policy", "critic", "reference", "policy"):
            net, head = nets[name]
            assert torch.equal(forward(net, rollout, config)[head], first[name]), name
    assert not torch.equal(first["policy"], first["reference"])


def test_a_critic_on_the_policys_trunk_computes_no_logits(folder):
    models = make_models(make_config(folder, **LORA))
    rollout, _ = collect(models, make_config(folder, **LORA))
    assert set(forward(models.critic.model, rollout, make_config(folder, **LORA))) == {"values"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_ratio_is_1_with_an_adapter(checkpointing, folder):
    config = make_config(folder, gradient_checkpointing=checkpointing, **LORA)
    models = make_models(config)
    take_steps(models, config, 2)
    rollout, _ = collect(models, config)
    update("critic", models, rollout, 0, 3, 0.1, config)
    assert 1 <= update("actor", models, rollout, 0, 3, 0.1, config)["policy/ratio_first"] < 1 + 1e-5


@pytest.mark.parametrize("flags", [{}, {"use_kl_loss": True, "kl_loss_type": "full", "kl_loss_coef": 0.5}])
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_gradients_under_checkpointing_are_those_without(folder, flags, role):
    gradients = []
    for checkpointing in (False, True):
        config = make_config(folder, gradient_checkpointing=checkpointing, entropy_coeff=0.1, **LORA | flags)
        models = make_models(config)
        take_steps(models, dataclasses.replace(config, ppo_epochs=2))  # B is no longer 0, and there is a KL
        rollout, _ = collect(models, config, step=1)
        learner = getattr(models, role)
        weights = ppo_llm.loss_weights(rollout.mask, "token-mean", 1.0)
        learner.backward((ppo_llm.ppo_loss(role, models, rollout, 0.5, config)[0] * weights).sum())
        gradients.append([w.grad.clone() for w in learner.masters])
    for plain_gradient, recomputed in zip(*gradients, strict=True):
        assert plain_gradient.norm() > 0
        torch.testing.assert_close(recomputed, plain_gradient, atol=1e-6, rtol=1e-4)


def test_the_full_kl_of_a_lora_policy_is_that_to_the_trunk(folder):
    config = make_config(folder, **LORA)
    models = make_models(config)
    take_steps(models, config, 2)
    rollout, _ = collect(models, config)
    with torch.no_grad():
        kl = forward(models.actor.model, rollout, config, models.reference)["kl"]
        policy = transformers.AutoModelForCausalLM.from_pretrained(folder)
        i, t = 0, len(rollout.responses[0]) - 1
        ids = rollout.prompts[i] + rollout.responses[i][:t]
        reference = logits_of(plain(policy), ids)[0, -1].log_softmax(-1)
        models.actor.model.select_adapter()
        logp = logits_of(models.actor.model.lm, ids)[0, -1].log_softmax(-1)
    assert kl[i, t].item() == pytest.approx((logp.exp() * (logp - reference)).sum().item(), rel=1e-3, abs=1e-6)


def test_the_rollout_samples_from_the_adapted_policy(folder):
    config = make_config(folder, **LORA)
    models = make_models(config)
    take_steps(models, config, 3)
    rollout, _ = collect(models, config)
    scored = score_tokens(models.actor.model, rollout, config)["logprobs"]
    assert (scored - rollout.old_logprobs).abs().max() < 1e-5
    assert (rollout.ref_logprobs - rollout.old_logprobs).abs().max() > 1e-3


@pytest.mark.parametrize("before", ["reference", "critic"])
def test_the_rollout_chooses_the_policys_adapter_whoever_computed_before(before, folder):
    config = make_config(folder, **LORA)
    models = make_models(config)
    take_steps(models, config, 2)
    expected, _ = collect(models, config)
    net = models.reference if before == "reference" else models.critic.model
    net.select_adapter()
    found, _ = collect(models, config)
    assert found.responses == expected.responses
    assert torch.equal(found.old_logprobs, expected.old_logprobs)


def test_a_shared_critic_works_beside_an_adapter(folder):
    config = make_config(folder, critic="shared", **LORA)
    models = make_models(config)
    base = base_weights(models)
    policy = snapshot(models, ".policy.")
    head = models.actor.model.value_head.weight.detach().clone()
    metrics = take_steps(models, config, 2)
    assert models.critic is None and not any(moved(base, base_weights(models)))
    assert all(moved(policy, snapshot(models, ".policy."))) and metrics["value/loss"] > 0
    assert not torch.equal(head, models.actor.model.value_head.weight)


def test_a_critic_model_with_lora_has_a_trunk_and_an_adapter_of_its_own(folder, tmp_path):
    other = save_folder(tmp_path / "critic", make_lm(seed=5))
    config = make_config(folder, critic_model=str(other), **LORA)
    models = make_models(config)
    critic = models.critic.model
    assert critic.lm is not models.actor.model.lm and critic.adapter == "critic"
    before = {name: w.detach().clone() for name, w in critic.named_parameters()}
    take_steps(models, config, 2)
    changed = {name for name, w in critic.named_parameters() if not torch.equal(w, before[name])}
    assert changed == {name for name in before if "lora_" in name or name == "value_head.weight"}


def test_the_adapters_start_depends_on_the_seed_alone(folder):
    torch.manual_seed(7)
    first = snapshot(make_models(make_config(folder, **LORA)), "lora_A")
    torch.manual_seed(8)
    again = snapshot(make_models(make_config(folder, **LORA)), "lora_A")
    other = snapshot(make_models(make_config(folder, seed=2, **LORA)), "lora_A")
    assert not any(moved(first, again)) and all(moved(first, other))


def test_alpha_scales_the_adapter_and_target_names_its_layers(folder):
    for alpha, scale in ((None, 2.0), (4.0, 1.0), (1.0, 0.25)):
        lm = make_models(make_config(folder, lora_alpha=alpha, lora_target="q_proj,v_proj", **LORA)).actor.model.lm
        layers = {name.split(".")[-1]: m.scaling["policy"] for name, m in lm.named_modules() if hasattr(m, "scaling")
                  and isinstance(m.scaling, dict)}
        assert layers == {"q_proj": scale, "v_proj": scale}


def test_bf16_adapters_have_fp32_masters(folder):
    config = make_config(folder, dtype="bfloat16", **LORA)
    models = make_models(config)
    assert {w.dtype for w in models.actor.weights} == {torch.bfloat16}
    assert {w.dtype for w in models.actor.masters} == {torch.float32}
    policy = snapshot(models, ".policy.")
    take_steps(models, config, 2)
    assert all(moved(policy, snapshot(models, ".policy.")))


def run(config: Config) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        ppo_llm.main(config)


def test_the_export_is_an_adapter_that_transformers_loads(folder, tmp_path, no_figures):
    run(make_config(folder, total_steps=2, output_dir=str(tmp_path / "a"), **LORA))
    exported = tmp_path / "a" / "model"
    files = {path.name for path in exported.iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    names = load_file(exported / "adapter_model.safetensors")
    assert names and not any("critic" in name for name in names)  # the policy's adapter only
    adapted = transformers.AutoModelForCausalLM.from_pretrained(exported)
    config = make_config(folder, total_steps=2, **LORA)
    models = make_models(config)
    checkpoint = tmp_path / "a" / "checkpoints" / "step_2"
    models.actor.load(checkpoint / "actor.safetensors")
    models.actor.model.select_adapter()
    ids = [5, 9, 30, 12]
    trained = logits_of(models.actor.model.lm, ids)
    torch.testing.assert_close(logits_of(adapted, ids), trained, atol=1e-5, rtol=1e-5)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.allclose(trained, logits_of(base, ids), atol=1e-3)
    assert transformers.AutoTokenizer.from_pretrained(exported).eos_token == "<|endoftext|>"


@pytest.mark.slow
def test_a_resumed_run_continues_bitwise(folder, tmp_path, no_figures):
    config = make_config(folder, total_steps=4, save_every=2, save_total_limit=9, **LORA)
    run(dataclasses.replace(config, output_dir=str(tmp_path / "straight")))
    resumed = dataclasses.replace(config, output_dir=str(tmp_path / "resumed"),
                                  resume=str(tmp_path / "straight" / "checkpoints" / "step_2"))
    run(resumed)
    for name in ("actor", "critic"):
        straight, again = (load_file(tmp_path / x / "checkpoints" / "step_4" / f"{name}.safetensors")
                           for x in ("straight", "resumed"))
        assert straight.keys() == again.keys() and all(torch.equal(straight[key], again[key]) for key in straight)
    sizes = [x.stat().st_size for x in (tmp_path / "straight" / "checkpoints" / "step_4").glob("*.safetensors")]
    assert max(sizes) < 3 * 4 * sum(w.numel() for w in make_lm().parameters())  # three fp32 numbers: only of adapters


@pytest.fixture(scope="module")
def one_step_run(folder, tmp_path_factory, no_figures):
    path = tmp_path_factory.mktemp("runs") / "shared"
    run(make_config(folder, total_steps=1, output_dir=str(path), **LORA | {"critic": "shared"}))
    return path


@pytest.mark.parametrize(("change", "sentence"), [
    ({"lora_rank": None}, "lora_rank 4, not None"), ({"lora_rank": 8}, "lora_rank 4, not 8"),
    ({"lora_alpha": 3.0}, "lora_alpha None, not 3.0"), ({"lora_target": "q_proj"}, "lora_target all-linear, not"),
    ({"critic": "separate"}, "critic shared, not separate"), ({"model": None}, "model ")])
def test_another_adapter_or_model_than_the_checkpoints_is_refused(
        one_step_run, folder, flat_folder, tmp_path, no_figures, change, sentence):
    if "model" in change:
        change = {"model": str(flat_folder)}
    config = make_config(folder, total_steps=1, **LORA | {"critic": "shared"})
    changed = dataclasses.replace(config, output_dir=str(tmp_path / "s"), **change, resume=str(one_step_run))
    with pytest.raises(UsageError, match=f"was made with {sentence}"):
        run(changed)


@pytest.mark.parametrize(("flags", "sentence"), [
    ({"lora_alpha": 8.0}, "need lora_rank"), ({"lora_target": "q_proj"}, "need lora_rank"),
    ({"lora_rank": 0}, "lora_rank cannot be 0"), ({"lora_rank": -1}, "lora_rank cannot be -1"),
    ({"lora_rank": 4, "lora_alpha": 0.0}, "lora_alpha cannot be 0.0")])
def test_what_cannot_work_is_refused(flags, sentence):
    with pytest.raises(UsageError, match=sentence):
        ppo_llm.check_config(Config(**flags))


@pytest.mark.parametrize("target", ["nonsense", "q_proj, v_prj", "q_proj,lm_head", ""])
def test_a_target_that_is_no_layer_or_the_output_head_is_refused_by_name(folder, target):
    wrong = target.split(",")[-1].strip()
    with pytest.raises(UsageError, match=f"lora_target '{wrong}': no layer has this name"):
        make_models(make_config(folder, lora_target=target, **LORA))


def test_targets_may_be_written_with_spaces(folder):
    lm = make_models(make_config(folder, lora_target="q_proj, v_proj", **LORA)).actor.model.lm
    assert {n.split(".")[-1] for n, m in lm.named_modules() if hasattr(m, "lora_A")} == {"q_proj", "v_proj"}


def test_an_exported_adapter_given_as_the_model_is_explained(folder, tmp_path, no_figures):
    run(make_config(folder, total_steps=1, output_dir=str(tmp_path / "r"), **LORA))
    with pytest.raises(UsageError, match="is a LoRA adapter: merge it first"):
        ppo_llm.load_tokenizer(make_config(folder, model=str(tmp_path / "r" / "model")))


def mean_score_after(config: Config, steps: int) -> float:
    """Mean score of the last three of some steps; the reward is the share of e among 8 tokens."""
    def reward(examples, responses):
        return [response.count("e") / 8 for response in responses]

    models = make_models(config)
    scores = []
    for step in range(steps):
        examples = [ppo_llm.Example("", "e", [3 + (7 * i + step) % 50]) for i in range(config.train_batch_size)]
        rollout, metrics = ppo_llm.collect_rollout(models, reward, examples, step, 0.0, config)
        scores.append(metrics["reward/score"].item())
        for role in ("critic", "actor"):
            update(role, models, rollout, step, steps, 0.0, config)
    return sum(scores[-3:]) / 3


@pytest.mark.slow
def test_lora_learns_what_is_rewarded_and_not_without_a_learning_rate(folder):
    config = make_config(folder, train_batch_size=32, ppo_epochs=2, ppo_mini_batch_size=16,
                         **LORA | {"lr": 2e-2, "kl_ctrl_coef": 0.0, "lora_rank": 16})
    assert mean_score_after(dataclasses.replace(config, lr=0.0), 3) < 0.1
    assert mean_score_after(config, 22) > 0.4


def test_a_layer_at_the_top_of_a_critics_own_trunk_can_be_a_target(folder, tmp_path):
    config = make_config(folder, lora_target="embed_tokens, q_proj", critic_model=str(folder), **LORA)
    names = make_models(config).critic.names
    assert any("embed_tokens" in name for name in names) and any("q_proj" in name for name in names)

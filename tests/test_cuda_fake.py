"""The code for CUDA without a GPU: fake tensors that say they are on cuda, in bf16, meet every line but the kernels.

A fake tensor has a shape, a dtype and a device, but no numbers. An operation whose arguments are on different
devices raises, as it would on a GPU: a tensor left on the CPU is found.
"""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SHAPE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_llm

GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10; static impl::DeviceGuardImplRegistrar r(kCUDA, new impl::NoOpDeviceGuardImpl<kCUDA>());"""
KINDS = {"qwen2": {}, "gemma2": {"head_dim": 8, "sliding_window": 6}, "gpt2": {}}
SOURCE = Path(ppo_llm.__file__).read_text()


@pytest.fixture(scope="module", autouse=True)
def guard(tmp_path_factory):
    """A CPU build of torch has no device guard for cuda: one that does nothing."""
    if torch.cuda.is_available() or shutil.which("g++") is None:
        pytest.skip("needs g++ and a build of torch without CUDA")
    folder = tmp_path_factory.mktemp("guard")
    (folder / "g.cpp").write_text(GUARD)
    build = f"g++ -shared -fPIC -std=c++20 -I{torch.__path__[0]}/include g.cpp -o g.so -L{torch.__path__[0]}/lib -lc10"
    subprocess.run(build.split(), cwd=folder, check=True)
    ctypes.CDLL(str(folder / "g.so"))


class Numbers(TorchDispatchMode):
    """Answers what depends on numbers: the last row has just ended, every number is 1, every truth False."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            return {torch.bool: False, torch.int64: 1}.get(args[0].dtype, 1.0)
        if func is aten.nonzero.default:  # rows that go on
            return torch.zeros(len(args[0]) - 1, 1, dtype=torch.long, device=args[0].device)
        if func is aten.index.Tensor and args[1][0].dtype == torch.bool:  # rows that have ended
            assert args[0].device == args[1][0].device
            return args[0][:1]
        if func in (aten.index_put_.default, aten.index.Tensor):  # a GPU's index into memory of the CPU
            assert args[0].is_cuda or not any(x.is_cuda for x in args[1] if x is not None)
        return func(*args, **(kwargs or {}))


def make_fake(module, kind: str, config, with_values: bool):
    """A language model whose weights say that they are on cuda."""
    lm_config = transformers.AutoConfig.for_model(kind, **SHAPE | KINDS[kind])
    lm = transformers.AutoModelForCausalLM.from_config(lm_config, dtype=torch.bfloat16).eval()
    for part in lm.modules():
        for name, x in part._buffers.items():
            part._buffers[name] = None if x is None else x.to("cuda")
        for name, x in part._parameters.items():
            part._parameters[name] = None if x is None else torch.nn.Parameter(x.to("cuda"))
    lm.tie_weights()
    return module.LanguageModel(lm, 60, with_values, config)


def fill_gradients(loss: torch.Tensor, weights: list[torch.Tensor]) -> None:
    """In place of autograd: a gradient for every weight."""
    assert loss.is_cuda and loss.dtype == torch.float32 and loss.dim() == 0 and loss.requires_grad
    for weight in weights:
        weight.grad = torch.ones_like(weight)


def run_on_fake_cuda(module, kind: str = "qwen2") -> None:
    """A rollout, its scoring, and an optimizer step of a policy with a value head."""
    with FakeTensorMode(allow_non_fake_inputs=True), Numbers():
        config = module.Config(max_response_length=4, train_batch_size=3, ppo_mini_batch_size=3, rollout_slots=2,
                               kl_ctrl_coef=0.1, kl_penalty="full", micro_batch_tokens=20)
        policy = make_fake(module, kind, config, True)
        reference = make_fake(module, kind, config, False)
        actor = module.Learner(policy, 1e-3, 1e-2, config)
        models = module.Models(actor, None, reference, None, {1, 7}, module.generate)
        prompts = [[3] * 4, [4] * 9, [5]]

        noise = torch.rand(3, 4, device="cuda")
        stop = torch.tensor([1, 7], device="cuda")
        responses, logprobs = module.decode(policy, prompts, noise, stop, config)
        assert [x.dtype for x in logprobs] == [torch.float32] * 3 and all(x.is_cuda for x in logprobs)
        module.generate(policy, prompts, {1, 7}, config, None)

        responses = [[5] * 4, [6] * 2, [7]]
        mask = torch.ones(3, 4, device="cuda")
        scores = torch.ones(3, device="cuda")
        stopped = torch.ones(3, dtype=torch.bool, device="cuda")
        rollout = module.Rollout(prompts, responses, mask, -mask, scores=scores, stopped=stopped)
        with torch.no_grad():
            metrics = module.score_anew(models, rollout, config)
            module.assign_credit(models, rollout, 0.1, config)
        assert set(metrics) >= {"rollout/logprob_gap", "rollout/is_weight_max"}
        rollout.ratio = mask.clone()
        rollout.clipped = mask.clone()
        tensors = [x for x in vars(rollout).values() if isinstance(x, torch.Tensor)]
        assert len(tensors) == 13 and all(x.is_cuda for x in tensors)

        masters = [master for master, weight in zip(actor.masters, actor.weights, strict=True) if master is not weight]
        assert len(masters) == len(actor.weights)  # bf16 weights have fp32 masters
        assert all(master.is_cuda and master.dtype == torch.float32 for master in masters)
        with pytest.MonkeyPatch.context() as monkeypatch:  # autograd's threads need a real device
            monkeypatch.setattr(torch.Tensor, "backward", lambda loss: fill_gradients(loss, actor.weights))
            found = module.train_mini_batch("actor", models, rollout, [0, 2, 1], 0.5, 0.1, config)
        assert actor.skipped_steps == 0 and found["grad_norm"] == 1.0
        state = actor.get_state(0)
        assert state["exp_avg"].is_cuda and state["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["qwen2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(KINDS)[1:])])
def test_rollout_scoring_and_update_run_on_fake_cuda_tensors_in_bf16(kind):
    run_on_fake_cuda(ppo_llm, kind)


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize(("place", "fault"), [
    ("tokens = torch.zeros(len(prompts), limit, dtype=torch.long, device=device)",
     "tokens = torch.zeros(len(prompts), limit, dtype=torch.long)"),
    ("logprobs = torch.zeros(len(prompts), limit, device=device)", "logprobs = torch.zeros(len(prompts), limit)"),
    ("lengths = torch.full((len(prompts),), limit, device=device)", "lengths = torch.full((len(prompts),), limit)"),
    ("padded = [torch.tensor(prompt, device=device) for", "padded = [torch.tensor(prompt) for"),
    ("rows = torch.arange(len(prompts), device=device)", "rows = torch.arange(len(prompts))"),
    ("stop = torch.tensor(sorted(stop_ids), device=device)", "stop = torch.tensor(sorted(stop_ids))"),
    ("select_adapter()\n        rows = [torch.tensor(sequence, device=self.lm.device)",
     "select_adapter()\n        rows = [torch.tensor(sequence)"),
    ("for response in part.responses for token in response], device=states.device)",
     "for response in part.responses for token in response])"),
    ("gap = (old_logprobs - sampled_logprobs).detach()", "gap = (old_logprobs - sampled_logprobs).detach().cpu()"),
    ("device=lm.device, dtype=lm.dtype)", "dtype=lm.dtype)"),
    ("weights = torch.zeros_like(mask)\n", "weights = torch.zeros(mask.shape)\n"),
    ("results = defaultdict(lambda: torch.zeros_like(rollout.mask))",
     "results = defaultdict(lambda: torch.zeros(rollout.mask.shape))"),
    ("gradient = weight.grad.float()", "gradient = weight.grad"),
    ("else w.detach().float() for w", "else w.detach().float().cpu() for w"),
])
def test_a_tensor_left_on_the_cpu_or_in_the_wrong_dtype_is_found(place, fault, tmp_path):
    assert SOURCE.count(place) == 1
    path = tmp_path / "planted.py"
    path.write_text(SOURCE.replace(place, fault))
    spec = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "planted", module)
        spec.loader.exec_module(module)
        with pytest.raises((RuntimeError, AssertionError)):
            run_on_fake_cuda(module)

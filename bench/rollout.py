"""Rollouts: tokens per second of the engines on the same prompts, and what it takes to bring vLLM's weights up to date.

Every engine first has to give the greedy completions of transformers' ``generate``, prompt by prompt (fp32), or to be
no further from the trainer's best tokens than twice what transformers is (bf16). What is timed is sampling at
temperature 1: a group for each prompt, all completions of full length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.checks import Outputs
from bench.harness import Call, Case, Problem, Variant
from bench.machine import copy_ceiling, gemm_ceiling
from bench.rollout_inputs import LARGE, SMALL, TINY, Load, RolloutInputs
from revisual_fast.packing import Prompt
from revisual_fast.rollout import vllm_problem
from revisual_fast.rollout.engine import Engine, Sampling
from revisual_fast.rollout.hf import HFEngine
from revisual_fast.rollout.messages import EngineSettings
from revisual_fast.rollout.weights import WeightSource, compare

OURS, TRANSFORMERS, VLLM = "revisual-fast", "transformers generate", "revisual-fast on vLLM"
GEMM_ROWS = 2048
_IMAGE, _LARGE_IMAGE = (1, 28, 28), (1, 70, 68)
LOADS = {
    load.label: load
    for load in (
        Load(512, 32, 8, 4, _IMAGE, TINY),
        Load(250, 64, 8, 4, _IMAGE, TINY),
        Load(40, 32, 8, 16, (1, 8, 8), TINY),
        Load(250, 32, 8, 2, _IMAGE, SMALL),
        Load(1450, 256, 8, 16, _LARGE_IMAGE, LARGE),
    )
}
BUCKET = 64 << 20


def suite(name: str) -> list[Case]:
    if name == "gpu":
        return [load.case("bfloat16", "cuda") for load in LOADS.values() if load.model == LARGE]
    return [load.case("float32", "cpu") for load in LOADS.values() if load.model != LARGE]


def rollout(case: Case) -> Problem:
    """``case.label`` on every engine."""
    x = RolloutInputs(LOADS[case.label], case.torch_dtype, case.device)
    load = x.load

    def answer() -> Outputs:
        alone = [x.transformers([p], do_sample=False) for p in x.prompts]
        return {"greedy": torch.stack(alone).expand(-1, load.group, -1)}

    def errors(outputs: Outputs, reference: Outputs) -> dict[str, float]:
        if case.dtype == "float32":
            return {"tokens": float((outputs["greedy"] != reference["greedy"]).double().mean())}
        return {"regret": x.regret([list(group) for group in outputs["greedy"]])}

    variants = [*_embedded(x), *_transformers(x), *_vllm(x, case)]
    text = x.config.text_config
    sizes = (GEMM_ROWS, text.hidden_size, text.intermediate_size)
    ceilings = {"copy": copy_ceiling(case.device), "gemm": gemm_ceiling(*sizes, case.torch_dtype, case.device)}
    n_bytes = load.response * sum(p.nbytes for p in x.policy.family.text.parameters())  # weights, once for each token
    flops = rollout_flops(x, load.prompts, load.prompts)
    return Problem(case, variants, answer, flops, n_bytes, ceilings, errors=errors, long_calls=True)


def rollout_flops(x: RolloutInputs, prompts: int, images: int) -> int:
    """Two for each parameter and token or patch; so many prompts are prefilled, so many images encoded."""
    text = sum(p.numel() for p in x.policy.family.text.layers.parameters())
    head, tower = x.policy.head_weight.numel(), x.policy.family.visual
    assert tower is not None
    vision = sum(p.numel() for p in tower.parameters())
    patches = images * x.load.grid[0] * x.load.grid[1] * x.load.grid[2]
    return 2 * (text * (prompts * x.load.prompt + x.load.tokens) + head * x.load.tokens + vision * patches)


def _checked(x: RolloutInputs, ask: Callable[[Sampling], Tensor], reset: Callable[[], Any] | None = None) -> Call:
    """Sampling, with the greedy completions beside its output, that the variant is judged by. ``ask`` gives
    [prompts, group, C]."""
    greedy = ask(Sampling(x.load.response, temperature=0))
    expected = (x.load.prompts, x.load.group, x.load.response)

    def run() -> Outputs:
        ids = ask(Sampling(x.load.response, seed=1))
        assert ids.shape == expected, f"tokens of shape {tuple(ids.shape)} instead of {expected}"
        return {"greedy": greedy}

    return Call(run, reset)


def _embedded(x: RolloutInputs) -> Iterator[Variant]:
    """As it is, and with a prompt of its own for each completion."""
    n, flops = x.load.group, rollout_flops(x, x.load.prompts, x.load.prompts)

    def ask(engine: Engine, prompts: list[Prompt], copies: int) -> Callable[[Sampling], Tensor]:
        def asked(sampling: Sampling) -> Tensor:
            groups = engine.generate(prompts, copies, sampling)
            return torch.stack([r.ids for group in groups for r in group]).view(-1, n, x.load.response)

        return asked

    def embedded(name: str, prompts: list[Prompt], copies: int, flops: int) -> Variant:
        def setup() -> Call:
            return _checked(x, ask(HFEngine(x.policy, []), prompts, copies))

        return Variant(name, "ours", setup, yardstick=TRANSFORMERS, flops=flops)

    yield embedded(OURS, x.prompts, n, flops)
    apart = [replace(p, image_keys=(f"{p.image_keys[0]}/{i}",)) for p in x.prompts for i in range(n)]
    yield embedded(f"{OURS}, a prompt for each completion", apart, 1, rollout_flops(x, len(apart), len(apart)))


def _transformers(x: RolloutInputs) -> Iterator[Variant]:
    """``num_return_sequences`` for all prompts at once, and prompt by prompt. It encodes an image once, too."""
    n, flops = x.load.group, rollout_flops(x, x.load.prompts * x.load.group, x.load.prompts)

    def variant(name: str, batches: list[list[Prompt]], note: str) -> Variant:
        def ask(sampling: Sampling) -> Tensor:
            greedy = sampling.temperature == 0  # it refuses to return one greedy sequence several times
            options = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "num_return_sequences": n}
            parts = [x.transformers(batch, **options) for batch in batches]
            return torch.cat(parts).view(x.load.prompts, -1, x.load.response).expand(-1, n, -1)

        return Variant(name, "plain", lambda: _checked(x, ask), note=note, yardstick=TRANSFORMERS, flops=flops)

    yield variant(TRANSFORMERS, [x.prompts], f"num_return_sequences={n}, all prompts at once")
    yield variant(f"{TRANSFORMERS}, prompt by prompt", [[p] for p in x.prompts], f"num_return_sequences={n}")


# -- vLLM


def _vllm(x: RolloutInputs, case: Case) -> Iterator[Variant]:
    """In a process of its own, with its prefix cache and without; what it keeps is dropped before each call."""
    for name, prefix in ((VLLM, True), (f"{VLLM}, no prefix cache", False)):
        problem = vllm_problem()

        def setup(prefix: bool = prefix) -> Call:
            engine = start_vllm(x, case, prefix_cache=prefix)
            engine.update_weights(x.policy, 1)

            def ask(sampling: Sampling) -> Tensor:
                groups = engine.generate(x.prompts, x.load.group, sampling)
                return torch.stack([torch.stack([r.ids for r in group]) for group in groups])

            return _checked(x, ask, lambda: engine.connection.call("drop_caches"))

        yield Variant(
            name,
            "ours",
            None if problem else setup,
            problem,
            "" if problem else "memory is its process's",
            yardstick=TRANSFORMERS,
            extra=lambda outputs, reference: {"peak_bytes": None},
        )


def start_vllm(x: RolloutInputs, case: Case, **settings: Any) -> Any:
    """A :class:`~revisual_fast.rollout.remote.RemoteEngine` that is told nothing yet."""
    from revisual_fast.rollout.remote import RemoteEngine
    from revisual_fast.rollout.vllm.process import ProcessConnection
    from revisual_fast.rollout.vllm.transfer import make_sender

    cuda, folder = case.device == "cuda", Path(x.folder.name)
    device = "cuda:0" if cuda else "cpu"
    transfer = "ipc" if cuda else "host"
    asked = EngineSettings(
        model=str(folder),
        dtype=case.dtype,  # type: ignore[arg-type]
        device=device,
        max_model_len=x.load.prompt + x.load.response,
        max_batch=x.load.prompts * x.load.group,
        memory_share=0.3,
        transfer=transfer,  # type: ignore[arg-type]
        images=1,
        **settings,
    )
    connection = ProcessConnection(asked, start_seconds=600.0, stall_seconds=300.0, log=folder / "vllm.log")
    return RemoteEngine(connection, make_sender(transfer, connection, bucket_bytes=BUCKET, device=torch.device(device)))


# -- weights


def sync_suite(name: str) -> list[Case]:
    """All weights of one model."""
    config, dtype, device = (LARGE, "bfloat16", "cuda") if name == "gpu" else (SMALL, "float32", "cpu")
    load = next(load for load in LOADS.values() if load.model == config)
    return [replace(load.case(dtype, device), op="weight_sync", n=0, label=f"all weights of {_name(load)}")]


def _name(load: Load) -> str:
    return load.label.partition(",")[0]


def weight_sync(case: Case) -> Problem:
    """All weights to vLLM in one update, against a copy of them; checked by the fingerprints of what arrived."""
    load = next(load for load in LOADS.values() if case.label.endswith(f" {_name(load)}"))
    x = RolloutInputs(load, case.torch_dtype, case.device)
    source = WeightSource(x.policy)
    n_bytes = sum(entry.bytes for entry in source.entries())
    ours = source.fingerprints()
    problem = vllm_problem()

    def setup() -> Call:
        engine = start_vllm(x, case)
        engine.update_weights(x.policy, 1)

        def run() -> Outputs:
            engine.sender.send(source, None, 2)
            theirs = engine.connection.call("fingerprints", names=list(ours))
            return {"different": torch.tensor(len(compare(ours, theirs["workers"], theirs["mapping"])))}

        def timed() -> Outputs:
            engine.sender.send(source, None, 2)
            return {}

        return Call(_first(run, timed))

    def copied() -> Call:
        target = {name: torch.empty_like(tensor) for name, tensor in source.tensors()}

        def run() -> Outputs:
            for name, tensor in source.tensors():
                target[name].copy_(tensor)
            return {"different": torch.tensor(0)}

        return Call(run)

    kind = "CUDA IPC" if case.device == "cuda" else "shared host memory"
    variants = [
        Variant(f"{OURS}, {kind}", "ours", None if problem else setup, problem, "to vLLM", yardstick="copy"),
        Variant("copy", "plain", copied, yardstick="copy"),
    ]
    return Problem(
        case,
        variants,
        lambda: {},
        0,
        2 * n_bytes,
        {"copy": copy_ceiling(case.device)},
        errors=lambda outputs, reference: {name: float(value) for name, value in outputs.items()},
        long_calls=True,
    )


def _first(first: Callable[[], Outputs], later: Callable[[], Outputs]) -> Callable[[], Outputs]:
    """Calls ``first`` once, then ``later``."""
    todo = [first]
    return lambda: (todo.pop() if todo else later)()

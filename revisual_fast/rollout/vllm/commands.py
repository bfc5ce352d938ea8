"""vLLM's engine in this process, and the trainer's commands to it."""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from revisual_fast.rollout.engine import Sampling
from revisual_fast.rollout.messages import Alive, EngineSettings, Event, Failed, Finished, Problem, Request
from revisual_fast.rollout.vllm.completions import end_problem, length_problem, sampling_params
from revisual_fast.rollout.vllm.inputs import engine_input

__all__ = ["Commands", "Refused", "problem_of"]

ALIVE_SECONDS = 1.0
NORMALIZE = "mm_device_do_normalize"
DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
"""Environment, where it says nothing else."""
CPU_DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer works on the same cores
}


class Refused(Exception):
    """What was asked cannot be done; the engine is as it was."""


class Commands:
    """One method for each :class:`~revisual_fast.rollout.messages.Command`; ``start`` comes first.

    Raises :class:`Refused` for what cannot be done; after any other exception the engine is of no use any more.
    """

    def __init__(self) -> None:
        self.engine: Any = None
        self._held = 0  # bytes, on CUDA

    # -- life

    def start(self, settings: EngineSettings) -> int:
        """Rows of the model's head."""
        if settings.masks and not settings.device.startswith("cuda"):
            raise Refused(
                "vLLM returns sampling masks on CUDA only; use the embedded engine, or sample with top_p 1 and top_k 0"
            )
        os.environ.update(environment(settings, os.environ))
        if not settings.device.startswith("cuda"):
            torch.compiler.set_stance("force_eager")  # the sampler's few functions are not worth a compiler's minute
        from vllm import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        import revisual_fast.rollout.vllm.extension  # noqa: F401  before the model is built

        try:
            arguments = engine_arguments(settings)
            if hasattr(EngineArgs, NORMALIZE):  # the versions that can
                arguments[NORMALIZE] = False  # the patches come normalised
            self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
        except ValueError as error:
            if "memory" in str(error):  # too little is free on the device
                raise torch.OutOfMemoryError(str(error)) from error
            raise Refused(f"vLLM does not start: {error}") from error
        assert not any(problems := self.engine.collective_rpc("revisual_problems")), problems
        self.settings = settings
        self._held = self._used()
        return self.engine.model_config.get_vocab_size()

    def close(self) -> None:
        if self.engine is not None:
            self.engine.engine_core.shutdown()
            self.engine = None
            gc.collect()  # what vLLM shares between its processes goes with its owner

    def sleep(self, level: int) -> None:
        self._check_sleep()
        self._resized(lambda: self.engine.sleep(level))

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        self._check_sleep()
        self._resized(lambda: self.engine.wake_up(None if tags is None else list(tags)))

    def memory(self) -> int:
        """Bytes: on CUDA the device's, as far as this engine took them; otherwise of its processes."""
        return self._held if self._on_cuda else self._used()

    def world_size(self) -> int:
        return self.engine.vllm_config.parallel_config.world_size

    @property
    def _on_cuda(self) -> bool:
        return self.settings.device.startswith("cuda")

    def _used(self) -> int:
        return sum(self.engine.collective_rpc("revisual_memory"))

    def _check_sleep(self) -> None:
        if not self._on_cuda:
            raise Refused("vLLM sleeps on CUDA only; set rollout.sleep: off")

    def _resized(self, work: Callable[[], object]) -> None:
        """The trainer waits meanwhile, so what the device gains or loses is this engine's."""
        before = self._used()
        work()
        self._held += self._used() - before

    # -- weights

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})

    def start_weight_update(self) -> None:
        self.engine.collective_rpc("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.engine.collective_rpc("update_weights", kwargs={"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.engine.collective_rpc("finish_weight_update")
        if weight_version is not None:
            self.engine.set_weight_version(weight_version)

    def drop_caches(self) -> None:
        """Keys, values and image features that were computed with other weights."""
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM's prefix cache is in use; it cannot be dropped while requests run")
        self.engine.reset_mm_cache()
        self.engine.reset_encoder_cache()

    def fingerprints(self, names: Sequence[str]) -> dict[str, Any]:
        """``workers``: parameter -> fingerprint, for each of them; ``mapping``: weight of ``names`` -> parameter."""
        workers = self.engine.collective_rpc("revisual_fingerprints")
        mapping = self.engine.collective_rpc("revisual_names", args=(list(names),))[0]
        return {"workers": workers, "mapping": mapping}

    # -- completions

    def generate(self, requests: Sequence[Request], n: int, sampling: Sampling, emit: Callable[[Event], None]) -> None:
        """Emits every request's Finished or Failed as it comes about, and Alive in between."""
        if self.engine.is_sleeping():
            raise Refused("the engine sleeps; wake it up before it is to generate")
        params = self._params(n, sampling)
        said = time.monotonic()
        for request in requests:
            problem = self._add(request, params)
            if problem:
                emit(Failed(request.index, problem))
            said = _stay_alive(said, emit)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    emit(_answer(output, n, self.settings.masks and sampling.masks))
                    said = time.monotonic()
            said = _stay_alive(said, emit)

    def _params(self, n: int, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked = sampling_params(n, sampling, self.settings, self.engine.model_config.get_vocab_size())
        return SamplingParams(**asked, output_kind=RequestOutputKind.FINAL_ONLY)

    def _add(self, request: Request, params: Any) -> str:
        """Why the request cannot be served; empty if it can."""
        if problem := length_problem(request, params.max_tokens, self.settings):
            return problem
        params = params.clone()
        params.seed = request.seed  # completion i takes seed + i
        try:
            self.engine.add_request(str(request.index), engine_input(request), params)
        except _refusals() as error:
            return str(error)
        return ""


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """What vLLM's ``EngineArgs`` is called with. All weights come from the trainer."""
    cuda = settings.device.startswith("cuda")
    return {
        "model": settings.model,
        "load_format": "dummy",
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_batch,
        "tensor_parallel_size": settings.tensor_parallel,
        "enable_prefix_caching": settings.prefix_cache,
        "enforce_eager": not cuda,
        "enable_sleep_mode": settings.sleep,
        "return_sampling_mask": settings.masks,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
        "weight_transfer_config": {"backend": settings.transfer},
        "worker_extension_cls": "revisual_fast.rollout.vllm.extension.WorkerExtension",
        "limit_mm_per_prompt": {"image": max(settings.images, 1), "video": 0},
        "skip_mm_profiling": True,
        "mm_processor_cache_gb": 0,
        "disable_log_stats": True,
        # A CPU's random generators cannot take back a draw, which vLLM wants of a request that was prefilled in part.
        **(
            {"gpu_memory_utilization": settings.memory_share}
            if cuda
            else {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, settings.max_model_len)}
        ),
    }


def environment(settings: EngineSettings, given: Mapping[str, str]) -> dict[str, str]:
    """What vLLM has to find in the environment when it is imported."""
    result = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    result |= {key: value for key, value in DEFAULTS.items() if key not in given}
    if not settings.device.startswith("cuda"):
        return result | {key: value for key, value in CPU_DEFAULTS.items() if key not in given}
    first, count = torch.device(settings.device).index or 0, settings.tensor_parallel
    shown = given.get("CUDA_VISIBLE_DEVICES", "")
    devices = shown.split(",") if shown else [str(i) for i in range(first + count)]
    if len(devices) < first + count:
        raise Refused(f"tensor_parallel {count} from {settings.device} needs more devices than the {len(devices)} here")
    return result | {"CUDA_VISIBLE_DEVICES": ",".join(devices[first : first + count])}


def _refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that it cannot serve."""
    from vllm import exceptions

    newer = getattr(exceptions, "VLLMClientError", None)  # since it is no ValueError any more
    return (ValueError, newer) if newer else (ValueError,)


def _stay_alive(said: float, emit: Callable[[Event], None]) -> float:
    """Emits Alive if the last event is long ago; when the last one was."""
    if time.monotonic() - said < ALIVE_SECONDS:
        return said
    emit(Alive())
    return time.monotonic()


def _answer(output: Any, n: int, masks: bool) -> Finished | Failed:
    """The event for vLLM's output of a finished request; a single greedy completion stands for all ``n``."""
    index, completions = int(output.request_id), output.outputs * (n // len(output.outputs))
    reasons = [c.finish_reason for c in completions]
    if problem := end_problem(reasons):
        return Failed(index, problem)
    return Finished(
        index,
        ids=[list(c.token_ids) for c in completions],
        logp=[[at[token].logprob for token, at in zip(c.token_ids, c.logprobs, strict=True)] for c in completions],
        finish_reason=reasons,
        masks=[c.sampling_mask.token_ids for c in completions] if masks else None,
    )


def problem_of(error: BaseException) -> Problem:
    """What the trainer is told of an exception."""
    if isinstance(error, Refused):
        return Problem("request", str(error))
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    short = any(isinstance(e, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(e) for e in chain)
    lines = "".join(traceback.format_exception(error)).strip().splitlines()
    return Problem("out_of_memory" if short else "engine", "\n".join(lines[-8:]))

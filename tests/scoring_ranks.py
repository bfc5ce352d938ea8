"""Scoring on two ranks, each a forked process: ``python -m tests.scoring_ranks`` says which cases went well.

A process that has computed before cannot fork safely, which is why this is a program of its own.
"""

from __future__ import annotations

import importlib.util
import os
import socket
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from revisual_fast.integrations.transformers import accelerate_scoring
from tests.numerics import relative_error
from tests.scoring import batch, build, plain


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def leave() -> None:
    """End this process as it is: what DDP keeps ends its group with the GIL held, and waits for a thread that may want
    it (pytorch/pytorch#56297)."""
    os._exit(0)


def shares(x: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {name: value[rank : rank + 1] for name, value in x.items()}


def _rank(rank: int, port: int, how: str) -> None:
    """Each rank scores one sequence; the gradient that comes out is the mean over ranks."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, tied = batch(), how == "fsdp2, tied"
    whole = build("llama", tie_word_embeddings=tied)
    (sum(loss_of(plain(whole, shares(x, r))) for r in range(2)) / 2).backward()  # type: ignore[union-attr]
    wanted = {n: p.grad for n, p in whole.named_parameters()}
    model = build("llama", tie_word_embeddings=tied)
    run: Any = model
    if how.startswith("ddp"):
        accelerate_scoring(model)
        run = nn.parallel.DistributedDataParallel(model, find_unused_parameters=how == "ddp, unused")
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        if "own head" in how or "resharded" in how:
            fully_shard(model.lm_head, reshard_after_forward="resharded" in how)
        if how == "fsdp2, scored last":
            fully_shard(model)
            accelerate_scoring(model)
        else:
            accelerate_scoring(model)
            fully_shard(model)
    if "resharded" in how:
        with pytest.raises(ValueError, match="the head is sharded again"):
            run(**shares(x, rank), score=True)
        leave()
    out = run(**shares(x, rank), score=True)
    check_gradients(out, model, wanted)
    leave()


def check_gradients(out: Any, model: nn.Module, wanted: dict[str, Any]) -> None:
    """Those of what ``model`` has returned, whole where they are divided over the ranks."""
    loss_of((out.logp, out.entropy)).backward()
    for name, parameter in model.named_parameters():
        grad: Any = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        assert relative_error(grad, wanted[name]) < 1e-5, name


def loss_of(scores: tuple[Tensor, Tensor]) -> Tensor:
    return -scores[0].mean() - 0.1 * scores[1].mean()


HOW = [
    "ddp",
    "ddp, unused",
    "fsdp2",
    "fsdp2, tied",
    "fsdp2, scored last",
    "fsdp2, own head",
    "fsdp2, resharded own head",
]


def _parallel_rank(rank: int, port: int) -> None:
    """Both ranks score the same rows with half of the head each."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, model = batch(), build("llama", tie_word_embeddings=False)
    loss_of(plain(model, x)).backward()
    wanted = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    whole = model.lm_head.weight.detach()
    model.lm_head.weight = nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)]))
    check_gradients(accelerate_scoring(model)(**x, score=True), model, wanted)
    leave()


def _liger_rank(rank: int, port: int) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Theirs

    from revisual_fast.integrations.liger import LigerFusedLinearGRPOLoss
    from tests.unit import test_integration_liger as unit

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x = unit.batch(seed=rank)
    x["attention_mask"][0, 3:] *= rank  # another number of tokens on each
    for items in (None, 25.0):
        got = unit.call(LigerFusedLinearGRPOLoss, x, None, {"loss_type": "dapo"}, num_items_in_batch=items)
        theirs = unit.call(Theirs, x, None, {"loss_type": "dapo", "compiled": False}, num_items_in_batch=items)
        for ours, liger in zip(got, theirs, strict=True):
            assert relative_error(ours, liger) < 2e-5
    leave()


CASES: dict[str, tuple[Any, ...]] = {how: (_rank, how) for how in HOW}
CASES["a head divided by rows"] = (_parallel_rank,)
if importlib.util.find_spec("liger_kernel") is not None:
    CASES["liger"] = (_liger_rank,)

if __name__ == "__main__":
    for case, (rank, *how) in CASES.items():
        mp.start_processes(rank, (free_port(), *how), nprocs=2, start_method="fork")
        print(case)

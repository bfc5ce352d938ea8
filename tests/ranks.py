"""What the tests of several ranks run in each of them: ``torchrun ... -m tests.ranks NAME ARGUMENTS``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]


def torchrun(*arguments: str, ranks: int = 2) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def communication() -> None:
    from revisual_fast.distributed import joined, world

    with joined() as ranks:
        assert ranks == world()
        mine = ranks.share(range(5))
        assert mine == ([0, 2, 4], [1, 3])[ranks.rank]
        assert ranks.whole(ranks.gather([x * 10 for x in mine])) == [0, 10, 20, 30, 40]
        assert ranks.sum(torch.tensor([1.0, ranks.rank])).tolist() == [2.0, 1.0]
        assert ranks.any(ranks.rank == 1)
        assert not ranks.any(False)
        assert ranks.agree(ranks.rank) == 0
        own = {
            f"{ranks.rank}.a": torch.arange(3) + ranks.rank,
            f"{ranks.rank}.b": torch.tensor(0.5, dtype=torch.bfloat16),
        }
        found = ranks.collect(own)
        assert sorted(found) == (["0.a", "0.b", "1.a", "1.b"] if ranks.main else [])
        assert not ranks.main or found["1.a"].tolist() == [1, 2, 3]
        failures(ranks)
        assert ranks.gather_from(lambda: ranks.rank) == [0, 1], "after failures all are in step again"
        assert ranks.same(lambda: [1, 2], "numbers") == [1, 2]
        with pytest.raises(RuntimeError, match="rank 1 has other numbers than rank 0: 1 instead of 0"):
            ranks.same(lambda: ranks.rank, "numbers")
    assert world().size == 1
    print("all is well", flush=True)


def failures(ranks: Any) -> None:
    """Where one fails, both do, each with what it can know."""

    def fail(error: Exception) -> None:
        raise error

    for error, kinds, elsewhere in (
        (KeyError("k"), (LookupError,), LookupError),
        (ValueError("v"), (LookupError,), RuntimeError),
    ):
        own = ranks.rank == 1
        with pytest.raises(type(error) if own else elsewhere) as raised:
            ranks.gather_from(lambda error=error: fail(error) if ranks.rank == 1 else 7, *kinds)
        assert raised.value is error if own else str(raised.value) == f"rank 1: {type(error).__name__}: {error}"


def model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: nn.Linear(6, 4) for name in ("trained", "here", "nowhere")})
    return layers.to(dtype)


def losses(layers: Any, step: int, rows: slice) -> torch.Tensor:
    """Of some rows of a batch; ``here`` has a gradient from the first row only, ``nowhere`` from none."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(layers["trained"].weight.dtype)
    loss = layers["trained"](x[rows]).float().square().sum()
    return loss + layers["here"](x[:1]).float().sum() if 0 in range(4)[rows] else loss


def optimizer(dtype_name: str) -> None:
    """Two ranks with half of the rows each end where one with all of them does, each with half of the state."""
    from revisual_fast.config import OptimizerConfig
    from revisual_fast.distributed import joined
    from revisual_fast.optim import Optimizer

    dtype, config = getattr(torch, dtype_name), OptimizerConfig(lr=1e-2, weight_decay=0.1)
    parts = [slice(0, 2), slice(2, 4)]

    def run(steps: range, chosen: list[slice], start: Any = None) -> tuple[nn.Module, Any, list[float]]:
        layers = model(dtype)
        optimizer = Optimizer(layers.named_parameters(), config, lambda name: False)
        if start is not None:
            layers.load_state_dict(start[0])
            optimizer.load_state_tensors(start[1])
        norms = []
        for step in steps:
            for rows in chosen:
                losses(layers, step, rows).backward()
            norms.append(optimizer.step(1.0))
        return layers, optimizer, norms

    alone, all_of_it, expected = run(range(4), parts)
    with joined() as ranks:
        own = [parts[ranks.rank]]
        half, optimizer, first = run(range(2), own)
        assert set(optimizer.masters) < set(all_of_it.masters)
        states = ranks.gather({name: tensor.clone() for name, tensor in optimizer.state_tensors().items()})
        saved = states[0] | states[1]
        assert len(saved) == len(states[0]) + len(states[1]), "nothing is kept twice"
        layers, optimizer, second = run(range(2, 4), own, (half.state_dict(), saved))
        together = {name: p.clone() for name, p in layers.named_parameters()}
        for other in ranks.gather(together):
            assert all(torch.equal(other[name], p) for name, p in together.items()), "the same weights everywhere"
    torch.testing.assert_close(torch.tensor(first + second), torch.tensor(expected), rtol=1e-5, atol=0)
    for (name, p), q in zip(alone.named_parameters(), layers.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5 if dtype == torch.float32 else 2**-8, atol=1e-6, msg=name)
    nowhere = layers["nowhere"].weight
    assert torch.equal(nowhere, model(dtype)["nowhere"].weight), "what has no gradient does not even decay"
    print("all is well", flush=True)


def stopped(config: str, at: str, *more: str) -> None:
    """A run of which one rank, not the main one, is asked to stop after so many steps."""
    from revisual_fast.config_file import load_config
    from revisual_fast.curriculum import Curriculum, Interrupted
    from revisual_fast.distributed import joined

    with joined() as ranks, Curriculum(load_config(config, []), resume="--resume" in more, overwrite=False) as run:
        train_step = run._train_step

        def counted(name: str, stage: Any) -> None:
            train_step(name, stage)
            run.stop.requested |= ranks.rank == 1 and run.state["global_step"] == int(at)

        run._train_step = counted
        try:
            run.run()
        except Interrupted as interrupted:
            print(interrupted, flush=True)


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    globals()[name](*arguments)

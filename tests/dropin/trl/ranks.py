"""A rank of a data-parallel run, stock and fast; compares what both left behind. For ``torch.distributed.run``."""

import os
import sys
from pathlib import Path

import torch
from trl import GRPOTrainer

from revisual_fast.integrations.trl import FastGRPOTrainer
from tests.dropin.trl.runs import Rollouts, differences, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rollouts = Path(sys.argv[1]), Rollouts()
    settings = {
        "checkpoint": folder / "model",
        "learning_rate": 0.005,
        "num_iterations": 2,
        "beta": 0.1,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
    }
    runs = []
    for cls in (GRPOTrainer, FastGRPOTrainer):
        runs.append(train(cls, folder / cls.__name__ / os.environ["RANK"], rollouts, **settings))
        wrapped = type(runs[-1].trainer.model_wrapped).__name__
        assert wrapped == "DistributedDataParallel", wrapped
    found = {n: e for n, e in differences(runs[1], runs[0]).items() if "per_second" not in n}
    assert max(found.values()) <= 1e-5, found
    weights = runs[1].weights
    for name, x in weights.items():  # all ranks have the same
        other = x.clone()
        torch.distributed.broadcast(other, 0)
        assert torch.equal(other, x), name
    print("ranks agree", torch.distributed.get_rank(), torch.distributed.get_world_size())

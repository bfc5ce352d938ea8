"""One of two processes of an FSDP2 group: ``two_processes.py RANK FOLDER``. Run by test_two_processes.py."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[3]))
import torch
import torch.distributed as dist
from transformers.modeling_outputs import BaseModelOutputWithPooling
from verl.utils import tensordict_utils as tu

from revisual_fast.integrations.verl.cpu import use_cpu
from tests.dropin.verl.engines import batch_of, engine_of, rows_of, score, step
from tests.models import worst_difference


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    use_cpu()
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    BaseModelOutputWithPooling.mean = lambda out: out.pooler_output.mean()  # verl 0.9.1 with transformers 5
    groups = [[(7, [(1, 4, 6)], [5, 3]), (9, [], [2, 8])], [(6, [], [4, 3]), (5, [], [7, 1])]][rank]
    data = batch_of(rows_of(groups, seed=rank), vision=True)  # only the first process has an image
    tu.assign_non_tensor(data, micro_batch_size_per_gpu=2, global_batch_size=8)
    verls, ours = (engine_of(folder / "model", ours=own) for own in (False, True))
    expected = step(verls, data)
    for never in (None, f"process {rank} leaves it to verl" if rank else None):  # both pack, then one does
        ours._never = never
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if never else "error", RuntimeWarning)
            found = step(ours, data)
        assert abs(found.loss - expected.loss) < 1e-5 * abs(expected.loss)
        worst = worst_difference(found.gradients, expected.gradients)
        assert worst[0] < 1e-5, worst
        print(rank, never, worst)
    score(ours, data)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

"""The estimate of activation memory against what a training pass allocates on a CUDA device."""

import pytest
import torch

from revisual_fast import PolicyObjective, TokenBatch, linear_policy_loss
from revisual_fast.kernels.plan import CHUNK_BYTES, SUPERCHUNK_BYTES
from revisual_fast.packing.memory import activation_bytes
from revisual_fast.policy.model import Policy
from tests.groups import make_groups
from tests.models import build
from tests.unit.test_memory import medium_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
}


def train(policy: Policy, batch) -> int:
    """Bytes allocated at the peak of a pass above what was allocated before it, gradients of the weights included."""
    tokens = TokenBatch(torch.ones(len(batch.targets), device="cuda"), cu_seqlens=batch.cu_seqlens)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_policy_loss(
        policy.hidden(batch), policy.head_weight, batch.targets, tokens, PolicyObjective()
    ).loss.backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["varlen", "triton"])
@pytest.mark.parametrize("images", ["none", "frozen", "yes"])
def test_the_estimate_is_what_a_training_pass_takes(backend, images, checkpointing):
    policy = Policy(build(medium_config("qwen2_5_vl", SIZES), std=0.02).to("cuda", torch.bfloat16), attention=backend)
    policy.model.train()
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    if images == "frozen":
        policy.freeze_vision()
    shapes = [(400, [(1, 32, 32)] if images != "none" else [], [500, 300, 400, 700]) for _ in range(4)]
    batch = policy.pack(make_groups(policy.family, shapes))
    train(policy, batch)  # gradients of the weights exist from here on, and whatever the libraries keep
    activations = activation_bytes(
        policy.family.shape,
        dtype_bytes=2,
        checkpointing=checkpointing,
        attention=backend,
        vision_trained=policy.vision_trained,
        chunk_bytes=CHUNK_BYTES["cuda"],
        superchunk_bytes=SUPERCHUNK_BYTES["cuda"],
    )
    keys = sum(batch.segments.keys) if backend == "varlen" else None
    patches = int(batch.grids.prod(1).sum())
    estimate = activations.peak(len(batch.ids), len(batch.targets), patches, keys=keys)
    assert estimate == pytest.approx(train(policy, batch), rel=0.15)

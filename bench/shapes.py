"""The shapes that the suites measure."""

from __future__ import annotations

SHAPES: dict[str, dict[str, list[tuple[int, int, int]]]] = {  # N, D, V
    "cpu": {
        "policy_loss_from_logits": [(512, 0, 32000)],
        "policy_loss_from_logits_gspo": [(128, 0, 32000)],
        "logits_statistics": [(128, 0, 32000)],
        "linear_policy_loss": [(2048, 512, 32000)],
        "shared_attention": [(1024, 256, 0)],
        "gather_kv": [(1024, 256, 0)],
        "pack_embeddings": [(1024, 256, 8192)],
        "mrope": [(1024, 512, 0)],
        "gather_rows": [(2048, 512, 0)],
        "linear_logprob": [(512, 512, 32000)],
        "sampling_mask_replay": [(512, 512, 32000)],
        "group_advantages": [(65536, 0, 0)],
        "pad_selection": [(65536, 0, 0)],
        "linear_cross_entropy": [],  # for quack, which needs CUDA
    },
    "gpu": {  # heads of Qwen2.5-VL 7B and 3B, attention of the 7B
        "policy_loss_from_logits": [(8192, 0, 151936)],
        "policy_loss_from_logits_gspo": [(8192, 0, 151936)],
        "logits_statistics": [(8192, 0, 151936)],
        "linear_policy_loss": [(8192, 3584, 152064), (8192, 2048, 151936)],
        "shared_attention": [(16384, 3584, 0), (16384, 2048, 0)],
        "gather_kv": [(16384, 512, 0)],
        "pack_embeddings": [(16384, 3584, 152064)],
        "mrope": [(16384, 3584, 0)],
        "gather_rows": [(16384, 3584, 0)],
        "linear_logprob": [(8192, 3584, 152064)],
        "sampling_mask_replay": [(8192, 3584, 152064)],
        "group_advantages": [(1 << 20, 0, 0)],
        "pad_selection": [(1 << 20, 0, 0)],
        "linear_cross_entropy": [(8192, 3584, 152064)],
    },
}

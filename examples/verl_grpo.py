"""GRPO on verl's FSDP2 engine, each prompt packed with its responses: a tiny model learns to say 7, on a CPU."""

from functools import partial

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl import DataProto
from verl.trainer.config import CheckpointConfig
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, PolicyLossConfig
from verl.workers.engine import EngineRegistry
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

from revisual_fast.integrations.verl.cpu import use_cpu

use_cpu()
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)).save_pretrained(path := "runs/verl_tiny")
plain = {"load_tokenizer": False, "use_remove_padding": False, "override_config": {"attn_implementation": "sdpa"}}
model = HFModelConfig(path=path, external_lib="revisual_fast.integrations.verl", **plain)
fsdp = FSDPEngineConfig(strategy="fsdp2", mixed_precision={"param_dtype": "fp32"})
rest = (FSDPOptimizerConfig(lr=3e-3, total_training_steps=20), CheckpointConfig())
(engine := EngineRegistry.new("language_model", "fsdp2", model, fsdp, *rest)).initialize()
actor = FSDPActorConfig(rollout_n=8, use_dynamic_bsz=True, policy_loss=PolicyLossConfig(loss_mode="revisual_fast"))
flags = {"use_dynamic_bsz": False, "use_remove_padding": False, "micro_batch_size_per_gpu": 32, "global_batch_size": 32}
for step in range(20):
    prompts = torch.randint(1, 32, (4, 6)).repeat_interleave(8, 0)  # 4 prompts, 8 responses each
    ids = engine.module.generate(prompts, do_sample=True, min_new_tokens=8, max_new_tokens=8, pad_token_id=0)
    said, ones = (ids[:, 6:] == 7).float(), torch.ones_like(ids)
    advantages, _ = compute_grpo_outcome_advantage(said, ones[:, 6:], [i // 8 for i in range(32)])
    batch = {"input_ids": ids, "attention_mask": ones, "position_ids": ones.cumsum(1) - 1, "prompts": prompts}
    batch |= {"responses": ids[:, 6:], "response_mask": ones[:, 6:], "advantages": advantages}
    data = left_right_2_no_padding(DataProto.from_dict(batch, meta_info={"temperature": 1.0, **flags}).to_tensordict())
    with engine.eval_mode():
        data["old_log_probs"] = no_padding_2_padding(engine.infer_batch(data)["model_output"]["log_probs"], data)
    with engine.train_mode():
        engine.train_batch(data, partial(ppo_loss, config=actor))
    print(f"step {step}: {said.mean():.0%} of the tokens are 7")

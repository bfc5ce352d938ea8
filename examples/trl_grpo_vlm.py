"""GRPO with TRL on PuzzleVQA: FastGRPOTrainer, or TRL's own with --stock. A tiny random model, so it runs on a CPU."""

import json
import sys
import time
from pathlib import Path

from datasets import Dataset, Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

from revisual_fast.integrations.trl import FastGRPOTrainer, unpatch

data, stock = Path("../shared/data"), "--stock" in sys.argv
rows = [json.loads(line) for line in (data / "puzzlevqa/data.jsonl").read_text().splitlines()[::125]]
images = [str(data / "puzzlevqa" / r["image"]) for r in rows]
prompts = [[{"role": "user", "content": r["question"]}] for r in rows]
config = AutoConfig.from_pretrained(data / "qwen2_5_vl_processor/config_3b.json", dtype="float32")
text = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1}
config.text_config.update({**text, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4})
config.vision_config.update({"depth": 4, "hidden_size": 128, "intermediate_size": 256, "out_hidden_size": 256})
settings = {"max_steps": 3, "num_generations": 8, "max_completion_length": 32, "use_cpu": True, "bf16": False}
trainer = (GRPOTrainer if stock else FastGRPOTrainer)(
    model=AutoModelForImageTextToText.from_config(config),
    reward_funcs=lambda completions, **_: [float(len(set(c[0]["content"]))) for c in completions],  # any that differs
    args=GRPOConfig(output_dir="runs/trl", report_to=[], save_strategy="no", logging_steps=1, **settings),
    train_dataset=Dataset.from_dict({"prompt": prompts, "image": images}).cast_column("image", Image()),
    processing_class=AutoProcessor.from_pretrained(data / "qwen2_5_vl_processor", max_pixels=28 * 28 * 196),
)
trainer.train()
seconds, gradients = [], []
for undo in [] if stock else [dict, dict, unpatch, dict]:  # the last batch, twice packed and twice as TRL does it
    _, _, start = undo(), trainer.model.zero_grad(), time.perf_counter()
    trainer.compute_loss(trainer.model, trainer._buffered_inputs[0]).backward()
    seconds.append(time.perf_counter() - start)
    gradients.append([p.grad for p in trainer.model.parameters()])
if not stock:
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(gradients[1], gradients[3], strict=True))
    print(f"training part of a step {seconds[3] / seconds[1]:.2f} times as fast, gradients within {error:.1e} of TRL's")

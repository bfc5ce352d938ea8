"""One run of TRL's trainer with a colocated vLLM on a CPU: ``python -m tests.vllm.trl_run images FastGRPOTrainer DIR``.

The engine loads the starting weights from disk. To give it others, TRL needs a GPU, so all updates are made on the
first rollouts.
"""

import json
import sys
from pathlib import Path

import torch
import trl

from revisual_fast.integrations.trl import FastGRPOTrainer
from tests.dropin.trl.runs import dataset, loaded, processor, reward, saved, tokenizer
from tests.models import tiny_config


def main(kind: str, name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    images = kind == "images"
    config = tiny_config("qwen2_5_vl" if images else "qwen2")
    text = config.get_text_config()
    text.num_attention_heads, text.num_key_value_heads = 2, 1  # vLLM's attention on a CPU wants heads of 32
    if images:
        text.rope_parameters["mrope_section"] = [4, 6, 6]
    path, words = saved(config, folder), processor() if images else tokenizer()
    words.save_pretrained(path)
    settings = {"output_dir": str(folder), "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False}
    settings |= {"max_steps": 3, "num_iterations": 3, "logging_steps": 1, "learning_rate": 0.01, "optim": "sgd"}
    settings |= {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "seed": 1}
    settings |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1}
    settings |= {"vllm_max_model_length": 128, "generation_kwargs": {"logit_bias": dict.fromkeys(range(5, 9), -100.0)}}
    trainer = {"GRPOTrainer": trl.GRPOTrainer, "FastGRPOTrainer": FastGRPOTrainer}[name](
        model=loaded(path),
        reward_funcs=reward,
        args=trl.GRPOConfig(**settings),
        train_dataset=dataset(images),
        processing_class=words,
    )
    trainer.vllm_generation.sync_weights = lambda: None
    trainer.train()
    (folder / "history.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

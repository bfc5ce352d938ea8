"""ms-swift's own pipeline, from a folder with a model and questions to trained weights, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def make_model(folder: Path, **config: Any) -> None:
    """A Qwen2 of some ten thousand weights, a tokenizer of single bytes, and questions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    letters = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    marks = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, **marks)
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False, **config}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer) + 5, initializer_range=0.1, **shape, **ids))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id].mul_(4)  # so that some completions end
    model.save_pretrained(folder)
    lines = [{"messages": [{"role": "user", "content": f"say {'a' * (i % 5)}{i}"}]} for i in range(8)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))


def train(folder: Path, out: Path, **more: Any) -> dict[str, Any]:
    """Two updates by SGD: the log, and the gradients of each update."""
    from swift.arguments import RLHFArguments
    from swift.pipelines.train.rlhf import SwiftRLHF
    from swift.rewards import ORM, orms
    from transformers import TrainerCallback

    class Bytes(ORM):
        def __call__(self, completions: list[str], **_: Any) -> list[float]:
            return [0.1 * len(c.encode()) + c.count("e") for c in completions]

    class Arguments(RLHFArguments):  # type: ignore[misc, valid-type]
        def _check_padding_free(self) -> None:
            """Without padding it wants flash-attn, which needs a GPU; torch's attention takes such rows as well."""

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.gradients: list[dict[str, Tensor]] = []

        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    class Pipeline(SwiftRLHF):
        def train(self, trainer: Any) -> Any:
            recorder = Recorder()
            trainer.add_callback(recorder)
            result = super().train(trainer)
            self.gradients = recorder.gradients
            self.log = [{k: v for k, v in entry.items() if _exact(k, v)} for entry in trainer.state.log_history]
            return result

    orms["bytes"] = Bytes
    settings: dict[str, Any] = {"rlhf_type": "grpo", "model": str(folder), "model_type": "qwen2", "template": "qwen2_5"}
    settings |= {"tuner_type": "full", "dataset": [str(folder / "questions.jsonl")], "reward_funcs": ["bytes"]}
    settings |= {"use_vllm": False, "torch_dtype": "float32", "num_generations": 4, "per_device_train_batch_size": 4}
    settings |= {"gradient_accumulation_steps": 1, "max_steps": 2, "max_completion_length": 12, "max_length": 64}
    settings |= {"logging_steps": 1, "output_dir": str(out), "save_strategy": "no", "report_to": [], "use_cpu": True}
    settings |= {"attn_impl": "eager", "dataset_num_proc": 1, "dataloader_num_workers": 0, "temperature": 0.9}
    settings |= {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    pipeline = Pipeline(Arguments(**{**settings, **more}))
    pipeline.run()
    return {"log": pipeline.log, "gradients": pipeline.gradients}


def _exact(name: str, value: Any) -> bool:
    """Whether a logged value is the same whenever the run is."""
    clock = ("runtime", "per_second", "memory", "speed", "time", "percentage", "global_step", "flos")
    return isinstance(value, int | float) and not any(word in name for word in clock)


def same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert len(got["gradients"]) == len(wanted["gradients"]) == 2
    for ours, theirs in zip(got["gradients"], wanted["gradients"], strict=True):
        assert ours.keys() == theirs.keys()
        whole = max(gradient.norm() for gradient in theirs.values())
        assert whole > 0
        for name, gradient in theirs.items():
            error = (ours[name] - gradient).norm()
            assert error <= 1e-5 * max(gradient.norm(), 1e-2 * whole), (name, error, gradient.norm(), whole)
    assert len(got["log"]) == len(wanted["log"])
    for ours, theirs in zip(got["log"], wanted["log"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert abs(ours[name] - value) <= 1e-5 * max(1.0, abs(value)), (name, ours, theirs)

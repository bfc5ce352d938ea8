"""Log-probs and entropies of a model of transformers, from its logits and without them: time and memory (Linux)."""

import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from revisual_fast.integrations.transformers import accelerate_scoring

shape = {"vocab_size": 50000, "hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512}
config = Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2)
model = accelerate_scoring(AutoModelForCausalLM.from_config(config))
ids = torch.randint(50000, (4, 96))  # the first 32 are the prompt


def from_logits():
    log_p = model(ids, logits_to_keep=65).logits[:, :-1].log_softmax(-1)
    return log_p.gather(2, ids[:, 32:, None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def without():
    out = model(ids, labels=ids.masked_fill(torch.arange(96) < 32, -100), score=True)
    return out.logp[:, 32:], out.entropy[:, 32:]


def step(way):  # seconds, kB at the peak, and what came out
    Path("/proc/self/clear_refs").write_text("5")
    before, start, (logp, entropy) = Path("/proc/self/status").read_text(), time.perf_counter(), way()
    grads = torch.autograd.grad((0.01 * entropy - logp).mean(), list(model.parameters()))
    seconds, after = time.perf_counter() - start, Path("/proc/self/status").read_text()
    kb = int(after.split("VmHWM:")[1].split()[0]) - int(before.split("VmRSS:")[1].split()[0])
    return seconds, kb, logp.detach(), entropy.detach(), *grads


torch.testing.assert_close(step(without)[2:], step(from_logits)[2:], rtol=1e-4, atol=1e-5)  # else no figure
rounds = [(step(from_logits)[:2], step(without)[:2]) for _ in range(3)]
for what, i in (("time", 0), ("memory", 1)):
    print(f"{what} of a step from logits, in that without: {median(plain[i] / ours[i] for plain, ours in rounds):.2f}")

"""OpenRLHF's Actor with and without patch_openrlhf(): the same log-probs and gradients, without logits. On a CPU."""

import sys
import tempfile

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

try:
    from openrlhf.models import Actor, PolicyLoss
except ImportError as error:
    sys.exit(f"{error}: pip install openrlhf==0.11.2, which needs deepspeed and flash-attn, and those a GPU's toolkit")

from revisual_fast.integrations import unpatch
from revisual_fast.integrations.openrlhf import patch_openrlhf

shape = {"vocab_size": 5000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
folder = tempfile.mkdtemp()
torch.manual_seed(0)
Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
actor = Actor(folder, attn_implementation="eager", temperature=0.9).float()
ids, mask, actions = torch.randint(5000, (4, 24)), torch.ones(4, 24).long(), torch.ones(4, 16)
advantages = torch.tensor([1.5, -0.4, 0.3, -1.1])[:, None].expand(4, 16)


def step():
    actor.zero_grad()
    logp, out = actor(ids, actions, attention_mask=mask, return_output=True)
    loss, *_ = PolicyLoss()(logp, logp.detach() - 0.1, advantages, action_mask=actions)
    loss.backward()
    print(f"loss {loss:.6f}, logits: {'none' if out.get('logits') is None else list(out.logits.shape)}")
    return [p.grad.clone() for p in actor.parameters()]


stock = step()
patch_openrlhf()
ours = step()
unpatch("openrlhf")
print(f"gradients differ by at most {max((a - b).norm() / b.norm() for a, b in zip(ours, stock, strict=True)):.0e}")

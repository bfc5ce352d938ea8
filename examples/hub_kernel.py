"""One policy-gradient step with the kernel that `make hub` lays out, loaded by HuggingFace's package `kernels`.

python examples/hub_kernel.py [DIRECTORY]
"""

import sys
from pathlib import Path

import torch

try:
    from kernels import get_local_kernel
except ImportError as error:
    sys.exit(f"{error}: pip install kernels==0.17.2")

DIRECTORY = Path(sys.argv[1] if sys.argv[1:] else Path(__file__).parents[1] / "build/hub/revisual-fast")
if not (DIRECTORY / "build").is_dir():
    sys.exit(f"{DIRECTORY} holds no kernel: make hub")

fast = get_local_kernel(DIRECTORY)
for name, why in fast.available_backends("linear_policy_loss").items():
    print(f"{name}: {why}")

torch.manual_seed(0)
body, head = torch.nn.Embedding(1000, 64), torch.nn.Linear(64, 1000, bias=False)
ids, targets = torch.randint(1000, (32,)), torch.randint(1000, (32,))
optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=1.0)
objective = fast.PolicyObjective.preset("grpo", aggregation="token_mean")
tokens = fast.TokenBatch(torch.randn(32))  # an advantage for each row

out = fast.linear_policy_loss(body(ids), head.weight, targets, tokens, objective)
out.loss.backward()
optimizer.step()
after, _ = fast.linear_logprob(body(ids), head.weight, targets)
gain = (tokens.advantages * (after - out.logp)).mean()
print(f"loss {out.loss:.4f}, advantage-weighted log-prob up by {gain:.4f}")

"""GRPO's loss in code written for Liger: only the import differs. Compares with Liger's own where it is installed."""

import torch

from revisual_fast.integrations.liger import LigerFusedLinearGRPOLoss

B, T, H, V = 4, 12, 64, 2000
torch.manual_seed(0)
head = torch.nn.Linear(H, V, bias=False)
hidden = torch.randn(B, T, H, requires_grad=True)
lengths = torch.tensor([12, 7, 3, 10])
batch = {
    "selected_token_ids": torch.randint(V, (B, T)),
    "attention_mask": (torch.arange(T) < lengths[:, None]).long(),
    "advantages": torch.tensor([1.2, -0.4, 0.3, -1.1]),
    "ref_per_token_logps": torch.randn(B, T) * 0.1 - 7.6,
}
settings = {"beta": 0.04, "loss_type": "grpo", "epsilon_high": 0.28, "compiled": False}


def step(loss_class):
    hidden.grad = head.weight.grad = None
    loss, (kl, clipped) = loss_class(**settings)(hidden, head.weight, **batch)
    loss.backward()
    print(f"{loss_class.__module__}: loss {loss:.6f}, kl {kl:.4f}, clipped {clipped:.2f}")
    return hidden.grad, head.weight.grad


ours = step(LigerFusedLinearGRPOLoss)
try:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as LigersOwn
except ImportError:
    print("pip install liger-kernel==0.8.5 to compare")
else:
    for a, b in zip(ours, step(LigersOwn), strict=True):
        print(f"gradients differ by {(a - b).norm() / b.norm():.0e} of their norm")

"""Layers without state, whose ``forward`` the loader's ``kernelize`` puts into a model's own layers."""

from torch import Tensor, nn

from .ops import linear_logprob


class LinearLogprob(nn.Module):
    """For a layer whose ``forward(hidden [N, D], weight [V, D], targets [N])`` gives logp ``[N]``, entropy ``[N]``."""

    can_torch_compile = True

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(hidden, weight, targets)

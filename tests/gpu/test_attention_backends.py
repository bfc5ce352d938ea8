"""Every attention backend that a CUDA device has, against float64, at the sizes of a real model."""

import pytest
import torch

from revisual_fast.kernels.shared_attention import AttentionTiles, shared_attention
from revisual_fast.policy.attention import BACKENDS, attention_problem, make_plan
from tests.groups import blank_groups
from tests.numerics import relative_error
from tests.unit.test_packing import pack

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(1450, [500, 350, 1, 2, 499]), (3, [40]), (700, [300] * 4), (64, [])]


def runnable(backend: str) -> object:
    problem = attention_problem(backend, CUDA, torch.bfloat16) if torch.cuda.is_available() else None
    return pytest.param(backend, marks=pytest.mark.skipif(problem is not None, reason=f"{backend} is {problem}"))


@pytest.mark.parametrize("layout", ["shared", "varlen"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 2), (28, 4)])
@pytest.mark.parametrize("backend", [runnable(name) for name in BACKENDS])
def test_errors_are_those_of_half_precision(backend, heads, kv_heads, layout):
    """Allowed is twice what sdpa's rectangles of the same inputs have, both against float64."""
    segments = pack(blank_groups(SHAPES), layout).segments
    n_rows, g = sum(segments.length), torch.Generator("cuda").manual_seed(0)
    shape = [(1, n, n_rows, 128) for n in (heads, kv_heads, kv_heads)]
    x = [torch.randn(s, generator=g, device=CUDA).bfloat16().requires_grad_() for s in shape]
    upstream = torch.randn(1, n_rows, heads, 128, generator=g, device=CUDA).bfloat16()
    wide = [t.detach().double().requires_grad_() for t in x]
    fields = (segments.start, segments.length, segments.prefix_start, segments.prefix_length)
    tiles = AttentionTiles.of(*fields, CUDA)
    exact = shared_attention(*(t[0].transpose(0, 1) for t in wide), tiles, scale=0.1, backend="torch")[None]
    reference = (exact, *torch.autograd.grad(exact, wide, upstream.double()))

    def errors(name: str) -> list[float]:
        out = make_plan(name, segments, CUDA, torch.bfloat16).attend(0, *x, 0.1)
        got = (out, *torch.autograd.grad(out, x, upstream))
        return [relative_error(a, b) for a, b in zip(got, reference, strict=True)]

    for mine, allowed in zip(errors(backend), errors("sdpa"), strict=True):
        assert mine <= 2 * allowed

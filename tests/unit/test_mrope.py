"""M-RoPE in place: against float64 and transformers' own functions, in every dtype and on every backend."""

import pytest
import torch

from revisual_fast.kernels.mrope import mrope, mrope_, mrope_axis
from tests.devices import ALL_BACKENDS, DEVICE, ON_DEVICE

pytestmark = [*ON_DEVICE, pytest.mark.usefixtures("poisoned_and_deterministic")]
backends = pytest.mark.parametrize("backend", ALL_BACKENDS)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def frequencies(half: int, base: float = 1e6) -> torch.Tensor:
    return (1.0 / base ** (torch.arange(half) / half)).float().to(DEVICE)


def section_of(half: int) -> list[int]:
    """In the proportions of Qwen2.5-VL's [16, 24, 24]."""
    rest = 3 * half // 8
    return [half - 2 * rest, rest, rest]


def make(dtype: torch.dtype, half: int = 8, tokens: int = 20, limit: int = 131_072, seed: int = 0):
    """q with four heads and k with two, as attention lays them out, [1, H, T, d]; positions up to ``limit``."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, tokens, n, 2 * half, generator=g).to(DEVICE, dtype).transpose(1, 2) for n in (4, 2))
    positions = torch.randint(limit, (3, tokens), generator=g).to(DEVICE)
    positions[:, 0] = 0
    return q, k, positions, frequencies(half), mrope_axis(section_of(half)).to(DEVICE)


def flat(x: torch.Tensor) -> torch.Tensor:
    return x[0].transpose(0, 1)  # [T, H, d], a view


def exact(x, positions, inv_freq, axis, scaling: float = 1.0) -> torch.Tensor:
    """x [T, H, d] turned as complex numbers in float64."""
    angle = (positions[axis.long()].double() * inv_freq.double()[:, None]).T[:, None]  # [T, 1, d / 2]
    a, b = x.double().chunk(2, -1)
    turned = torch.complex(a, b) * torch.polar(torch.full_like(angle, scaling), angle)
    return torch.cat([turned.real, turned.imag], -1)


def plain(x, positions, inv_freq, axis, scaling: float) -> torch.Tensor:
    """x [T, H, d] turned in its own dtype."""
    angle = (positions[axis.long()] * inv_freq[:, None]).T[:, None]
    cosine, sine = ((scaling * y).to(x.dtype) for y in (angle.cos(), angle.sin()))
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)


def by_transformers(family: str, positions: torch.Tensor, section: list[int], dtype: torch.dtype):
    """cos and sin ``[1, T, d]`` by the rotary embedding of a model's text tower."""
    half = sum(section)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section, "mrope_interleaved": True}
    sizes = {"hidden_size": 4 * 2 * half, "num_attention_heads": 4, "rope_parameters": rope}
    if family == "qwen2_5_vl":
        from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl as settings
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

        rotary = modeling.Qwen2_5_VLRotaryEmbedding(settings.Qwen2_5_VLTextConfig(**sizes))
    else:
        from transformers.models.qwen3_vl import configuration_qwen3_vl as settings
        from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling

        rotary = modeling.Qwen3VLTextRotaryEmbedding(settings.Qwen3VLTextConfig(**sizes, head_dim=2 * half))
    cos, sin = rotary.to(DEVICE)(torch.empty(0, dtype=dtype, device=DEVICE), positions[:, None])
    return rotary.inv_freq, lambda q, k: modeling.apply_rotary_pos_emb(q, k, cos, sin)


@backends
@pytest.mark.parametrize("limit", [50, 131_072])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("family", "section"), [("qwen2_5_vl", [4, 6, 6]), ("qwen2_5_vl", [16, 24, 24]), ("qwen3_vl", [24, 20, 20])]
)
def test_error_is_bounded_by_transformers(family, section, dtype, limit, backend):
    q, k, positions, _, _ = make(dtype, sum(section), limit=limit)
    inv_freq, rotate = by_transformers(family, positions, section, dtype)
    axis = mrope_axis(section, interleaved=family == "qwen3_vl").to(DEVICE)
    theirs = rotate(q, k)
    goal = [exact(flat(x), positions, inv_freq, axis) for x in (q, k)]
    ours = mrope_(flat(q), flat(k), positions, inv_freq, axis, backend=backend)
    for x, y, z in zip(ours, theirs, goal, strict=True):
        assert x.dtype == dtype
        assert (x - z).abs().max() <= 2 * (flat(y) - z).abs().max()


@pytest.mark.parametrize(("family", "interleaved"), [("qwen2_5_vl", False), ("qwen3_vl", True)])
@pytest.mark.parametrize("section", [[16, 24, 24], [24, 20, 20], [2, 3, 3], [6, 5, 5], [8, 0, 0], [3, 1, 4]])
def test_axes_are_transformers_own(family, interleaved, section):
    """Positions that tell the axes apart, and angles small enough that the cosine does."""
    if interleaved and section in ([3, 1, 4], [16, 24, 24], [2, 3, 3]):
        with pytest.raises(ValueError, match="cannot be interleaved"):
            mrope_axis(section, interleaved)
        return
    positions = torch.tensor([[0], [1], [2]], device=DEVICE)
    inv_freq, rotate = by_transformers(family, positions, section, torch.float32)
    q = torch.zeros(1, 1, 1, 2 * sum(section), device=DEVICE)
    q[..., : sum(section)] = 1  # so that the second half of the result is the sine
    sine = rotate(q, q)[0].flatten()[sum(section) :]
    which = (sine.double().asin() / inv_freq.double()).round()
    which = torch.where(sine < (inv_freq * 1.5).sin(), which.clamp(max=1), 2.0)  # sin 2 == sin(pi - 2)
    assert torch.equal(which.to(torch.int8).cpu(), mrope_axis(section, interleaved))


@backends
@pytest.mark.parametrize("half", [3, 8, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_the_inverse_rotation(backend, half, dtype):
    q, k, *angles = make(dtype, half)
    up = [flat(x) for x in make(dtype, half, seed=1)[:2]]
    inputs = [x.requires_grad_() for x in (q, k)]
    wide = [flat(x.detach()).double().requires_grad_() for x in inputs]
    goal = torch.autograd.grad([exact(x, *angles, 1.5) for x in wide], wide, [u.double() for u in up])
    plain_gradients = torch.autograd.grad([plain(flat(x), *angles, 1.5) for x in inputs], inputs, up)
    for out in (
        mrope(flat(q), flat(k), *angles, 1.5, backend),
        mrope_(flat(q.clone()), flat(k.clone()), *angles, 1.5, backend),
    ):
        got = torch.autograd.grad(out, inputs, up)
        for x, y, z in zip(got, plain_gradients, goal, strict=True):
            assert x.dtype == dtype
            assert (flat(x) - z).abs().max() <= 2 * (flat(y) - z).abs().max()


@backends
def test_in_place_through_views_of_one_projection(backend):
    """The memory is changed, and autograd knows: whoever uses the projection later gets the right gradient."""
    _, _, *angles = make(torch.float32)
    source = torch.randn(20, 8, 16, device=DEVICE, requires_grad=True)
    fused = source * 1.0  # two heads each of q and k, and four of v
    q, k = mrope_(fused[:, :2], fused[:, 2:4], *angles, backend=backend)
    assert torch.equal(q, fused[:, :2])
    assert torch.equal(fused[:, 4:], source[:, 4:])
    goal = exact(source[:, :4], *angles)
    torch.testing.assert_close(fused[:, :4], goal.float())
    weights = torch.randn(20, 8, 16, device=DEVICE)
    (got,) = torch.autograd.grad((fused * weights).sum() + k.sum(), source, retain_graph=True)
    (expected,) = torch.autograd.grad((goal * weights[:, :4]).sum() + goal[:, 2:].sum(), source)
    torch.testing.assert_close(got[:, :4], expected[:, :4])
    assert torch.equal(got[:, 4:], weights[:, 4:])


@backends
def test_whoever_kept_the_old_values_is_told(backend):
    q, k, *angles = make(torch.float32)
    leaf = flat(q).clone().requires_grad_()
    old = leaf * 1.0
    square = old**2
    mrope_(old, flat(k), *angles, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@backends
def test_the_incoming_gradient_is_left_alone(backend):
    q, k, *angles = make(torch.float32)
    q, k = (flat(x).clone().requires_grad_() for x in (q, k))
    out, _ = mrope_(q * 1.0, k * 1.0, *angles, backend=backend)
    upstream = torch.randn_like(out)
    kept = upstream.clone()
    out.backward(upstream)
    assert torch.equal(upstream, kept)
    out, other = mrope(q, k, *angles, backend=backend)
    (alone,) = torch.autograd.grad(other, k, torch.ones_like(other))  # q's gradient is not asked for
    (expanded,) = torch.autograd.grad(out.sum() * 2, q)
    assert torch.isfinite(alone).all()
    assert torch.isfinite(expanded).all()


@backends
def test_any_strides_over_tokens_and_heads(backend):
    q, k, *angles = make(torch.float32)
    goal = exact(flat(q), *angles).float()
    wide = torch.zeros(20, 9, 24, device=DEVICE)
    padded = wide[:, 1:9:2, 3:19]  # every second head, not aligned
    padded.copy_(flat(q))
    heads_first = q[0].contiguous().transpose(0, 1)
    for x in (padded, heads_first, flat(q)):
        got, _ = mrope_(x, flat(k).clone(), *angles, backend=backend)
        torch.testing.assert_close(got, goal)
    assert wide.count_nonzero() == padded.numel()
    inner = torch.zeros(4, 20, 16, device=DEVICE)[1:3].transpose(0, 1)
    assert mrope(inner, inner, *angles, backend=backend)[0].stride() == (16, 320, 1)


@backends
def test_positions_of_a_packed_batch(backend):
    """[4, 1, T] with a text row first; the first token does not move, and lengths stay."""
    q, k, positions, inv_freq, axis = make(torch.float32)
    packed = torch.cat([positions[:1], positions])[:, None]
    got, _ = mrope(flat(q), flat(k), packed[1:, 0], inv_freq, axis, backend=backend)
    assert torch.equal(got[0], flat(q)[0])
    torch.testing.assert_close(got.norm(dim=-1), flat(q).norm(dim=-1))
    strided = positions.T.contiguous().T
    assert torch.equal(mrope(flat(q), flat(k), strided, inv_freq, axis, backend=backend)[0], got)


@backends
def test_nothing_to_turn(backend):
    q, k, _, inv_freq, axis = make(torch.float32)
    none = torch.empty(3, 0, dtype=torch.int64, device=DEVICE)
    out = mrope(flat(q)[:0], flat(k)[:0], none, inv_freq, axis, backend=backend)
    assert [x.shape for x in out] == [(0, 4, 16), (0, 2, 16)]


@backends
def test_an_axis_that_is_none_gives_nan(backend):
    q, k, positions, inv_freq, axis = make(torch.float32)
    goal, _ = mrope(flat(q), flat(k), positions, inv_freq, axis, backend=backend)
    axis = axis.clone()
    axis[1], axis[5] = 3, -1
    got, _ = mrope(flat(q), flat(k), positions, inv_freq, axis, backend=backend)
    wrong = [1, 5, 9, 13]
    assert got.isnan().all(dim=1).all(dim=0).nonzero().flatten().tolist() == wrong
    right = [i for i in range(16) if i not in wrong]
    assert torch.equal(got[..., right], goal[..., right])


@pytest.mark.parametrize("op", [mrope, mrope_])
def test_compiled(op):
    """The graph breaks around them, and the gradient is right; where it must not break, that is an error."""
    q, k, *angles = make(torch.float32)
    inputs = [flat(x).clone().requires_grad_() for x in (q, k)]
    up = [torch.randn_like(x) for x in inputs]

    def twice(q, k):
        return [2 * x for x in op(2 * q, 3 * k, *angles)]

    outputs = twice(*inputs), torch.compile(twice, backend="aot_eager")(*inputs)
    eager, got = (torch.autograd.grad(out, inputs, up) for out in outputs)
    assert all(x.any() and torch.equal(x, y) for x, y in zip(got, eager, strict=True))
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="would be 0"):
        torch.compile(twice, fullgraph=True, backend="aot_eager")(*inputs)


LAYOUTS = [  # what q and k [4, heads, 8] are of x [4, 6, 8], and whether they share memory
    (lambda x: (x[:, :4], x[:, 4:]), False),
    (lambda x: (x[:, ::2], x[:, 1::2]), False),
    (lambda x: (x[:, ::2], x[:, 3:5]), True),
    (lambda x: (x[:, :4], x[:, 3:]), True),
    (lambda x: (x[:2], x[2:]), False),
    (lambda x: (x[:3], x[1:]), True),
    (lambda x: (x[::2], x[1::2]), False),
    (lambda x: (x[:1, :3], x[:1, 3:]), False),
    (lambda x: (x[:1, :3], x[:1, 2:]), True),
    (lambda x: (x[..., :4], x[..., 4:]), False),
    (lambda x: (x[..., :4], x[..., 2:6]), True),
    (lambda x: (x.view(6, 4, 8)[:4].transpose(0, 1), x.view(6, 4, 8)[4:].transpose(0, 1)), False),
    (lambda x: (x.view(6, 4, 8)[:4].transpose(0, 1), x.view(6, 4, 8)[3:].transpose(0, 1)), True),
    (lambda x: (x[:, :2], x.view(6, 4, 8)[3:].transpose(0, 1)), True),
    (lambda x: (x, x), True),
    (lambda x: (x, x.clone()), False),
    (lambda x: (x, x[:, :0]), False),
]


@pytest.mark.parametrize(("views", "shared"), LAYOUTS)
def test_memory_that_q_and_k_share(views, shared):
    q, k = views(torch.arange(192.0).view(4, 6, 8))
    half = q.shape[2] // 2
    angles = torch.zeros(3, len(q), dtype=torch.int64), torch.ones(half), torch.zeros(half, dtype=torch.int8)
    if shared:
        with pytest.raises(ValueError, match="q and k share memory"):
            mrope_(q, k, *angles)
    else:
        mrope_(q, k, *angles)
    mrope(q, k, *angles)


@pytest.mark.parametrize(
    "views",
    [
        lambda leaf: (leaf * 1).split([4, 2], dim=1),
        lambda leaf: (leaf * 1).chunk(2, dim=1),
        lambda leaf: (leaf[:, :4], leaf[:, 4:]),
    ],
)
def test_views_that_autograd_refuses(views):
    leaf = torch.ones(3, 6, 4, requires_grad=True)
    angles = torch.ones(3, 3, dtype=torch.int64), torch.ones(2), torch.zeros(2, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="view"):
        mrope_(*views(leaf), *angles)
    q, k = mrope(*views(leaf), *angles)
    assert torch.autograd.grad(q.sum() + k.sum(), leaf)[0].any()


def test_fp64_and_tensors_without_data():
    q, k, *angles = make(torch.float64)
    inputs = [flat(x).contiguous().requires_grad_() for x in (q, k)]
    assert torch.autograd.gradcheck(lambda q, k: mrope(q, k, *angles, 0.7), inputs)
    assert torch.autograd.gradcheck(lambda q, k: mrope_(q * 1.0, k * 1.0, *angles, 0.7), inputs)
    with pytest.raises(ValueError, match=r"backend='triton' has no rotation of torch\.float64"):
        mrope(*inputs, *angles, backend="triton")
    meta = [x.detach().to("meta").requires_grad_() for x in (*inputs,)]
    out = mrope_(meta[0] * 1.0, meta[1] * 1.0, *(x.to("meta") for x in angles))
    sum(x.sum() for x in out).backward()
    assert meta[1].grad.shape == meta[1].shape


def test_what_does_not_fit():
    q, k, positions, inv_freq, axis = make(torch.float32)
    q, k = flat(q), flat(k)
    cases = [
        ((q[0], k, positions, inv_freq, axis), r"q must be \[T, heads, d\]"),
        ((q, k[1:], positions, inv_freq, axis), r"k must be \[T, heads, d\]"),
        ((q, k.bfloat16(), positions, inv_freq, axis), "q and k alike"),
        ((q[..., :15], k[..., :15], positions, inv_freq, axis), "d even"),
        ((q.transpose(1, 2).contiguous().transpose(1, 2), k, positions, inv_freq, axis), "side by side"),
        ((q, k, positions[:2], inv_freq, axis), r"positions must be \[3, 20\]"),
        ((q, k, positions, inv_freq.double(), axis), r"inv_freq must be \[8\] torch\.float32"),
        ((q, k, positions, inv_freq, axis.long()), r"axis must be \[8\] torch\.int8"),
        ((q.clone().requires_grad_(), k, positions, inv_freq, axis), "q is a leaf"),
        ((q, k[:, :1].expand(-1, 3, -1), positions, inv_freq, axis), "k is expanded"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            mrope_(*arguments)
    with pytest.raises(ValueError, match="time, height and width"):
        mrope_axis([4, 4])

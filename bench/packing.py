"""Work on packed rows: embeddings, rows with a target, keys and values of shared prompts, rotary positions.

Every variant goes forward and back, with the same upstream gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from bench import counts
from bench.checks import Outputs
from bench.harness import Call, Case, Problem, Variant
from bench.machine import copy_ceiling
from bench.ours import by_device
from bench.peers import why_not
from bench.plain import COMPILED, detached
from revisual_fast.kernels.embed import pack_embeddings as our_embeddings
from revisual_fast.kernels.gather import gather_rows as our_gather
from revisual_fast.kernels.mrope import mrope as our_mrope
from revisual_fast.kernels.mrope import mrope_axis
from revisual_fast.kernels.prefix import KVRows, gather_kv

PROMPTS, GROUP = 4, 8  # prompts in a pack, completions a prompt
HEAD = 128  # elements of an attention head, in widths that are a multiple of it
QUERIES = 7  # query heads a key head, as in Qwen2.5-VL 7B
THETA = 1e6
TABLES = "its tables of cosines and sines are made before, once a batch"


def gather_rows(case: Case) -> Problem:
    """N rows of N hidden states, in order, a fifth of them repeats as with shared prompts; and the gradient back."""
    made = _Data(case)
    hidden, upstream = made.leaf(case.n, case.d), made.normal(case.n, case.d)
    rows = torch.arange(case.n, device=case.device) * 4 // 5

    def call(function: Callable[[Tensor], Tensor]) -> Callable[[], Call]:
        return both_ways(lambda hidden: [function(hidden)], {"hidden": hidden}, {"rows": upstream})

    variants = [
        *by_device(case, lambda backend: call(lambda hidden: our_gather(hidden, rows, backend))),
        Variant("eager", "plain", call(lambda hidden: hidden[rows])),
        Variant("index_select", "plain", call(lambda hidden: hidden.index_select(0, rows))),
    ]

    def answer() -> Outputs:
        return {"rows": hidden.detach()[rows], "d_hidden": _sums(upstream, rows, case.n)}

    n_bytes = counts.gather_bytes(case.n, len(rows.unique()), case.d, case.torch_dtype.itemsize)
    return _problem(case, variants, answer, n_bytes)


def pack_embeddings(case: Case) -> Problem:
    """N rows of a ``[V, D]`` table, some ids often, and of image features, a quarter of the rows; and both gradients,
    the table's dense."""
    made = _Data(case)
    is_image = torch.arange(case.n, device=case.device) % 8 < 2
    places = is_image.nonzero()[:, 0]
    ids = (torch.rand(case.n, generator=made.g, device=case.device) ** 4 * case.v).long()
    index = torch.where(is_image, is_image.long().cumsum(0) - 1, -1)
    inputs = {"table": made.leaf(case.v, case.d), "features": made.leaf(len(places), case.d)}
    upstream = made.normal(case.n, case.d)

    def call(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Call]:
        return both_ways(lambda table, features: [function(table, features)], inputs, {"rows": upstream})

    def mine(backend: str) -> Callable[[], Call]:
        return call(lambda table, features: our_embeddings(ids, table, features, index, backend))

    def scattered(table: Tensor, features: Tensor) -> Tensor:
        return embedding(ids, table).masked_scatter(is_image[:, None], features)

    def copied(table: Tensor, features: Tensor) -> Tensor:
        return embedding(ids, table).index_copy(0, places, features)

    variants = [
        *by_device(case, mine),
        Variant("eager", "plain", call(scattered), note="masked_scatter, as transformers does it"),
        Variant("index_copy", "plain", call(copied)),
    ]

    def answer() -> Outputs:
        table, features = (x.detach() for x in inputs.values())
        out = {"rows": table[ids].index_copy_(0, places, features), "d_features": upstream[places].double()}
        return out | {"d_table": _sums(upstream.masked_fill(is_image[:, None], 0), ids, case.v)}

    sizes = case.n, len(ids[~is_image].unique()), len(places), case.d, case.v
    return _problem(case, variants, answer, counts.embeddings_bytes(*sizes, case.torch_dtype.itemsize))


def kv_gather(case: Case) -> Problem:
    """Keys and values of N packed rows, each of width D, in 4 groups: a prompt, half of the group's rows, for itself
    and in front of each of its 8 completions; and the gradients back. The order of a row's copies is found once."""
    made, head = _Data(case), head_size(case.d)
    rows = KVRows.checked(shared_prompts(case.n).to(case.device), case.n)
    shape, n_gathered = (case.d // head, head), len(rows.index)
    inputs = {name: made.leaf(case.n, *shape) for name in ("key", "value")}
    upstream = {name: made.normal(n_gathered, *shape) for name in ("keys", "values")}

    def call(function: Callable[[Tensor, Tensor], Sequence[Tensor]]) -> Callable[[], Call]:
        return both_ways(function, inputs, upstream)

    variants = [
        *by_device(case, lambda backend: call(lambda key, value: gather_kv(key, value, rows, backend))),
        Variant("eager", "plain", call(lambda key, value: [key[rows.index], value[rows.index]])),
        Variant("index_select", "plain", call(lambda *kv: [x.index_select(0, rows.index) for x in kv])),
    ]

    def answer() -> Outputs:
        out = {f"{name}s": x.detach()[rows.index] for name, x in inputs.items()}
        return out | {f"d_{name}": _sums(upstream[f"{name}s"], rows.index, case.n) for name in inputs}

    return _problem(case, variants, answer, counts.kv_bytes(case.n, n_gathered, case.d, case.torch_dtype.itemsize))


def shared_prompts(n: int) -> Tensor:
    """Which row each gathered one is: of every group the prompt, then before each completion the prompt again."""
    found = []
    for first in range(0, n, max(1, n // PROMPTS)):
        size = min(max(1, n // PROMPTS), n - first)
        length = size // (2 * GROUP)
        prompt = torch.arange(first, first + size - GROUP * length)
        own = torch.arange(first + len(prompt), first + size).view(GROUP, length)
        found += [prompt, *(torch.cat([prompt, rows]) for rows in own)]
    return torch.cat(found)


def mrope(case: Case) -> Problem:
    """Rotary positions of three axes on q, D wide, and on k with a seventh of its heads; and the gradients back."""
    made, head = _Data(case), head_size(case.d)
    heads = case.d // head
    sizes = {"q": (case.n, heads, head), "k": (case.n, max(1, heads // QUERIES), head)}
    inputs = {name: made.leaf(*size) for name, size in sizes.items()}
    upstream = {f"{name}_turned": made.normal(*size) for name, size in sizes.items()}
    section = section_of(head // 2)
    positions = torch.randint(4096, (3, case.n), generator=made.g, device=case.device)
    inv_freq = THETA ** (-torch.arange(head // 2, device=case.device) / (head // 2))
    axis = mrope_axis(section).to(case.device)
    tables = _tables(positions, inv_freq, case.torch_dtype)  # of all axes
    one = [torch.cat([x[i % 3] for i, x in enumerate(t.split(section * 2, -1))], -1) for t in tables]

    def mine(backend: str) -> Callable[[], Call]:
        return both_ways(lambda q, k: our_mrope(q, k, positions, inv_freq, axis, 1.0, backend), inputs, upstream)

    def plain_torch(q: Tensor, k: Tensor) -> list[Tensor]:
        cosine, sine = (table[:, None] for table in one)  # [T, 1, d]
        return [x * cosine + torch.cat([-x[..., head // 2 :], x[..., : head // 2]], -1) * sine for x in (q, k)]

    compiled: Any = torch.compile(plain_torch, dynamic=False)
    variants = [
        *by_device(case, mine),
        Variant("eager", "plain", both_ways(plain_torch, inputs, upstream), note=TABLES),
        Variant(
            "torch.compile",
            "plain",
            both_ways(compiled, inputs, upstream),
            note=f"{COMPILED}; {TABLES}",
            slow_start=True,
        ),
        _transformers_mrope(case, one, inputs, upstream),
        _liger_mrope(case, tables, section, inputs, upstream),
    ]

    def answer() -> Outputs:
        angle = (positions[axis.long()].double() * inv_freq.double()[:, None]).T[:, None]  # [T, 1, d / 2]
        out = {f"{name}_turned": _turned(x.detach(), angle) for name, x in inputs.items()}
        return out | {f"d_{name}": _turned(upstream[f"{name}_turned"], -angle) for name in inputs}

    width = sum(size[1] * head for size in sizes.values())
    return _problem(case, variants, answer, counts.mrope_bytes(case.n, width, case.torch_dtype.itemsize))


def head_size(width: int) -> int:
    """128 where it divides the width, else one head."""
    return HEAD if width % HEAD == 0 else width


def section_of(half: int) -> list[int]:
    """In the proportions of Qwen2.5-VL's [16, 24, 24]."""
    rest = 3 * half // 8
    return [half - 2 * rest, rest, rest]


def _tables(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Cosines and sines ``[3, T, d]`` of fp32 angles, rounded, as transformers makes them."""
    angle = positions[..., None].float() * inv_freq
    return [torch.cat([x, x], -1).to(dtype) for x in (angle.cos(), angle.sin())]


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.double().chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def _transformers_mrope(
    case: Case, one: list[Tensor], inputs: dict[str, Tensor], upstream: dict[str, Tensor]
) -> Variant:
    module = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"

    def function(*qk: Tensor) -> list[Tensor]:
        apply = import_module(module).apply_rotary_pos_emb
        return _tokens_first(apply(*_heads_first(qk), *(table[None] for table in one)))

    setup, reason = both_ways(function, inputs, upstream), why_not(case, module)
    return Variant("transformers", "peer", None if reason else setup, reason, TABLES)


def _liger_mrope(
    case: Case, tables: list[Tensor], section: list[int], inputs: dict[str, Tensor], upstream: dict[str, Tensor]
) -> Variant:
    """In place, as it always is, on the incoming gradient too: both are brought back before every call."""
    module = "liger_kernel.transformers.qwen2vl_mrope"

    def setup() -> Call:
        own = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        back = {name: x.clone() for name, x in upstream.items()}

        def function(*qk: Tensor) -> list[Tensor]:
            apply = import_module(module).liger_multimodal_rotary_pos_emb
            return _tokens_first(apply(*_heads_first(qk), *(table[:, None] for table in tables), section))

        def reset() -> None:
            for mine, given in ((own, inputs), (back, upstream)):
                for name, x in mine.items():
                    x.detach().copy_(given[name].detach())

        return both_ways(function, own, back)()._replace(reset=reset)

    reason = why_not(case, module, cuda=True)
    return Variant("Liger M-RoPE", "peer", None if reason else setup, reason, f"in place; {TABLES}")


def _heads_first(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.transpose(0, 1)[None] for x in tensors]  # [1, H, T, d]


def _tokens_first(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x[0].transpose(0, 1) for x in tensors]


class _Data:
    """Seeded tensors of a case's dtype."""

    def __init__(self, case: Case) -> None:
        self.case, self.g = case, torch.Generator(case.device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g, device=self.case.device).to(self.case.torch_dtype)

    def leaf(self, *shape: int) -> Tensor:
        return self.normal(*shape).requires_grad_()


def both_ways(
    function: Callable[..., Sequence[Tensor]], inputs: dict[str, Tensor], upstream: dict[str, Tensor]
) -> Callable[[], Call]:
    """``function`` of ``inputs`` and the backward pass of what it returns, under the names of ``upstream``."""

    def run() -> Outputs:
        out = function(*inputs.values())
        gradients = torch.autograd.grad(out, list(inputs.values()), list(upstream.values()))
        back = {f"d_{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
        return detached(**dict(zip(upstream, out, strict=True)), **back)

    return lambda: Call(run)


def _sums(entries: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """The gradient of a gather, in float64."""
    return torch.zeros((n_rows, *entries.shape[1:]), dtype=torch.float64, device=entries.device).index_add_(
        0, rows, entries.double()
    )


def _problem(case: Case, variants: Sequence[Variant], answer: Callable[[], Outputs], n_bytes: int) -> Problem:
    return Problem(case, variants, answer, 0, n_bytes, {"copy": copy_ceiling(case.device)})

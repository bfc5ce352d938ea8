"""Micro experiments beside the library, nothing of which it can be set to: layouts of the three products of a head, and
the rows' kernel of one chunk beside the product of another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from bench import counts
from bench.checks import Outputs
from bench.harness import Call, Case, Problem, Variant
from bench.inputs import OBJECTIVE, Inputs, clip_loss, make_inputs, reference
from bench.machine import ceilings
from bench.plain import plain
from bench.tuning.experiment import Axis, Experiment, Piece, Setting, Trial
from bench.tuning.linear import OP, pieces
from bench.tuning.rows import case_of
from revisual_fast import policy_loss_from_logits
from revisual_fast.kernels import plan
from revisual_fast.kernels.linear import matmul

Product = Callable[[Tensor, Tensor], Tensor]
LAYOUTS_OF: dict[str, dict[str, str]] = {  # product -> its layouts, that of the library first
    "logits": {"X W^T": "", "X (W^T)": "of a transposed copy of W", "(W X^T)^T": "logits stored by columns"},
    "dX": {"dZ W": "", "dZ (W^T)^T": "of a transposed copy of W", "(W^T dZ^T)^T": "dX stored by columns"},
    "dW": {"dZ^T X": "", "(X^T dZ)^T": "dW stored by columns"},
}


def chunk_case(device: str) -> Case:
    """One chunk of the rows of the suite's case."""
    case = case_of(OP, device, "bfloat16" if device == "cuda" else "float32")
    size = plan.rows_per_chunk(case.v, case.torch_dtype, torch.device(device))
    rows = plan.slices(case.n, size)[0]
    return replace(case, n=(rows.stop - rows.start) // 8 * 8)


# layouts


def _layouts(device: str) -> Trial:
    case = chunk_case(device)
    n, d, v, dtype = case.n, case.d, case.v, case.torch_dtype
    g = torch.Generator(device).manual_seed(0)
    x, w, dz = (
        torch.randn(shape, generator=g, device=device).mul_(shape[1] ** -0.5).to(dtype)
        for shape in ((n, d), (v, d), (n, v))
    )
    w_t = w.t().contiguous()
    wide = torch.float32
    products: dict[str, dict[str, Callable[[], Tensor]]] = {
        "logits": {
            "X W^T": lambda: matmul(x, w.t(), wide),
            "X (W^T)": lambda: matmul(x, w_t, wide),
            "(W X^T)^T": lambda: matmul(w, x.t(), wide).t(),
        },
        "dX": {
            "dZ W": lambda: matmul(dz, w, dtype),
            "dZ (W^T)^T": lambda: matmul(dz, w_t.t(), dtype),
            "(W^T dZ^T)^T": lambda: matmul(w.t(), dz.t(), dtype).t(),
        },
        "dW": {"dZ^T X": lambda: matmul(dz.t(), x, wide), "(X^T dZ)^T": lambda: matmul(x.t(), dz, wide).t()},
    }

    def candidate(setting: Setting) -> Variant:
        chosen = {name: products[name][layout] for name, layout in setting.items()}
        return Variant("", "ours", lambda: Call(lambda: {name: product() for name, product in chosen.items()}))

    @cache
    def answer() -> Outputs:
        a, b, c = x.double(), w.double(), dz.double()
        return {"logits": a @ b.t(), "dX": c @ b, "dW": c.t() @ a}

    eager = replace(candidate(_present_layouts(device)), name="eager", role="plain")
    flops, n_bytes = counts.head_flops(n, d, v), counts.head_bytes(n, d, v, dtype.itemsize)
    problem = Problem(case, [eager], answer, flops, n_bytes, ceilings(case))
    return Trial(problem, candidate, lambda setting: [p for p in pieces(case, "float32") if p.flops])


def _present_layouts(device: str) -> Setting:
    return {name: next(iter(layouts)) for name, layouts in LAYOUTS_OF.items()}


LAYOUTS = Experiment(
    "gemm-layouts",
    start=_present_layouts,
    axes=lambda device: [
        Axis(
            name,
            list(layouts),
            "The library's products are of tensors as they lie; cuBLAS has kernels for all layouts, which differ by "
            "some percent at most ("
            + ", ".join(f"{layout}: {note}" for layout, note in layouts.items() if note)
            + "; a copy of W takes 4 bytes an element once a step).",
        )
        for name, layouts in LAYOUTS_OF.items()
    ],
    trial=_layouts,
    seconds=10,
)


# streams


def _overlap(device: str) -> Trial:
    """Loss and gradient of a chunk's logits beside the product of the next chunk's."""
    case = chunk_case(device)
    head = make_inputs(case)
    rows = make_inputs(replace(case, d=0))
    hidden, weight = (tensor.detach() for tensor in head.head)
    product = partial(matmul, hidden, weight.t(), torch.float32)
    beside = torch.cuda.Stream()

    def work_on_rows() -> Outputs:
        assert rows.logits is not None
        out = policy_loss_from_logits(rows.logits, rows.targets, rows.tokens, OBJECTIVE)
        (d_logits,) = torch.autograd.grad(out.loss, [rows.logits])
        return {"logp": out.logp, "d_logits": d_logits}

    def one_after_the_other() -> Outputs:
        return work_on_rows() | {"logits": product()}

    def side_by_side() -> Outputs:
        here = torch.cuda.current_stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            out = work_on_rows()
        logits = product()
        here.wait_stream(beside)
        return out | {"logits": logits}

    runs = {1: one_after_the_other, 2: side_by_side}
    gemm = Piece(2 * case.n * case.d * case.v, 2 * (case.n + case.v) * case.d + 4 * case.n * case.v)
    memory = Piece(bytes=counts.logits_bytes(case.n, case.v, 2))
    together = Piece(gemm.flops, gemm.bytes + memory.bytes)
    problem = Problem(case, [_eager(case, rows, product)], _answer(rows, hidden, weight), 0, 0, ceilings(case))
    return Trial(
        problem,
        lambda setting: Variant("", "ours", lambda: Call(runs[setting["streams"]])),
        lambda setting: [gemm, memory] if setting["streams"] == 1 else [together],
    )


def _answer(rows: Inputs, hidden: Tensor, weight: Tensor) -> Callable[[], Outputs]:
    @cache
    def answer() -> Outputs:
        return reference(rows, clip_loss(rows)) | {"logits": hidden.double() @ weight.double().t()}

    return answer


def _eager(case: Case, rows: Inputs, product: Callable[[], Tensor]) -> Variant:
    of_rows = next(v for v in plain(replace(case, d=0), rows, clip_loss(rows)) if v.name == "eager")
    assert of_rows.setup is not None
    call = of_rows.setup()
    return Variant("eager", "plain", lambda: Call(lambda: call.run() | {"logits": product()}))


OVERLAP = Experiment(
    "stream-overlap",
    start=lambda device: {"streams": 1},
    axes=lambda device: [
        Axis(
            "streams",
            (2,),
            "The product is bound by FLOPs and the rows' kernel by bytes: side by side they would take the longer of"
            " both. But each fills the multiprocessors' shared memory, so that blocks of one wait for those of the "
            "other to end, and most of that is not to be had. To pay for a second chunk in memory it has to gain 5% "
            "here.",
        )
    ],
    trial=_overlap,
    seconds=8,
    why_not=lambda device: "" if device == "cuda" else "needs CUDA",
)

"""What activations take: the bytes alive at the peak of a forward and backward pass, from the model's sizes.

Kept from forward to backward by transformers' layers, for each packed row (``D`` hidden, ``I`` intermediate, ``H``
query heads and ``K`` key heads (``H`` where they are repeated) of width ``d``, ``b`` bytes a number):

==================  =========================  =========================  ==========================================
part                fp32 (b = 4)               half (b = 2)               which tensors
==================  =========================  =========================  ==========================================
norm                4 (3 D + 1)                4 (D + 1) + 2 b D          input (half: its fp32 copy), 1/rms, normalised
                                                                          and rounded, output
... liger's         2 b D + 4                  2 b D + 4                  input, 1/rms, output
q, k norms          8 (H + K) d + 4 (H + K)    6 (H + K) d + 4 (H + K)    as above, without the output (Qwen3)
attention           2 b H d + 4 H              2 b H d + 4 H              query after rotation, output, log of sums
... by sdpa         b H d                      b H d                      output in the order of the rows
... each key        2 b K d                    2 b K d                    key and value (gathered once per segment)
MLP                 4 b I                      4 b I                      gate, silu, up, product
... liger's         3 b I                      3 b I                      gate, up, product
LoRA, rank r        28 r                       28 r                       the adapters' inner activations
... inputs                                     4 (5 D + H d + I)          fp32 copies of the projections' inputs
... less            2 b D                      b (4 D + I + H d)          norms' normalised rows; half: these inputs
==================  =========================  =========================  ==========================================

A layer has two norms; the residual stream is their input. peft's adapters are in fp32. Once for all layers: cos and
sin ``2 b d``, and the final norm without its output. With checkpointing a layer keeps its input ``b D``, and one layer
at a time all of the table.

A patch of a trained vision tower keeps, in every block: the norms (LayerNorm: input, output, two statistics), query,
key and value with the projection they were cut from ``5 b D``, output ``b D``, log of sums ``4 H``, and the MLP's
tensors (4 if gated, 3 for quick GELU, otherwise 2); once: the pixels, cos and sin in fp32, the mergers' norm and both
sides of their GELU. A frozen tower keeps nothing.

On top comes the larger of: the loss (a chunk of logits, the gradient of its logits or, on CUDA, of a superchunk's, and
the gradient of the head's weight: in fp32 where it is a sum of several products, in the weight's dtype where it is one)
and the backward pass of one layer (the gradients of the product's factors and of the residual stream). A pass ends with
the gradient of the embedding, for which the vision tower's tensors have to wait. Weights, their gradients and optimizer
states are not in it, nor are masks, index tensors and what kernels allocate for themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from revisual_fast.packing.cost import ModelShape, VisionShape

__all__ = ["Activations", "activation_bytes", "readable_bytes"]


@dataclass(frozen=True)
class Activations:
    """Bytes by what they grow with; see :func:`activation_bytes`."""

    per_row: int  # kept for a packed row
    per_query: int  # kept for a row of queries as attention takes them
    per_key: int  # kept for a row of keys and values as attention takes them
    per_patch: int
    row_work: int  # while one layer's backward pass runs, for a packed row
    query_work: int
    key_work: int
    patch_work: int
    per_target: int  # while the loss runs, without its logits
    logits: int  # of a row, without superchunks with their gradient
    chunk: int  # bytes of the loss's logits, at most
    gradient: int  # of a row's logits
    superchunk: int  # bytes of that gradient, at most; 0: it is counted in ``logits``
    head: int  # while the loss runs: the gradient of the head's weight, if it is a sum
    head_once: int  # if it is one product
    embedding: int  # at the end of the backward pass: the gradient of the embedding

    def peak(
        self, rows: int, targets: int = 0, patches: int = 0, *, queries: int | None = None, keys: int | None = None
    ) -> int:
        """Bytes at the peak for ``rows`` packed rows, ``targets`` of them with a target, and so many image patches.

        ``queries`` and ``keys`` are what the attention backend gathers: keys the packed rows and, for every segment
        with a prefix, that prefix; queries the rows and their padding. None: nothing is gathered.
        """
        queries, keys = rows if queries is None else queries, rows if keys is None else keys
        vision = patches * self.per_patch
        kept = vision + rows * self.per_row + queries * self.per_query + keys * self.per_key
        loss = targets * self.per_target + self._head_and_logits(targets)
        layer = rows * self.row_work + queries * self.query_work + keys * self.key_work
        return max(kept + max(loss, layer), vision + max(self.embedding, patches * self.patch_work))

    def _head_and_logits(self, targets: int) -> int:
        logits, gradient = min(self.chunk, targets * self.logits), min(self.superchunk, targets * self.gradient)
        once = targets * self.gradient <= self.superchunk if self.superchunk else targets * self.logits <= self.chunk
        if not once:
            return logits + gradient + self.head
        if self.superchunk:  # the logits are gone by then
            return gradient + max(logits, self.head_once)
        return logits + self.head_once

    @property
    def per_token(self) -> int:
        """What one more token takes, nothing gathered."""
        return self.per_row + self.per_query + self.per_key + self.row_work + self.query_work + self.key_work

    def describe(self, tokens: int) -> str:
        """One line for a run's header: ``tokens`` packed rows of text, each with a target."""
        total = self.peak(tokens, tokens)
        patch = f", {readable_bytes(self.per_patch)} an image patch" if self.per_patch else ""
        return (
            f"activations: {readable_bytes(self.per_token)} a token{patch}, "
            f"{readable_bytes(total)} for micro_batch_tokens {tokens} of text"
        )


def activation_bytes(
    shape: ModelShape,
    *,
    dtype_bytes: int,
    checkpointing: bool = False,
    liger: bool = False,
    attention: str = "varlen",  # sdpa keeps its output a second time
    heads_repeated: bool = False,  # whether attention takes keys and values once for every query head
    lora_rank: int | None = None,  # of fp32 adapters on the seven projections of every layer, all else frozen
    head_trained: bool = True,
    vision_trained: bool = True,
    chunk_bytes: int = 0,  # the budget of the loss's logits; without superchunks, of their gradient as well
    superchunk_bytes: int = 0,  # the budget of the gradient of the loss's logits
) -> Activations:
    """What the activations of a model of ``shape`` take in a training pass over packed rows.

    ``dtype_bytes`` is 2 or 4 (ValueError otherwise); the table is in the module's docstring.
    """
    if dtype_bytes not in (2, 4):
        raise ValueError(f"activations of {dtype_bytes} bytes a number are not estimated; 2 (half) or 4 (fp32) are")
    b, hidden = dtype_bytes, shape.hidden
    kv_heads = shape.heads if heads_repeated else shape.kv_heads
    row, query, key = _layer(shape, b, liger, attention == "sdpa", kv_heads, lora_rank)
    kept_row, kept_query, kept_key = (b * hidden, 0, 0) if checkpointing else (row, query, key)
    backward = b * (2 * shape.intermediate + hidden)
    once = 2 * b * shape.head_dim + _norm(hidden, b, liger) - b * hidden
    vision = shape.vision if vision_trained else None
    per_patch, patch_work = (0, 0) if vision is None else _patch(vision, b, checkpointing, liger)
    half = b if b < 4 else 0
    return Activations(
        per_row=shape.layers * kept_row + once,
        per_query=shape.layers * kept_query,
        per_key=shape.layers * kept_key,
        per_patch=per_patch,
        row_work=backward + (row - (kept_row if b == 4 or liger else 0) if checkpointing else 0),
        query_work=query if checkpointing else 0,
        key_work=key if checkpointing else 0,
        patch_work=patch_work,
        per_target=2 * b * hidden,
        logits=shape.vocab * ((4 if half else 0) if superchunk_bytes else 4 + half),  # fp32: one in the other's place
        chunk=chunk_bytes,
        gradient=shape.vocab * b,
        superchunk=superchunk_bytes,
        head=4 * shape.vocab * hidden if head_trained else 0,
        head_once=b * shape.vocab * hidden if head_trained else 0,
        embedding=(4 + half) * shape.vocab * hidden if lora_rank is None else 0,
    )


def _layer(
    shape: ModelShape, b: int, liger: bool, ordered: bool, kv_heads: int, lora_rank: int | None
) -> tuple[int, int, int]:
    """What a decoder layer keeps for a row, for a row of queries and for a row of keys."""
    hidden, intermediate, width = shape.hidden, shape.intermediate, shape.heads * shape.head_dim
    row = 2 * _norm(hidden, b, liger) + (3 if liger else 4) * b * intermediate + (b * width if ordered else 0)
    if lora_rank is not None:
        row += 7 * 4 * lora_rank - (0 if liger else 2 * b * hidden)
        if b < 4:  # fp32 copies of the projections' inputs, each its own, in the place of these inputs
            row += 4 * (5 * hidden + width + intermediate) - b * (2 * hidden + intermediate + (width if ordered else 0))
    if shape.qk_norm:
        heads = shape.heads + shape.kv_heads
        row += heads * (_norm(shape.head_dim, b, liger) - b * shape.head_dim)
    return row, 2 * b * width + 4 * shape.heads, 2 * b * kv_heads * shape.head_dim


def _norm(width: int, b: int, liger: bool) -> int:
    """What an RMSNorm keeps, its input and its output among it."""
    return (2 * b if liger else 3 * b if b == 4 else 4 + 2 * b) * width + 4


def _patch(vision: VisionShape, b: int, checkpointing: bool, liger: bool) -> tuple[int, int]:
    """What the tower keeps for a patch, and what one block's backward pass takes on top."""
    hidden = vision.hidden
    norm = _norm(hidden, b, liger) if vision.rms_norm else 2 * b * hidden + 8
    kept = (3 if liger else 4) if vision.gated else 3 if vision.quick_gelu else 2
    block = 2 * norm + 6 * b * hidden + 4 * vision.heads + kept * b * vision.intermediate
    merger = norm + 2 * b * hidden
    once = b * vision.patch_inputs + 8 * (hidden // vision.heads) + (1 + vision.deepstack) * merger
    backward = b * ((2 if vision.gated or vision.quick_gelu else 1) * vision.intermediate + hidden)
    if checkpointing:  # by the last block's turn the merger is done, and what the block got is counted already
        got = b * hidden if b == 4 or liger or not vision.rms_norm else 0
        return vision.depth * b * hidden + once, backward + block - merger - got
    return vision.depth * block + once, backward


def readable_bytes(size: float) -> str:
    """1536 -> "1.5 KiB"."""
    units: Sequence[str] = ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units:
        if size < 1024 or unit == units[-1]:
            return f"{size:.{0 if size >= 100 or unit == 'B' else 1}f} {unit}"
        size /= 1024
    raise AssertionError

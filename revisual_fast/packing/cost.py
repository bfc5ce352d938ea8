"""What a group costs: the floating-point operations of its packed row, counted from the model's sizes.

A matrix product of ``[n, k]`` and ``[k, m]`` is ``2 n k m``. Counted are the matrix products and attention; norms,
activations and rotations are not (less than a hundredth of it at the sizes of a real model). ``flops`` are of all
layers together.
"""

from __future__ import annotations

from dataclasses import dataclass

from revisual_fast.packing.batch import Group, Layout

__all__ = [
    "CostModel",
    "ModelShape",
    "VisionShape",
    "attention_flops",
    "head_flops",
    "text_flops",
    "vision_attention_flops",
    "vision_linear_flops",
]

Grid = tuple[int, int, int]
"""(t, h, w) of an image, in patches."""


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a vision tower: patch embedding, ``depth`` blocks, and mergers of ``merge²`` patches to one feature."""

    hidden: int
    depth: int
    intermediate: int
    heads: int
    patch_inputs: int  # numbers in a patch: channels * temporal patch * patch²
    merge: int  # patches on a side of a feature
    out: int  # width of a feature
    window: int = 0  # patches on a side of an attention window; 0: attention spans a frame in every block
    full_blocks: int = 0  # blocks whose attention spans a frame although there are windows
    gated: bool = False  # MLP with gate, up and down projections instead of two projections
    rms_norm: bool = False  # RMSNorm, written out in fp32, instead of LayerNorm
    quick_gelu: bool = False  # x * sigmoid(1.702 x), written out, instead of GELU
    deepstack: int = 0  # mergers beside the last one

    @property
    def block_weights(self) -> int:
        """Of the linear layers of a block."""
        return 4 * self.hidden**2 + (3 if self.gated else 2) * self.hidden * self.intermediate


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder (with gated MLP and grouped heads), its head, and its vision tower if it has one."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qk_norm: bool = False  # RMSNorm over every head of q and k
    vision: VisionShape | None = None


def text_flops(shape: ModelShape, rows: int) -> int:
    """Forward of the decoder's linear layers over ``rows`` packed rows."""
    attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)  # q, k, v and output projections
    return 2 * rows * shape.layers * (attention + 3 * shape.hidden * shape.intermediate)


def attention_flops(shape: ModelShape, queries: int, prefix: int) -> int:
    """Forward of the decoder's attention for one segment: every query sees the prefix and its own rows up to itself."""
    pairs = queries * prefix + queries * (queries + 1) // 2
    return 4 * shape.layers * shape.heads * shape.head_dim * pairs


def head_flops(shape: ModelShape, targets: int) -> int:
    """Forward of the head for ``targets`` rows: the others never meet it."""
    return 2 * targets * shape.hidden * shape.vocab


def vision_linear_flops(shape: VisionShape, grid: Grid) -> int:
    """Forward of patch embedding, blocks without their attention, and mergers."""
    t, h, w = grid
    patches, wide = t * h * w, shape.hidden * shape.merge**2
    mergers = (1 + shape.deepstack) * (patches // shape.merge**2) * wide * (wide + shape.out)
    return 2 * (patches * (shape.patch_inputs * shape.hidden + shape.depth * shape.block_weights) + mergers)


def vision_attention_flops(shape: VisionShape, grid: Grid) -> int:
    """Forward of the blocks' attention: all pairs of patches of a frame, or of a window."""
    t, h, w = grid
    frame = t * (h * w) ** 2
    if shape.window == 0:
        pairs = shape.depth * frame
    else:
        in_windows = t * _sum_of_squares(h, shape.window) * _sum_of_squares(w, shape.window)
        pairs = shape.full_blocks * frame + (shape.depth - shape.full_blocks) * in_windows
    return 4 * shape.hidden * pairs


def _sum_of_squares(side: int, window: int) -> int:
    """Of the lengths that cutting ``side`` into windows gives."""
    return side // window * window**2 + (side % window) ** 2


@dataclass(frozen=True, kw_only=True)
class _Pass:
    gradient: bool = True  # False: a pass that only scores
    text_trained: bool = True  # False: the decoder's weights are frozen below adapters, whose own cost is left out
    head_trained: bool = True
    vision_trained: bool = True
    vision_cached: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class CostModel(_Pass):
    """FLOPs of a forward and backward pass over groups, each counted as if it were alone in its micro-batch.

    Backward: a linear layer multiplies twice more, once for its input and once for its weight (not for the patches,
    and not for a frozen weight). Attention takes 5 products where its forward takes 2, because the scores are computed
    again (FlashAttention-2, arXiv 2307.08691, section 3.1.2): 2.5 times the forward. The head is the fused loss's:
    6 N D V, with a frozen head 4 N D V. ``checkpointing`` computes the layers of the trained towers once more, without
    their last product, the down projection, which nobody asks for. A vision tower that is frozen runs forward only,
    and not at all with ``vision_cached``.

    The tower runs once per distinct image (by key) in every layout; an image that two groups share counts in both.
    """

    shape: ModelShape

    def flops(self, group: Group, layout: Layout = "shared") -> int:
        """Of ``group`` in ``layout``; in ``padded`` to the longest of the group's own completions."""
        shape, prompt = self.shape, len(group.prompt.ids)
        own = [len(c) - 1 for c in group.completions]
        if layout == "shared":
            attention = attention_flops(shape, prompt, 0) + sum(attention_flops(shape, n, prompt) for n in own)
        else:
            attention = sum(attention_flops(shape, prompt + n, 0) for n in own or [0])
        if layout == "padded":
            attention += sum(attention_flops(shape, max(own) - n, 0) for n in own)
        return self._text(group.tokens(layout), attention) + self._head(sum(own) + len(own)) + self._images(group)

    def _text(self, rows: int, attention: int) -> int:
        linear = text_flops(self.shape, rows)
        if not self.gradient:
            return linear + attention
        flops = (3 if self.text_trained else 2) * linear + 7 * attention // 2
        if self.checkpointing:
            flops += linear + attention - 2 * rows * self.shape.layers * self.shape.hidden * self.shape.intermediate
        return flops

    def _head(self, targets: int) -> int:
        products = (3 if self.head_trained else 2) if self.gradient else 1
        return products * head_flops(self.shape, targets)

    def _images(self, group: Group) -> int:
        keys = group.prompt.image_keys
        if not keys or (self.vision_cached and not self.vision_trained):
            return 0
        vision = self.shape.vision
        if vision is None:
            raise ValueError("the group has images, but the model has no vision tower")
        grids: dict[str, list[int]] = dict(zip(keys, group.prompt.grids.tolist(), strict=True))
        return sum(self._image(vision, (t, h, w)) for t, h, w in grids.values())

    def _image(self, vision: VisionShape, grid: Grid) -> int:
        linear, attention = vision_linear_flops(vision, grid), vision_attention_flops(vision, grid)
        if not (self.gradient and self.vision_trained):
            return linear + attention
        patches = grid[0] * grid[1] * grid[2]
        flops = 3 * linear - 2 * patches * vision.patch_inputs * vision.hidden + 7 * attention // 2
        if self.checkpointing:
            down = vision.hidden * vision.intermediate
            flops += 2 * patches * vision.depth * (vision.block_weights - down) + attention
        return flops

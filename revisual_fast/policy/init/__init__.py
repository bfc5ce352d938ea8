"""Models that this package makes itself, without a download: ``revisual-fast init KIND DIRECTORY``."""

from __future__ import annotations

from pathlib import Path

from revisual_fast.policy.init.shared import InitError

__all__ = ["KINDS", "InitError", "build"]

KINDS = ("tiny-vl", "smollm2-vl")


def build(kind: str, directory: str | Path, *, seed: int = 0) -> list[str]:
    """Make the model ``kind`` (one of :data:`KINDS`) in ``directory`` and return the lines to print about it.

    ``seed`` draws the weights that are random. Raises :class:`InitError` for an unknown kind, a directory that is not
    empty, or a missing package.
    """
    if kind == "tiny-vl":
        from revisual_fast.policy.init.tiny_vl import build_tiny_vl

        build_tiny_vl(directory, seed=seed)
        return [f"{directory}: a Qwen2.5-VL with random weights and its tokenizer (fp32)"]
    if kind == "smollm2-vl":
        from revisual_fast.policy.init.smollm2_vl import TOLERANCE, build_smollm2_vl

        made = build_smollm2_vl(directory, seed=seed)
        return [
            f"{directory}: a Qwen2.5-VL with SmolLM2-135M-Instruct as its language tower (fp32)",
            f"language tower {made['language_parameters']:,} parameters, vocabulary {made['vocabulary']:,}",
            f"vision tower {made['vision_parameters']:,} parameters, random: it must be trained before it sees",
            f"next-token log-probs against the original: max difference {made['max_logprob_difference']:.1e} "
            f"(allowed {TOLERANCE:.0e})",
        ]
    raise InitError(f"unknown kind of model {kind!r}; choose one of {', '.join(KINDS)}")

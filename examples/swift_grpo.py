"""ms-swift's GRPO command with log-probs from the fused head: every argument is handed on to `swift rlhf`.

python examples/swift_grpo.py --model Qwen/Qwen2.5-VL-3B-Instruct --dataset questions.jsonl --reward_funcs accuracy ...
Without arguments it says what would be replaced.
"""

import sys

try:
    from swift.pipelines import rlhf_main
except ImportError as error:
    sys.exit(f"{error}: pip install ms-swift==4.6.0 'trl<1' msgspec")

from revisual_fast.integrations.swift import SINGLE, TRAINER, patch_swift

patch_swift()
if len(sys.argv) == 1:
    sys.exit(f"replaced: {TRAINER}.{SINGLE}")
rlhf_main(["--rlhf_type", "grpo", *sys.argv[1:]])

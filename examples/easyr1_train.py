"""EasyR1 with the fused log-probs and objective: its own command line, every worker process patched when it starts.

python examples/easyr1_train.py config=examples/config.yaml worker.actor.model.model_path=Qwen/Qwen2.5-VL-7B-Instruct
"""

import sys

from revisual_fast.integrations.easyr1 import patch_easyr1

try:
    import ray
    from verl.trainer.main import main
except ImportError as error:
    sys.exit(f"{error}: git clone https://github.com/hiyouga/EasyR1 && pip install -e EasyR1")

variables = {
    "TOKENIZERS_PARALLELISM": "true",  # as EasyR1 sets them where Ray has not been started
    "NCCL_DEBUG": "WARN",
    "VLLM_LOGGING_LEVEL": "WARN",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}
patch_easyr1()  # here, so that a seam that has moved is noticed before anything starts
hook = "revisual_fast.integrations.easyr1.patch_easyr1"
ray.init(runtime_env={"env_vars": variables, "worker_process_setup_hook": hook})
main()

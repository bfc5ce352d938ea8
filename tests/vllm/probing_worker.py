"""The engine process of the tests: it also says what vLLM keeps, and lets a weight be spoilt."""

from __future__ import annotations

from typing import Any

from revisual_fast.rollout.messages import EngineSettings
from revisual_fast.rollout.vllm.commands import Commands
from revisual_fast.rollout.vllm.worker import main


class Probing(Commands):
    def start(self, settings: EngineSettings) -> int:
        vocab = super().start(settings)
        self._scheduled = self._encoded = 0
        scheduler = self._scheduler
        schedule = scheduler.schedule

        def counting(*arguments: Any, **options: Any) -> Any:
            output = schedule(*arguments, **options)
            self._scheduled += output.total_num_scheduled_tokens
            self._encoded += sum(map(len, output.scheduled_encoder_inputs.values()))
            return output

        scheduler.schedule = counting
        return vocab

    @property
    def _scheduler(self) -> Any:
        return self.engine.engine_core.engine_core.scheduler

    def probe(self) -> dict[str, Any]:
        """Tokens and images computed since the last time; what is cached; the eos ids of a request."""
        (runner,) = self.engine.collective_rpc(lambda worker: worker.model_runner)
        pool = self._scheduler.kv_cache_manager.block_pool
        found = {
            "tokens": self._scheduled,
            "images": self._encoded,
            "cached_images": len(runner.encoder_cache) + len(self._scheduler.encoder_cache_manager.cached),
            "cached_blocks": len(pool.cached_block_hash_to_block),
            "eos": self._eos(),
        }
        self._scheduled = self._encoded = 0
        return found

    def spoil(self, parameter: str) -> None:
        """Change one element of a parameter by its last bit or so."""
        (model,) = self.engine.collective_rpc("get_model")
        model.get_parameter(parameter).data.view(-1)[3] *= 1.01

    def _eos(self) -> set[int]:
        from vllm import SamplingParams

        params = SamplingParams()
        processor = self.engine.input_processor
        params.update_from_generation_config(processor.generation_config_fields, processor.renderer.get_eos_token_id())
        return set(params.all_stop_token_ids)


if __name__ == "__main__":
    main(Probing())

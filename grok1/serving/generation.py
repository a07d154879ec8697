"""Generation for requests: one at a time, or batched with sampling parameters per request."""

from __future__ import annotations

import copy
import threading
from typing import Any

from fastapi import HTTPException
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.cli.serving.utils import BaseGenerateManager, CBGenerateManager, GenerateManager, GenerationState


SHUTTING_DOWN = "The server is shutting down."


class ContextLimit(BaseGenerateManager):
    """Limits a request to the context before Transformers' manager generates."""

    def context(self, model: PreTrainedModel) -> int:
        """Tokens that prompt and completion may have together."""
        return model.config.max_position_embeddings

    def prepare(
        self, model: PreTrainedModel, inputs: dict[str, Any], generation_config: GenerationConfig, request_id: str
    ) -> None:
        """Limit the completion to the context. Raises 400 if the prompt is empty or leaves no room."""
        ids = inputs["input_ids"]
        length = len(ids) if isinstance(ids, list) else ids.shape[-1]
        context = self.context(model)
        if length == 0:
            raise HTTPException(400, "The prompt is empty: expected at least one token.")
        if length >= context:
            raise HTTPException(
                400,
                f"The context is {context} tokens, prompt and answer together, and the prompt alone has {length}. "
                "Shorten it.",
            )
        room, asked = context - length, generation_config.max_new_tokens
        generation_config.max_new_tokens = room if asked is None else min(asked, room)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> Any:
        self.prepare(model, inputs, gen_config, request_id)
        return super().generate_streaming(  # type: ignore[safe-super]
            model, processor, inputs, gen_config, request_id, response_parser
        )

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        self.prepare(model, inputs, gen_config, request_id)
        return await super().generate_non_streaming(  # type: ignore[safe-super]
            model, processor, inputs, gen_config, request_id
        )


class Sequential(ContextLimit, GenerateManager):
    """One request at a time."""

    def stop(self) -> None:
        """Wait for the current step: a thread that is killed within torch kills the process."""
        self.submit(lambda: None).result()


class Batched(ContextLimit, CBGenerateManager):
    """Continuous batching, each request with its own temperature, top_k and top_p.

    Transformers' manager samples every request with the parameters of the first. Its continuous batching supports
    parameters per request once the shared configuration makes it create a processor for each of the three.
    """

    def __init__(self, config: ContinuousBatchingConfig | None):
        super().__init__(config)
        self._sampling: dict[str, dict[str, Any]] = {}
        self._stopped = False

    def init_cb(self, model: PreTrainedModel, gen_config: GenerationConfig) -> None:
        if self._cb is not None:
            return
        shared = copy.deepcopy(model.generation_config)
        shared.update(do_sample=True, temperature=0.5, top_k=model.config.vocab_size, top_p=0.5, use_cache=False)
        super().init_cb(model, shared)
        batches: Any = self._cb
        add_request = batches.add_request

        def add_with_sampling(input_ids: list[int], *, request_id: str, **kwargs: Any) -> str | None:
            return add_request(input_ids, request_id=request_id, **self._sampling.pop(request_id), **kwargs)

        batches.add_request = add_with_sampling

    def context(self, model: PreTrainedModel) -> int:
        # A request larger than the whole cache would end the batching thread.
        batches: Any = self._cb
        sizes = batches.continuous_batching_config
        if sizes.num_blocks is None:  # the cache is not allocated yet
            return super().context(model)
        return min(super().context(model), sizes.page_size * sizes.num_blocks)

    def prepare(
        self, model: PreTrainedModel, inputs: dict[str, Any], generation_config: GenerationConfig, request_id: str
    ) -> None:
        super().prepare(model, inputs, generation_config, request_id)
        sampling = {"temperature": 1.0, "top_k": 1, "top_p": 0.0}  # greedy
        if generation_config.do_sample:
            vocabulary = model.config.vocab_size
            sampling = {
                "temperature": float(generation_config.temperature or 1.0),
                "top_k": min(generation_config.top_k or vocabulary, vocabulary),
                "top_p": 1.0 if generation_config.top_p is None else float(generation_config.top_p),
            }
        self._sampling[request_id] = sampling

    async def generate_non_streaming(self, *args: Any, **kwargs: Any) -> tuple[str, int, Any]:
        try:
            return await super().generate_non_streaming(*args, **kwargs)
        except RuntimeError:
            if self._stopped:
                raise HTTPException(503, SHUTTING_DOWN) from None
            raise

    def stop(self) -> None:
        self._stopped = True
        if self._cb is not None:
            self._cb.stop(hard_stop=True)


def batching_config(model: PreTrainedModel, **sizes: Any) -> ContinuousBatchingConfig:
    """The cache and the batch of continuous batching.

    Args:
        sizes: arguments of `ContinuousBatchingConfig`. Transformers' default is most of the free memory. On a CPU,
            where that is most of the machine's, the default here is eight sequences of the whole context.
    """
    if model.device.type == "cpu" and "max_memory_percent" not in sizes:
        page = sizes.setdefault("page_size", min(256, model.config.max_position_embeddings))
        sizes.setdefault("num_blocks", 8 * model.config.max_position_embeddings // page)
        sizes.setdefault("max_batch_tokens", 256)
    return ContinuousBatchingConfig(per_request_processors=True, **sizes)


class ServerState(GenerationState):
    """Creates the managers above, and refuses work after shutdown."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.stopping = threading.Event()

    def check_running(self, *_: Any) -> None:
        """Raises 503 after shutdown; called before every forward pass."""
        if self.stopping.is_set():
            raise HTTPException(503, SHUTTING_DOWN)

    def shutdown(self) -> None:
        """Abort generation and wait for the current step."""
        self.stopping.set()
        for manager in [*self._generate_managers.values(), self._cb_manager]:
            if manager is not None:
                manager.stop()

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        self.check_running()
        if use_cb:
            self._cb_manager = self._cb_manager or Batched(self._cb_config)
            return self._cb_manager
        if model_id not in self._generate_managers:
            self._generate_managers[model_id] = Sequential()
        return self._generate_managers[model_id]

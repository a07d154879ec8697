"""Generation for many requests together, by Transformers' continuous batching."""

from __future__ import annotations

import asyncio
import copy
import queue
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from transformers import ContinuousBatchingConfig, PreTrainedModel

from grok1.serving.generation import SHUTTING_DOWN, Job, Sampling, Token, UnavailableError, end_tokens


# Crashes of the worker without one finished request between them, after which the server calls itself unhealthy.
MAX_CRASHES = 3


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


class Batched:
    """Continuous batching, each request with its own temperature, top_k and top_p.

    Transformers' manager takes a configuration for all requests, and parameters per request once that configuration
    makes it create a processor for each of the three. When its thread dies, the requests in it fail and the next one
    starts another.
    """

    def __init__(self, model: PreTrainedModel, config: ContinuousBatchingConfig):
        self.model, self.config = model, config
        self.crashes = self.restarts = 0
        self._stopped = False
        self._manager: Any = None
        self._start()

    def _start(self) -> None:
        shared = copy.deepcopy(self.model.generation_config)
        vocabulary = self.model.config.vocab_size
        shared.update(do_sample=True, temperature=0.5, top_k=vocabulary, top_p=0.5, use_cache=False)
        self._manager = self.model.init_continuous_batching(  # type: ignore[operator]
            generation_config=shared, continuous_batching_config=copy.deepcopy(self.config)
        )
        self._manager.start()

    def _running(self) -> Any:
        """The manager, a new one where the last one's thread died."""
        if self._stopped:
            raise UnavailableError(SHUTTING_DOWN)
        if not self._manager.is_running():
            self.crashes, self.restarts = self.crashes + 1, self.restarts + 1
            with suppress(Exception):  # it gives the cache back
                self._manager.stop(block=False)
            self._start()
        return self._manager

    def refusals(self, job: Job) -> list[str]:
        wanted = {
            "frequency_penalty": job.sampling.frequency_penalty != 0,
            "logit_bias": bool(job.sampling.logit_bias),
            "logprobs": job.alternatives is not None,
            "presence_penalty": job.sampling.presence_penalty != 0,
            "seed": job.sampling.seed is not None and job.sampling.temperature > 0,
        }
        return [name for name, asked in wanted.items() if asked]

    def context(self) -> int:
        # A request larger than the whole cache would end the batching thread.
        context = int(self.model.config.max_position_embeddings)
        sizes = self._manager.continuous_batching_config
        if sizes.num_blocks is None:  # the cache is not allocated yet
            return context
        return min(context, sizes.page_size * sizes.num_blocks)

    def _sampling(self, sampling: Sampling) -> dict[str, Any]:
        if sampling.temperature == 0:
            return {"temperature": 1.0, "top_k": 1, "top_p": 0.0}
        vocabulary = self.model.config.vocab_size
        top_k = min(sampling.top_k, vocabulary) if sampling.top_k > 0 else vocabulary
        return {"temperature": sampling.temperature, "top_k": top_k, "top_p": sampling.top_p}

    async def generate(self, job: Job) -> AsyncIterator[Token]:
        manager, name, given = self._running(), uuid.uuid4().hex, 0
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        if job.max_tokens == 0:
            return
        manager.register_result_handler(name, outputs.put_nowait)
        finished = False
        try:
            manager.add_request(
                job.prompt,
                request_id=name,
                streaming=True,
                max_new_tokens=job.max_tokens,
                eos_token_id=sorted(end_tokens(self.model)) or -1,
                **self._sampling(job.sampling),
            )
            while not finished:
                output = await self._next(manager, outputs)
                finished = output.is_finished() or output.error is not None
                for token in output.generated_tokens[given:]:
                    yield Token(token)
                given = max(given, len(output.generated_tokens))
                if output.error is not None:
                    raise UnavailableError(SHUTTING_DOWN if self._stopped else f"Generation failed: {output.error}")
            self.crashes = 0
        finally:
            if not finished:
                manager.cancel_request(name)
            self._forget(manager, name)

    async def _next(self, manager: Any, outputs: asyncio.Queue[Any]) -> Any:
        """The next output. Raises UnavailableError where none will come: the thread died before it saw the request."""
        while True:
            with suppress(TimeoutError):
                return await asyncio.wait_for(outputs.get(), 1)
            if not manager.is_running() and outputs.empty():
                raise UnavailableError(
                    SHUTTING_DOWN if self._stopped else "Generation failed; the worker is restarted."
                )

    @staticmethod
    def _forget(manager: Any, name: str) -> None:
        """Drop a request's handler, and the outputs that came after one: nobody reads that queue."""
        router = manager.output_router
        with router._lock:
            router.result_handlers.pop(name, None)
        with suppress(queue.Empty):
            while True:
                router.output_queue.get_nowait()

    def health(self) -> tuple[bool, dict[str, Any]]:
        with suppress(UnavailableError):
            self._running()
        about = {"restarts": self.restarts} if self.restarts else {}
        return not self._stopped and self.crashes < MAX_CRASHES, about

    def stop(self) -> None:
        self._stopped = True
        self._manager.stop(hard_stop=True)

"""Generation for requests, one at a time.

The loop is our own, not `model.generate`: it ends between two steps when the client leaves, gives log-probabilities of
prompt and answer from the same passes, and draws from a random stream of each request. The sampling is Transformers'.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


SHUTTING_DOWN = "The server is shutting down."
# Tokens of a prompt in one forward pass: bounds its activations, and the time until a client that left is noticed.
PREFILL = 512


class UnavailableError(Exception):
    """The engine cannot serve a request now."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, as OpenAI defines the parameters. Temperature 0 is greedy; top_k 0 is all tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One sequence to generate.

    Args:
        prompt: token ids, at least one.
        max_tokens: new tokens at most; the end-of-text token ends it earlier.
        alternatives: the number of most likely tokens to report with each token's log-probability; None: neither.
        echo: report the prompt's tokens, before the new ones. Only with `alternatives`.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    alternatives: int | None = None
    echo: bool = False


@dataclass(frozen=True)
class Token:
    """A token, its natural log-probability before sampling, and the most likely ones in its place.

    Both are None or empty where they were not asked for, and for the first token of a prompt.
    """

    id: int
    logprob: float | None = None
    likely: tuple[tuple[int, float], ...] = ()


class Engine(Protocol):
    """What generates."""

    def refusals(self, job: Job) -> list[str]:
        """The parameters of a job that this engine does not have."""

    def context(self) -> int:
        """Tokens that prompt and answer may have together."""

    def generate(self, job: Job) -> AsyncIterator[Token]:
        """The job's tokens. Closing the iterator ends the generation. Raises UnavailableError, RuntimeError."""

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether requests are served, and what /health says beside that."""

    def stop(self) -> None:
        """End all generation with UnavailableError and wait for the current step."""


def end_tokens(model: Any) -> set[int]:
    """The ids that end a text."""
    found = model.generation_config.eos_token_id
    return set() if found is None else set(found if isinstance(found, list) else [found])


class Chooser:
    """Chooses the next token from the logits (vocabulary,) of one sequence."""

    def __init__(self, sampling: Sampling, device: torch.device):
        self.sampling, self.generator = sampling, None
        self.counts: dict[int, int] = {}
        if sampling.temperature == 0:
            return
        self.generator = torch.Generator(device)
        self.generator.manual_seed(torch.seed() if sampling.seed is None else sampling.seed)
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_k > 0:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, logits: torch.Tensor) -> int:
        scores = logits.float()
        adjustments = dict(self.sampling.logit_bias)
        for token, count in self.counts.items():
            penalty = self.sampling.frequency_penalty * count + self.sampling.presence_penalty
            adjustments[token] = adjustments.get(token, 0.0) - penalty
        if adjustments:
            scores = scores.clone()
            ids = torch.tensor(list(adjustments), device=scores.device)
            scores[ids] += torch.tensor(list(adjustments.values()), device=scores.device)
        if self.generator is None:
            chosen = int(scores.argmax())
        else:
            none: Any = None  # these do not look at the ids
            probabilities = self.warpers(none, scores[None]).softmax(-1)
            chosen = int(torch.multinomial(probabilities, 1, generator=self.generator))
        if self.sampling.frequency_penalty or self.sampling.presence_penalty:
            self.counts[chosen] = self.counts.get(chosen, 0) + 1
        return chosen


def scored(logits: torch.Tensor, ids: torch.Tensor, alternatives: int) -> Iterator[Token]:
    """The tokens `ids` (N,) with their log-probabilities by `logits` (N, vocabulary)."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    top = logprobs.topk(alternatives)
    for token, logprob, values, indices in zip(
        ids.tolist(), own, top.values.tolist(), top.indices.tolist(), strict=True
    ):
        yield Token(token, logprob, tuple(zip(indices, values, strict=True)))


@torch.inference_mode()
def decode(model: Any, job: Job, check: Callable[[], None]) -> Iterator[Token]:
    """The tokens of a job, one after the other. `check` is called before every forward pass and may raise."""
    cache, length, ends = DynamicCache(config=model.config), len(job.prompt), end_tokens(model)
    ids = torch.tensor([job.prompt], device=model.device)
    attended = torch.ones(1, length + job.max_tokens, dtype=torch.long, device=model.device)
    done = 0

    def step(inputs: torch.Tensor, keep: int) -> torch.Tensor:
        nonlocal done
        check()
        done += inputs.shape[1]
        output = model(inputs, attention_mask=attended[:, :done], past_key_values=cache, logits_to_keep=keep)
        logits: torch.Tensor = output.logits[0]
        if logits[-1].isnan().any():
            raise RuntimeError("The model's logits are not numbers: its weights are damaged.")
        return logits

    if job.echo:
        yield Token(job.prompt[0])
    for chunk in ids.split(PREFILL, dim=1):
        logits = step(chunk, 0 if job.echo else 1)
        if job.echo:
            following = ids[0, done - chunk.shape[1] + 1 : done + 1]
            yield from scored(logits[: len(following)], following, job.alternatives or 0)
    choose = Chooser(job.sampling, logits.device)
    for left in reversed(range(job.max_tokens)):
        chosen = torch.tensor([choose(logits[-1])], device=logits.device)
        yield from [Token(int(chosen))] if job.alternatives is None else scored(logits[-1:], chosen, job.alternatives)
        if int(chosen) in ends or left == 0:
            return
        logits = step(chosen[None].to(model.device), 1)


class Sequential:
    """One request at a time, in a thread of its own."""

    def __init__(self, model: Any):
        self.model = model
        self._stopping = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generation")

    def refusals(self, job: Job) -> list[str]:
        return []

    def context(self) -> int:
        return int(self.model.config.max_position_embeddings)

    async def generate(self, job: Job) -> AsyncIterator[Token]:
        if self._stopping.is_set():
            raise UnavailableError(SHUTTING_DOWN)
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Token | Exception | None] = asyncio.Queue()
        left = threading.Event()

        def put(item: Token | Exception | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(queue.put_nowait, item)

        running = self._thread.submit(self._run, job, put, left)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            left.set()
            running.cancel()

    def _run(self, job: Job, put: Callable[[Token | Exception | None], None], left: threading.Event) -> None:
        def check() -> None:
            if self._stopping.is_set() or left.is_set():
                raise UnavailableError(SHUTTING_DOWN)

        try:
            for token in decode(self.model, job, check):
                put(token)
            put(None)
        except Exception as error:
            put(error)

    def health(self) -> tuple[bool, dict[str, Any]]:
        return True, {}

    def stop(self) -> None:
        self._stopping.set()
        self._thread.shutdown(wait=True)

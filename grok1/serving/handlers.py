"""A request to jobs, jobs to choices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError
from starlette.exceptions import HTTPException

from grok1.serving.answers import Piece
from grok1.serving.generation import Engine, Job, Sampling, end_tokens
from grok1.serving.model import ServedModel
from grok1.serving.schema import ChatRequest, CompletionRequest, Request
from grok1.serving.text import Text


NO_CHAT_TEMPLATE = (
    "This model has no chat template: Grok-1 is a base model, it continues text and was never tuned to chat. "
    "Use /v1/completions, or start the server with `--chat-template FILE`, a Jinja template of your choice."
)


class Handler:
    """Turns requests into jobs for an engine, and what it generates into text.

    Tokenising and templates run in one thread of their own, so that they do not stop the server.
    """

    def __init__(self, served: ServedModel, engine: Engine):
        self.served, self.engine = served, engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenising")

    async def jobs(self, request: CompletionRequest | ChatRequest) -> list[Job]:
        """One job per choice. Raises HTTPException for what the model or the engine cannot do."""
        sampling, limit = self._sampling(request)
        loop = asyncio.get_running_loop()
        if isinstance(request, ChatRequest):
            prompts = [await loop.run_in_executor(self._thread, self._chat_prompt, request)]
        else:
            prompts = [
                await loop.run_in_executor(self._thread, self._encode, prompt) if isinstance(prompt, str) else prompt
                for prompt in request.prompt
            ]
        echo = isinstance(request, CompletionRequest) and bool(request.echo) and request.logprobs is not None
        jobs = []
        for prompt in prompts:
            room = self._room(prompt)
            max_tokens = room if limit is None else min(limit, room)
            for number in range(request.n or 1):
                seed = None if sampling.seed is None else (sampling.seed + number) % 2**63
                jobs.append(Job(prompt, max_tokens, replace(sampling, seed=seed), request.alternatives, echo))
        if refused := self.engine.refusals(jobs[0]):
            raise HTTPException(
                400,
                f"Not supported with --continuous-batching, leave out: {', '.join(refused)}. A server without that "
                "option has it, and so has vLLM's.",
            )
        return jobs

    def _sampling(self, request: Request) -> tuple[Sampling, int | None]:
        """How to choose tokens, and how many at most: the request over its generation_config over the model's."""
        default, given = self.served.model.generation_config, request.generation_config
        temperature = (default.temperature or 1.0) if default.do_sample else 0.0
        top_p, top_k = (default.top_p or 1.0, default.top_k or 0) if default.do_sample else (1.0, 0)
        limit: int | None = request.limit  # type: ignore[attr-defined]
        if given is not None:
            limit = given.max_new_tokens if given.max_new_tokens is not None and not self._limited(request) else limit
            if given.temperature is not None or given.do_sample:
                temperature, top_k = 1.0 if given.temperature is None else given.temperature, 0
            if given.do_sample is False:
                temperature = 0.0
            top_p = top_p if given.top_p is None else given.top_p
            top_k = top_k if given.top_k is None else given.top_k
        if request.temperature is not None:
            temperature, top_k = request.temperature, 0
        sampling = Sampling(
            temperature=temperature,
            top_p=top_p if request.top_p is None else request.top_p,
            top_k=top_k if request.top_k is None else request.top_k,
            seed=request.seed,
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            logit_bias=self._logit_bias(request.logit_bias or {}),
        )
        return sampling, limit

    @staticmethod
    def _limited(request: Request) -> bool:
        return bool(request.model_fields_set & {"max_tokens", "max_completion_tokens"})

    def _logit_bias(self, given: dict[str, float]) -> dict[int, float]:
        vocabulary = self.served.model.config.vocab_size
        wrong = [name for name in given if not (name.isascii() and name.isdigit() and int(name[:20]) < vocabulary)]
        if wrong:
            raise HTTPException(400, f"logit_bias: expected token ids below {vocabulary}, found {wrong[0][:40]!r}.")
        return {int(name): bias for name, bias in given.items()}

    def _encode(self, text: str) -> list[int]:
        """Raises HTTPException before any work where so many characters cannot fit in the context."""
        context = self.engine.context()
        if len(text) > context * self.served.longest_token:
            raise HTTPException(
                400,
                f"The context is {context} tokens, prompt and answer together, and the prompt alone has {len(text):,} "
                "characters. Shorten it.",
            )
        return self.served.encode(text)

    def _room(self, prompt: Sequence[int]) -> int:
        """Tokens that the context leaves for the answer."""
        context, vocabulary = self.engine.context(), self.served.model.config.vocab_size
        if not prompt:
            raise HTTPException(400, "The prompt is empty: expected at least one token.")
        if len(prompt) >= context:
            raise HTTPException(
                400,
                f"The context is {context} tokens, prompt and answer together, and the prompt alone has "
                f"{len(prompt)}. Shorten it.",
            )
        if not all(0 <= token < vocabulary for token in prompt):
            raise HTTPException(400, f"prompt: expected token ids from 0 to {vocabulary - 1}.")
        return context - len(prompt)

    def _chat_prompt(self, request: ChatRequest) -> list[int]:
        tokenizer, wanted = self.served.tokenizer, request.chat_template_kwargs or {}
        if tokenizer.chat_template is None:
            raise HTTPException(400, NO_CHAT_TEMPLATE)
        if unknown := sorted(wanted.keys() - self.served.template_variables):
            raise HTTPException(
                400,
                "chat_template_kwargs: expected variables of the server's chat template "
                f"({', '.join(sorted(self.served.template_variables)) or 'it has none'}), "
                f"found {', '.join(unknown)[:200]}.",
            )
        messages = [
            {"role": message.role, "content": message.text, **({"name": message.name} if message.name else {})}
            for message in request.messages
        ]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **wanted)
        except (TemplateError, TypeError, ValueError) as error:
            raise HTTPException(400, f"The chat template refuses the messages: {error}.") from None
        return self._encode(text)

    async def choice(self, job: Job, request: CompletionRequest | ChatRequest) -> AsyncIterator[Piece]:
        """The pieces of a job's choice. The last one has the reason of its end."""
        text, new, ends = Text(self.served.tokenizer, request.stop or []), 0, end_tokens(self.served.model)
        echo = isinstance(request, CompletionRequest) and bool(request.echo)
        left = len(job.prompt) if job.echo else 0
        reason = "length"
        if echo:
            yield Piece(self.served.tokenizer.decode(job.prompt).removeprefix(" "))
        async with aclosing(self.engine.generate(job)) as tokens:  # type: ignore[type-var]
            async for token in tokens:
                if left > 0:
                    left -= 1
                    yield Piece(tokens=[token])
                    continue
                new += 1
                piece = Piece(text.add(token.id), [token])
                if text.stopped or token.id in ends:
                    reason = "stop"
                yield piece
                if text.stopped:
                    break
        rest = text.finish()
        yield Piece(rest, finish_reason="stop" if text.stopped else reason)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


async def merged(streams: Sequence[AsyncIterator[Piece]]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of several choices as they come, with the number of their choice."""
    queue: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()

    async def pump(index: int, stream: Any) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    queue.put_nowait((index, piece))
        finally:
            queue.put_nowait((index, None))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            index, piece = await queue.get()
            if piece is None:
                await tasks[index]
                running -= 1
            else:
                yield index, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

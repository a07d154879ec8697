"""Transformers' OpenAI-compatible server around one folder with Grok-1.

The routes, the handlers and the generation are those of `transformers serve`. What is different:

- one model, under its folder's name or path; any other name is refused and nothing is ever downloaded
- a prompt beyond the context is refused, an answer ends with the context
- a chat without a chat template is refused with the way out: Grok-1 is a base model
- an answer is decoded as the continuation of its prompt: it keeps the space that it begins with
- a temperature above 0 samples, and with continuous batching every request has its own
- a parameter that the server would leave out of account is refused
"""

from __future__ import annotations

import asyncio
import copy
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError, TemplateSyntaxError
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    BaseHandler,
    CBGenerateManager,
    GenerateManager,
    GenerationState,
)

from modeling_grok1.pipeline_grok1 import continuation_tokenizer
from modeling_grok1.quantization_grok1 import Grok1Int8Config


# Of OpenAI's parameters those that Transformers' handlers read nowhere, and the values that change nothing.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
}
# Those that sequential generation heeds and continuous batching does not.
SEQUENTIAL_ONLY: dict[str, tuple[Any, ...]] = {"frequency_penalty": (0,), "logit_bias": ({},), "stop": ([], "")}
# Numbers that are checked before anything is generated.
RANGES = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "max_tokens": (1, 2**31 - 1),
    "max_completion_tokens": (1, 2**31 - 1),
    "max_output_tokens": (1, 2**31 - 1),
}

NO_CHAT_TEMPLATE = (
    "This model has no chat template: Grok-1 is a base model, it continues text and was never tuned to chat. "
    "Use /v1/completions, or start the server with `--chat-template FILE`, a Jinja template of your choice."
)
GRACE = 5  # seconds for clients to take the end of their answers
ENDING = "The server is ending."


class FolderManager(ModelManager):
    """One model, loaded at the start from a folder and kept.

    Args:
        folder: with config.json, tokenizer.json and safetensors.
        chat_template: a Jinja file, instead of the folder's own template, if it has one.
        quantization: `"int8"` (xAI's own kind), or Transformers' `"bnb-4bit"` or `"bnb-8bit"`.
        model_kwargs: for `from_pretrained`, such as `experts_on`.
        options: of Transformers' `ModelManager`: device, dtype, attn_implementation, continuous_batching.

    Raises:
        ValueError, OSError: the folder cannot be loaded, or an option has no such value.
    """

    def __init__(
        self,
        folder: Path,
        *,
        chat_template: Path | None = None,
        quantization: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ):
        self.native_int8 = quantization == "int8"
        super().__init__(quantization=None if self.native_int8 else quantization, **options)
        self.folder, self.chat_template, self.model_kwargs = folder, chat_template, model_kwargs or {}
        self.name = self.force_model = folder.resolve().name
        self.model_timeout = -1  # never unloaded
        self.model, self.tokenizer = self.load_model_and_processor(self.name)

    def process_model_name(self, model_id: str | None) -> str:  # type: ignore[override]
        """The one name of the model, which a request may also leave out. Raises 404 for another model."""
        if model_id not in (None, self.name, str(self.folder), str(self.folder.resolve())):
            raise HTTPException(404, f"This server has one model, {self.name!r}; found {model_id!r} in the request.")
        return self.name

    def shutdown(self) -> None:
        """Nothing: the model stays until the process ends, whoever posts to /reset."""

    def get_gen_models(self) -> list[dict[str, Any]]:
        created = int((self.folder / "config.json").stat().st_mtime)
        return [{"id": self.name, "object": "model", "created": created, "owned_by": "local"}]

    def get_quantization_config(self) -> Any:
        return Grok1Int8Config() if self.native_int8 else super().get_quantization_config()

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
        tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template.read_text(encoding="utf-8")
            try:
                tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
            except TemplateSyntaxError as error:
                raise ValueError(f"{self.chat_template}, line {error.lineno}: {error.message}") from None
            except TemplateError:
                pass  # the template wants another kind of chat
        return continuation_tokenizer(tokenizer)  # an answer continues its prompt

    def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> PreTrainedModel:
        # Transformers' own looks the architecture up among its own classes only.
        options = dict(self.model_kwargs)
        quantization = self.get_quantization_config()
        if quantization is not None:  # None would hide the one of an int8 folder
            options["quantization_config"] = quantization
        return AutoModelForCausalLM.from_pretrained(
            self.folder,
            attn_implementation=self.attn_implementation,
            dtype=self.dtype,
            device_map=self.device,
            **options,
        )


class FitsInContext(BaseGenerateManager):
    """Looks at a request before Transformers' manager generates."""

    def context(self, model: PreTrainedModel) -> int:
        """The tokens that prompt and answer may have together."""
        return model.config.max_position_embeddings

    def prepare(
        self, model: PreTrainedModel, inputs: dict[str, Any], generation_config: GenerationConfig, request_id: str
    ) -> None:
        """Let the answer end where the context ends. Raises 400 if the prompt leaves no room, or is empty."""
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


class InOrder(FitsInContext, GenerateManager):
    """One request after the other."""

    def stop(self) -> None:
        """Wait until nothing is computed: a thread that dies within torch takes the process with it."""
        self.submit(lambda: None).result()


class Batched(FitsInContext, CBGenerateManager):
    """Many requests at a time, each with its own temperature, top_k and top_p.

    Transformers' own manager samples every request as the first one asked. Its continuous batching can do better when
    the shared configuration makes it create a processor for each of the three.
    """

    def __init__(self, config: ContinuousBatchingConfig | None):
        super().__init__(config)
        self._sampling: dict[str, dict[str, Any]] = {}
        self._ended = False

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
        # A request that is larger than the whole cache would end the batching thread, for everyone.
        batches: Any = self._cb
        sizes = batches.continuous_batching_config
        if sizes.num_blocks is None:  # the cache is not there yet
            return super().context(model)
        return min(super().context(model), sizes.page_size * sizes.num_blocks)

    def prepare(
        self, model: PreTrainedModel, inputs: dict[str, Any], generation_config: GenerationConfig, request_id: str
    ) -> None:
        super().prepare(model, inputs, generation_config, request_id)
        sampling = {"temperature": 1.0, "top_k": 1, "top_p": 0.0}  # leaves the likeliest token
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
            if self._ended:
                raise HTTPException(503, ENDING) from None
            raise

    def stop(self) -> None:
        self._ended = True
        if self._cb is not None:
            self._cb.stop(hard_stop=True)


def batching_config(model: PreTrainedModel, **sizes: Any) -> ContinuousBatchingConfig:
    """How much is batched.

    Args:
        sizes: arguments of `ContinuousBatchingConfig`. Without any Transformers takes most of the memory that is free,
            which on a CPU is that of the whole machine and slow: there, eight sequences of the whole context instead.
    """
    if model.device.type == "cpu" and "max_memory_percent" not in sizes:
        page = sizes.setdefault("page_size", min(256, model.config.max_position_embeddings))
        sizes.setdefault("num_blocks", 8 * model.config.max_position_embeddings // page)
        sizes.setdefault("max_batch_tokens", 256)
    return ContinuousBatchingConfig(per_request_processors=True, **sizes)


class OneModelState(GenerationState):
    """Hands out the managers above, until the end."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.ending = threading.Event()

    def go_on(self, *_: Any) -> None:
        """Raises 503 after the end; before every forward pass."""
        if self.ending.is_set():
            raise HTTPException(503, ENDING)

    def shutdown(self) -> None:
        """Break off what is being generated, and wait for the step under way."""
        self.ending.set()
        for manager in [*self._generate_managers.values(), self._cb_manager]:
            if manager is not None:
                manager.stop()

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        self.go_on()
        if use_cb:
            self._cb_manager = self._cb_manager or Batched(self._cb_config)
            return self._cb_manager
        if model_id not in self._generate_managers:
            self._generate_managers[model_id] = InOrder()
        return self._generate_managers[model_id]


class OneModel(BaseHandler):
    """Checks a request before Transformers' handler serves it."""

    model_manager: FolderManager

    def _validate_request(self, body: dict[str, Any]) -> Any:
        without_effect = WITHOUT_EFFECT
        if self.generation_state._continuous_batching:
            without_effect = {**WITHOUT_EFFECT, **SEQUENTIAL_ONLY}
        refused = [
            name
            for name, harmless in without_effect.items()
            if body.get(name) is not None and body[name] not in harmless
        ]
        if refused:
            raise HTTPException(400, f"Not supported by this server, leave out: {', '.join(sorted(refused))}.")
        for name, (low, high) in RANGES.items():
            value = body.get(name)
            if value is not None and not (isinstance(value, (int, float)) and low <= value <= high):
                raise HTTPException(400, f"{name}: expected a number from {low} to {high}, found {value!r}.")
        return super()._validate_request(body)

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, PreTrainedModel, Any]:
        body["model"] = self.model_manager.process_model_name(body.get("model"))
        return super()._resolve_model(body)

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        if body.get("temperature"):
            config.update(do_sample=True, top_k=0)  # OpenAI's sampling has no top_k
        elif body.get("temperature") == 0:
            config.update(temperature=None, top_p=None)  # or `generate` warns that they have no effect
        return config


class Completions(OneModel, CompletionHandler):
    pass


def is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)
    return content is None or isinstance(content, str)


class OneModelWithTemplate(OneModel):
    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, PreTrainedModel, Any]:
        model_id, model, tokenizer = super()._resolve_model(body)
        if tokenizer.chat_template is None:
            raise HTTPException(400, NO_CHAT_TEMPLATE)
        return model_id, model, tokenizer


class ChatCompletions(OneModelWithTemplate, ChatCompletionHandler):
    def _validate_request(self, body: dict[str, Any]) -> None:
        messages = body.get("messages")
        if not (isinstance(messages, list) and messages and all(map(is_message, messages))):
            raise HTTPException(400, "messages: expected a list of objects with role and content.")
        super()._validate_request(body)


class Responses(OneModelWithTemplate, ResponseHandler):
    def _validate_request(self, body: dict[str, Any]) -> None:
        body.setdefault("stream", False)  # OpenAI's default; Transformers' is to stream
        super()._validate_request(body)


class SystemOne(OneModel, SystemOneHandler):
    pass


class Transcriptions(TranscriptionHandler):
    async def handle_request(self, request: Any) -> Any:
        raise HTTPException(400, "Grok-1 reads text, not sound.")


def refusal(status: int, message: str) -> JSONResponse:
    """In OpenAI's form, of which its clients show the message."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


def not_json(error: RequestValidationError) -> str:
    return f"The request is not a JSON object: {error.errors()[0]['msg']}."


def build_app(
    manager: FolderManager,
    *,
    batching: ContinuousBatchingConfig | None = None,
    enable_cors: bool = False,
) -> FastAPI:
    """Transformers' application around `manager`, for `Server`.

    Args:
        batching: from `batching_config`, to batch the requests; else they are served one after the other.
    """
    state = OneModelState(continuous_batching=batching is not None, cb_config=batching)
    if batching is None:
        manager.model.register_forward_pre_hook(state.go_on)
    app = build_server(
        manager,
        ChatCompletions(manager, state),
        completion_handler=Completions(manager, state),
        response_handler=Responses(manager, state),
        transcription_handler=Transcriptions(manager, state),
        systemone_handler=SystemOne(manager, state),
        generation_state=state,
        enable_cors=enable_cors,
    )
    app.state.manager, app.state.generation = manager, state

    app.add_exception_handler(AnyHTTPException, lambda _, error: refusal(error.status_code, str(error.detail)))
    app.add_exception_handler(RequestValidationError, lambda _, error: refusal(400, not_json(error)))
    for kind in (ValueError, TemplateError):  # `generate` and the chat template look at what they are given
        app.add_exception_handler(kind, lambda _, error: refusal(400, str(error)))
    return app


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises OSError with the reason: taken, not allowed, no such host."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


class Server(uvicorn.Server):
    """Uvicorn with the application of `build_app`; at its end answers under way are broken off."""

    def __init__(self, app: FastAPI, **options: Any):
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=GRACE, **options))
        self.generation: OneModelState = app.state.generation

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self.generation.shutdown)
        await super().shutdown(sockets)


def run(app: FastAPI, bound: socket.socket, *, log_level: str = "warning") -> None:
    """Serve until SIGINT or SIGTERM."""
    # After its graceful end uvicorn raises the signal again, for handlers that were there before.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    Server(app, log_level=log_level).run(sockets=[bound])

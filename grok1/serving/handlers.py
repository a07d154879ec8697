"""The handlers of the routes: which requests are refused, and how a request becomes a generation config."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException
from transformers import GenerationConfig, PreTrainedModel
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import BaseHandler

from grok1.serving.model import FolderManager


# OpenAI's parameters that Transformers' handlers do not read, and their values without effect.
IGNORED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
}
# Those that sequential generation supports and continuous batching does not.
SEQUENTIAL_ONLY: dict[str, tuple[Any, ...]] = {"frequency_penalty": (0,), "logit_bias": ({},), "stop": ([], "")}
# Numeric parameters and their ranges.
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


class RequestHandler(BaseHandler):
    """Checks a request before Transformers' handler serves it."""

    model_manager: FolderManager

    def _validate_request(self, body: dict[str, Any]) -> Any:
        ignored = IGNORED
        if self.generation_state._continuous_batching:
            ignored = {**IGNORED, **SEQUENTIAL_ONLY}
        refused = [
            name for name, harmless in ignored.items() if body.get(name) is not None and body[name] not in harmless
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


class Completions(RequestHandler, CompletionHandler):
    pass


def is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)
    return content is None or isinstance(content, str)


class ChatHandler(RequestHandler):
    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, PreTrainedModel, Any]:
        model_id, model, tokenizer = super()._resolve_model(body)
        if tokenizer.chat_template is None:
            raise HTTPException(400, NO_CHAT_TEMPLATE)
        return model_id, model, tokenizer


class ChatCompletions(ChatHandler, ChatCompletionHandler):
    def _validate_request(self, body: dict[str, Any]) -> None:
        messages = body.get("messages")
        if not (isinstance(messages, list) and messages and all(map(is_message, messages))):
            raise HTTPException(400, "messages: expected a list of objects with role and content.")
        super()._validate_request(body)


class Responses(ChatHandler, ResponseHandler):
    def _validate_request(self, body: dict[str, Any]) -> None:
        body.setdefault("stream", False)  # OpenAI's default; Transformers' is to stream
        super()._validate_request(body)


class SystemOne(RequestHandler, SystemOneHandler):
    pass


class Transcriptions(TranscriptionHandler):
    async def handle_request(self, request: Any) -> Any:
        raise HTTPException(400, "Grok-1 has no audio input.")

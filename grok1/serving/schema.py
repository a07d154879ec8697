"""What a request may hold. Everything else is refused with the name of the field.

Fields and ranges are those of https://platform.openai.com/docs/api-reference/completions and /chat, with `top_k` and
`chat_template_kwargs` as vLLM has them and `generation_config` as `transformers chat` sends it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


MAX_STOPS = 4
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_NAME = 1000
# The logits are divided by the temperature in float32. Below it they overflow.
MIN_TEMPERATURE = 1e-5
INT64 = 2**63
COMPLETION_TOKENS = 16  # OpenAI's default for completions

# OpenAI's parameters that this server does not have, and their values without effect.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (),
    "prediction": (),
    "previous_response_id": (),
    "prompt_cache_key": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
# Fields of a message that clients send back from an answer, all empty there.
EMPTY_IN_MESSAGES: tuple[Any, ...] = (None, [], "")


def usable_temperature(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"expected 0 (greedy) or a number from {MIN_TEMPERATURE:.5f} to 100")
    return value


def read_stops(value: Any) -> Any:
    """One string or a list; empty strings stop nothing and are dropped."""
    if isinstance(value, str):
        value = [value]
    return [text for text in value if text != ""] if isinstance(value, list) else value


def token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def read_prompts(value: Any) -> list[str | list[int]]:
    """One prompt or several, each a string or a list of token ids."""
    if isinstance(value, str) or token_ids(value):
        return [value]
    several = isinstance(value, list) and 0 < len(value) <= MAX_CHOICES
    if several and (all(isinstance(item, str) for item in value) or all(map(token_ids, value))):
        return list(value)
    raise ValueError(f"expected a string, a list of token ids, or a list of at most {MAX_CHOICES} of either")


StopStrings = Annotated[
    list[Annotated[str, Field(max_length=MAX_NAME)]], Field(max_length=MAX_STOPS), BeforeValidator(read_stops)
]
Prompts = Annotated[Any, AfterValidator(read_prompts), Field(json_schema_extra={"type": ["string", "array"]})]
Name = Annotated[str, Field(max_length=MAX_NAME)]


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Part):
    include_usage: bool | None = False


class GenerationConfig(Part):
    """The part of Transformers' GenerationConfig that a request may set."""

    max_new_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(usable_temperature)] | None = None
    top_p: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    transformers_version: Name | None = None


def read_generation_config(value: Any) -> Any:
    """The object in a JSON text, as `transformers chat` sends it, without what is unset."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError("expected a string, the JSON of a GenerationConfig")
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("expected the JSON of a GenerationConfig, found something else") from None
    if not isinstance(found, dict):
        raise ValueError("expected the JSON of a GenerationConfig, found something else")
    return {name: item for name, item in found.items() if item is not None}


class Request(Part):
    """What completions and chats have in common. null is the same as no value."""

    model: Name | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    max_tokens: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(usable_temperature)] | None = None
    top_p: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: StopStrings | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: Name | None = None
    generation_config: Annotated[
        GenerationConfig | None, BeforeValidator(read_generation_config, json_schema_input_type=str | None)
    ] = None

    @model_validator(mode="before")
    @classmethod
    def without_effect(cls, body: Any) -> Any:
        """Drop parameters that would have no effect, and refuse those that would."""
        if not isinstance(body, dict):
            return body
        refused = [
            name
            for name, harmless in NOT_SUPPORTED.items()
            if body.get(name) is not None and not any(equal(body[name], value) for value in harmless)
        ]
        if refused:
            raise ValueError(
                f"Not supported by this server, leave out: {', '.join(sorted(refused))}. vLLM's server may have it."
            )
        return {name: value for name, value in body.items() if name not in NOT_SUPPORTED}

    @model_validator(mode="after")
    def options_of_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: has no effect without stream")
        return self


def equal(found: Any, harmless: Any) -> bool:
    """Equal, and of the same kind: True is not 1."""
    return type(found) is type(harmless) and found == harmless


class CompletionRequest(Request):
    route: ClassVar[str] = "/v1/completions"
    prompt: Prompts
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def tokens_and_choices(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: expected a number from 1 on; 0 needs echo")
        if len(self.prompt) * (self.n or 1) > MAX_CHOICES:
            raise ValueError(f"n: expected at most {MAX_CHOICES} choices, found {len(self.prompt)} prompts x {self.n}")
        return self

    @property
    def alternatives(self) -> int | None:
        """How many alternatives per token to report; None: no log-probabilities."""
        return self.logprobs

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most; None: as many as fit in the context."""
        return self.max_tokens if "max_tokens" in self.model_fields_set else COMPLETION_TOKENS


class ContentPart(Part):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Name
    content: str | list[ContentPart] | None = None
    name: Name | None = None

    @model_validator(mode="after")
    def nothing_else(self) -> Self:
        surplus = [name for name, value in (self.model_extra or {}).items() if value not in EMPTY_IN_MESSAGES]
        if surplus:
            raise ValueError(f"expected role, content and name, found {', '.join(sorted(surplus))}")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(Request):
    route: ClassVar[str] = "/v1/chat/completions"
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def alternatives_of_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: has no effect without logprobs")
        return self

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

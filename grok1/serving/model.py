"""The served model: loaded once from a folder, never replaced, never downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from grok1.loading import load_model, load_tokenizer
from grok1.precision import AUTO
from modeling_grok1.pipeline_grok1 import continuation_tokenizer


# What the server itself gives to a chat template. A request may set the template's other variables.
OWN_VARIABLES = frozenset({
    "add_generation_prompt", "bos_token", "documents", "eos_token", "messages", "pad_token", "raise_exception",
    "strftime_now", "tools", "unk_token",
})  # fmt: skip


class ServedModel:
    """One model and its tokenizer.

    Args:
        folder: with config.json, tokenizer.json and safetensors.
        name: for clients; default: the folder's.
        chat_template: a Jinja file to use instead of the folder's own template.
        precision: as in `grok1.precision.loading_options`.
        options: further arguments of `from_pretrained`: device_map, attn_implementation, experts_on.

    Raises:
        ValueError, OSError: the folder cannot be loaded, or an option has no such value.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str | None = None,
        chat_template: Path | None = None,
        precision: str = AUTO,
        **options: Any,
    ):
        self.folder = folder
        self.name = name or folder.resolve().name
        self.tokenizer = served_tokenizer(folder, chat_template)
        self.template_variables = template_variables(self.tokenizer.chat_template)
        self.longest_token = max(map(len, self.tokenizer.get_vocab()))
        self.model = load_model(folder, precision, **options)

    def answers_to(self, name: str | None) -> bool:
        """Whether a request for `name` is for this model. A request may leave it out."""
        return name in (None, self.name, str(self.folder), str(self.folder.resolve()))

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Releases Python's lock; not for several threads at once."""
        ids: list[int] = self.tokenizer.backend_tokenizer.encode_batch_fast([text])[0].ids
        return ids

    def described(self) -> dict[str, Any]:
        """The entry of /v1/models, with the context as vLLM gives it."""
        created = int((self.folder / "config.json").stat().st_mtime)
        context = self.model.config.max_position_embeddings
        return {
            "id": self.name,
            "object": "model",
            "created": created,
            "owned_by": "local",
            "max_model_len": context,
        }


def served_tokenizer(folder: Path, chat_template: Path | None) -> Any:
    """The folder's tokenizer, made for continuations, with another chat template where one is given."""
    tokenizer: Any = load_tokenizer(folder)
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
        except TemplateSyntaxError as error:
            raise ValueError(f"{chat_template}, line {error.lineno}: {error.message}") from None
        except TemplateError:
            pass  # the template expects another kind of chat
    tokenizer = continuation_tokenizer(tokenizer)  # an answer continues its prompt
    tokenizer("")  # sets the state of the tokenizers library, which `encode` then only reads
    return tokenizer


def template_variables(template: str | None) -> frozenset[str]:
    """The variables of a chat template that a request may set."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        found = meta.find_undeclared_variables(environment.parse(template or ""))
    except TemplateError:  # with tags of Transformers
        return frozenset()
    return frozenset(found) - OWN_VARIABLES

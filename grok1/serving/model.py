"""The served model: loaded once from a folder, never replaced, never downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import HTTPException
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedModel
from transformers.cli.serving.model_manager import ModelManager

from grok1.loading import load_model
from grok1.precision import AUTO
from modeling_grok1.pipeline_grok1 import continuation_tokenizer


class FolderManager(ModelManager):
    """One model, loaded from a folder at start and kept.

    Args:
        folder: with config.json, tokenizer.json and safetensors.
        chat_template: a Jinja file to use instead of the folder's own template.
        precision: as in `grok1.precision.loading_options`.
        model_kwargs: for `from_pretrained`, such as `experts_on`.
        options: of Transformers' `ModelManager`: device, attn_implementation, continuous_batching.

    Raises:
        ValueError, OSError: the folder cannot be loaded, or an option has no such value.
    """

    def __init__(
        self,
        folder: Path,
        *,
        chat_template: Path | None = None,
        precision: str = AUTO,
        model_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.folder, self.chat_template = folder, chat_template
        self.precision, self.model_kwargs = precision, model_kwargs or {}
        self.name = self.force_model = folder.resolve().name
        self.model_timeout = -1  # never unloaded
        self.model, self.tokenizer = self.load_model_and_processor(self.name)

    def process_model_name(self, model_id: str | None) -> str:  # type: ignore[override]
        """The name of the model, which a request may omit. Raises 404 for another model."""
        if model_id not in (None, self.name, str(self.folder), str(self.folder.resolve())):
            raise HTTPException(404, f"This server has one model, {self.name!r}; found {model_id!r} in the request.")
        return self.name

    def shutdown(self) -> None:
        """Do nothing: the model stays loaded until the process ends, also after a POST to /reset."""

    def get_gen_models(self) -> list[dict[str, Any]]:
        created = int((self.folder / "config.json").stat().st_mtime)
        return [{"id": self.name, "object": "model", "created": created, "owned_by": "local"}]

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
        tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template.read_text(encoding="utf-8")
            try:
                tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
            except TemplateSyntaxError as error:
                raise ValueError(f"{self.chat_template}, line {error.lineno}: {error.message}") from None
            except TemplateError:
                pass  # the template expects another kind of chat
        return continuation_tokenizer(tokenizer)  # an answer continues its prompt

    def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> PreTrainedModel:
        # Transformers' manager only looks for the architecture among its own classes.
        return load_model(
            self.folder,
            self.precision,
            attn_implementation=self.attn_implementation,
            device_map=self.device,
            **self.model_kwargs,
        )

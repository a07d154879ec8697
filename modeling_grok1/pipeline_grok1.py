# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""The text of a continuation, to the character, and `pipeline("text-generation")` with it.

SentencePiece puts a space in front of every text that it encodes, and decoding takes it off again. That is right for a
whole text; for tokens that continue another text it removes a space that belongs there.
"""

import copy
import json
from typing import Any

from transformers import TextGenerationPipeline
from transformers.pipelines import PIPELINE_REGISTRY


def continuation_tokenizer(tokenizer: Any) -> Any:
    """A copy of `tokenizer` whose `decode` is additive: `decode(a) + decode(b) == decode(a + b)`, except where the cut
    is inside a character. A whole text then comes back with a space in front.

    `save_pretrained` keeps the property: it is in tokenizer.json. A tokenizer that has it already, or none of
    Grok-1's decoding steps, is returned as it is. Encoding is the same.
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    steps = state.get("decoders", [])
    additive = [step for step in steps if step != {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    if additive == steps:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    without_strip: Any = type(decoder)([])  # type: ignore[misc]
    without_strip.__setstate__(json.dumps({**state, "decoders": additive}).encode())
    tokenizer.backend_tokenizer.decoder = without_strip
    return tokenizer


class Grok1TextGenerationPipeline(TextGenerationPipeline):
    """Transformers' pipeline with the space between the prompt and what was generated.

    Transformers decodes the generated tokens alone, which loses a first space. For models other than Grok-1 this class
    makes Transformers' own pipeline.
    """

    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        # A quantised or adapted model has the type in its config too; copies are made without a model.
        if model is None or str(getattr(model.config, "model_type", "")).startswith("grok-1"):
            return super().__new__(cls)
        return TextGenerationPipeline(model, *args, **kwargs)

    def postprocess(self, model_outputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model_outputs.get("input_ids") is None:  # no prompt: what was generated is a whole text
            return super().postprocess(model_outputs, *args, **kwargs)
        view = copy.copy(self)
        view.tokenizer = self._continuation_tokenizer()
        return TextGenerationPipeline.postprocess(view, model_outputs, *args, **kwargs)

    def _continuation_tokenizer(self) -> Any:
        """Made once, and again where the pipeline got another tokenizer or more tokens."""
        key = (id(self.tokenizer), len(self.tokenizer or ()))
        if getattr(self, "_continuation", (None,))[0] != key:
            self._continuation = (key, continuation_tokenizer(self.tokenizer))
        return self._continuation[1]


def register_text_generation() -> None:
    """Let `pipeline("text-generation")` make a `Grok1TextGenerationPipeline` for Grok-1.

    The registry's own function would also have `save_pretrained` write `custom_pipelines` into config.json, and then
    `pipeline` refuses the folder without trust_remote_code.
    """
    tasks = PIPELINE_REGISTRY.supported_tasks
    if getattr(tasks["text-generation"]["impl"], "__name__", "") != Grok1TextGenerationPipeline.__name__:
        tasks["text-generation"] = {**tasks["text-generation"], "impl": Grok1TextGenerationPipeline}

# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
The versions of Transformers that this code runs with, and what differs between them. Every difference is in this file.

    5.24   the cache is named `cache` in forwards, masks and outputs; before, `past_key_values`
    5.24   continuous batching updates the paged cache in the attention module; before, in the attention function
    5.23   conversions of several tensors to several declare themselves
    5.23   the first version that quantises a weight before it casts it to the dtype of its empty parameter
"""

import warnings
from importlib.metadata import version
from typing import Any

from transformers import core_model_loading
from transformers.cache_utils import Cache
from transformers.utils import TransformersKwargs, is_torchdynamo_compiling, logging


logger = logging.get_logger(__name__)

# The tested range, first and last minor release.
OLDEST, NEWEST = (5, 21), (5, 24)
FOUND = version("transformers")
RELEASE = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in FOUND.split(".")[:2])

# The name that Transformers gives to a cache where it passes or reads one.
CACHE = "cache" if RELEASE >= (5, 24) else "past_key_values"

# Whether the attention function updates the paged cache of continuous batching, which is in its `cache` then.
ATTENTION_UPDATES_PAGED_CACHE = RELEASE < (5, 24)
# Whether a weight is cast to the dtype of its empty parameter before it is quantised.
CASTS_BEFORE_QUANTIZING = RELEASE < (5, 23)

# What may come beside the parameters of `forward`: the arguments of Transformers' models, of continuous batching
# (PagedAttentionArgs), of the loss function, and of the decorators.
KNOWN_ARGUMENTS = {
    *TransformersKwargs.__annotations__,
    *("block_table", "k_cache", "logits_indices", "logits_processor_args", "read_index", "v_cache", "write_index"),
    *("ignore_index", "shift_labels", "label_smoothing"),
    *("cache_position", "debug_io", "debug_io_dir", "prune_layers", "return_dict", "token_type_ids"),
    *("assistant_tokenizer", "tokenizer"),  # `generate` passes its own on
    *("kwargs", "skip_logits"),  # a pipeline passes all arguments of the language model to its stages
}


def unsupported() -> str | None:
    """One sentence that says why the PyTorch model cannot be built with this Transformers, or None."""
    if RELEASE >= OLDEST:
        return None
    oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
    return (
        f"The PyTorch model of Grok-1 needs transformers {oldest} to {newest}, found {FOUND}: run "
        f'`pip install "transformers>={oldest},<{NEWEST[0]}.{NEWEST[1] + 1}"`. The configuration works with this one.'
    )


def check_transformers() -> None:
    """
    Raises:
        ImportError: Transformers is older than the tested range. A newer one is warned of, once: wrong weights are
            refused when they are loaded, and unknown arguments when they are passed.
    """
    problem = unsupported()
    if problem is not None:
        raise ImportError(problem)
    if RELEASE > NEWEST:
        logger.warning_once(
            f"Grok-1 was tested with transformers {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, found {FOUND}."
        )


def one_cache(past_key_values: Any, cache: Any, kwargs: dict[str, Any]) -> Any:
    """
    The cache of a forward pass from its two names. A paged cache goes to the attention function through `kwargs` where
    that one updates it. The name that is older than this Transformers is warned of, as its own models do.

    Raises:
        ValueError: two different caches.
    """
    if cache is None:
        if past_key_values is not None and CACHE == "cache" and not is_torchdynamo_compiling():
            message = f"`past_key_values` is deprecated with transformers {FOUND}: use `cache` instead."
            warnings.warn(message, FutureWarning, stacklevel=2)
        return past_key_values
    if past_key_values is not None and past_key_values is not cache:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: give one.")
    if ATTENTION_UPDATES_PAGED_CACHE and not isinstance(cache, Cache):
        kwargs["cache"] = cache
        return None
    return cache


def check_arguments(kwargs: dict[str, Any]) -> None:
    """
    Raises:
        TypeError: an argument that no forward pass knows, such as one that a newer Transformers has renamed. It would
            be ignored.
    """
    unknown = sorted(set(kwargs) - KNOWN_ARGUMENTS - ({"cache"} if ATTENTION_UPDATES_PAGED_CACHE else set()))
    if unknown:
        raise TypeError(f"Grok-1's forward got unknown arguments: {', '.join(unknown)}.")


def allow_many_to_many(operation: type) -> type:
    """Decorates a conversion of several tensors to several, which was a closed list up to 5.22."""
    names = "_INTERNAL_MANY_TO_MANY_CONVERSIONS"
    listed = getattr(core_model_loading, names, None)
    if listed is not None:
        setattr(core_model_loading, names, (*listed, operation))
    return operation


def cache_argument(cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument, or as a field of an output, of this version."""
    return {CACHE: cache}

# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
Around the attention of modeling_grok1.py: long prompts some queries at a time, continuous batching, and 4-D masks.
Letters as there.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging

from .configuration_grok1 import GrokConfig
from .versions_grok1 import ATTENTION_UPDATES_PAGED_CACHE, cache_argument


logger = logging.get_logger(__name__)

AttentionOutput = tuple[torch.Tensor, torch.Tensor | None]

# Bytes of the scores that are computed at a time: what the caches of a CPU hold, a small part of an accelerator.
SCORE_BYTES = {"cpu": 2**21}
SCORE_BYTES_ELSEWHERE = 2**28


def in_pieces(attention: Callable[..., AttentionOutput]) -> Callable[..., AttentionOutput]:
    """
    Calls `attention` for some queries at a time where the scores of all would be large: 36 GiB for 8,192 tokens of the
    release. The result is the same, but for the attention weights, which are None then. With gradients the backward
    pass computes each piece again, so that memory grows with the tokens and not with their square. Everything is
    computed at once where the weights, or gradients of the mask, are asked for, and under torch.compile. In
    torch.export each query head has a key head of its own: that the rows of a group are one matrix for every length
    is more than it can prove.
    """

    @wraps(attention)
    def forward(
        module: Any,
        query: torch.Tensor,  # B H T d
        key: torch.Tensor,  # B K S d
        value: torch.Tensor,  # B K S d
        attention_mask: torch.Tensor | None,  # broadcasts to B H T S; added
        **kwargs,
    ) -> AttentionOutput:
        wanted = kwargs.get("output_attentions", module.config.output_attentions)
        learned = attention_mask is not None and attention_mask.requires_grad
        if torch.compiler.is_exporting():
            key, value = (tensor.repeat_interleave(module.num_key_value_groups, dim=1) for tensor in (key, value))
        if torch.compiler.is_compiling() or wanted or learned:
            return attention(module, query, key, value, attention_mask, **kwargs)
        (B, H, T, _), S = query.shape, key.shape[2]  # noqa: N806
        rows = max(16, SCORE_BYTES.get(query.device.type, SCORE_BYTES_ELSEWHERE) // (4 * B * H * S))
        if rows >= T:
            return attention(module, query, key, value, attention_mask, **kwargs)
        pieces = []
        for start in range(0, T, rows):
            piece, mask, visible = slice(start, start + rows), None, S
            if attention_mask is not None:
                mask = attention_mask.expand(-1, -1, T, -1)[:, :, piece]
                visible = visible_keys(mask)
                mask = mask[..., :visible]
            pieces.append((piece, visible, mask))
        return Pieces.apply(partial(attention, module, **kwargs), pieces, query, key, value), None

    return forward


class Pieces(torch.autograd.Function):
    """The attention of some queries at a time, each with the keys that it sees, computed again for the gradients."""

    @staticmethod
    def forward(ctx: Any, attention: Callable, pieces: list, query, key, value) -> torch.Tensor:
        """pieces: slices of the queries, with the number of their keys and their mask. Gives B T H d."""
        ctx.attention, ctx.pieces = attention, pieces
        ctx.save_for_backward(query, key, value)
        device = query.device.type
        if torch.amp.is_autocast_available(device):  # the meta device, on which memory is measured, has none
            ctx.autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
        outputs = [
            attention(query[:, :, piece], key[:, :, :visible], value[:, :, :visible], mask)[0]
            for piece, visible, mask in pieces
        ]
        return torch.cat(outputs, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        for piece, visible, mask in ctx.pieces:
            parts = [(slice(None), slice(None), piece), *[(slice(None), slice(None), slice(visible))] * 2]
            with torch.enable_grad(), torch.autocast(query.device.type, **ctx.autocast):
                inputs = [
                    tensor[part].detach().requires_grad_()
                    for tensor, part in zip((query, key, value), parts, strict=True)
                ]
                output, _ = ctx.attention(*inputs, mask)
            found = torch.autograd.grad(output, inputs, gradient[:, piece])
            for whole, part, new in zip(gradients, parts, found, strict=True):
                whole[part] += new
        return None, None, *gradients


def paged(attention: Callable[..., AttentionOutput]) -> Callable[..., AttentionOutput]:
    """
    `attention` for continuous batching, which passes a mask of its own. Transformers makes none for a forward pass
    with `paged|eager`, which would attend to what follows.
    """

    @torch.compiler.disable  # the paged cache is written in place, which functionalisation would copy whole
    def forward(module, query, key, value, attention_mask, **kwargs) -> AttentionOutput:
        cache = kwargs.pop("cache", None)  # None where the attention module has updated it
        if attention_mask is None or (cache is None and ATTENTION_UPDATES_PAGED_CACHE):
            raise ValueError("`paged|eager` is for continuous batching only; use `eager` for a forward pass.")
        if cache is not None:
            key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        return attention(module, query, key, value, attention_mask, **kwargs)

    return forward


def visible_keys(mask: torch.Tensor) -> int:
    """
    How many of the keys a mask (B H T S, added) leaves open, counted to the last one. All of them where a query sees
    none, for it weighs all alike; and off the CPU, where looking costs a synchronisation.
    """
    if mask.device.type != "cpu":
        return mask.shape[-1]
    is_open = mask > torch.finfo(mask.dtype).min
    if not is_open.any(dim=-1).all():
        return mask.shape[-1]
    return int(is_open.any(dim=(0, 1, 2)).nonzero().max()) + 1


def causal_mask(
    config: GrokConfig,
    inputs_embeds: torch.Tensor,  # B T D
    attention_mask: torch.Tensor | None,  # B S, or 4-D
    past_key_values: Cache | None,
    position_ids: torch.Tensor,  # B T
):
    """The mask of all layers, as the attention implementation of the config expects it. Without an attention mask,
    positions that begin again separate packed texts, also where an empty cache is to be filled."""
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        attention_mask = additive_mask(attention_mask, inputs_embeds.dtype)
    values_are_known = not inputs_embeds.is_meta and not torch.compiler.is_compiling()
    empty = type(past_key_values) is DynamicCache and past_key_values.get_seq_length() == 0
    if attention_mask is None and values_are_known and empty:
        past_key_values = None  # Transformers looks for packed texts only where there is no cache
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **cache_argument(past_key_values),
    )


def positions(inputs_embeds: torch.Tensor, cache: Cache | None, kwargs: dict[str, Any]) -> torch.Tensor:
    """The positions (1 T) of `inputs_embeds` (B T D): after the cache, or in each text of a packed batch."""
    length, device = inputs_embeds.shape[1], inputs_embeds.device
    packed = packed_positions(length, device, kwargs)
    if packed is not None:
        return packed
    return torch.arange(length, device=device)[None] + (cache.get_seq_length() if cache is not None else 0)


def packed_positions(length: int, device: torch.device, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """
    The positions (1 T) in a packed batch that says only where its texts begin, by FlashAttention's `cu_seq_lens_q`
    (the sum of the lengths before each text, and of all), or None.
    """
    starts = kwargs.get("cu_seq_lens_q")
    if starts is None:
        return None
    index, starts = torch.arange(length, device=device), starts.flatten().to(device)
    return (index - starts[torch.searchsorted(starts, index, right=True) - 1])[None]


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    A 4-D attention mask of the caller (B H T S) as it is added to the scores.

    Args:
        mask: bool or integer, true or 1 where a query may see a key; or floating, 0 there and very negative elsewhere.

    Raises:
        ValueError: a floating mask with positive values, which would be added to the scores as they are.
    """
    if not mask.is_floating_point():
        hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return hidden.masked_fill_(mask == 0, torch.finfo(dtype).min)
    # Not in a decoding step (T = 1), where it would cost a synchronisation for each token.
    if mask.shape[-2] > 1 and not mask.is_meta and not torch.compiler.is_compiling() and (mask > 0).any():
        raise ValueError(
            "`attention_mask`: a 4-D floating mask is added to the scores: expected 0 and large negative values, "
            f"found {mask.max().item():g}. Give a mask of 0 and 1 as bool or integer."
        )
    return mask


def warn_of_padding(
    input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, pad_token_id: int | None
) -> None:
    """Warns where a prompt (B T) without an attention mask holds the padding token: xAI's code hides it, this model
    hides what `attention_mask` says."""
    if attention_mask is not None or input_ids is None or pad_token_id is None:
        return
    if input_ids.shape[-1] == 1 or input_ids.is_meta:
        return
    if not torch.compiler.is_compiling() and (input_ids == pad_token_id).any():
        logger.warning_once(
            f"`input_ids` holds the padding token {pad_token_id} and there is no `attention_mask`: it is attended to "
            "as any other token. Pass `attention_mask=(input_ids != pad_token_id)` to hide it, as xAI's code does."
        )

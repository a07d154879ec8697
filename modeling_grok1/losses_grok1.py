# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""The losses of Grok1ForCausalLM. Letters as in modeling_grok1.py."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from .attention_grok1 import packed_positions


IGNORED = -100  # the label of a token that is not to be predicted
LOGIT_BYTES = 2**26  # of the float32 logits that are computed at a time


def predictable_labels(
    labels: torch.Tensor,  # B T
    attention_mask: torch.Tensor | None = None,  # B S, or 4-D
    position_ids: torch.Tensor | None = None,  # B T
    **kwargs,
) -> torch.Tensor:
    """
    The labels without those of tokens that do not see the token before them, which would have to predict them: the
    first one after padding on the left, and the first one of each text in a packed batch.
    """
    T = labels.shape[-1]  # noqa: N806
    if attention_mask is None:
        if position_ids is None:
            position_ids = packed_positions(T, labels.device, kwargs)
        if position_ids is None or position_ids.ndim != 2:
            return labels
        sees = position_ids.diff(dim=-1) == 1
    elif not isinstance(attention_mask, torch.Tensor):
        return labels
    elif attention_mask.ndim == 4:
        before = attention_mask[..., -T:].diagonal(offset=-1, dim1=-2, dim2=-1)  # B H T-1, of T rows and T columns
        floating = attention_mask.is_floating_point()
        sees = (before > torch.finfo(before.dtype).min if floating else before != 0).any(dim=1)
    else:
        sees = attention_mask[:, -T:][:, :-1] != 0
    sees = F.pad(sees, (1, 0), value=True).to(labels.device)  # what predicts the first token is no part of the batch
    return labels.masked_fill(~sees, IGNORED)


def causal_lm_losses(
    model: Any,
    hidden_states: torch.Tensor,  # B T D
    logits: torch.Tensor | None,  # B T V; None: from the hidden states, some rows at a time
    labels: torch.Tensor | None,  # B T, -100 where a token is not to be predicted
    router_logits: Any,  # N E per layer
    attention_mask: torch.Tensor | None,  # B S, or 4-D
    position_ids: torch.Tensor | None = None,  # B T
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    The mean cross entropy in nats, and the load-balancing loss of Switch Transformer where router logits are given
    (https://huggingface.co/papers/2101.03961, equations 4 to 6), which the first contains with the weight
    `router_aux_loss_coef`. Each is None where its input is.

    Args:
        num_items_in_batch: the number of targets of all batches of an optimizer step. The cross entropy is divided by
            it, and the load-balancing loss weighted with the share of this batch.
    """
    loss: torch.Tensor | None = None
    aux_loss: Any = None
    share: torch.Tensor | float = 1.0
    if labels is not None:
        targets = predictable_labels(labels, attention_mask, position_ids, **kwargs)
        if num_items_in_batch is not None:
            num_items_in_batch, share = divisor_and_share(labels, targets, num_items_in_batch, kwargs)
        loss_function = model.loss_function if logits is not None else partial(loss_in_pieces, model.compute_logits)
        scores = logits if logits is not None else hidden_states
        loss = loss_function(scores, targets, model.config.vocab_size, num_items_in_batch=num_items_in_batch, **kwargs)
    if router_logits is not None:
        config = model.config
        if attention_mask is not None:
            # Of the tokens of this call alone: in generation the mask covers the cache too, and may be 4-D.
            tokens = router_logits[0].shape[0] // hidden_states.shape[0]
            attention_mask = attention_mask[:, -tokens:] if attention_mask.ndim == 2 else None
        aux_loss = load_balancing_loss_func(
            router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
        )
        if loss is not None:
            check_balance_is_trained(model, loss, aux_loss)
            loss = loss + config.router_aux_loss_coef * (aux_loss * share).to(loss.device)
    return loss, aux_loss


def check_balance_is_trained(model: Any, loss: torch.Tensor, aux_loss: torch.Tensor) -> None:
    """
    Raises:
        ValueError: reentrant checkpoints have detached the router logits, so that the balance would not be trained.
    """
    if not loss.requires_grad or aux_loss.requires_grad:
        return
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in model.modules())
    if any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions):
        raise ValueError(
            "With reentrant checkpoints the load-balancing loss (`output_router_logits=True`) has no gradient: leave "
            "`use_reentrant=True` out, or `output_router_logits`."
        )


def loss_in_pieces(
    head: Callable[[torch.Tensor], torch.Tensor],  # rows D -> rows V
    hidden_states: torch.Tensor,  # B T D
    labels: torch.Tensor,  # B T
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    As Transformers' ForCausalLMLoss, which keeps all logits three times: in their dtype, in float32, and their
    gradient. Here the backward pass computes those of some rows again, and rows without a target are left out.

    Not torch's `linear_cross_entropy`: it takes a bare weight, where PEFT adapts the head, and rounds the loss to
    bfloat16.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(hidden_states.device)
    predicting = shift_labels != ignore_index
    hidden_states, targets = hidden_states[predicting], shift_labels[predicting]

    def part(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(rows).float(), targets, reduction="sum")

    size = max(1, LOGIT_BYTES // (4 * vocab_size))
    pairs = zip(hidden_states.split(size), targets.split(size), strict=True)
    total = torch.stack([checkpoint(part, *pair, use_reentrant=False) for pair in pairs]).sum()
    return total / (len(targets) if num_items_in_batch is None else num_items_in_batch)


def divisor_and_share(
    labels: torch.Tensor,
    targets: torch.Tensor,
    num_items: torch.Tensor | int,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What the sum over this batch is divided by, and its share of the optimizer step. transformers.Trainer counts
    labels, and cannot know which are no targets: where its count is that of this batch alone, the targets are counted.
    """
    shifted = kwargs.get("shift_labels")
    ignored = kwargs.get("ignore_index", IGNORED)
    pair = (labels[..., 1:], targets[..., 1:]) if shifted is None else (shifted, shifted)
    counted, predicted = ((tensor != ignored).sum() for tensor in pair)
    divisor = torch.as_tensor(num_items, device=counted.device)
    divisor = torch.where(divisor == counted, predicted, divisor).clamp(min=1)
    return divisor, predicted / divisor

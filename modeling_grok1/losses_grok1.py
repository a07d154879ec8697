# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""The losses of Grok1ForCausalLM. Letters as in modeling_grok1.py."""

from typing import Any

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


def causal_lm_losses(
    model: Any,
    logits: torch.Tensor,  # B T V
    labels: torch.Tensor | None,  # B T, -100 where a token is not to be predicted
    router_logits: Any,  # N E per layer
    attention_mask: torch.Tensor | None,  # B S, or 4-D
    **kwargs,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    The mean cross entropy in nats, and the load-balancing loss of Switch Transformer where router logits are given
    (https://huggingface.co/papers/2101.03961, equations 4 to 6), which the first contains with the weight
    `router_aux_loss_coef`. Each is None where its input is.
    """
    loss: torch.Tensor | None = None
    aux_loss: Any = None
    if labels is not None:
        loss = model.loss_function(logits, labels, model.vocab_size, **kwargs)
    if router_logits is not None:
        config = model.config
        if attention_mask is not None:
            # Of the tokens of this call alone: in generation the mask covers the cache too, and may be 4-D.
            tokens = router_logits[0].shape[0] // logits.shape[0]
            attention_mask = attention_mask[:, -tokens:] if attention_mask.ndim == 2 else None
        aux_loss = load_balancing_loss_func(
            router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
        )
        if loss is not None:
            loss = loss + config.router_aux_loss_coef * aux_loss.to(loss.device)
    return loss, aux_loss

# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""transformers.Trainer with the balance of the experts in its logs."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer


class Grok1Trainer(Trainer):
    """
    As `transformers.Trainer`, which logs `loss` alone: beside it stands `aux_loss`, the load-balancing loss of the
    routers, where the model computes one (`model.config.output_router_logits = True`).

    `aux_loss` is the mean over the batches since the last log and over all processes, before its weight
    `router_aux_loss_coef`: `num_experts_per_tok` (2) where every expert is chosen equally often. `loss` contains it
    with that weight.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.aux_losses: list[torch.Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        aux_loss = outputs.get("aux_loss")
        if model.training and aux_loss is not None:
            self.aux_losses.append(aux_loss.detach().mean())  # one a device under nn.DataParallel
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.aux_losses:
            aux_loss = self.accelerator.gather(torch.stack(self.aux_losses).mean()).mean()
            logs["aux_loss"] = aux_loss.item()
            self.aux_losses.clear()
        super().log(logs, start_time)

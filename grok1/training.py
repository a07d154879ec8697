# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""transformers.Trainer with the balance of the experts in its logs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from modeling_grok1.losses_grok1 import predictable_labels


@dataclass
class BalancedLabelSmoother(LabelSmoother):
    """Transformers' smoothed loss, computed from the logits, with the load-balancing loss in it."""

    config: Any = None

    def __call__(
        self,
        model_output: Any,
        labels: torch.Tensor,
        shift_labels: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        loss = super().__call__(model_output, labels, shift_labels, num_items_in_batch)
        aux_loss = model_output.get("aux_loss")
        if aux_loss is None:
            return loss
        share: torch.Tensor | float = 1.0
        if num_items_in_batch is not None:
            share = (labels[..., 1:] != self.ignore_index).sum() / num_items_in_batch
        return loss + self.config.router_aux_loss_coef * share * aux_loss.mean()


class Grok1Trainer(Trainer):
    """
    As `transformers.Trainer`, which logs `loss` alone: beside it stands `aux_loss`, the load-balancing loss of the
    routers, where the model computes one (`model.config.output_router_logits = True`).

    `aux_loss` is the mean over the batches since the last log and over all processes, before its weight
    `router_aux_loss_coef`: `num_experts_per_tok` (2) where every expert is chosen equally often. `loss` contains it
    with that weight, also with label smoothing.

    Training computes no logits where nothing reads them, but the loss of some rows at a time: 131,072 numbers a token
    are not kept. A loss is divided by the number of targets of all batches of a step, which do not count tokens after
    padding on the left.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.aux_losses: list[torch.Tensor] = []
        if self.label_smoother is not None:
            self.label_smoother = BalancedLabelSmoother(self.label_smoother.epsilon, config=self.model.config)  # type: ignore[union-attr]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        reads_logits = return_outputs or self.label_smoother is not None or self.compute_loss_func is not None
        if model.training and not reads_logits and self._loss_shifts_labels:
            inputs = {**inputs, "skip_logits": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        aux_loss = outputs.get("aux_loss")
        if model.training and aux_loss is not None:
            self.aux_losses.append(aux_loss.detach().mean())  # one a device under nn.DataParallel
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        for batch in batch_samples:
            if self._loss_shifts_labels and "labels" in batch and "shift_labels" not in batch:
                batch["labels"] = predictable_labels(**batch)
        return super()._get_num_items_in_batch(batch_samples, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.aux_losses:
            aux_loss = self.accelerator.gather(torch.stack(self.aux_losses).mean()).mean()
            logs["aux_loss"] = aux_loss.item()
            self.aux_losses.clear()
        super().log(logs, start_time)

# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""transformers.Trainer with the balance of the experts in its logs."""

import json
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from grok1.files import write_file
from grok1.model_card.training_run import RUN_NAME, SETTINGS
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
    `transformers.Trainer` that also logs `aux_loss`, the load-balancing loss of the routers, if the model computes it
    (`model.config.output_router_logits = True`), and saves a record of the run with the model.

    `aux_loss` is the mean over the batches since the last log entry and over all processes, before it is multiplied by
    `router_aux_loss_coef`. Its minimum is `num_experts_per_tok` (2), where every expert is chosen equally often.
    `loss` includes it with that weight, also with label smoothing.

    Unless something reads the logits, the loss is computed from a few rows at a time and the logits (131,072 per
    token) are not stored. A loss is divided by the number of targets in all batches of a step; a token that follows
    left padding is not a target.
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `transformers.Trainer`; also writes a record of the run, for `grok1 card` and `grok1 curves`."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            path = Path(output_dir or self.args.output_dir or ".") / RUN_NAME
            write_file(path, json.dumps(self.run_record(), indent=2) + "\n")

    def run_record(self) -> dict[str, Any]:
        """Settings and log of this run as JSON values: what was trained, on what, with which losses."""
        arguments = {key: getattr(self.args, key) for key in SETTINGS if hasattr(self.args, key)}
        parameters = list(self.accelerator.unwrap_model(self.model).parameters())
        base = str(getattr(self.model, "name_or_path", "") or "")
        info = getattr(self.train_dataset, "info", None)
        dataset_id = getattr(info, "dataset_name", None)
        examples = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None
        dataset = dataset_id or ("not named" if examples is None else f"{examples:,} examples, not named")
        return {
            # Only the last part of a local path.
            "base_model": (base if base.count("/") == 1 and base[0] not in "./" else Path(base).name) or None,
            "dataset": dataset,
            "dataset_id": dataset_id if dataset_id and "/" in dataset_id else None,
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "arguments": {
                **{key: value if isinstance(value, (int, float)) else str(value) for key, value in arguments.items()},
                "processes": self.args.world_size,
            },
            "global_step": self.state.global_step,
            "epoch": self.state.epoch,
            "log_history": self.state.log_history,
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.aux_losses:
            aux_loss = self.accelerator.gather(torch.stack(self.aux_losses).mean()).mean()
            logs["aux_loss"] = aux_loss.item()
            self.aux_losses.clear()
        super().log(logs, start_time)

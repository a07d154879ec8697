"""What a folder records of the training run that made it: settings and the Trainer's own log."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grok1.errors import ConversionError


RUN_NAME = "training_run.json"  # written by grok1.training.Grok1Trainer
STATE_NAME = "trainer_state.json"  # written by transformers.Trainer.save_state, and in every checkpoint
SHOWN_ROWS = 12
COLUMNS = ("step", "epoch", "loss", "aux_loss", "eval_loss", "learning_rate", "grad_norm")
SETTINGS = {
    "max_steps": "steps asked for",
    "num_train_epochs": "epochs asked for",
    "per_device_train_batch_size": "sequences per device and step",
    "gradient_accumulation_steps": "gradient accumulation steps",
    "processes": "processes",
    "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule",
    "optim": "optimizer",
    "weight_decay": "weight decay",
    "seed": "seed",
}


@dataclass(frozen=True)
class TrainingRun:
    """
    Args:
        base: the model that was fine-tuned, as it was loaded: a repository or the name of a folder; None if unknown.
        dataset: the training data in words; None if unknown.
        dataset_id: the repository of the data set, where it has one.
        summary: one sentence about what was trained.
        settings: name and value, in words.
        log: the entries of the Trainer's log.
    """

    base: str | None
    dataset: str | None
    dataset_id: str | None
    summary: str
    settings: tuple[tuple[str, str], ...]
    log: tuple[dict[str, Any], ...]

    @property
    def base_repository(self) -> str | None:
        """`base` where it is USER/NAME."""
        return self.base if self.base and self.base.count("/") == 1 and not self.base.startswith(("/", ".")) else None

    @property
    def columns(self) -> list[str]:
        """The columns of the log that hold anything."""
        return [column for column in COLUMNS if any(column in entry for entry in self.losses)]

    @property
    def losses(self) -> list[dict[str, Any]]:
        """The entries with a loss."""
        return [entry for entry in self.log if "loss" in entry or "eval_loss" in entry]

    @property
    def rows(self) -> list[list[str]]:
        """At most `SHOWN_ROWS` entries with a loss, evenly spread, the first and the last among them."""
        losses, last = self.losses, len(self.losses) - 1
        if last >= SHOWN_ROWS:
            losses = [losses[round(i * last / (SHOWN_ROWS - 1))] for i in range(SHOWN_ROWS)]
        return [[_shown(entry.get(column)) for column in self.columns] for entry in losses]

    @property
    def omitted(self) -> int:
        """Entries with a loss that `rows` leaves out."""
        return len(self.losses) - len(self.rows)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def read_training_run(folder: Path) -> TrainingRun | None:
    """The record of a folder; None where there is none.

    Raises:
        ConversionError: the record cannot be read.
    """
    path = next((folder / name for name in (RUN_NAME, STATE_NAME) if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        log = tuple(dict(entry) for entry in record["log_history"])
        arguments = dict(record.get("arguments") or {})
        trained, parameters = record.get("trained_parameters"), record.get("parameters")
        steps, epochs = int(record["global_step"]), record.get("epoch")
        summary = f"{steps:,} steps" + (f", {float(epochs):.2f} epochs" if epochs else "")
        if trained is not None and parameters:
            summary += f"; {int(trained):,} of {int(parameters):,} parameters were trained"
        return TrainingRun(
            base=record.get("base_model"),
            dataset=record.get("dataset"),
            dataset_id=record.get("dataset_id"),
            summary=f"{summary}.",
            settings=tuple((words, _shown(arguments[key])) for key, words in SETTINGS.items() if key in arguments),
            log=log,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConversionError(
            f"{path}: expected the record of a training run, found {type(error).__name__}: {error}.",
            next_step="Remove it, or save the model again with the Trainer.",
        ) from None

"""The perplexity of a text, and top-1 agreement with another model."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grok1.errors import ConversionError
from grok1.loading import check_device_map, check_folder, load_model, load_tokenizer
from grok1.precision import AUTO, find_precision, stored_precision


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """
    What `evaluate` measured.

    Args:
        folder: the model's folder.
        precision: how its weights are stored, such as "bfloat16" or "nf4 in bfloat16".
        bytes: weights in memory including all quantisation state, a tied head counted once.
        context: tokens of a window.
        predicted: number of predicted tokens: all but the first of each window.
        nats: mean negative log-likelihood per predicted token.
        perplexity: exp(nats).
        against: the folder of the model that the top-1 tokens were compared with.
        agreement: fraction of predicted tokens where both models have the same top-1 token, 0 to 1.
        seconds: time of the forward passes of this model.
    """

    folder: str
    precision: str
    bytes: int
    context: int
    predicted: int
    nats: float
    perplexity: float
    against: str | None
    agreement: float | None
    seconds: float


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model's state dict: weights, scales and other quantisation state, shared tensors once."""
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values() if t.numel() > 0}.values())


def windows(ids: torch.Tensor, context: int) -> list[torch.Tensor]:
    """
    Split ids (T,) into windows of `context` tokens that do not overlap. A last window of one token predicts
    nothing and is dropped.

    Raises:
        ValueError: `context` or the number of tokens is below 2.
    """
    if context < 2:
        raise ValueError(f"`context`: expected at least 2 tokens, found {context}.")
    if len(ids) < 2:
        raise ValueError(f"text: expected at least 2 tokens, found {len(ids)}.")
    return [piece for piece in ids.split(context) if len(piece) > 1]


def score(
    model: PreTrainedModel, pieces: list[torch.Tensor], progress: Report | None = None
) -> tuple[float, torch.Tensor]:
    """
    Run the model over each window independently; the first token of a window is not predicted.

    Returns:
        the sum of the negative log-likelihoods of all other tokens in nats (log-softmax in float32, sum in float64),
        and the top-1 token at each of their positions, (predicted,), int64, on the CPU.
    """
    import torch

    nats, top1 = 0.0, []
    total, done = sum(len(piece) for piece in pieces), 0
    for piece in pieces:
        with torch.no_grad():
            logits = model(piece[None].to(model.device), use_cache=False).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, piece[1:].to(logits.device), reduction="none")
        nats += losses.double().sum().item()
        top1.append(logits.argmax(dim=-1).cpu())
        done += len(piece)
        if progress is not None:
            progress(done, total)
    return nats, torch.cat(top1)


def text_windows(folder: str | Path, text: str, against: str | Path | None, context: int) -> list[torch.Tensor]:
    """The tokenised windows of `text`. Raises ValueError as `evaluate` does."""
    import torch

    config = check_folder(folder)
    if context > config.max_position_embeddings:
        raise ValueError(f"`context`: expected at most the model's {config.max_position_embeddings}, found {context}.")
    if against is not None and check_folder(against, tokenizer=False).vocab_size != config.vocab_size:
        raise ValueError(f"`against`: the models of {folder} and {against} have different vocabularies.")
    tokenizer = load_tokenizer(folder)
    return windows(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]), context)


def evaluate(
    folder: str | Path,
    text: str,
    *,
    against: str | Path | None = None,
    precision: str = AUTO,
    context: int = 512,
    device_map: str | None = None,
    progress: Report | None = None,
) -> Evaluation:
    """
    Perplexity of `text`: exp of the mean negative log-likelihood over windows of `context` tokens that do not overlap.
    The first token of a window is not predicted; no token is added to the text.

    Args:
        folder: a converted folder with a tokenizer.
        text: what to predict.
        against: a folder whose model, in bfloat16, the top-1 tokens are compared with; it may be `folder`. It runs
            first and is freed before the other is loaded. None: no comparison.
        precision: as in `loading_options`.
        context: tokens of a window.
        device_map: as in `from_pretrained`.
        progress: called with (tokens done, total tokens) after each window, for one model after the other.

    Raises:
        ConversionError: the folder is damaged, as in `grok1.loading.check_folder`, or the loss is not finite.
        ValueError: an unknown option, a text of less than 2 tokens, a context beyond the model's, or two models whose
            vocabularies differ.
    """
    check_device_map(device_map)
    pieces = text_windows(folder, text, against, context)
    expected = None
    if against is not None:
        _, expected = score(load_model(against, "bfloat16", device_map=device_map), pieces, progress)
    model = load_model(folder, precision, device_map=device_map)
    start = time.perf_counter()
    nats, top1 = score(model, pieces, progress)
    seconds = time.perf_counter() - start
    mean = nats / len(top1)
    if not mean < math.log(sys.float_info.max):  # NaN is not below either
        raise ConversionError(
            f"{folder}: the text has no perplexity",
            [f"loss: expected a finite number of nats per token, found {mean}"],
            "The model computes numbers that are not finite; try --precision float32.",
        )
    dtype = str(model.dtype).removeprefix("torch.")
    method = stored_precision(folder)
    if precision != AUTO and find_precision(precision).quantization is not None:
        method = precision
    return Evaluation(
        folder=str(folder),
        precision=dtype if method is None else f"{method} in {dtype}",
        bytes=stored_bytes(model),
        context=context,
        predicted=len(top1),
        nats=mean,
        perplexity=math.exp(mean),
        against=None if against is None else str(against),
        agreement=None if expected is None else (top1 == expected).double().mean().item(),
        seconds=seconds,
    )

"""`grok1 eval`: the perplexity of a text, and how often the likeliest token is that of another model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


Report = Callable[[int, int], None]

QUANTIZE = ("int8", "int8-bnb", "nf4", "nf4-double", "fp4")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Evaluation:
    """
    What `evaluate` measured.

    Args:
        folder: the model's folder.
        precision: how its weights were stored, such as "bfloat16" or "nf4 in bfloat16".
        bytes: weights in memory with all quantisation state, a tied head counted once.
        context: tokens of a window.
        predicted: tokens that were predicted, all but the first of each window.
        nats: mean negative log-likelihood of a predicted token.
        perplexity: exp(nats).
        against: the folder of the model that the likeliest tokens were compared with.
        agreement: share of predicted tokens where both models' likeliest token is the same, 0 to 1.
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


def quantization_config(name: str, dtype: torch.dtype) -> Any:
    """
    What to pass to `from_pretrained` as `quantization_config` for a name of `QUANTIZE`; 4-bit weights are multiplied
    in `dtype`. Raises ValueError for another name.
    """
    from transformers import BitsAndBytesConfig

    from modeling_grok1 import Grok1Int8Config

    if name not in QUANTIZE:
        raise ValueError(f"`quantize`: expected one of {', '.join(QUANTIZE)}, found {name!r}.")
    if name == "int8":
        return Grok1Int8Config()
    if name == "int8-bnb":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name.removesuffix("-double"),
        bnb_4bit_use_double_quant=name.endswith("-double"),
        bnb_4bit_compute_dtype=dtype,
    )


def load(folder: Path, dtype: str = "auto", quantize: str | None = None, device_map: str | None = None) -> Any:
    """The model of a folder, in eval mode. Raises ValueError for an unknown `dtype` or `quantize`."""
    import torch
    from transformers import AutoModelForCausalLM

    from modeling_grok1 import GrokConfig

    if dtype not in DTYPES:
        raise ValueError(f"`dtype`: expected one of {', '.join(DTYPES)}, found {dtype!r}.")
    options: dict[str, Any] = {"dtype": dtype, "device_map": device_map}
    if quantize is not None:
        compute = GrokConfig.from_pretrained(folder).dtype if dtype == "auto" else dtype
        compute = str(compute).removeprefix("torch.")
        options["quantization_config"] = quantization_config(quantize, getattr(torch, compute))
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of what the model would save: weights, scales and other quantisation state, shared tensors once."""
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values() if t.numel() > 0}.values())


def windows(ids: torch.Tensor, context: int) -> list[torch.Tensor]:
    """
    ids (T,) in pieces of `context` tokens that do not overlap; a last piece of one token, of which nothing would be
    predicted, is left out.

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
    Run the model over each piece by itself; the first token of a piece is not predicted.

    Returns:
        the sum of the negative log-likelihoods of all other tokens in nats (log-softmax in float32, sum in float64),
        and the likeliest token at each of their places, (predicted,), int64, on the CPU.
    """
    import torch

    nats, likeliest = 0.0, []
    total, done = sum(len(piece) for piece in pieces), 0
    for piece in pieces:
        with torch.no_grad():
            logits = model(piece[None].to(model.device), use_cache=False).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, piece[1:].to(logits.device), reduction="none")
        nats += losses.double().sum().item()
        likeliest.append(logits.argmax(dim=-1).cpu())
        done += len(piece)
        if progress is not None:
            progress(done, total)
    return nats, torch.cat(likeliest)


def evaluate(
    folder: str | Path,
    text: str,
    *,
    against: str | Path | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    context: int = 512,
    device_map: str | None = None,
    progress: Report | None = None,
) -> Evaluation:
    """
    Perplexity of `text`, exp of the mean negative log-likelihood over windows of `context` tokens that do not overlap,
    the first token of a window not predicted; no token is added to the text.

    Args:
        folder: a converted folder with a tokenizer.
        text: what to predict.
        against: a folder whose model, in bfloat16, the likeliest tokens are compared with; it may be `folder`. It runs
            first and is gone when the other is loaded. None: no comparison.
        dtype: compute dtype, "float32", "bfloat16" or "auto" (as stored).
        quantize: quantise while loading, a name of `QUANTIZE`; None: as stored.
        context: tokens of a window.
        device_map: as in `from_pretrained`.
        progress: called with (tokens done, tokens in all) after each window.

    Raises:
        ValueError: an unknown option, a text of less than 2 tokens, a context beyond the model's, or two models whose
            vocabularies differ.
    """
    import torch
    from transformers import AutoTokenizer

    from modeling_grok1 import GrokConfig

    config = GrokConfig.from_pretrained(folder)
    if context > config.max_position_embeddings:
        raise ValueError(f"`context`: expected at most the model's {config.max_position_embeddings}, found {context}.")
    if against is not None and GrokConfig.from_pretrained(against).vocab_size != config.vocab_size:
        raise ValueError(f"`against`: the models of {folder} and {against} have different vocabularies.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    pieces = windows(ids, context)

    total = sum(len(piece) for piece in pieces) * (1 if against is None else 2)
    done = 0

    def step(here: int, _: int) -> None:
        if progress is not None:
            progress(done + here, total)

    expected = None
    if against is not None:
        _, expected = score(load(Path(against), "bfloat16", device_map=device_map), pieces, step)
        done = total // 2
    model = load(Path(folder), dtype, quantize, device_map)
    start = time.perf_counter()
    nats, likeliest = score(model, pieces, step)
    seconds = time.perf_counter() - start
    method = quantize or getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    name = str(model.dtype).removeprefix("torch.")
    return Evaluation(
        folder=str(folder),
        precision=name if method is None else f"{getattr(method, 'value', method)} in {name}",
        bytes=stored_bytes(model),
        context=context,
        predicted=len(likeliest),
        nats=nats / len(likeliest),
        perplexity=math.exp(nats / len(likeliest)),
        against=None if against is None else str(against),
        agreement=None if expected is None else (likeliest == expected).double().mean().item(),
        seconds=seconds,
    )


def eval_command(
    folder: Annotated[Path, typer.Argument(help="A converted folder with a tokenizer.", exists=True, file_okay=False)],
    text: Annotated[Path, typer.Option(help="Text file (UTF-8) to predict.", exists=True, dir_okay=False)],
    against: Annotated[
        Path | None,
        typer.Option(
            help="Compare the likeliest tokens with this folder's in bfloat16; may be FOLDER.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto (as stored).")] = "auto",
    quantize: Annotated[str | None, typer.Option(help=f"Quantise while loading: {', '.join(QUANTIZE)}.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window; windows do not overlap.")] = 512,
    device_map: Annotated[str, typer.Option(help="Where the layers go: auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure the perplexity of a text, and how often the likeliest token is the bfloat16 model's."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("Predicting tokens", total=None)
        found = evaluate(
            folder,
            text.read_text(encoding="utf-8"),
            against=against,
            dtype=dtype,
            quantize=quantize,
            context=context,
            device_map=device_map,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    typer.echo(f"precision   {found.precision}, {found.bytes:,} bytes of weights")
    typer.echo(
        f"perplexity  {found.perplexity:.4f} ({found.nats:.5f} nats a token; {found.predicted:,} tokens, windows of "
        f"{found.context} that do not overlap, the first token of each not predicted)"
    )
    if found.agreement is not None:
        typer.echo(f"agreement   {found.agreement:.2%} of likeliest tokens as {found.against} in bfloat16")

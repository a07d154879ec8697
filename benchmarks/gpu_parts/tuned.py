"""Tiles of the Triton kernel for the shapes of decoding and prompts: the winners in the form of its table `TILES`."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .results import NotHereError, Run


# What is tried of each attribute, one after the other from the tile of the table; `split_k` 0 means two programs for
# each multiprocessor.
# The experts are 93 % of the bytes of a decoding step; the other products are measured with the winner.
TUNED_FOR = ("gate and up", "down")
FEW_ROWS: dict[str, tuple[int, ...]] = {
    "block_n": (16, 32, 64, 128),
    "block_k": (128, 256, 512),
    "num_stages": (3, 4, 5, 6),
    "num_warps": (2, 4, 8),
    "split_k": (0, 1, 2, 4),
}
MANY_ROWS: dict[str, tuple[int, ...]] = {
    "block_s": (32, 64, 128),
    "block_n": (64, 128, 256),
    "block_k": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}


def kernel_module() -> Any:
    try:
        return importlib.import_module("modeling_grok1.triton_grok1")
    except ImportError as error:
        raise NotHereError(error) from error


def random_product(
    run: Run, bits: int, counts: list[int], outputs: int, inputs: int, blocks: int
) -> tuple[torch.Tensor, ...]:
    """x, weight, scale and offsets of a grouped product."""
    dtype, scale_size = run.sizes.dtype, inputs**-0.5 / (73 if bits == 8 else 4.6)
    E = len(counts)  # noqa: N806
    x = torch.randn(sum(counts), inputs, device=run.device).to(dtype)
    if bits == 8:
        weight = torch.empty(E, outputs, inputs, dtype=torch.int8, device=run.device).random_(-127, 128)
    else:
        weight = torch.empty(E, outputs, inputs // 8, dtype=torch.int32, device=run.device).random_(-(2**31), 2**31)
    scale = (torch.rand(E, outputs, blocks, device=run.device) * 0.4 + 0.8) * scale_size
    offsets = torch.tensor(counts, device=run.device).cumsum(0, dtype=torch.int32)
    return x, weight, scale.bfloat16(), offsets


def shapes(run: Run, bits: int, few: bool) -> dict[str, tuple[torch.Tensor, ...]]:
    """The products of a layer: both of the experts, and the 6,144- and 1,024-wide projections of the attention."""
    sizes = run.sizes
    D, F, keys = sizes.hidden, sizes.intermediate, sizes.model["num_key_value_heads"] * sizes.model["head_dim"]  # noqa: N806

    def blocks(inputs: int, of_int8: int) -> int:
        return of_int8 if bits == 8 else inputs // sizes.group_size

    experts = [0, 1, 0, 0, 0, 1, 0, 0] if few else [512, 511, 513, 400, 624, 512, 512, 512]
    one = [1] if few else [2048]
    if sizes.dry and not few:
        experts, one = [66, 0, 3], [5]
    return {
        "gate and up": random_product(run, bits, experts, 2 * F, D, blocks(D, 1)),
        "down": random_product(run, bits, experts, D, F, blocks(F, sizes.scale_blocks)),
        "query": random_product(run, bits, one, D, D, blocks(D, 1)),
        "key": random_product(run, bits, one, keys, D, blocks(D, 1)),
    }


def tune(run: Run, bits: int, few: bool, grid: dict[str, tuple[int, ...]]) -> None:
    """Coordinate descent: each attribute in turn takes the value with the least time of all shapes together. The best
    tile so far is recorded whenever it changes, so that a cut run keeps it."""
    module = kernel_module()
    from triton.runtime.errors import OutOfResources

    products = shapes(run, bits, few)
    label = f"{'decoding' if few else 'prompts'}, int{bits}"
    times: dict[Any, float] = {}

    def measure(tile: Any) -> float:
        if tile not in times:
            times[tile] = float("inf")
            with run.attempt(f"{label}: {describe(tile)}"):
                try:
                    seconds = {
                        name: time_of(run, lambda p=product: module.quantised_grouped_matmul(*p, tile=tile))
                        for name, product in products.items()
                        if name in TUNED_FOR
                    }
                except OutOfResources as error:
                    raise NotHereError(f"the tile is too large for the card: {error}") from error
                times[tile] = sum(seconds.values())
                detail = ", ".join(f"{name} {value * 1e6:.1f}" for name, value in seconds.items())
                run.value(f"{label}: {describe(tile)}", times[tile] * 1e6, "us", detail)
        return times[tile]

    start = best = module.TILES[few, bits]
    measure(start)
    for attribute, values in [("block_k", (32, 128))] if run.dry else grid.items():
        for value in values:
            if run.seconds_left() < 6 and not run.dry:
                break
            candidate = best._replace(**{attribute: value})
            if measure(candidate) < 0.98 * times[best]:  # differences of 2 % are noise
                best = candidate
    detail = f"{times[start] / times[best]:.2f} x the speed of the table's tile; {len(times)} tiles tried"
    line = f"({few}, {bits}): {describe(best)},"
    run.value(f"{label}: winner", times[best] * 1e6, "us", f"{line} {detail}", line=line)
    read_rates(run, label, products, module, best)


def time_of(run: Run, function: Callable[[], Any]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton's about its own defaults
        return run.seconds(function, repeats=20, warmup=2)


def read_rates(run: Run, label: str, products: dict[str, tuple[torch.Tensor, ...]], module: Any, tile: Any) -> None:
    """Bytes of the chosen matrices per second, the measure of decoding; FLOP per second, that of prompts."""
    for name, product in products.items():
        x, weight, scale, offsets = product
        seconds = time_of(run, lambda p=product: module.quantised_grouped_matmul(*p, tile=tile))
        ends = offsets.tolist()
        chosen = sum(end > start for start, end in zip([0, *ends], ends, strict=False))
        read = chosen * (weight[0].nbytes + scale[0].nbytes) / seconds / 1e9
        flop = 2 * x.shape[0] * x.shape[1] * weight.shape[1] / seconds / 1e12
        run.value(f"{label}: winner, {name}", seconds * 1e6, "us", f"{read:,.0f} GB/s, {flop:,.1f} TFLOP/s")
        for split_k in (1, 4) if name not in TUNED_FOR else ():  # narrow outputs fill the card only if cut
            if run.seconds_left() > 4:
                other = tile._replace(split_k=split_k)
                seconds = time_of(run, lambda p=product, t=other: module.quantised_grouped_matmul(*p, tile=t))
                run.value(f"{label}: {name}, split_k={split_k}", seconds * 1e6, "us")


def describe(tile: Any) -> str:
    split = f", split_k={tile.split_k}" if tile.split_k != 1 else ""
    blocks = f"{tile.block_s}, {tile.block_n}, {tile.block_k}"
    return f"Tile({blocks}, num_warps={tile.num_warps}, num_stages={tile.num_stages}{split})"


def decoding_int8(run: Run) -> None:
    tune(run, 8, True, FEW_ROWS)


def decoding_int4(run: Run) -> None:
    tune(run, 4, True, FEW_ROWS)


def prompts_int8(run: Run) -> None:
    tune(run, 8, False, MANY_ROWS)


def prompts_int4(run: Run) -> None:
    tune(run, 4, False, MANY_ROWS)

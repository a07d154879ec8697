"""Whether the model fits on Macs, by mlx-lm, and the command that runs it there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from grok1.sizing.hardware import MAC_SHARE, Mac
from grok1.sizing.memory import Memory, model_memory


if TYPE_CHECKING:
    from modeling_grok1 import GrokConfig


@dataclass(frozen=True)
class MlxFormat:
    """Weights as mlx-lm holds them: integers with a scale and a bias per group, both bfloat16.

    Args:
        name: for the table.
        bits: per weight.
        group: weights per scale.
        embedding: the embedding is quantised too, as `mlx_lm.convert -q` does; else it stays bfloat16.
        folder: name of the folder in the command.
        make: the command that writes the folder.
    """

    name: str
    bits: int
    group: int
    embedding: bool
    folder: str
    make: str


# Best quality first.
FORMATS = (
    MlxFormat("int8", 8, 128, False, "grok-1-int8", "grok1 convert CKPT grok-1-int8 --dtype int8"),
    MlxFormat("int4", 4, 128, False, "grok-1-int4", "grok1 convert CKPT grok-1-int4 --dtype int4"),
    MlxFormat(
        "mlx 4 bit",
        4,
        64,
        True,
        "grok-1-4bit",
        "mlx_lm.convert --hf-path grok-1-hf --mlx-path grok-1-4bit -q --q-bits 4 --trust-remote-code",
    ),
)


@dataclass(frozen=True)
class MacPlan:
    """One format on `count` Macs, in bytes per Mac; `free` is negative where it does not fit."""

    format: MlxFormat
    count: int
    weights: int
    cache: int
    free: int
    tokens_per_second: float
    command: str

    @property
    def fits(self) -> bool:
        return self.free >= 0


def format_bytes(memory: Memory, form: MlxFormat) -> dict[str, int]:
    """Bytes by kind of weight in a format, from the model's memory in bfloat16."""
    quantized = {"attention", "experts"} | ({"embedding", "head"} if form.embedding else set())
    sizes = {}
    for kind, nbytes in memory.weights.items():
        count = nbytes // 2
        sizes[kind] = count * form.bits // 8 + 4 * count // form.group if kind in quantized else nbytes
    return sizes


def mac_plans(config: GrokConfig, count: int, mac: Mac, context: int, batch: int = 1) -> list[MacPlan]:
    """Every format on `count` equal Macs, tensor parallel.

    Three quarters of the memory are usable (`MAC_SHARE`). The speed is an upper bound by bandwidth, batch 1.

    Raises:
        ValueError: the number of Macs does not divide the key and value heads, or the context is out of range.
    """
    if config.num_key_value_heads % count != 0:
        heads = config.num_key_value_heads
        raise ValueError(
            f"`--mac`: expected a number of Macs that divides the {heads} key and value heads, found {count}."
        )
    if not 1 <= context <= config.max_position_embeddings:
        raise ValueError(f"`context`: expected 1 to {config.max_position_embeddings} tokens, found {context}.")
    memory = model_memory(config, "bfloat16", prompt=1)
    cache = memory.kv_bytes(context * batch)
    plans = []
    for form in FORMATS:
        sizes = format_bytes(memory, form)
        weights = sum(sizes.values())
        head = sizes.get("head", sizes.get("embedding", 0))
        active = sizes["experts"] * config.num_experts_per_tok // config.num_experts
        read = sizes["attention"] + sizes["router"] + sizes["norms"] + head + active + memory.kv_bytes(context)
        free = int(mac.memory * MAC_SHARE) - (weights + cache) // count
        plans.append(
            MacPlan(
                form, count, weights // count, cache // count, free, mac.bandwidth * count / read, command(form, count)
            )
        )
    return plans


def command(form: MlxFormat, count: int) -> str:
    """The command to paste: one Mac generates, several serve."""
    if count == 1:
        run = f'mlx_lm.generate --model {form.folder} --trust-remote-code --prompt "The answer to life"'
    else:
        hosts = ",".join(f"mac{number + 1}" for number in range(count))
        run = f"mlx.launch --hosts {hosts} --backend ring mlx_lm.server --model {form.folder} --trust-remote-code"
    return f"# {form.folder} is written by `{form.make}`\n{run}"

"""What a converted folder holds, measured from its config and the headers of its files, for the model card.

No weight is read. Counts of elements and bytes are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from grok1.arrays import folder_arrays
from grok1.conversion.names import HEAD_NAME, KINDS, SAFETENSORS_LAYOUTS, GrokSizes, hub_tensors
from grok1.conversion.release import release_sizes
from grok1.conversion.tokenizer import TOKENIZER_NAME, read_sentencepiece
from grok1.errors import ConversionError
from grok1.files import read_json
from grok1.gguf_files import is_gguf, read_gguf
from grok1.model_card.card import PICTURES, CardFacts, Group, Memory, read_evaluation
from grok1.model_card.training_run import read_training_run
from modeling_grok1.configuration_grok1 import GrokConfig
from modeling_grok1.packing_grok1 import bits_and_group_size


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)
HEAD, SCALES = "Output head", "Scales of the quantised weights"
# The kinds of conversion.names under the headings of the card.
GROUPS = {
    "Experts": ("moe_gate", "moe_up", "moe_down"),
    "Attention": ("attn_q", "attn_k", "attn_v", "attn_o"),
    "Router": ("router",),
    "Norms": ("norm_final", "norm_pre_attn", "norm_post_attn", "norm_pre_moe", "norm_post_moe"),
    "Embedding": ("embedding",),
    HEAD: (HEAD_NAME,),
    SCALES: ("scales",),
}


Packed = tuple[int, int]  # bits and group size of packed matrices


class Tensor(Protocol):
    """What is needed of a tensor: dtype as torch spells it, shape, bytes on disk."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...


def card_facts(
    folder: Path,
    tensors: Mapping[str, Tensor] | None = None,
    shards: Mapping[str, int] | None = None,
    description: str = "",
) -> CardFacts:
    """Measures a converted folder.

    Args:
        folder: with config.json and, as a rule, the weights.
        tensors: every tensor as it was written, by name, where the shards were sent off already; read from the headers
            of the folder's shards where None.
        shards: bytes of each shard by its name, and
        description: what a GGUF file says of its numbers; given with `tensors`.

    Raises:
        ConversionError: the folder is not complete, or not a Grok-1 in one of the converter's layouts.
    """
    folder = Path(folder)
    config = _config(folder)
    sizes = _sizes(folder, config)
    if tensors is None:
        stored: Mapping[str, Any]
        if is_gguf(folder):
            model = read_gguf(folder)
            stored, description = model.tensors, model.keys.get("general.description", "")
        else:
            stored = folder_arrays(folder)
        tensors = stored
        shards = {file.name: file.stat().st_size for file in sorted({tensor.file for tensor in stored.values()})}
    assert shards is not None
    table = SimpleNamespace(**sizes)
    packing = bits_and_group_size(config.get("quantization_config"))
    layout, kind_of = layout_of(folder, table, tensors, packing)
    groups = _groups(tensors, kind_of, packing)
    by_title = {group.name: group for group in groups}
    tied = bool(config.get("tie_word_embeddings", True))
    uncounted = {SCALES, HEAD} if tied else {SCALES}
    parameters = sum(group.elements for group in groups if group.name not in uncounted)
    experts = by_title["Experts"].elements
    idle = experts // sizes["num_experts"] * (sizes["num_experts"] - sizes["num_experts_per_tok"])
    release = release_sizes()
    return CardFacts(
        sizes=sizes,
        parameters=parameters,
        active_parameters=parameters - idle,
        expert_share=100 * experts / parameters,
        precision=" and ".join(by_title["Experts"].dtypes),
        layout=layout,
        tied=tied,
        is_release=all(getattr(release, key) == value for key, value in sizes.items()),
        groups=groups,
        shards=tuple(shards),
        description=description,
        weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        shard_bytes=sum(shards.values()),
        memory=_memory(table, parameters, experts + by_title["Attention"].elements),
        transformers_version=config.get("transformers_version"),
        tokenizer_pieces=_tokenizer_pieces(folder, layout),
        has_code=(folder / "modeling_grok1.py").is_file(),
        picture=next((name for name in PICTURES if (folder / name).is_file()), None),
        evaluation=read_evaluation(folder),
        training=read_training_run(folder),
    )


def _groups(tensors: Mapping[str, Tensor], kind_of: Mapping[str, str], packing: Packed | None) -> tuple[Group, ...]:
    """The tensors under the headings of the card."""
    members: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        members.setdefault(kind_of[name], []).append(tensor)
    groups = []
    for title, kinds in GROUPS.items():
        group = [tensor for kind in kinds for tensor in members.get(kind, ())]
        if group:
            dtypes = tuple(sorted({_precision(tensor, packing) for tensor in group}))
            elements, nbytes = sum(_elements(t, packing) for t in group), sum(t.nbytes for t in group)
            groups.append(Group(title, len(group), dtypes, elements, nbytes))
    return tuple(groups)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"{folder}: expected a converted folder with config.json, found none that can be read ({error}).",
            next_step="Make one with `grok1 convert CKPT OUT`.",
        ) from None
    if (found := config.get("model_type", GrokConfig.model_type)) != GrokConfig.model_type:
        raise ConversionError(
            f"{folder} is not a Grok-1:",
            [f"config.json: model_type: expected {GrokConfig.model_type!r}, found {str(found)[:80]!r}"],
        )
    return config


def _sizes(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    config = dict(config)
    for key, twin in {"num_experts": "num_local_experts", "intermediate_size": "moe_intermediate_size"}.items():
        config.setdefault(key, config.get(twin))
    if config.get("head_dim") is None and config.get("num_attention_heads"):
        config["head_dim"] = config.get("hidden_size", 0) // config["num_attention_heads"]
    problems = [
        f"config.json: `{key}`: expected a positive integer, found {config.get(key)!r}"
        for key in SIZES
        if not (isinstance(config.get(key), int) and config[key] > 0)
    ]
    if problems:
        raise ConversionError(f"{folder} is not a Grok-1:", problems, "A converted folder has all of these.")
    return {key: config[key] for key in SIZES}


def _precision(tensor: Tensor, packing: Packed | None) -> str:
    return f"int{packing[0]}" if packing and tensor.dtype == "int32" else tensor.dtype


def _elements(tensor: Tensor, packing: Packed | None) -> int:
    """The weights that a tensor holds."""
    return math.prod(tensor.shape) * (32 // packing[0] if packing and tensor.dtype == "int32" else 1)


def layout_of(
    folder: Path, table: GrokSizes, tensors: Mapping[str, Tensor], packing: Packed | None
) -> tuple[str, dict[str, str]]:
    """The layout whose names and shapes are exactly the folder's, and the kind of each tensor.

    Args:
        table: the sizes of the model.
        tensors: every tensor of the folder by its name. The output head may be there or not.
        packing: bits and group size of a packed folder.

    Raises:
        ConversionError: there is none; what is missing, left over or of another shape in the nearest layout.
    """
    found = {name: tensor for name, tensor in tensors.items() if name != HEAD_NAME}
    attempts: dict[str, list[str]] = {}
    embedding = KINDS["embedding"].gguf
    layouts = ("gguf",) if embedding in found else ("hub",) if packing is not None else SAFETENSORS_LAYOUTS
    for layout in layouts:
        expected = hub_tensors(table, layout, *((f"int{packing[0]}", packing[1]) if packing else ("bfloat16",)))
        expected.pop(HEAD_NAME, None)
        wrong = [f"{name}: missing" for name in expected if name not in found]
        wrong += [f"{name}: not a tensor of a Grok-1" for name in found if name not in expected]
        wrong += [
            f"{name}: expected shape {list(tensor.shape)}, found {list(found[name].shape)}"
            for name, tensor in expected.items()
            if name in found and tensor.shape != found[name].shape
        ]
        if not wrong:
            kinds = {
                name: tensor.parts[0].entry.kind.name if tensor.parts[0].field == "weight" else "scales"
                for name, tensor in expected.items()
            }
            return layout, {**kinds, HEAD_NAME: HEAD_NAME}
        attempts[layout] = wrong
    nearest = min(attempts, key=lambda layout: len(attempts[layout]))
    wrong = attempts[nearest]
    raise ConversionError(
        f"{folder}: its tensors are not those of a Grok-1 of the sizes in config.json ({nearest} layout):",
        wrong,
        "Complete the folder, or write it again with `grok1 convert`.",
    )


def _memory(table: SimpleNamespace, parameters: int, quantised: int) -> tuple[Memory, ...]:
    """Computed from the sizes; `quantised` counts the elements of attention and experts."""
    layers, kv = table.num_hidden_layers, table.num_key_value_heads * table.head_dim
    # Norms and routers are float32 in every precision.
    float32 = layers * (4 + table.num_experts) * table.hidden_size + table.hidden_size
    others = 2 * (parameters - quantised - float32) + 4 * float32
    outputs = (table.num_attention_heads * table.head_dim + 2 * kv + table.hidden_size) + table.num_experts * (
        2 * table.intermediate_size + table.hidden_size
    )
    matrices = layers * (4 + 3 * table.num_experts)
    # A bfloat16 scale per group of 128 inputs.
    scales = 2 * quantised // 128
    cache = 2 * layers * kv * table.max_position_embeddings * 2
    outside = 2 * table.vocab_size * table.hidden_size + 4 * table.hidden_size
    return (
        Memory("float32", 4 * parameters, 2 * cache, layers, 4 * (table.vocab_size + 1) * table.hidden_size),
        Memory("bfloat16", others + 2 * quantised, cache, layers, outside),
        Memory("int8, xAI's own values", others + quantised + scales, cache, layers, outside),
        Memory("int4, groups of 128", others + quantised // 2 + scales, cache, layers, outside),
        # A float32 scale per output row.
        Memory("8 bit, bitsandbytes", others + quantised + 4 * layers * outputs, cache, layers, outside),
        # Half a byte, a float32 scale per block of 64, and a code of 16 float32 numbers per matrix.
        Memory(
            "4 bit (nf4), bitsandbytes",
            others + quantised // 2 + 4 * -(-quantised // 64) + 64 * matrices,
            cache,
            layers,
            outside,
        ),
    )


def _tokenizer_pieces(path: Path, layout: str) -> int | None:
    file, model = path / "tokenizer.json", path / TOKENIZER_NAME
    if not file.is_file():
        # Beside GGUF files, which have the vocabulary themselves, there is no other file of it.
        return len(read_sentencepiece(model).pieces) if layout == "gguf" and model.is_file() else None
    try:
        return len(read_json(file)["model"]["vocab"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(
            f"{file}: expected a tokenizer with `model.vocab`, found {type(error).__name__}: {error}.",
            next_step="Write it again with `grok1 tokenizer TOKENIZER.MODEL FOLDER`.",
        ) from error

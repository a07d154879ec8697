"""The headers of GGUF files: the metadata that llama.cpp's own converter writes, and where each tensor lies.

Keys and tensor descriptions are laid out and written by the gguf package. The tensors themselves are streamed to the
offsets that follow from it (`streaming`), so no more than a block of one is in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grok1.conversion.names import KINDS, HubTensor
from grok1.conversion.shards import Shard
from grok1.conversion.tokenizer import BYTE, CONTROL, NORMAL, SPECIAL_IDS, UNKNOWN, UNUSED, read_sentencepiece
from grok1.errors import ConversionError
from grok1.gguf_files import LOSSLESS, SUFFIX, GgufModel, gguf_package, quantization_type
from modeling_grok1.configuration_grok1 import GrokConfig


ARCHITECTURE = "grok"
BASENAME = "grok-1"
SOURCE = "https://huggingface.co/xai-org/grok-1"
TEMPLATE_NAME = "chat_template.jinja"
FILE_TYPES = {"float32": "ALL_F32", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
# Rows of the vocabulary that the tokenizer has no piece for.
PADDING_SCORE = -10000.0
# Of the architecture, and the field of the config that each is.
KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.output_scale": "attn_output_multiplier",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "router_logit_softcapping": "router_logit_softcapping",
    "embedding_scale": "embedding_multiplier_scale",
    "logit_scale": "output_multiplier_scale",
}
KEPT_TYPES = (UNKNOWN, CONTROL, UNUSED, BYTE)


def gguf_shards(
    groups: Sequence[Sequence[HubTensor]],
    config: GrokConfig,
    tokenizer: Path | None,
    *,
    is_release: bool,
    round_scales: bool,
) -> list[Shard]:
    """The files of a model: one, or one for each group of tensors under llama.cpp's names of splits.

    Args:
        groups: the tensors of each file, in their order.
        config: of the model.
        tokenizer: tokenizer.model, or None for a file without a vocabulary.
        is_release: whether the model has the sizes of xAI's release.
        round_scales: whether scales that float16 does not hold are rounded.
    """
    gguf = gguf_package()
    tensors = [tensor for group in groups for tensor in group]
    dtype = next(tensor.dtype for tensor in tensors if tensor.parts[0].entry.kind.quantised)
    embedding = next(tensor.dtype for tensor in tensors if tensor.parts[0].entry.kind.name == "embedding")
    description = describe(dtype, embedding, round_scales)
    with tempfile.TemporaryDirectory(prefix="grok1-gguf-") as name:
        path = Path(name) / f"{BASENAME}-{dtype.replace('bfloat16', 'bf16').replace('float32', 'f32')}{SUFFIX}"
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        for number, group in enumerate(groups):
            if number:
                writer.tensors.append({})
            for tensor in group:
                element = np.dtype(np.float32)  # of the shape; the type is the last argument
                writer.add_tensor_info(
                    tensor.name, tensor.shape, element, tensor.nbytes, quantization_type(tensor.dtype)
                )
        add_keys(writer, config, dtype, description, is_release=is_release)
        if tokenizer is not None:
            add_vocabulary(writer, config, tokenizer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        files = writer.format_shard_names(path)
        alignment = writer.data_alignment
        return [_shard(file, group, alignment, description) for file, group in zip(files, groups, strict=True)]


def _shard(file: Path, tensors: Sequence[HubTensor], alignment: int, description: str) -> Shard:
    """A file with its header as the gguf package wrote it; each tensor begins at a multiple of the alignment."""
    pad = gguf_package().GGUFWriter.ggml_pad
    header = file.read_bytes()
    header += bytes(pad(len(header), alignment) - len(header))
    offsets, position = {}, len(header)
    for tensor in tensors:
        offsets[tensor.name] = position
        position += pad(tensor.nbytes, alignment)
    return Shard(file.name, tuple(tensors), header, offsets, position, description)


def describe(dtype: str, embedding: str, round_scales: bool) -> str:
    """What the numbers of a file are, beside those of xAI."""
    if dtype == "q8_0":
        if embedding == "float32" and not round_scales:
            return LOSSLESS
        matrices = "xAI's int8 values" + (", with scales rounded to float16" if round_scales else " and scales")
    elif dtype == "q4_0":
        matrices = "xAI's matrices, quantised to 4 bits"
    else:
        matrices = f"xAI's int8 values times their scales, in {dtype}"
    return f"{matrices}; the embedding is in {embedding}."


def add_keys(writer: Any, config: GrokConfig, dtype: str, description: str, *, is_release: bool) -> None:
    """Adds the metadata, in the order of llama.cpp's converter.

    Args:
        writer: a GGUFWriter that knows the tensors.
        dtype: of the matrices.
        description: of the numbers.
        is_release: see `gguf_shards`.
    """
    gguf = gguf_package()
    _add_general_keys(writer, description, is_release)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base((config.rope_parameters or {}).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping or 0.0)
    writer.add_router_logit_softcapping(config.router_logit_softcapping or 0.0)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_attn_output_scale(config.attn_output_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier_scale)
    writer.add_logit_scale(config.output_multiplier_scale)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_general_keys(writer: Any, description: str, is_release: bool) -> None:
    gguf = gguf_package()
    label = gguf.size_label(*writer.get_total_parameter_count())
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("Grok-1" if is_release else f"Grok-1's architecture, {label}")
    writer.add_basename(BASENAME)
    writer.add_description(description)
    writer.add_size_label(label)
    writer.add_license("apache-2.0")
    if is_release:
        writer.add_organization("xAI")
        writer.add_source_url("https://github.com/xai-org/grok-1")
        writer.add_source_repo_url(SOURCE)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, "Grok-1")
        writer.add_base_model_organization(0, "xAI")
        writer.add_base_model_repo_url(0, SOURCE)
    writer.add_languages(["en"])
    writer.add_tags(["grok-1", "mixture-of-experts", "moe", "base-model", "text-generation"])


def config_of_keys(model: GgufModel) -> GrokConfig:
    """The config of a model that has none beside it, from its metadata.

    The multipliers are float32 there: the nearest ones of the released model are taken as its own.

    Raises:
        ConversionError: the model is not a Grok-1, or keys are missing.
    """
    keys, released = model.keys, GrokConfig()
    architecture = keys.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ConversionError(
            f"{model.files[0]}: expected general.architecture {ARCHITECTURE}, found {architecture!r}"
        )
    missing = [f"{ARCHITECTURE}.{key}: expected, found none" for key in KEYS if f"{ARCHITECTURE}.{key}" not in keys]
    embedding = model.tensors.get(KINDS["embedding"].gguf)
    if missing or embedding is None:
        missing += [] if embedding else [f"{KINDS['embedding'].gguf}: expected, found no such tensor"]
        raise ConversionError(f"{model.files[0]}: not the metadata of a Grok-1", missing)
    values: dict[str, Any] = {"vocab_size": embedding.shape[0]}
    for key, field in KEYS.items():
        value = keys[f"{ARCHITECTURE}.{key}"]
        own = getattr(released, field)
        values[field] = own if isinstance(own, float) and np.float32(own) == np.float32(value) else value
    rope = {"rope_type": "default", "rope_theta": keys.get(f"{ARCHITECTURE}.rope.freq_base", 10000.0)}
    return GrokConfig(**values, rope_parameters=rope)


def add_vocabulary(writer: Any, config: GrokConfig, tokenizer: Path) -> None:
    """Adds the pieces of a tokenizer.model, with rows of no piece up to the model's vocabulary.

    User-defined pieces are normal ones, as llama.cpp's converter writes them: declared user-defined, llama.cpp would
    put a space after each of them.
    """
    model = read_sentencepiece(tokenizer)
    pieces = model.pieces[: config.vocab_size]
    missing = range(len(pieces), config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.text.encode() for piece in pieces] + [f"[PAD{i}]".encode() for i in missing])
    writer.add_token_scores([piece.score for piece in pieces] + [PADDING_SCORE for _ in missing])
    types = [piece.type if piece.type in KEPT_TYPES else NORMAL for piece in pieces]
    writer.add_token_types(types + [UNUSED for _ in missing])
    writer.add_bos_token_id(SPECIAL_IDS["bos_token"])
    writer.add_eos_token_id(SPECIAL_IDS["eos_token"])
    writer.add_unk_token_id(SPECIAL_IDS["unk_token"])
    writer.add_pad_token_id(SPECIAL_IDS["pad_token"])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(model.add_dummy_prefix)
    template = tokenizer.with_name(TEMPLATE_NAME)
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))

"""What a conversion is asked to do, in one object."""

from __future__ import annotations

import os
from dataclasses import dataclass

from grok1.conversion.names import BITS, DTYPES, LAYOUTS
from grok1.files import BLOCK_SIZE
from modeling_grok1.packing_grok1 import GROUP_SIZES
from modeling_grok1.sizes_grok1 import parse_size


EMBEDDINGS = ("float32", "bfloat16", "q8_0")  # in GGUF


@dataclass(frozen=True)
class Settings:
    """The settings of a conversion. They are checked by `problems`, so that all problems are reported together.

    Args:
        dtype: "bfloat16", "float32", "int8" (keeps xAI's values and scales) or "int4". Norms and routers are float32
            always.
        layout: "hub" (one tensor per expert), "fused" (one per expert matrix of a layer), "hpcai" or "keyfan" write
            safetensors; "gguf" writes what llama.cpp reads, int8 as q8_0 and int4 as q4_0.
        config: a config.json; by default the one in the source or its parent, or the release's if the sizes fit.
        tokenizer: a tokenizer.model; by default the one in the source or its parent.
        no_tokenizer: convert without a tokenizer.
        max_shard_size: bytes of tensors in a shard, or "5GB", "4GiB"; a larger tensor has a shard of its own. By
            default 5 GB, and 50 GB with "gguf".
        group_size: inputs per scale of int8 and int4, by default 128; engines have kernels for 128, 64 and 32. The
            blocks of "gguf" have 32.
        embedding: with "gguf": the dtype of the embedding, "float32", "bfloat16" or "q8_0"; by default that of the
            matrices, and "float32" with int8 and int4.
        round_scales: with "gguf": round scales that float16 does not hold. By default they are refused.
        discard_source: delete a file fetched from the hub when no unfinished shard needs it; folders are kept.
        scratch: bound on the disk space of fetched files with `discard_source`.
        push_to: a repository on the hub that receives each finished shard, and index and card last.
        private: whether that repository is created as a private one.
        discard_output: delete each local shard when the hub has it.
    """

    dtype: str = "bfloat16"
    layout: str = "hub"
    config: str | os.PathLike[str] | None = None
    tokenizer: str | os.PathLike[str] | None = None
    no_tokenizer: bool = False
    max_shard_size: int | str | None = None
    group_size: int | None = None
    embedding: str | None = None
    round_scales: bool = False
    discard_source: bool = False
    scratch: int | str = "16GB"
    push_to: str | None = None
    private: bool = False
    discard_output: bool = False

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes, or its default. Raises ValueError."""
        default = "50GB" if self.layout == "gguf" else "5GB"
        return parse_size(default if self.max_shard_size is None else self.max_shard_size, "max_shard_size")

    @property
    def inputs_per_scale(self) -> int:
        """`group_size`, or its default."""
        return self.group_size or (BLOCK_SIZE if self.layout == "gguf" else GROUP_SIZES[0])

    @property
    def scratch_bytes(self) -> int:
        """`scratch` in bytes. Raises ValueError."""
        return parse_size(self.scratch, "scratch")

    def problems(self) -> list[str]:
        """What is wrong with the settings, one line per problem."""
        problems = []
        if self.dtype not in DTYPES:
            problems.append(f"dtype: expected one of {', '.join(DTYPES)}, found {self.dtype!r}")
        if self.layout not in LAYOUTS:
            problems.append(f"layout: expected one of {', '.join(LAYOUTS)}, found {self.layout!r}")
        if self.dtype in BITS and self.layout not in ("hub", "gguf"):
            problems.append(
                f"layout: expected hub or gguf with dtype {self.dtype} (no engine reads another), found "
                f"{self.layout!r}"
            )
        problems += self._gguf_problems()
        if self.group_size is not None and self.dtype not in BITS:
            problems.append(f"group_size: expected with dtype {' or '.join(BITS)} only, found with {self.dtype}")
        if self.group_size is not None and self.group_size < 1:
            problems.append(f"group_size: expected a positive number, found {self.group_size}")
        for option in ("max_shard_bytes", "scratch_bytes"):
            try:
                getattr(self, option)
            except ValueError as error:
                problems.append(str(error))
        if self.discard_output and self.push_to is None:
            problems.append("discard_output: expected a repository to push to (push_to), found none")
        if self.no_tokenizer and self.tokenizer is not None:
            problems.append("tokenizer: expected a file or no_tokenizer, found both")
        return problems

    def _gguf_problems(self) -> list[str]:
        if self.layout != "gguf":
            given = {"embedding": self.embedding is not None, "round_scales": self.round_scales}
            return [
                f"{name}: expected with layout gguf only, found with {self.layout}" for name in given if given[name]
            ]
        problems = []
        if self.group_size not in (None, BLOCK_SIZE):
            problems.append(f"group_size: expected {BLOCK_SIZE}, as the blocks of GGUF have, found {self.group_size}")
        if self.embedding not in (None, *EMBEDDINGS):
            problems.append(f"embedding: expected one of {', '.join(EMBEDDINGS)}, found {self.embedding!r}")
        return problems

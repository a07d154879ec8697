# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
Experts that stay in host memory or on disk, and come to the device when the router has chosen them.

The checkpoint's own safetensors files are read in place, one matrix at a time: a token needs k of the E experts of a
layer, so k/E of the bytes. Threads read ahead while the device computes, and a cache keeps the experts used last.
"""

import json
import os
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.modeling_utils import LoadStateDictConfig

from .configuration_grok1 import GrokConfig
from .quantization_grok1 import QUANT_METHOD, Grok1Int8Quantizer, grouped_matmul
from .sizes_grok1 import parse_size


CPU, DISK = "cpu", "disk"

EXPERT_TENSOR = re.compile(r"layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.(\w+)$")
# https://github.com/huggingface/safetensors#format
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}
READ_SIZE = 2**24

Expert = dict[str, torch.Tensor]  # "w1.weight" and so on; what one expert needs to compute


class StoredTensor(NamedTuple):
    """Where the bytes of one tensor lie. `changed_ns` is the file's time of change when it was looked at."""

    file: str
    name: str
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    changed_ns: int


def stored_tensors(file: str) -> Iterator[StoredTensor]:
    """The tensors of a safetensors file, from its header alone."""
    with open(file, "rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_size))
        changed_ns = os.fstat(stream.fileno()).st_mtime_ns
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in DTYPES:
            continue
        start, end = (8 + header_size + offset for offset in entry["data_offsets"])
        yield StoredTensor(file, name, start, end - start, DTYPES[entry["dtype"]], tuple(entry["shape"]), changed_ns)


def read_tensor(stored: StoredTensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """Read one tensor into host memory, into `buffer` (uint8, of its bytes) where one is given.

    Not through `safetensors.safe_open`, which holds the interpreter's lock while it reads, nor through a memory map,
    where a file that was cut short kills the process instead of raising.

    Raises:
        OSError: the file is gone, was cut short or was replaced since the model was loaded.
    """
    data = torch.empty(stored.nbytes, dtype=torch.uint8) if buffer is None else buffer
    view = memoryview(data.numpy())  # type: ignore[arg-type]
    try:
        with open(stored.file, "rb", buffering=0) as stream:
            if os.fstat(stream.fileno()).st_mtime_ns != stored.changed_ns:
                raise OSError("the file was replaced since the model was loaded")
            if hasattr(os, "posix_fadvise"):
                # Otherwise the system reads on behind the tensor, into experts that nobody chose.
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            stream.seek(stored.start)
            done = 0
            while done < stored.nbytes:
                count = stream.readinto(view[done : done + READ_SIZE])
                if not count:
                    raise OSError(f"the file ends after {done} of the tensor's {stored.nbytes} bytes")
                done += count
    except OSError as error:
        raise OSError(
            f"Cannot read the expert weights {stored.name!r} from {stored.file}: {error}. The experts are read from "
            "the checkpoint while the model runs: put the file back and load the model again."
        ) from error
    return data.view(stored.dtype).view(stored.shape)


class ExpertStore:
    """
    The experts of a checkpoint, outside the device. Safe to use from several threads.

    Args:
        experts: (layer, expert) -> name within the expert (`"w1.weight"`) -> where it lies on disk.
        place (`"cpu"` or `"disk"`): `"cpu"` reads everything into host memory now.
        cache_bytes (`int`): how many bytes of recently used experts may stay on the device. The budget is dealt out
            over the layers, an expert at a time, each layer keeping its own most recent ones: a decoder visits its
            layers in a cycle, and a cache of all layers together would drop every expert shortly before its next use.
        read_ahead (`int`): experts to read ahead of the one that computes.

    Attributes:
        bytes_fetched (`int`): bytes that left the store: read from disk, or from host memory.
        hits, misses (`int`): experts found in the cache, and fetched.
        cached_bytes (`int`): what the cache holds now.
    """

    def __init__(
        self,
        experts: dict[tuple[int, int], dict[str, StoredTensor]],
        place: str,
        cache_bytes: int = 0,
        read_ahead: int = 2,
    ):
        self.experts = experts
        self.place = place
        self.cache_bytes = cache_bytes
        self.read_ahead = read_ahead
        self.layers = sorted({layer for layer, _ in experts})
        self.bytes_fetched = self.hits = self.misses = self.cached_bytes = 0
        self.cache: dict[int, OrderedDict[int, Expert]] = {layer: OrderedDict() for layer in self.layers}
        self.lock = threading.Lock()
        # Host memory that was read into and copied to the device from. Fresh memory costs more than reading: the
        # kernel clears it page by page.
        self.staging: dict[int, list[torch.Tensor]] = {}
        matrices = max(len(tensors) for tensors in experts.values())
        self.pool = ThreadPoolExecutor(max_workers=read_ahead * matrices, thread_name_prefix="grok1-experts")
        self.in_memory: dict[StoredTensor, torch.Tensor] = {}
        if place == CPU:
            stored = [tensor for tensors in experts.values() for tensor in tensors.values()]
            self.in_memory = dict(zip(stored, self.pool.map(read_tensor, stored), strict=True))

    @classmethod
    def open(
        cls,
        config: GrokConfig,
        files: list[str] | None,
        load_config: LoadStateDictConfig,
        place: str,
        cache_bytes: int,
    ) -> "ExpertStore":
        """The experts of the checkpoint that `from_pretrained` has found, whatever repository's names it uses.

        Raises:
            ValueError: the checkpoint has no safetensors files, or not every matrix of every expert is in them.
        """
        if not files or not files[0].endswith(".safetensors"):
            raise ValueError("`experts_on` reads the experts from safetensors files, and this checkpoint has none.")
        blocks = None
        if isinstance(load_config.hf_quantizer, Grok1Int8Quantizer):
            if not load_config.hf_quantizer.pre_quantized:
                raise ValueError(
                    "`experts_on` reads the experts as the checkpoint stores them and does not quantise them: write "
                    "an int8 folder with `grok1 convert`, or leave `quantization_config` out."
                )
            blocks = load_config.hf_quantizer.quantization_config.scale_blocks
        renamings = [entry for entry in load_config.weight_mapping or [] if isinstance(entry, WeightRenaming)]
        experts = find_experts(config, files, lambda name: apply_renamings(name, renamings), blocks)
        return cls(experts, place, cache_bytes, read_ahead=config.num_experts_per_tok)

    def read(self, stored: StoredTensor, stage: bool) -> torch.Tensor:
        """One tensor in host memory, in a buffer of `staging` if `stage`. All that is computed with passes here."""
        buffer = None
        with self.lock:
            self.bytes_fetched += stored.nbytes
            if stage and self.staging.get(stored.nbytes):
                buffer = self.staging[stored.nbytes].pop()
        if stage and buffer is None:
            buffer = torch.empty(stored.nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        if self.place == DISK:
            return read_tensor(stored, buffer)
        tensor = self.in_memory[stored]
        return tensor if buffer is None else buffer.view(stored.dtype).view(stored.shape).copy_(tensor)

    def fetch(
        self, layer: int, experts: Iterable[int], device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[int, Expert]]:
        """Yield (expert, its tensors on `device`, the matrices in `dtype`), in the given order, reading ahead."""
        todo, stage = iter(experts), device.type != "cpu"
        requested: deque[tuple[int, Expert | None, dict[str, Future]]] = deque()

        def request_next() -> None:
            expert = next(todo, None)
            if expert is None:
                return
            cached = self.look_up(layer, expert, device, dtype)
            reads = {}
            if cached is None:
                stored = self.experts[layer, expert]
                reads = {name: self.pool.submit(self.read, at, stage) for name, at in stored.items()}
            requested.append((expert, cached, reads))

        for _ in range(self.read_ahead):
            request_next()
        while requested:
            expert, tensors, reads = requested.popleft()
            if tensors is None:
                # The copy to the device is this thread's, so that it is ordered with the computation on its stream.
                host = {name: read.result() for name, read in reads.items()}
                tensors = {
                    name: tensor.to(device=device, dtype=dtype if is_cast(name, tensor) else tensor.dtype)
                    for name, tensor in host.items()
                }
                if stage:
                    with self.lock:
                        for tensor in host.values():
                            buffer = tensor.view(-1).view(torch.uint8)
                            self.staging.setdefault(buffer.nbytes, []).append(buffer)
                self.keep(layer, expert, tensors)
            request_next()
            yield expert, tensors

    def look_up(self, layer: int, expert: int, device: torch.device, dtype: torch.dtype) -> Expert | None:
        with self.lock:
            tensors = self.cache[layer].get(expert)
            usable = tensors is not None and all(
                tensor.device == device and (tensor.dtype == dtype or not is_cast(name, tensor))
                for name, tensor in tensors.items()
            )
            if not usable:
                self.misses += 1
                return None
            self.hits += 1
            self.cache[layer].move_to_end(expert)
            return tensors

    def keep(self, layer: int, expert: int, tensors: Expert) -> None:
        nbytes = size_of(tensors)
        slots, layers_with_one_more = divmod(self.cache_bytes // nbytes, len(self.layers))
        if self.layers.index(layer) < layers_with_one_more:
            slots += 1
        with self.lock:
            recent = self.cache[layer]
            self.cached_bytes -= size_of(recent.pop(expert, {}))
            while recent and len(recent) >= slots:
                self.cached_bytes -= size_of(recent.popitem(last=False)[1])
            if slots:
                recent[expert] = tensors
                self.cached_bytes += nbytes


def is_cast(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor takes the dtype of the computation: int8 weights and their scales keep their own."""
    return tensor.is_floating_point() and name.endswith(".weight")


def size_of(tensors: Expert) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def find_experts(
    config: GrokConfig, files: Iterable[str], rename: Callable[[str], str], blocks: int | None = None
) -> dict[tuple[int, int], dict[str, StoredTensor]]:
    """
    Where every matrix of every expert lies.

    Args:
        files: paths of safetensors files.
        rename: from the name of a tensor in the files to its name in the model.
        blocks: scale blocks of a row of `w2` where the experts are int8.

    Raises:
        ValueError: the files do not hold each matrix by itself, or not all of them, or not in the config's shapes; all
            such tensors in one message.
    """
    found: dict[tuple[int, int], dict[str, StoredTensor]] = {}
    for file in files:
        for stored in stored_tensors(file):
            match = EXPERT_TENSOR.search(rename(stored.name))
            if match is not None:
                found.setdefault((int(match[1]), int(match[2])), {})[f"{match[3]}.{match[4]}"] = stored

    D, F_ = config.hidden_size, config.intermediate_size  # noqa: N806
    shapes: dict[str, tuple[int, ...]] = {"w1.weight": (F_, D), "w3.weight": (F_, D), "w2.weight": (D, F_)}
    if blocks is not None:
        shapes |= {"w1.weight_scale": (F_, 1), "w3.weight_scale": (F_, 1), "w2.weight_scale": (D, blocks)}
    problems = []
    for layer in range(config.num_hidden_layers):
        for expert in range(config.num_experts):
            tensors = found.get((layer, expert), {})
            for name, shape in shapes.items():
                at = f"layer {layer}, expert {expert}, {name}"
                if name not in tensors:
                    problems.append(f"{at}: missing")
                elif tensors[name].shape != shape:
                    problems.append(f"{at}: expected the shape {shape}, found {tensors[name].shape}")
                elif (tensors[name].dtype == torch.int8) != (blocks is not None and name.endswith("weight")):
                    problems.append(f"{at}: unexpected dtype {tensors[name].dtype}")
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(
            "`experts_on` reads each matrix of each expert from the checkpoint's safetensors files, which do not hold "
            f"them so: {shown}. Load without `experts_on`, or write the folder with `grok1 convert`."
        )
    return {key: tensors for key, tensors in found.items() if key[0] < config.num_hidden_layers}


def multiply(x: torch.Tensor, expert: Expert, matrix: str) -> torch.Tensor:
    """x times the transpose of a matrix of the expert, which is int8 if it has scales."""
    weight, scale = expert[f"{matrix}.weight"], expert.get(f"{matrix}.weight_scale")
    if scale is None:
        return F.linear(x, weight)
    return grouped_matmul(x, weight[None], scale[None], torch.tensor([x.shape[0]], dtype=torch.int32, device=x.device))


class Grok1OffloadedExperts(nn.Module):
    """The experts of a layer, in an `ExpertStore` that `from_pretrained` sets. The module itself has no parameters."""

    def __init__(self, config: GrokConfig):
        super().__init__()
        self.act_fn = ACT2FN[config.hidden_act]
        self.layer_idx: int | None = None
        self.store: ExpertStore | None = None

    @torch.compiler.disable
    def forward(self, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """sum over the chosen e of gates[e] * down_e(gelu(gate_e(x)) * up_e(x)); x: N D, experts and gates: N k."""
        if self.store is None or self.layer_idx is None:
            raise ValueError("`experts_on` reads the experts of a checkpoint: load the model with `from_pretrained`.")
        output = torch.zeros_like(x)
        chosen = experts.unique().tolist()
        for e, tensors in self.store.fetch(self.layer_idx, chosen, x.device, x.dtype):
            token, slot = torch.where(experts == e)
            rows = x[token]
            y = multiply(self.act_fn(multiply(rows, tensors, "w1")) * multiply(rows, tensors, "w3"), tensors, "w2")
            output.index_add_(0, token, (y * gates[token, slot, None]).to(output.dtype))
        return output


def check_offloading(
    config: GrokConfig, experts_layout: str | None, experts_on: str | None, expert_cache: int | str | None
) -> int:
    """The bytes that `expert_cache` means. Raises ValueError for options that do not go together, all in one."""
    problems = []
    if experts_on not in (None, CPU, DISK):
        problems.append(f"`experts_on`: expected {CPU!r} or {DISK!r}, found {experts_on!r}")
    if experts_on is None and expert_cache is not None:
        problems.append("`expert_cache` keeps experts of `experts_on='cpu'` or `'disk'` on the device: give both")
    if experts_on is not None:
        quantization = getattr(config, "quantization_config", None)
        if isinstance(quantization, dict):
            method = quantization.get("quant_method")
        else:
            method = getattr(quantization, "quant_method", None)
        if method not in (None, QUANT_METHOD):
            problems.append(
                "`experts_on` reads the experts as the checkpoint stores them, which quantisation by "
                f"{str(getattr(method, 'value', method))!r} does not: leave out one of the two"
            )
        if experts_layout == "fused":
            problems.append("`experts_on` reads experts one matrix at a time: leave `experts_layout='fused'` out")
        if getattr(config, "distributed_config", None) is not None:
            problems.append("`experts_on` is for one process: leave `distributed_config` out")
    if problems:
        raise ValueError("; ".join(problems) + ".")
    return 0 if expert_cache in (None, 0) else parse_size(expert_cache)

# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
Experts in host memory or on disk, copied to the device when the router has chosen them.

The checkpoint's own safetensors files are read in place, one matrix at a time: a token needs k of the E experts of a
layer, so k/E of the bytes. Threads read ahead while the device computes, and a cache keeps the most recently used
experts on the device.
"""

import json
import os
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.modeling_utils import LoadStateDictConfig

from .configuration_grok1 import GrokConfig
from .experts_grok1 import geglu, routed_sum
from .packing_grok1 import unpack
from .quantization_grok1 import INT4, INT8, Grok1Quantizer, quantization_method
from .quantized_grok1 import form_for_device, quantised_matmul
from .shapes_grok1 import Shapes
from .sizes_grok1 import parse_size


CPU, DISK = "cpu", "disk"

EXPERT_TENSOR = re.compile(r"layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.(\w+)$")
# https://github.com/huggingface/safetensors#format
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}
READ_SIZE = 2**24

Expert = dict[str, torch.Tensor]  # the tensors of one expert by their names within it, such as "w1.weight"


class TensorLocation(NamedTuple):
    """Where the bytes of a tensor are on disk. `changed_ns` is the file's modification time when it was opened."""

    file: str
    name: str
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    changed_ns: int


def tensor_locations(file: str) -> Iterator[TensorLocation]:
    """The tensors of a safetensors file, from its header alone."""
    with open(file, "rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_size))
        changed_ns = os.fstat(stream.fileno()).st_mtime_ns
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in DTYPES:
            continue
        start, end = (8 + header_size + offset for offset in entry["data_offsets"])
        yield TensorLocation(file, name, start, end - start, DTYPES[entry["dtype"]], tuple(entry["shape"]), changed_ns)


def read_tensor(at: TensorLocation, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """
    Read one tensor into host memory, into `buffer` (uint8, of its size in bytes) where one is given.

    `safetensors.safe_open` holds the interpreter lock while it reads, and reading a memory map of a file that was
    truncated kills the process instead of raising.

    Raises:
        OSError: the file was removed, truncated or replaced since the model was loaded.
    """
    data = torch.empty(at.nbytes, dtype=torch.uint8) if buffer is None else buffer
    view = memoryview(data.numpy())  # type: ignore[arg-type]
    try:
        with open(at.file, "rb", buffering=0) as stream:
            if os.fstat(stream.fileno()).st_mtime_ns != at.changed_ns:
                raise OSError("the file was replaced since the model was loaded")
            if hasattr(os, "posix_fadvise"):
                # Otherwise the system reads ahead beyond the tensor, into experts that were not chosen.
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            stream.seek(at.start)
            done = 0
            while done < at.nbytes:
                count = stream.readinto(view[done : done + READ_SIZE])
                if not count:
                    raise OSError(f"the file ends after {done} of the tensor's {at.nbytes} bytes")
                done += count
    except OSError as error:
        raise OSError(
            f"Cannot read the expert weights {at.name!r} from {at.file}: {error}. The experts are read from "
            "the checkpoint while the model runs: put the file back and load the model again."
        ) from error
    return data.view(at.dtype).view(at.shape)


class ExpertStore:
    """
    The experts of a checkpoint, in host memory or on disk. Safe to use from several threads.

    Pickling and deep-copying give a store of the same files with an empty cache: host memory is read again.

    Args:
        experts: (layer, expert) -> name within the expert (`"w1.weight"`) -> its location on disk.
        place (`"cpu"` or `"disk"`): `"cpu"` reads everything into host memory now.
        cache_bytes (`int`): bytes of recently used experts that may stay on the device. They are divided among the
            layers in whole experts, and each layer keeps its own most recent ones: a decoder runs its layers in a
            cycle, and one cache for all layers would evict every expert shortly before its next use.
        read_ahead (`int`): experts to read while one is computed.
        bits (`int`, *optional*): bits of packed weights (packing_grok1.py); None where they are floats.

    Attributes:
        bytes_fetched (`int`): bytes read from disk or from host memory.
        hits, misses (`int`): experts found in the cache, and fetched.
        cached_bytes (`int`): size of the cache now.
    """

    def __init__(
        self,
        experts: dict[tuple[int, int], dict[str, TensorLocation]],
        place: str,
        cache_bytes: int = 0,
        read_ahead: int = 2,
        bits: int | None = None,
    ):
        self.experts = experts
        self.place = place
        self.cache_bytes = cache_bytes
        self.read_ahead = read_ahead
        self.bits = bits
        self.layers = sorted({layer for layer, _ in experts})
        self.start()

    def start(self) -> None:
        """Everything that is not an argument: counters, an empty cache, threads, and the experts in host memory."""
        self.bytes_fetched = self.hits = self.misses = self.cached_bytes = 0
        self.cache: dict[int, OrderedDict[int, Expert]] = {layer: OrderedDict() for layer in self.layers}
        self.lock = threading.Lock()
        # Buffers in host memory, by their size: the copy to the device is made from them. Allocating new memory for
        # each read costs more than reading, because the kernel clears it page by page.
        self.staging: dict[int, list[torch.Tensor]] = {}
        matrices = max(len(tensors) for tensors in self.experts.values())
        self.pool = ThreadPoolExecutor(max_workers=self.read_ahead * matrices, thread_name_prefix="grok1-experts")
        self.in_memory: dict[TensorLocation, torch.Tensor] = {}
        if self.place == CPU:
            locations = [at for tensors in self.experts.values() for at in tensors.values()]
            self.in_memory = dict(zip(locations, self.pool.map(read_tensor, locations), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in ("experts", "place", "cache_bytes", "read_ahead", "bits", "layers")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.start()

    @classmethod
    def open(
        cls,
        config: GrokConfig,
        files: list[str] | None,
        load_config: LoadStateDictConfig,
        place: str,
        cache_bytes: int,
    ) -> "ExpertStore":
        """The experts in the files that `from_pretrained` loads, under the names of any repository that it reads.

        Raises:
            ValueError: the checkpoint has no safetensors files, or not every matrix of every expert is in them.
        """
        if not files or not files[0].endswith(".safetensors"):
            raise ValueError("`experts_on` reads the experts from safetensors files, and this checkpoint has none.")
        form = None
        quantizer = load_config.hf_quantizer
        if isinstance(quantizer, Grok1Quantizer):
            form = quantizer.quantization_config.source
            if form is None or form[0] != quantizer.quantization_config.bits:
                raise ValueError(
                    "`experts_on` reads the experts as the checkpoint stores them and does not quantise them: write "
                    "an int8 or int4 folder with `grok1 convert`, or leave `quantization_config` out."
                )
        renamings = [entry for entry in load_config.weight_mapping or [] if isinstance(entry, WeightRenaming)]
        experts = find_experts(config, files, lambda name: apply_renamings(name, renamings), form)
        return cls(experts, place, cache_bytes, config.num_experts_per_tok, form[0] if form else None)

    def read(self, at: TensorLocation, stage: bool) -> torch.Tensor:
        """One tensor in host memory, in a buffer of `staging` if `stage`. Every access to the experts is made here."""
        buffer = None
        with self.lock:
            self.bytes_fetched += at.nbytes
            if stage and self.staging.get(at.nbytes):
                buffer = self.staging[at.nbytes].pop()
        if stage and buffer is None:
            buffer = torch.empty(at.nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        if self.place == DISK:
            return read_tensor(at, buffer)
        tensor = self.in_memory[at]
        return tensor if buffer is None else buffer.view(at.dtype).view(at.shape).copy_(tensor)

    def fetch(
        self, layer: int, experts: Iterable[int], device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[int, Expert]]:
        """Yield (expert, its tensors on `device`, floating matrices in `dtype`) in the given order, reading ahead."""
        todo, stage = iter(experts), device.type != "cpu"
        requested: deque[tuple[int, Expert | None, dict[str, Future]]] = deque()

        def request_next() -> None:
            expert = next(todo, None)
            if expert is None:
                return
            cached = self.look_up(layer, expert, device, dtype)
            reads = {}
            if cached is None:
                locations = self.experts[layer, expert]
                reads = {name: self.pool.submit(self.read, at, stage) for name, at in locations.items()}
            requested.append((expert, cached, reads))

        for _ in range(self.read_ahead):
            request_next()
        while requested:
            expert, tensors, reads = requested.popleft()
            if tensors is None:
                # Copied to the device by this thread, so that the copy is ordered with the computation on its stream.
                host = {name: read.result() for name, read in reads.items()}
                tensors = {
                    name: tensor.to(device=device, dtype=dtype if is_cast(name, tensor) else tensor.dtype)
                    for name, tensor in host.items()
                }
                if stage:
                    self.give_back(host.values())
                if self.bits is not None:
                    shared = self.place == CPU and not stage  # the tensors of `in_memory` themselves
                    tensors = unpacked(tensors, self.bits, in_place=not shared)
                self.keep(layer, expert, tensors)
            request_next()
            yield expert, tensors

    def give_back(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let the next reads use the buffers of these tensors."""
        with self.lock:
            for tensor in tensors:
                buffer = tensor.view(-1).view(torch.uint8)
                self.staging.setdefault(buffer.nbytes, []).append(buffer)

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


def unpacked(tensors: Expert, bits: int, in_place: bool) -> Expert:
    """
    The weights and scales of an expert in the form that products on their device read, from packed ones. `in_place`
    writes int8 where the packed values are.
    """
    output: Expert = {}
    for matrix in ("w1", "w2", "w3"):
        packed, scale = tensors[f"{matrix}.weight_packed"], tensors[f"{matrix}.weight_scale"]
        if bits == 8:
            packed = unpack(packed, 8, out=packed.view(torch.int8) if in_place else None)
        weight, scale = form_for_device(packed, scale)
        output |= {f"{matrix}.weight": weight, f"{matrix}.weight_scale": scale}
    return output


def is_cast(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is cast to the dtype of the computation; scales are not."""
    return tensor.is_floating_point() and name.endswith(".weight")


def size_of(tensors: Expert) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def find_experts(
    config: GrokConfig, files: Iterable[str], rename: Callable[[str], str], form: tuple[int, int] | None = None
) -> dict[tuple[int, int], dict[str, TensorLocation]]:
    """
    The location of every matrix of every expert.

    Args:
        files: paths of safetensors files.
        rename: from the name of a tensor in the files to its name in the model.
        form: the bits and the group size of packed experts; None where they are floats.

    Raises:
        ValueError: the files do not hold one tensor per matrix, or not all of them, or not in the config's shapes; all
            such tensors in one message.
    """
    found: dict[tuple[int, int], dict[str, TensorLocation]] = {}
    for file in files:
        for location in tensor_locations(file):
            match = EXPERT_TENSOR.search(rename(location.name))
            if match is not None:
                found.setdefault((int(match[1]), int(match[2])), {})[f"{match[3]}.{match[4]}"] = location

    D, F_ = config.hidden_size, config.intermediate_size  # noqa: N806
    shapes: dict[str, tuple[int, ...]] = {"w1.weight": (F_, D), "w3.weight": (F_, D), "w2.weight": (D, F_)}
    if form is not None:
        bits, group_size = form
        matrices, shapes = shapes, {}
        for name, (rows, inputs) in matrices.items():
            shapes[f"{name}_packed"] = (rows, inputs * bits // 32)
            shapes[f"{name}_scale"] = (rows, inputs // group_size)
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
                elif (tensors[name].dtype == torch.int32) != name.endswith("_packed"):
                    problems.append(f"{at}: unexpected dtype {tensors[name].dtype}")
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(
            "`experts_on` reads each matrix of each expert from the checkpoint's safetensors files, which do not hold "
            f"them so: {shown}. Load without `experts_on`, or write the folder with `grok1 convert`."
        )
    return {
        key: {name: tensors[name] for name in shapes}
        for key, tensors in found.items()
        if key[0] < config.num_hidden_layers
    }


def multiply(x: torch.Tensor, expert: Expert, matrix: str) -> torch.Tensor:
    """x times the transpose of a matrix of the expert, which is quantised if it has scales."""
    weight, scale = expert[f"{matrix}.weight"], expert.get(f"{matrix}.weight_scale")
    return F.linear(x, weight) if scale is None else quantised_matmul(x, weight, scale)


class Grok1OffloadedExperts(Shapes, nn.Module):
    """The experts of a layer, in an `ExpertStore` that `from_pretrained` sets. The module itself has no parameters."""

    def __init__(self, config: GrokConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.layer_idx: int | None = None
        self.store: ExpertStore | None = None

    @torch.compiler.disable
    def forward(self, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """sum over the chosen e of gates[e] * down_e(geglu(gate_e(x), up_e(x))); x: N D, experts and gates: N k."""
        if self.store is None or self.layer_idx is None:
            raise ValueError("`experts_on` reads the experts of a checkpoint: load the model with `from_pretrained`.")
        # In the order in which `routed_sum` calls them.
        fetched = self.store.fetch(self.layer_idx, experts.unique().tolist(), x.device, x.dtype)

        def expert(e: int, rows: torch.Tensor) -> torch.Tensor:
            index, tensors = next(fetched)
            assert index == e
            y = geglu(multiply(rows, tensors, "w1"), multiply(rows, tensors, "w3"))
            return multiply(y, tensors, "w2")

        return routed_sum(x, experts, gates, expert, self.num_experts)


def check_offloading(
    config: GrokConfig, experts_layout: str | None, experts_on: str | None, expert_cache: int | str | None
) -> int:
    """`expert_cache` in bytes. Raises ValueError with every reason why the options contradict each other."""
    problems = []
    if experts_on not in (None, CPU, DISK):
        problems.append(f"`experts_on`: expected {CPU!r} or {DISK!r}, found {experts_on!r}")
    if experts_on is None and expert_cache is not None:
        problems.append("`expert_cache` keeps experts of `experts_on='cpu'` or `'disk'` on the device: give both")
    if experts_on is not None:
        method = quantization_method(config)
        if method not in (None, INT8, INT4):
            problems.append(
                "`experts_on` reads the experts as the checkpoint stores them, which quantisation by "
                f"{method!r} does not: leave out one of the two"
            )
        if experts_layout == "fused":
            problems.append("`experts_on` reads experts one matrix at a time: leave `experts_layout='fused'` out")
        if getattr(config, "distributed_config", None) is not None:
            problems.append("`experts_on` is for one process: leave `distributed_config` out")
    if problems:
        raise ValueError("; ".join(problems) + ".")
    return 0 if expert_cache in (None, 0) else parse_size(expert_cache)

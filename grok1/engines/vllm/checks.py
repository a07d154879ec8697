"""What vLLM would load or compute wrongly in silence, refused in one sentence."""

from collections.abc import Iterable, Iterator

import torch
from vllm.config import CacheConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.selector import get_attn_backend

from grok1.conversion.names import LAYOUTS, hub_tensors
from modeling_grok1.configuration_grok1 import GrokConfig


# The attention backends of vLLM 0.32 whose kernels apply the soft-cap. HPC, B12X and flex attention refuse it; the
# others take it and drop it.
CAPPED_BACKENDS = (
    *("CPU_ATTN", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"),
    *("ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN", "ROCM_SEGMENTED_ATTN"),
)


def kernel_head_dim(head_dim: int, cache_config: CacheConfig | None) -> int:
    """The smallest head size of the platform's attention backend that holds `head_dim`: itself, but for small heads on
    a CPU.

    Raises:
        ValueError: the backend has no such size.
    """
    backend = get_attn_backend(
        head_dim, torch.get_default_dtype(), cache_config.cache_dtype if cache_config is not None else "auto"
    )
    if backend.supports_head_size(head_dim):
        return head_dim
    sizes = backend.get_supported_head_sizes()
    try:
        return min(size for size in sizes if size > head_dim)
    except ValueError:
        raise ValueError(
            f"Grok-1's heads of {head_dim} do not fit vLLM's attention backend {backend.get_name()}, whose head sizes "
            f"are {sizes}: choose another one with --attention-backend."
        ) from None


def check_soft_cap(attn: Attention) -> None:
    """Raise ValueError for an attention backend that is not known to apply the soft-cap."""
    name = attn.attn_backend.get_name()
    if name not in CAPPED_BACKENDS:
        raise ValueError(
            f"vLLM's attention backend {name} is not known to apply Grok-1's soft-cap of attention scores; without "
            f"it the outputs would be wrong. Choose one of {', '.join(CAPPED_BACKENDS)} with --attention-backend "
            "(and no --kv-cache-dtype that needs another)."
        )


def modules_with_weights(config: GrokConfig, layout: str) -> set[str]:
    """Every module that has weights in a checkpoint, in any format (`weight`, `weight_packed`)."""
    return {name.rpartition(".")[0] for name in hub_tensors(config, layout)}


def checked(
    weights: Iterable[tuple[str, torch.Tensor]], config: GrokConfig, missing: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass the weights on and take their modules out of `missing`. vLLM's loader puts the experts of another layout
    in the wrong place, and does not miss those of a shard that is not there.

    Raises:
        ValueError: a weight of another layout, or weights that are missing at the end.
    """
    modules = {layout: modules_with_weights(config, layout) for layout in LAYOUTS}
    for name, weight in weights:
        module = name.rpartition(".")[0]
        if module not in modules["hub"]:
            layout = next((layout for layout in LAYOUTS if module in modules[layout]), "unknown")
            raise ValueError(
                f"{name} is a weight in the layout {layout!r}; vLLM serves Grok-1 from the layout 'hub', the "
                "default of `grok1 convert`, which `grok1 adopt FOLDER NEW_FOLDER` makes of 'hpcai' and 'keyfan'."
            )
        missing.discard(module)
        yield name, weight
    if missing:
        raise ValueError(
            f"This folder has no weights for {len(missing)} of Grok-1's modules, such as "
            f"{min(missing)}: complete the download, or convert the checkpoint again."
        )

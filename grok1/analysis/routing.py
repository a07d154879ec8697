"""Expert routing of a text: which experts each layer's router selects, and with which probability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    import torch

    from modeling_grok1 import Grok1ForCausalLM

BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class RoutingStatistics:
    """The routers' decisions. L layers, N tokens, E experts, k experts per token.

    Args:
        experts: L N k, integers: the selected experts, highest probability first.
        gates: L N k, float32: their probabilities, which sum to less than 1 (they are not renormalised).
        token_entropy: L N, float32: entropy of the router's distribution over all E experts, in bits; at most log2(E).
        num_experts: E.
    """

    experts: np.ndarray
    gates: np.ndarray
    token_entropy: np.ndarray
    num_experts: int

    @cached_property
    def load(self) -> np.ndarray:
        """L E: the fraction of a layer's assignments that an expert gets; rows sum to 1, 1/E is uniform."""
        counts = [np.bincount(layer.ravel(), minlength=self.num_experts) for layer in self.experts]
        return np.stack(counts) / self.experts[0].size

    @property
    def entropy(self) -> np.ndarray:
        """L: mean entropy of the router over the tokens, in bits."""
        return self.token_entropy.mean(axis=1)

    @property
    def uniform_entropy(self) -> float:
        """log2(E): the entropy of a router that has no preference, in bits."""
        return math.log2(self.num_experts)

    @property
    def gate_mass(self) -> np.ndarray:
        """L: mean total probability of the k selected experts; the rest is dropped."""
        return self.gates.sum(axis=2).mean(axis=1)

    @cached_property
    def top_pairs(self) -> list[tuple[tuple[int, ...], float]]:
        """L: the most frequent set of k experts in a layer, and the fraction of the tokens routed to it."""
        pairs = []
        for layer in np.sort(self.experts, axis=2):
            sets, counts = np.unique(layer, axis=0, return_counts=True)
            pairs.append((tuple(int(e) for e in sets[counts.argmax()]), float(counts.max() / len(layer))))
        return pairs

    def to_dict(self) -> dict[str, Any]:
        """The figures per layer, for JSON."""
        return {
            "layers": len(self.experts),
            "tokens": self.experts.shape[1],
            "load": self.load.tolist(),
            "entropy_bits": self.entropy.tolist(),
            "gate_mass": self.gate_mass.tolist(),
            "top_pairs": [{"experts": list(experts), "share": share} for experts, share in self.top_pairs],
        }

    @classmethod
    def join(cls, parts: Sequence[RoutingStatistics]) -> RoutingStatistics:
        """The statistics of several texts as one, their tokens in order."""
        return cls(
            experts=np.concatenate([part.experts for part in parts], axis=1),
            gates=np.concatenate([part.gates for part in parts], axis=1),
            token_entropy=np.concatenate([part.token_entropy for part in parts], axis=1),
            num_experts=parts[0].num_experts,
        )


def routing_statistics(
    model: Grok1ForCausalLM, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> RoutingStatistics:
    """Run a text through the model and record every router's decisions.

    Args:
        model: either layout of experts, any precision.
        input_ids: B T.
        attention_mask: B T, 0 where a token is padding, which is not counted; None: all tokens count.

    Returns:
        The statistics of the tokens of all rows, in row order.

    Raises:
        ValueError: rows longer than the model's context.
    """
    import torch

    if input_ids.shape[1] > model.config.max_position_embeddings:
        raise ValueError(
            f"`input_ids`: expected at most {model.config.max_position_embeddings} tokens per row, found "
            f"{input_ids.shape[1]}. Split the text into rows."
        )
    with torch.no_grad():
        outputs = model.base_model(
            input_ids, attention_mask=attention_mask, use_cache=False, output_router_logits=True
        )
    real = slice(None) if attention_mask is None else attention_mask.flatten().bool().cpu()
    # A router's logits are flattened over the batch: N E per layer.
    logits = torch.stack([layer.float().cpu()[real] for layer in outputs.router_logits])
    probabilities = logits.softmax(dim=-1)
    gates, experts = probabilities.topk(model.config.num_experts_per_tok, dim=-1)
    entropy = -(probabilities * probabilities.clamp_min(1e-30).log2()).sum(dim=-1)
    return RoutingStatistics(experts.numpy(), gates.numpy(), entropy.numpy(), model.config.num_experts)


def load_bars(statistics: RoutingStatistics) -> str:
    """A bar per layer and expert for a terminal, below the numbers of the experts; the last line is the scale."""
    lines = [f"{'expert':<8} ▕{' '.join(str(e % 10) for e in range(statistics.num_experts))}▏"]
    for layer, load in enumerate(statistics.load):
        heights = np.clip(np.ceil(load * statistics.num_experts / 2 * (len(BLOCKS) - 1)), 0, len(BLOCKS) - 1)
        lines.append(f"layer {layer:>2} ▕{' '.join(BLOCKS[int(height)] for height in heights)}▏")
    uniform = 100 / statistics.num_experts
    lines.append(f"▄ = {uniform:.3g} % of the layer's assignments, the uniform share; █ = {2 * uniform:.3g} % or more")
    return "\n".join(lines)


def readable(piece: str) -> str:
    """The text of a SentencePiece piece; a byte beyond ASCII stays `<0xE2>`."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") and int(piece[3:5], 16) < 128:
        return chr(int(piece[3:5], 16))
    return piece.replace("▁", " ")

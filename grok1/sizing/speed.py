"""Upper bounds on decoding speed: every token reads its weights and the cache once, at the memory's bandwidth."""

from __future__ import annotations

from grok1.sizing.hardware import Gpus
from grok1.sizing.memory import Memory
from grok1.sizing.request import Request


def read_bytes(request: Request, memory: Memory) -> tuple[int, float]:
    """Bytes that one decoding step reads: without the experts (cache included), and of the experts.

    The head is read whole, also where it is tied to the embedding. In a batch a step reads every expert that any of
    its tokens is routed to: E (1 - (1 - k/E)^batch) of E experts where routing is uniform.
    """
    experts, active = request.config.num_experts, request.config.num_experts_per_tok
    head = memory.weights.get("head", memory.weights.get("embedding", 0))
    rest = sum(memory.weights.get(kind, 0) for kind in ("attention", "router", "norms")) + head
    fraction = 1 - (1 - active / experts) ** request.batch
    return rest + memory.kv_bytes(request.context * request.batch), memory.weights["experts"] * fraction


def step_seconds(
    request: Request, parallel: str, memory: Memory, gpus: Gpus, outside: float | None = None, cached: float = 0.0
) -> float | None:
    """The least seconds of one decoding step; None where the cards' bandwidth is unknown.

    Args:
        request: model, batch and context.
        parallel: "one", "tp", "ep", "pp" or "offload".
        memory: of the model in the precision.
        gpus: the cards.
        outside: bytes/s at which experts arrive that are not on the GPU ("offload").
        cached: the fraction of the experts that the GPU keeps; as many reads hit it where routing is uniform.
    """
    if gpus.card is None:
        return None
    rest, experts = read_bytes(request, memory)
    if parallel == "offload":
        assert outside is not None
        return (rest + experts * cached) / gpus.card.bandwidth + experts * (1 - cached) / outside
    if parallel in ("one", "pp"):  # stages work one after the other
        return (rest + experts) / gpus.card.bandwidth
    if parallel == "ep":  # whole experts: at least one of each layer on the busiest GPU
        whole = memory.weights["experts"] / request.config.num_experts
        experts_here = max(experts / gpus.count, whole)
        return (rest / gpus.count + experts_here) / gpus.card.bandwidth
    return (rest + experts) / gpus.count / gpus.card.bandwidth

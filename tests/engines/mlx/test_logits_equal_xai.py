"""The float32 folders give xAI's logits and greedy tokens, and no mistake that other ports made would."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, make_prompt_cache


BOUND = 2e-4  # 7.3e-5 is measured on tiny-8


class PaddedCache(KVCache):
    """xAI masks the keys of padding, here on the right; mlx-lm never pads there."""

    def __init__(self, real: mx.array):
        super().__init__()
        self.real = real

    def make_mask(self, N: int, **options: Any) -> mx.array:  # noqa: N803
        return create_causal_mask(N) & self.real[:, None, None, :]


def error(model: nn.Module, reference: dict[str, np.ndarray]) -> float:
    """The largest difference of a logit from xAI's, at padded positions too."""
    tokens = mx.array(reference["tokens"])
    logits = model(tokens, [PaddedCache(tokens != 0) for _ in model.layers])
    return float(np.abs(np.array(logits.astype(mx.float32)) - reference["logits"]).max())


def test_neither_torch_nor_this_package_is_here() -> None:
    assert importlib.util.find_spec("torch") is None
    assert importlib.util.find_spec("modeling_grok1") is None
    assert importlib.util.find_spec("grok1") is None


@pytest.mark.parametrize("name", ["tiny-1", "tiny-8"])
def test_logits_and_greedy_tokens(
    name: str,
    load: Callable[..., nn.Module],
    folder: Callable[[str], Path],
    reference: Callable[[str], dict[str, np.ndarray]],
) -> None:
    model, expected = load(folder(name)), reference(name)
    assert error(model, expected) < BOUND

    cache, ids = make_prompt_cache(model), mx.array(expected["prompt"])
    for token, logits in zip(expected["greedy"], expected["greedy_logits"], strict=True):
        found = model(ids, cache)[0, -1]
        assert np.abs(np.array(found) - logits).max() < BOUND
        assert mx.argmax(found).item() == token
        ids = mx.array([[int(token)]])


def activation(function: Callable[[mx.array], mx.array]) -> Callable[[nn.Module, dict], None]:
    def change(model: nn.Module, names: dict[str, Any]) -> None:
        names["geglu"] = lambda gate, x: function(gate) * x

    return change


def cap(function: Callable[[mx.array, float], mx.array]) -> Callable[[nn.Module, dict], None]:
    def change(model: nn.Module, names: dict[str, Any]) -> None:
        names["softcap_scores"] = lambda scores, multiplier, cap: function(scores * multiplier, cap)

    return change


def router(function: Callable[[nn.Module, mx.array], mx.array]) -> Callable[[nn.Module, dict], None]:
    def change(model: nn.Module, names: dict[str, Any]) -> None:
        names["Router"].__call__ = function

    return change


def attention(name: str, value: Any) -> Callable[[nn.Module, dict], None]:
    def change(model: nn.Module, names: dict[str, Any]) -> None:
        for layer in model.layers:
            setattr(layer.self_attn, name, value(layer.self_attn) if callable(value) else value)

    return change


def norms(name: str, value: Callable[[nn.Module], Any]) -> Callable[[nn.Module, dict], None]:
    def change(model: nn.Module, names: dict[str, Any]) -> None:
        for module in model.modules():
            if isinstance(module, names["RMSNorm"]):
                setattr(module, name, value(module))

    return change


def renormalised_gates(model: nn.Module, names: dict[str, Any]) -> None:
    def block(self: nn.Module, x: mx.array) -> mx.array:
        logits = self.gate(x)
        chosen = mx.argpartition(-logits, kth=1, axis=-1)[..., :2]
        gates = mx.softmax(mx.take_along_axis(logits, chosen, axis=-1), axis=-1)
        return (self.switch_mlp(x, chosen) * gates[..., None]).sum(axis=-2)

    names["SparseMoeBlock"].__call__ = block


def low_precision_scores(model: nn.Module, names: dict[str, Any]) -> None:
    exact = names["softcap_scores"]
    names["softcap_scores"] = lambda scores, *rest: exact(scores.astype(mx.bfloat16), *rest)


def embedding_multiplier(model: nn.Module, names: dict[str, Any]) -> None:
    model.model.embedding_multiplier_scale = float(mx.array(model.model.embedding_multiplier_scale, mx.bfloat16))


def output_multiplier(model: nn.Module, names: dict[str, Any]) -> None:
    model.args.output_multiplier_scale = 0.578125


def swapped_layers(model: nn.Module, names: dict[str, Any]) -> None:
    model.model.layers[1], model.model.layers[2] = model.model.layers[2], model.model.layers[1]


TRAPS = {
    "erf GELU": activation(nn.gelu),
    "SiLU": activation(nn.silu),
    "no cap": cap(lambda scores, cap: scores),
    "clamp instead of tanh": cap(lambda scores, cap: mx.clip(scores, -cap, cap)),
    "scores in bfloat16": low_precision_scores,
    "attention multiplier of 1/sqrt(128)": attention("attn_output_multiplier", 128**-0.5),
    "rope theta 1e5": attention("rope", lambda attn: nn.RoPE(attn.rope.dims, traditional=False, base=1e5)),
    "interleaved rope": attention("rope", lambda attn: nn.RoPE(attn.rope.dims, traditional=True, base=1e4)),
    "renormalised gates": renormalised_gates,
    "router in bfloat16": router(lambda self, x: x.astype(mx.bfloat16) @ self.weight.astype(mx.bfloat16).T),
    "router soft-cap 30": router(lambda self, x: 30 * mx.tanh(x @ self.weight.T / 30)),
    "norm scale 1 + w": norms("weight", lambda norm: 1 + norm.weight),
    "norm eps 1e-6": norms("eps", lambda norm: 1e-6),
    "embedding multiplier rounded": embedding_multiplier,
    "output multiplier rounded": output_multiplier,
    "layers in another order": swapped_layers,
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_mistake_of_other_ports_is_caught(
    trap: str,
    load: Callable[..., nn.Module],
    folder: Callable[[str], Path],
    reference: Callable[[str], dict[str, np.ndarray]],
) -> None:
    """Each breaks the bound of the test above, on one of the two checkpoints at least."""
    errors = {}
    for name in ("tiny-1", "tiny-8"):
        model = load(folder(name))
        TRAPS[trap](model, type(model).sanitize.__globals__)
        errors[name] = error(model, reference(name))
    print(f"{trap}: {errors}")
    assert max(errors.values()) > BOUND

# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""Grok-1's configuration. The defaults are the released 314B model."""

import math
import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What is done with a config that is read from a file. A model sets it while it loads: `from_pretrained` has no other
# place between reading the config and choosing a quantizer for it.
PREPARE_CONFIG: ContextVar[Callable[[Any], Any]] = ContextVar("prepare_config", default=lambda config: config)

# Where the classes lie in a folder on the hub, for `trust_remote_code=True`.
AUTO_MAP = {
    "AutoConfig": "configuration_grok1.GrokConfig",
    "AutoModel": "modeling_grok1.Grok1Model",
    "AutoModelForCausalLM": "modeling_grok1.Grok1ForCausalLM",
    # Decisions are scored by any causal model's logits; `transformers serve` loads remote code under this name only.
    "AutoModelForDecision": "modeling_grok1.Grok1ForCausalLM",
}

# The same for mlx-lm; other engines ignore the key.
MLX_FILE = "grok1_mlx.py"

# Values that other ports offer and xAI's code does not have: field -> the only value that is implemented, and why.
FIXED = {
    "hidden_act": ("gelu_pytorch_tanh", "jax.nn.gelu is the tanh approximation"),
    "norm_topk_prob": (False, "xAI does not renormalise the gates of the chosen experts"),
    "moe_router_renormalize": (False, "xAI does not renormalise the gates of the chosen experts"),
    "router_logit_softcapping": (0.0, "xAI caps attention logits, never router logits"),
    "residual_moe": (False, "Grok-1 has no dense branch beside its experts"),
    "load_presharded_moe": (False, "the experts of a checkpoint are whole"),
}

# What keyfan/grok-1-hf states wrongly, where its config, like hpcai-tech/grok-1's, names no model type.
MISSTATED = {
    "hidden_act": ("gelu_pytorch_tanh", "jax.nn.gelu is the tanh approximation"),
    "rope_theta": (10000.0, "xAI's rotary base is 10,000"),
}

# Far beyond any model. Tools make lists of a config's weights; a wrong file must not make them endless.
MAX_SIZE = 2**31
MAX_MATRICES = 100_000

# They belong below `rope_parameters`; older files have them at the top level.
ROPE_KEYS = ("rope_theta", "rope_type")


def raises_value_errors(config_class):
    """`@strict` and the rope checks raise other kinds; a user of this package gets a ValueError for every refusal."""

    def translate(method):
        @wraps(method)
        def wrapper(self, *args, **kwargs):
            try:
                return method(self, *args, **kwargs)
            except (StrictDataclassError, KeyError) as error:
                cause = error.__cause__ or error
                prefix = "" if config_class.__name__ in str(cause) else f"{config_class.__name__}: "
                raise ValueError(f"{prefix}{cause}") from error

        return wrapper

    for name in ("__init__", "__setattr__", "validate"):
        setattr(config_class, name, translate(getattr(config_class, name)))
    return config_class


@raises_value_errors
@strict
class GrokConfig(PreTrainedConfig):
    r"""
    Configuration of a Grok-1 model. `GrokConfig()` is the released checkpoint: 314B parameters, 64 layers, 8 experts
    2 of which are active per token.

    Four fields have a second spelling in other engines' configs: `num_local_experts` (`num_experts`), `max_attn_value`
    (`attn_logit_softcapping`), `moe_intermediate_size` (`intermediate_size`) and `logit_scale`
    (`output_multiplier_scale`). Both spellings are read and written; they are one value, and a config that gives the
    two spellings different values is refused.

    Args:
        vocab_size (`int`): V, rows of the embedding and of the tied head.
        hidden_size (`int`): D, width of the residual stream.
        intermediate_size (`int`): F, width of one expert.
        num_hidden_layers (`int`): decoder layers.
        num_attention_heads (`int`): H, query heads.
        num_key_value_heads (`int`): K, key and value heads; query heads `j*H/K .. (j+1)*H/K - 1` share head j.
        head_dim (`int`): width of a head; `hidden_size // num_attention_heads` where it is not given.
        num_experts (`int`): E, experts of a layer.
        num_experts_per_tok (`int`): top_k, active experts per token.
        max_position_embeddings (`int`): longest context in tokens.
        rms_norm_eps (`float`): epsilon inside the square root of every RMSNorm.
        attn_output_multiplier (`float`): factor on the attention scores, 1/sqrt(128) in the release.
        attn_logit_softcapping (`float`): c in `c * tanh(score / c)`, applied before the mask.
        embedding_multiplier_scale (`float`): factor on the embeddings, sqrt(6144) in the release.
        output_multiplier_scale (`float`): factor on the logits, 1/sqrt(3) in the release.
        rope_parameters (`dict`): rotary embedding, `{"rope_type": "default", "rope_theta": 10000.0}` in the release.
        router_aux_loss_coef (`float`): weight of the load-balancing loss, see `output_router_logits`.
        hidden_act, norm_topk_prob, residual_moe: for other engines; only the value of xAI's code is accepted.
        moe_router_renormalize, router_logit_softcapping, load_presharded_moe: likewise.

    Raises:
        ValueError: a value of the wrong type, an unsupported one, or values that contradict each other; the message
            names every such key with what was expected and what was found.
    """

    model_type = "grok-1"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 10000.0
    attribute_map = {
        "num_local_experts": "num_experts",
        "max_attn_value": "attn_logit_softcapping",
        "moe_intermediate_size": "intermediate_size",
        "logit_scale": "output_multiplier_scale",
    }

    # The router is float32 and small: it stays whole on every rank.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.block_sparse_moe.experts.gate_up_proj": "packed_colwise",
        "layers.*.block_sparse_moe.experts.down_proj": "rowwise",
        "layers.*.block_sparse_moe.experts": "moe_tp_experts",
    }
    base_model_ep_plan: ClassVar[dict[str, Any] | None] = {
        "layers.*.block_sparse_moe.experts.gate_up_proj": "grouped_gemm",
        "layers.*.block_sparse_moe.experts.down_proj": "grouped_gemm",
        "layers.*.block_sparse_moe.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    # The final norm is freed too: kept, it would share a group with the bfloat16 head, and a group has one dtype.
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm": "free_full_weight",
    }

    vocab_size: int = 131072
    hidden_size: int = 6144
    intermediate_size: int = 32768
    num_hidden_layers: int = 64
    num_attention_heads: int = 48
    num_key_value_heads: int = 8
    head_dim: int = 0  # 0: hidden_size // num_attention_heads
    num_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    attn_output_multiplier: float | int = 0.08838834764831845
    attn_logit_softcapping: float | int = 30.0
    embedding_multiplier_scale: float | int = 78.38367176906169
    output_multiplier_scale: float | int = 0.5773502691896257
    rope_parameters: dict | None = None
    hidden_act: str = "gelu_pytorch_tanh"
    norm_topk_prob: bool = False
    moe_router_renormalize: bool = False
    router_logit_softcapping: float | int = 0.0
    residual_moe: bool = False
    load_presharded_moe: bool = False
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __new__(cls, *args, **kwargs):
        # The one place that sees which spellings the caller gave, before the attribute map folds them together.
        rope = kwargs.get("rope_parameters") or {}
        given = {**kwargs, **{f"rope_parameters.{key}": rope.get(key) for key in ROPE_KEYS}}
        pairs = [*cls.attribute_map.items(), *((key, f"rope_parameters.{key}") for key in ROPE_KEYS)]
        problems = [
            f"`{field}` is {given[field]} and `{twin}` is {given[twin]}"
            for twin, field in pairs
            if given.get(twin) is not None and given.get(field) is not None and given[twin] != given[field]
        ]
        if problems:
            raise ValueError(
                f"{cls.__name__}: two spellings of one value disagree: {'; '.join(problems)}. Give one, or both equal."
            )
        return super().__new__(cls)

    def __post_init__(self, **kwargs):
        if self.head_dim == 0 and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        rope_type = kwargs.pop("rope_type", None)
        if rope_type is not None:
            self.rope_parameters = {"rope_type": rope_type, **(self.rope_parameters or {})}
        super().__post_init__(**kwargs)
        if self.architectures is None:
            self.architectures = ["Grok1ForCausalLM"]
        if "transformers.pipelines" in sys.modules:
            # `pipeline("text-generation", FOLDER)` takes its class right after it has read the configuration, before
            # the model's code is there. Registered here only then: importing the pipelines takes seconds.
            from .pipeline_grok1 import register_text_generation

            register_text_generation()

    def validate_architecture(self):
        """Refuse, all in one ValueError, what the model does not implement and what cannot be built."""
        problems = [
            f"`{key}`: expected {expected!r} ({reason}), found {getattr(self, key)!r}"
            for key, (expected, reason) in FIXED.items()
            if getattr(self, key) != expected
        ]
        for key in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok"),
            *("max_position_embeddings", "rms_norm_eps"),
            *("attn_logit_softcapping", "attn_output_multiplier"),
            *("embedding_multiplier_scale", "output_multiplier_scale"),
        ):
            value = getattr(self, key)
            if value is None or not (math.isfinite(value) and value > 0):
                problems.append(f"`{key}`: expected a positive number, found {value!r}")
            elif value >= MAX_SIZE:
                problems.append(f"`{key}`: expected a number below {MAX_SIZE}, found {value!r}")
        if not problems:
            # Before anything makes a list of them.
            matrices = self.num_hidden_layers * (3 * self.num_experts + 9)
            if matrices > MAX_MATRICES:
                problems.append(
                    f"`num_hidden_layers`, `num_experts`: expected at most {MAX_MATRICES} weight matrices, found "
                    f"{self.num_hidden_layers} layers of {self.num_experts} experts"
                )
            if self.num_attention_heads % self.num_key_value_heads != 0:
                problems.append(
                    f"`num_attention_heads`: expected a multiple of `num_key_value_heads` "
                    f"({self.num_key_value_heads}), found {self.num_attention_heads}"
                )
            if self.head_dim % 2 != 0:
                problems.append(f"`head_dim`: expected an even number (rotary halves), found {self.head_dim}")
            if self.num_experts_per_tok > self.num_experts:
                problems.append(
                    f"`num_experts_per_tok`: expected at most `num_experts` ({self.num_experts}), "
                    f"found {self.num_experts_per_tok}"
                )
        rope = self.rope_parameters or {}
        theta = rope.get("rope_theta")
        if rope.get("rope_type") not in ("default", *ROPE_INIT_FUNCTIONS):
            problems.append(
                f"`rope_parameters.rope_type`: expected one of {['default', *ROPE_INIT_FUNCTIONS]}, "
                f"found {rope.get('rope_type')!r}"
            )
        if not isinstance(theta, float | int) or theta <= 0:
            problems.append(f"`rope_parameters.rope_theta`: expected a positive number, found {theta!r}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            problems.append(
                "`rope_parameters.partial_rotary_factor`: expected 1.0 (xAI rotates whole heads), "
                f"found {rope['partial_rotary_factor']!r}"
            )
        if problems:
            raise ValueError(f"{type(self).__name__} cannot be a Grok-1: " + "; ".join(problems) + ".")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in Transformers, but overrides replace the file's values, in every spelling, before any validation."""
        keys = (*cls.__annotations__, *cls.attribute_map, *ROPE_KEYS)
        overrides = {key: kwargs.pop(key) for key in keys if key in kwargs}
        rope = {key: overrides[key] for key in ROPE_KEYS if key in overrides}
        config_dict = dict(config_dict)
        if "model_type" not in config_dict:
            for key, (value, reason) in MISSTATED.items():
                if config_dict.get(key, value) != value:
                    logger.warning(
                        f"`{key}`: the file says {config_dict[key]!r}; taken as {value!r}, because {reason}."
                    )
                    config_dict[key] = value
        for twin, field in cls.attribute_map.items():
            if twin in overrides or field in overrides:
                config_dict.pop(twin, None)
                config_dict.pop(field, None)
        if rope or "rope_parameters" in overrides:
            for key in ROPE_KEYS:
                config_dict.pop(key, None)
        if rope and "rope_parameters" not in overrides:
            overrides["rope_parameters"] = {**(config_dict.get("rope_parameters") or {}), **rope}
        result = super().from_dict({**config_dict, **overrides}, **kwargs)
        prepare_config = PREPARE_CONFIG.get()
        return (prepare_config(result[0]), *result[1:]) if isinstance(result, tuple) else prepare_config(result)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that config.json holds: every spelling of every key, and the hub's code map."""
        output = super().to_dict()
        output.update({twin: output[field] for twin, field in self.attribute_map.items() if field in output})
        if "rope_theta" in (output.get("rope_parameters") or {}):
            output["rope_theta"] = output["rope_parameters"]["rope_theta"]
        output["auto_map"] = {**(output.get("auto_map") or {}), **AUTO_MAP}
        output["model_file"] = MLX_FILE
        return output


__all__ = ["GrokConfig"]

"""vLLM serves Grok-1: the plugin that vLLM finds through the entry point group `vllm.general_plugins`."""


def register() -> None:
    """Name Grok-1's configuration and model to vLLM. vLLM calls this in each of its processes, for every model that is
    served, so the model's code is only named here and imported when a folder needs it."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from modeling_grok1.configuration_grok1 import GrokConfig

    from . import refusals  # noqa: F401

    AutoConfig.register(GrokConfig.model_type, GrokConfig, exist_ok=True)
    ModelRegistry.register_model("Grok1ForCausalLM", "grok1.engines.vllm.model:Grok1ForCausalLM")

"""Grok-1 for Hugging Face Transformers. Importing this package registers its classes with every Auto class."""

from importlib.metadata import version

from transformers import AutoConfig

from modeling_grok1.configuration_grok1 import GrokConfig


__version__ = "0.1.0"

# TEMPORARY: the configuration alone under the Transformers that other engines bring.
if not version("transformers").startswith("5.19."):
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    from modeling_grok1.modeling_grok1 import (
        Grok1ForCausalLM,
        Grok1ForQuestionAnswering,
        Grok1ForSequenceClassification,
        Grok1ForTokenClassification,
        Grok1Model,
        Grok1PreTrainedModel,
    )
    from modeling_grok1.quantization_grok1 import Grok1Int8Config


    AutoConfig.register(GrokConfig.model_type, GrokConfig)
    GrokConfig.register_for_auto_class()
    for auto_class, model_class in {
        AutoModel: Grok1Model,
        AutoModelForCausalLM: Grok1ForCausalLM,
        AutoModelForQuestionAnswering: Grok1ForQuestionAnswering,
        AutoModelForSequenceClassification: Grok1ForSequenceClassification,
        AutoModelForTokenClassification: Grok1ForTokenClassification,
    }.items():
        auto_class.register(GrokConfig, model_class)
        # Makes save_pretrained copy the code beside the weights, so that the folder loads with trust_remote_code.
        model_class.register_for_auto_class(auto_class.__name__)

    __all__ = [
        "Grok1ForCausalLM",
        "Grok1ForQuestionAnswering",
        "Grok1ForSequenceClassification",
        "Grok1ForTokenClassification",
        "Grok1Int8Config",
        "Grok1Model",
        "Grok1PreTrainedModel",
        "GrokConfig",
    ]

"""
Grok-1 for Hugging Face Transformers. Importing this package registers its classes with every Auto class.

The configuration works with every version of Transformers 5. The PyTorch model needs the tested range of
`versions_grok1.py`: with an older one its classes are not there, and an Auto class says so when it is asked for them.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from modeling_grok1.configuration_grok1 import GrokConfig
from modeling_grok1.versions_grok1 import unsupported


__version__ = "0.1.0"

AutoConfig.register(GrokConfig.model_type, GrokConfig, exist_ok=True)
GrokConfig.register_for_auto_class()

if unsupported() is None:
    from modeling_grok1.heads_grok1 import (
        Grok1ForQuestionAnswering,
        Grok1ForSequenceClassification,
        Grok1ForTokenClassification,
    )
    from modeling_grok1.modeling_grok1 import Grok1ForCausalLM, Grok1Model, Grok1PreTrainedModel
    from modeling_grok1.quantization_grok1 import Grok1Int4Config, Grok1Int8Config

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
else:

    class UnsupportedGrok1:
        """Stands for every model class where Transformers is too old for them."""

        config_class = GrokConfig

        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            raise ImportError(unsupported())

        _from_config = from_pretrained

    for auto_class in (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    ):
        auto_class.register(GrokConfig, UnsupportedGrok1)

    def __getattr__(name: str):
        if name in __all__:
            raise ImportError(unsupported())
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Grok1ForCausalLM",
    "Grok1ForQuestionAnswering",
    "Grok1ForSequenceClassification",
    "Grok1ForTokenClassification",
    "Grok1Int4Config",
    "Grok1Int8Config",
    "Grok1Model",
    "Grok1PreTrainedModel",
    "GrokConfig",
]

"""What vLLM has to be told that it cannot serve, before it says so in words that help nobody."""

from typing import Any, NoReturn

from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


@register_quantization_config("grok1_int8")
class Grok1Int8(QuantizationConfig):
    """The quantised format of older versions of this package, for which no engine has kernels."""

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any], user_quant, hf_config=None) -> None:
        """vLLM asks every method about every folder's `quantization_config`, first of all.

        Raises:
            ValueError: it is the one of an int8 folder of this package.
        """
        if hf_quant_cfg.get("quant_method") == "grok1_int8":
            raise ValueError(
                "vLLM has no kernels for the format 'grok1_int8' of this folder. Convert the checkpoint again with "
                "`grok1 convert CHECKPOINT NEW_FOLDER --dtype int8`: the format compressed-tensors (W8A16), which it "
                "writes now, holds the same int8 values, and vLLM serves it."
            )

    @classmethod
    def get_name(cls) -> str:
        return "grok1_int8"

    @classmethod
    def get_supported_act_dtypes(cls) -> list:
        return []

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NoReturn:
        raise AssertionError("refused above")

    def get_quant_method(self, layer, prefix: str) -> NoReturn:
        raise AssertionError("refused above")

"""Named configurations, and the published facts of the release."""

import json
from importlib import resources

from modeling_grok1.configuration_grok1 import GrokConfig


def preset_names() -> list[str]:
    """The presets that `load_preset` knows."""
    names = (file.name for file in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def load_preset(name: str) -> GrokConfig:
    """The configuration of a named model: "grok-1" is the release, "demo" the checkpoint that the package carries.

    Raises:
        ValueError: there is no preset of that name.
    """
    if name not in preset_names():
        raise ValueError(f"preset: expected one of {', '.join(preset_names())}, found {name!r}")
    return GrokConfig(**json.loads(resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")))


__all__ = ["GrokConfig", "load_preset", "preset_names"]

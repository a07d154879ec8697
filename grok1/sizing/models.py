"""The model that is planned: a converted folder, or a preset by its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grok1.downloads import check_is_grok1, is_repository, read_config
from grok1.precision import find_precision, stored_precision


if TYPE_CHECKING:
    from modeling_grok1 import GrokConfig

RELEASE = "grok-1"


@dataclass(frozen=True)
class Model:
    """
    Args:
        title: what is planned, for the heading.
        config: its sizes.
        folder: where it is a folder, else None.
        stored: the precision of the folder's files; None for a preset.
    """

    title: str
    config: GrokConfig
    folder: Path | None
    stored: str | None

    def folder_for(self, precision: str) -> str:
        """The folder that a command in this precision loads.

        The given one where it is stored so (float32 and bfloat16 load as each other, and are quantised by bitsandbytes
        while they load); else the name of the one to convert: grok-1-int8, grok-1-hf, ...
        """
        wanted = find_precision(precision).converted
        floats = ("float32", "bfloat16")
        if self.folder is not None and (self.stored == wanted or (self.stored in floats and wanted in floats)):
            return str(self.folder)
        return "grok-1-hf" if wanted in floats else f"grok-1-{wanted}"


def find_model(name: str | None) -> Model:
    """The folder, repository (USER/NAME) or preset of that name; None: the release.

    Raises:
        ValueError: there is none, or it holds no Grok-1.
    """
    from grok1.configuration import load_preset, preset_names
    from grok1.conversion.inputs import refuse_grok2_folder
    from modeling_grok1 import GrokConfig

    if name is None:
        return Model("the released Grok-1", load_preset(RELEASE), None, None)
    folder = Path(name)
    if is_repository(folder):
        check_is_grok1(name)
        folder = read_config(name).parent
    if (folder / "config.json").is_file():
        refuse_grok2_folder(folder)
        config = GrokConfig.from_pretrained(folder)
        dtype = str(config.dtype or "bfloat16").removeprefix("torch.")
        return Model(name, config, Path(name), stored_precision(folder) or dtype)
    if name in preset_names():
        return Model(f"the preset {name}", load_preset(name), None, None)
    raise ValueError(
        f"{name}: expected a converted folder with config.json, USER/NAME on the hub, or a preset "
        f"({', '.join(preset_names())}), found none of them."
    )

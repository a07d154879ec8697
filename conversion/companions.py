"""Everything in a converted folder that is not a shard: config, code, tokenizer, card, license, sums, index."""

from __future__ import annotations

import json
import os
import shutil
from importlib import resources
from pathlib import Path

from transformers import GenerationConfig

from grok1.conversion.facts import card_facts
from grok1.conversion.plan import Plan
from grok1.conversion.shards import index_text
from grok1.conversion.sums import RECORD_NAMES, write_sums
from grok1.conversion.tokenizer import TOKENIZER_NAME, convert_tokenizer
from grok1.files import INDEX_NAME, PARTIAL_SUFFIX, SUMS_NAME, sync_folder
from grok1.model_card.card import write_card
from modeling_grok1.configuration_grok1 import MLX_FILE


MODELFILE_NAME = "Modelfile"


def write_companions(plan: Plan) -> None:
    """Writes them to the folder of a plan, the sums and the index last: without them it is no finished folder."""
    staging = plan.out / f".companions{PARTIAL_SUFFIX}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    names = companion_files(staging, plan)
    write_sums(staging, plan.out, [shard.name for shard in plan.shards])
    last = [SUMS_NAME, *(name for name in names if name == INDEX_NAME)]
    for name in [name for name in names if name not in last] + last:
        with (staging / name).open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(staging / name, plan.out / name)
    shutil.rmtree(staging)
    for name in RECORD_NAMES:
        (plan.out / name).unlink(missing_ok=True)
    sync_folder(plan.out)


def companion_files(folder: Path, plan: Plan) -> list[str]:
    """Writes them, without the sums, to any folder; returns their names."""
    license_text = resources.files("grok1.model_card").joinpath("LICENSE")
    (folder / "LICENSE").write_bytes(license_text.read_bytes())
    tensors = {tensor.name: tensor for shard in plan.shards for tensor in shard.tensors}
    if plan.layout == "gguf":
        _write_gguf_companions(folder, plan)
    else:
        _write_model_companions(folder, plan)
    description = plan.shards[0].description if plan.shards else ""
    write_card(folder, card_facts(folder, tensors, {shard.name: shard.nbytes for shard in plan.shards}, description))
    return sorted(path.name for path in folder.iterdir())


def _write_gguf_companions(folder: Path, plan: Plan) -> None:
    """What `grok1 export-xai` needs besides the weights, and how Ollama takes them."""
    values = plan.config.to_dict()
    values.pop("auto_map", None)  # there is no code in the folder
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if plan.tokenizer is not None:
        shutil.copyfile(plan.tokenizer, folder / TOKENIZER_NAME)
    (folder / MODELFILE_NAME).write_text(modelfile(plan), encoding="utf-8", newline="\n")


def modelfile(plan: Plan) -> str:
    """Ollama's description of the model: text is continued as it is, without a template."""
    return (
        f"FROM ./{plan.shards[0].name}\n"
        'TEMPLATE """{{ .Prompt }}"""\n'
        f"PARAMETER num_ctx {plan.config.max_position_embeddings}\n"
    )


def _write_model_companions(folder: Path, plan: Plan) -> None:
    """What Transformers loads besides the weights."""
    plan.config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=plan.config.bos_token_id,
        eos_token_id=plan.config.eos_token_id,
        pad_token_id=plan.config.pad_token_id,
    ).save_pretrained(folder)
    for file in resources.files("modeling_grok1").iterdir():
        if file.name.endswith(("_grok1.py", MLX_FILE)):
            (folder / file.name).write_bytes(file.read_bytes())
    if plan.tokenizer is not None:
        convert_tokenizer(plan.tokenizer, folder, plan.config.vocab_size)
    (folder / INDEX_NAME).write_text(index_text(plan.shards), encoding="utf-8", newline="\n")

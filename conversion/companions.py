"""Everything in a converted folder that is not a shard: config, code, tokenizer, card, license, sums, index."""

from __future__ import annotations

import os
import shutil
from importlib import resources
from pathlib import Path

from transformers import GenerationConfig

from grok1.conversion.facts import card_facts
from grok1.conversion.plan import Plan
from grok1.conversion.shards import index_text
from grok1.conversion.sums import RECORD_NAMES, write_sums
from grok1.conversion.tokenizer import convert_tokenizer
from grok1.files import INDEX_NAME, PARTIAL_SUFFIX, SUMS_NAME, sync_folder
from grok1.model_card.card import write_card
from modeling_grok1.configuration_grok1 import MLX_FILE


def write_companions(plan: Plan) -> None:
    """Writes them to the folder of a plan. The index comes last: without it no loader takes the folder for a model."""
    staging = plan.out / f".companions{PARTIAL_SUFFIX}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    *names, index = companion_files(staging, plan)
    write_sums(staging, plan.out, [shard.name for shard in plan.shards])
    for name in (*names, SUMS_NAME, index):
        with (staging / name).open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(staging / name, plan.out / name)
    shutil.rmtree(staging)
    for name in RECORD_NAMES:
        (plan.out / name).unlink(missing_ok=True)
    sync_folder(plan.out)


def companion_files(folder: Path, plan: Plan) -> list[str]:
    """Writes them, without the sums, to any folder; returns their names, the index last."""
    plan.config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=plan.config.bos_token_id,
        eos_token_id=plan.config.eos_token_id,
        pad_token_id=plan.config.pad_token_id,
    ).save_pretrained(folder)
    for file in resources.files("modeling_grok1").iterdir():
        if file.name.endswith(("_grok1.py", MLX_FILE)):
            (folder / file.name).write_bytes(file.read_bytes())
    license_text = resources.files("grok1.model_card").joinpath("LICENSE")
    (folder / "LICENSE").write_bytes(license_text.read_bytes())
    if plan.tokenizer is not None:
        convert_tokenizer(plan.tokenizer, folder, plan.config.vocab_size)
    tensors = {tensor.name: tensor for shard in plan.shards for tensor in shard.tensors}
    write_card(folder, card_facts(folder, tensors, [shard.nbytes for shard in plan.shards]))
    names = sorted(path.name for path in folder.iterdir())
    (folder / INDEX_NAME).write_text(index_text(plan.shards), encoding="utf-8", newline="\n")
    return [*names, INDEX_NAME]

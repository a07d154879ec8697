"""A card says what the folder's headers say, to the digit, and nothing that was not measured."""

import json
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file

from grok1.conversion.convert import convert
from grok1.conversion.facts import SIZES, card_facts
from grok1.conversion.names import hub_tensors
from grok1.conversion.release import release_sizes
from grok1.errors import ConversionError
from grok1.files import read_sums, sha256_of
from grok1.model_card.card import is_card, name_repository, render_card, write_card


RELEASE_PARAMETERS = 315_684_820_992
FOLDERS = ("hub-bfloat16", "hub-float32", "hub-int8", "fused-float32", "hpcai-float32", "keyfan-float32")


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory) -> dict[str, Path]:
    """tiny-1 in each layout and precision."""
    made = {name: tmp_path_factory.mktemp("card") / name for name in FOLDERS}
    for name, folder in made.items():
        layout, dtype = name.split("-")
        group_size = 16 if dtype == "int8" else None
        options = {"layout": layout, "dtype": dtype, "group_size": group_size}
        convert(golden / "tiny-1", folder, **options, no_tokenizer=True, max_shard_size="500kB")
    return made


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Facts of the released model in bfloat16, from its sizes alone."""
    folder = tmp_path_factory.mktemp("release")
    sizes = vars(release_sizes())
    (folder / "config.json").write_text(json.dumps({**sizes, "tie_word_embeddings": True}))
    shards = {f"model-{number:05d}-of-00130.safetensors": 10**9 for number in range(1, 131)}
    return card_facts(folder, hub_tensors(release_sizes()), shards=shards)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("name", FOLDERS)
def test_facts_are_those_of_the_stored_tensors(folders, name):
    facts, tensors = card_facts(folders[name]), stored(folders[name])
    layout, dtype = name.split("-")
    # A packed weight holds four values per element.
    weights = {
        n: t.numel() * (4 if n.endswith("_packed") else 1)
        for n, t in tensors.items()
        if n != "lm_head.weight" and not n.endswith(("_scale", "_shape"))
    }
    assert facts.parameters == sum(weights.values()) == 439_456
    experts = sum(count for n, count in weights.items() if "expert" in n or ".moe." in n)
    assert facts.active_parameters == facts.parameters - experts * 6 // 8
    assert facts.expert_share == pytest.approx(100 * experts / 439_456)
    assert (facts.layout, facts.precision) == (layout, dtype)
    assert facts.weight_bytes == sum(t.nbytes for t in tensors.values())
    files = list(folders[name].glob("*.safetensors"))
    assert len(facts.shards) == len(files) and facts.shard_bytes == sum(file.stat().st_size for file in files)
    assert sum(group.tensors for group in facts.groups) == len(tensors)
    assert sum(group.nbytes for group in facts.groups) == facts.weight_bytes
    groups = {group.name: group for group in facts.groups}
    assert groups["Norms"].tensors == 13 and groups["Norms"].dtypes == ("float32",)
    assert groups["Router"].elements == 3 * 8 * 32 and groups["Router"].dtypes == ("float32",)
    assert any(name.startswith("Scales") for name in groups) == (dtype == "int8")


def test_the_card_shows_the_facts(folders):
    card = render_card(card_facts(folders["hub-int8"]))
    assert "| Parameters | 439,456 |" in card
    assert "| Experts | 72 | int8 | 405,504 | 405,504 |" in card
    assert "| Precision of the experts | int8 |" in card
    assert "no tokenizer in this folder" in card
    assert "grok1_int8" not in card, "an int8 folder is loaded as it is"


def test_a_small_model_is_never_called_the_released_one(folders, release):
    small = render_card(card_facts(folders["hub-bfloat16"]))
    assert "This is not xAI's 314B model" in small
    body = small.split("# What other ports")[0]
    for claim in ("base_model:", "October 2023", "80 GB", "315,684,820,992", "open release"):
        assert claim not in body, claim
        assert claim in render_card(release), claim


def test_the_released_model_from_its_sizes(release):
    assert release.is_release and release.parameters == RELEASE_PARAMETERS
    # All but 6 of 8 experts: 64 layers x 6 experts x 3 matrices.
    assert release.active_parameters == RELEASE_PARAMETERS - 64 * 6 * 3 * 6144 * 32768
    weights = {row.precision: row.weights for row in release.memory}
    norms_and_routers = 64 * (4 + 8) * 6144 + 6144
    assert weights["float32"] == 4 * RELEASE_PARAMETERS
    assert weights["bfloat16"] == 2 * RELEASE_PARAMETERS + 2 * norms_and_routers
    cache = 2 * 64 * 8 * 128 * 8192 * 2
    assert release.memory[1].cache == cache == 2_147_483_648
    layer = (weights["bfloat16"] - 2 * 131072 * 6144 + cache) / 64
    assert release.memory[1].devices == 10, "seven layers on a device, not eight"
    assert 7 * layer + 2 * 131072 * 6144 < 72e9 < 8 * layer
    matrices = 64 * (2 * 6144 * 6144 + 2 * 6144 * 1024 + 8 * 3 * 6144 * 32768)
    nf4 = next(row.weights for row in release.memory if "nf4" in row.precision)
    assert 0.5625 < (nf4 - (weights["bfloat16"] - 2 * matrices)) / matrices < 0.5626


def test_memory_agrees_with_the_measured_meta_model(folders):
    from grok1.sizing.memory import model_memory
    from modeling_grok1 import GrokConfig

    config = GrokConfig.from_pretrained(folders["hub-bfloat16"])
    rows = {row.precision: row for row in card_facts(folders["hub-bfloat16"]).memory}
    for precision, row in (
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),  # not int8: the plan counts groups of 128, which these widths are no multiple of
        ("int8-bnb", "8 bit, bitsandbytes"),
        ("nf4", "4 bit (nf4), bitsandbytes"),
    ):
        measured = model_memory(config, precision, prompt=4)
        assert rows[row].weights == measured.weights_bytes, precision
        assert rows[row].cache == measured.kv_bytes(config.max_position_embeddings), precision


def test_metadata_survives_the_hub_librarys_own_round_trip(release, folders, tmp_path):
    for facts, base in ((release, "xai-org/grok-1"), (card_facts(folders["hub-bfloat16"]), None)):
        file = tmp_path / "README.md"
        file.write_text(render_card(facts), encoding="utf-8")
        card = ModelCard.load(file)
        data = card.data
        assert isinstance(data, ModelCardData)
        assert (data.license, data.library_name) == ("apache-2.0", "transformers")
        assert data.pipeline_tag == "text-generation"
        assert data.base_model == base
        assert "grok-1" in data.tags and "mixture-of-experts" in data.tags
        assert ModelCardData(**data.to_dict()).to_dict() == data.to_dict()
        assert card.text.strip().startswith("<!--") and "{{" not in card.text and "{%" not in card.text


def test_the_hubs_validator_takes_the_card(folders, monkeypatch):
    from fake_hub import FakeHub

    with FakeHub() as hub:
        hub.patch(monkeypatch)
        ModelCard(render_card(card_facts(folders["hub-bfloat16"]))).validate()
        assert hub.sent("POST", "/api/validate-yaml")[0][2] == 200


def test_the_same_folder_gives_the_same_card(folders, tmp_path):
    first, moved = tmp_path / "here", tmp_path / "elsewhere"
    for copy in (first, moved):
        shutil.copytree(folders["hub-float32"], copy)
    assert (
        write_card(first, card_facts(first)).read_bytes()
        == write_card(moved, card_facts(moved)).read_bytes()
        == write_card(moved, card_facts(moved)).read_bytes()
    )
    text = (moved / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in text and not re.search(r"20\d\d-\d\d", text)
    assert [p.name for p in moved.iterdir() if p.name.startswith(".")] == []


def test_the_source_is_not_claimed_to_be_xais(folders, release):
    assert "were not compared with it when this card was written" in render_card(release)
    assert "compared" not in render_card(card_facts(folders["hub-float32"]))


def test_the_picture_is_shown_only_where_there_is_one(folders, tmp_path):
    facts = card_facts(folders["hub-float32"])
    assert "routing.png" not in render_card(facts)
    assert "](routing.png)" in render_card(replace(facts, picture="routing.png"))


def test_every_loading_recipe_pins_a_revision_and_runs(folders, monkeypatch):
    """The blocks of a card, in order, on its own folder: as a stranger would paste them."""
    for name in ("hub-bfloat16", "hub-int8"):
        text = render_card(card_facts(folders[name]))
        blocks = re.findall(r"```python\n(.*?)```", text, re.S)
        assert len(blocks) == (1 if name == "hub-int8" else 3)
        assert all("revision=revision" in block for block in blocks)
        scope: dict = {}
        for block in blocks:
            exec(
                block.replace("USER/NAME", str(folders[name])).replace('device_map="auto"', 'device_map="cpu"'),
                scope,
            )
            tokens = torch.arange(3, 9)[None]
            assert scope["model"](tokens).logits.isfinite().all()
    assert text.count("pin the commit") == 1


def test_shards_that_are_gone_already_can_be_described(folders, tmp_path):
    """A conversion that uploads and discards its shards hands in what it wrote."""
    whole = folders["hub-bfloat16"]
    kept = tmp_path / "kept"
    shutil.copytree(whole, kept, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = card_facts(whole).sizes
    assert set(sizes) == set(SIZES)
    tensors = hub_tensors(SimpleNamespace(**sizes))
    shards = {file.name: file.stat().st_size for file in sorted(whole.glob("*.safetensors"))}
    assert card_facts(kept, tensors, shards) == card_facts(whole)


def test_a_folder_that_is_not_whole_gets_no_card(folders, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(folders["hub-float32"], folder)
    shards = sorted(folder.glob("*.safetensors"))
    (folder / "README.md").unlink(missing_ok=True)
    shards[0].unlink()
    with pytest.raises(ConversionError, match=shards[0].name):
        write_card(folder, card_facts(folder))
    assert not (folder / "README.md").exists()


def test_tensors_that_no_grok_has_are_named(folders, tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(folders["hub-float32"], folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = stored(folders["hub-float32"])
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(2, 2)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(3, 5)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        card_facts(folder)
    assert caught.value.problems == [
        "model.norm.weight: missing",
        "model.layers.0.mlp.gate_proj.weight: not a tensor of a Grok-1",
        "model.layers.1.self_attn.q_proj.weight: expected shape [96, 32], found [3, 5]",
    ]


def test_sizes_that_are_missing_are_all_named(folders, tmp_path):
    folder = tmp_path / "sizes"
    shutil.copytree(folders["hub-float32"], folder)
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    config["num_experts_per_tok"] = "two"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError) as caught:
        card_facts(folder)
    assert len(caught.value.problems) == 2
    assert "`hidden_size`" in caught.value.problems[0] and "'two'" in caught.value.problems[1]
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ConversionError, match="JSON object"):
        card_facts(folder)


def test_only_a_card_of_ours_counts_as_one(folders, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(folders["hub-float32"], folder)
    assert is_card(write_card(folder, card_facts(folder)))
    (folder / "README.md").write_text("# My own words")
    assert not is_card(folder / "README.md")


def test_only_headers_are_read(folders, tmp_path):
    """The weights can be a hole in the file: a card of 633 GB takes no longer than one of a megabyte."""
    folder = tmp_path / "sparse"
    shutil.copytree(folders["hub-float32"], folder)
    before = card_facts(folder)
    for shard in folder.glob("*.safetensors"):
        size = shard.stat().st_size
        with shard.open("r+b") as stream:
            header = struct.unpack("<Q", stream.read(8))[0]
            stream.truncate(8 + header)
            stream.truncate(size)
    assert card_facts(folder) == before


def test_an_evaluation_is_shown_and_becomes_the_model_index(folders, tmp_path):
    folder = tmp_path / "evaluated"
    shutil.copytree(folders["hub-float32"], folder)
    figures = {"text": "a.txt", "text_sha256": "ab" * 32, "predicted": 1000, "context": 512, "precision": "float32"}
    (folder / "evaluation.json").write_text(json.dumps({**figures, "perplexity": 12.34567, "seconds": 1.0}))
    card = render_card(card_facts(folder))
    assert "| a.txt (SHA-256 `abababababababab…`) | 1,000 | 512 | float32 | 12.3457 |" in card
    (result,) = ModelCard(card).data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("perplexity", 12.3457, "a.txt")
    (folder / "evaluation.json").write_text('{"perplexity": 1}')
    with pytest.raises(ConversionError, match="expected the figures of `grok1 eval`"):
        card_facts(folder)


def test_a_tuned_model_is_called_so_with_the_trainers_log(release, folders, tmp_path):
    folder = tmp_path / "tuned"
    shutil.copytree(folders["hub-float32"], folder)
    log = [{"step": n, "epoch": n / 10, "loss": 5 - n / 100, "aux_loss": 2.1} for n in range(1, 31)]
    record = {"base_model": "me/grok-1-hf", "dataset": "their/data", "dataset_id": "their/data", "log_history": log}
    record |= {"parameters": 100, "trained_parameters": 5, "arguments": {"learning_rate": 1e-4}, "global_step": 30}
    (folder / "training_run.json").write_text(json.dumps(record))
    facts = card_facts(folder)
    card = ModelCard(render_card(facts))
    assert card.data.base_model == "me/grok-1-hf" and card.data.datasets == ["their/data"]
    assert "fine-tuned" in card.data.tags and "base-model" not in card.data.tags
    text = str(card)
    assert "30 steps; 5 of 100 parameters were trained." in text and "| learning rate | 0.0001 |" in text
    rows = re.findall(r"^\| (\d+) \| [\d.]+ \| [\d.]+ \| 2.1 \|$", text, re.M)
    assert len(rows) == 12 and rows[0] == "1" and rows[-1] == "30" and "12 of 30 entries" in text
    # The released sizes, tuned: never "Grok-1" alone, and none of the base model's claims.
    tuned = render_card(replace(release, training=facts.training))
    assert "# Grok-1, fine-tuned\n" in tuned and "xAI's raw checkpoint" not in tuned and "GSM8k" not in tuned


def test_a_card_takes_the_name_of_its_repository(folders, tmp_path):
    folder = tmp_path / "named"
    shutil.copytree(folders["hub-float32"], folder)
    for name in ("me/grok", "other/name"):
        name_repository(folder, name)
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert f'repo = "{name}"' in text and f"`vllm serve {name}`" in text and f"`grok1 serve {name}`" in text
        assert "USER/NAME" not in text and read_sums(folder / "SHA256SUMS")["README.md"] == sha256_of(
            folder / "README.md"
        )
    assert "me/grok" not in text

"""`check_folder` finds everything that would make a folder useless or harmful on the hub."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from grok1.arrays import count_nonfinite
from grok1.conversion.convert import convert
from grok1.model_card import hub
from grok1.model_card.hub import check_folder, upload_plan


@pytest.fixture(scope="module")
def sound(golden, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "grok"
    convert(golden / "tiny-1", folder, no_tokenizer=True, max_shard_size="500kB")
    return folder


@pytest.fixture
def folder(sound, tmp_path, monkeypatch) -> Path:
    """A copy to damage; the fresh process is left out, it has tests of its own."""
    shutil.copytree(sound, tmp_path / "grok")
    monkeypatch.setattr(hub, "_clean_load", lambda folder: [])
    return tmp_path / "grok"


def rewrite(shard: Path, name: str, value: torch.Tensor) -> None:
    tensors = load_file(shard)
    tensors[name] = value
    save_file(tensors, shard, metadata={"format": "pt"})


def test_a_converted_folder_is_fit(sound):
    """With the fresh process: config, remote code without the package, and every number of every tensor."""
    seen = []
    assert check_folder(sound, lambda done, total: seen.append((done, total))) == []
    done = [done for done, _ in seen]
    assert done == sorted(done) and {total for _, total in seen} == {done[-1]}
    assert done[-1] == sum(t.nbytes for file in sound.glob("*.safetensors") for t in load_file(file).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.block_sparse_moe.experts.5.w2.weight"])
def test_one_number_that_is_not_finite_is_found(folder, name, value):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][name]
    tensor = load_file(shard)[name]
    tensor.view(-1)[-1] = value
    rewrite(shard, name, tensor)
    assert check_folder(folder) == [f"{name} in {shard.name}: 1 of {tensor.numel():,} are NaN or infinite"]


def test_blocks_are_counted_across_their_borders(folder, monkeypatch):
    monkeypatch.setattr(hub, "BLOCK", 64)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    name, tensor = next((n, t) for n, t in load_file(shard).items() if t.ndim == 2)
    tensor[1:3] = float("inf")
    bad = 2 * tensor.shape[1]
    rewrite(shard, name, tensor)
    assert check_folder(folder) == [f"{name} in {shard.name}: {bad:,} of {tensor.numel():,} are NaN or infinite"]


def test_not_finite_numbers_of_each_dtype():
    values = torch.tensor([0.0, -1.5, float("nan"), 3e38, float("inf"), -float("inf"), 1e-40])
    assert count_nonfinite(values.numpy().tobytes(), "float32") == 3
    assert count_nonfinite(values.bfloat16().view(torch.int16).numpy().tobytes(), "bfloat16") == 3
    assert count_nonfinite(np.arange(-128, 128, dtype=np.int8).tobytes(), "int8") == 0


def test_missing_and_cut_and_foreign_shards_are_all_named(folder):
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    first.unlink()
    os.truncate(second, second.stat().st_size - 5)
    problems = check_folder(folder)
    assert len(problems) == 2
    assert problems[0].startswith(first.name) and problems[1].startswith(second.name)


def test_a_shard_that_no_index_names_is_refused(folder):
    shutil.copy(next(folder.glob("*.safetensors")), folder / "extra.safetensors")
    assert check_folder(folder) == ["extra.safetensors: in no index"]


@pytest.mark.parametrize("name", ["config.json", "README.md", "LICENSE"])
def test_what_must_be_there_is(folder, name):
    (folder / name).unlink()
    advice = "" if name == "config.json" else f"; `grok1 card {folder}` writes it"
    assert check_folder(folder) == [f"{name}: missing{advice}"]


def test_the_code_must_be_there(folder):
    (folder / "modeling_grok1.py").unlink()
    assert len(check_folder(folder)) == 1 and "trust_remote_code" in check_folder(folder)[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pytorch_model.bin", b"anything"),
        ("optimizer.pt", b"anything"),
        ("tensor00000_000", pickle.dumps({"w": 1}, protocol=4)),
        ("notes.txt", pickle.dumps([1], protocol=2)),
        ("weights.dat", b"PK\x03\x04 a zip, as torch.save writes it"),
        ("sub/arrays.npz", b"anything"),
    ],
)
def test_pickles_are_refused_by_name_and_by_content(folder, name, content):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    [problem] = check_folder(folder)
    assert problem.startswith(f"{name}: a pickle")


@pytest.mark.parametrize("target", ["/etc/hosts", "config.json", "nowhere"])
def test_links_are_refused(folder, target):
    (folder / "link.txt").symlink_to(target)
    assert check_folder(folder) == [f"link.txt: a link to {target}; expected a file"]


LEFT = ("model-00001-of-00002.safetensors.partial", "x.tmp", "a.lock", ".grok1-conversion.json", ".cache2/x", "x.pyc")


@pytest.mark.parametrize("name", LEFT)
def test_leftovers_and_hidden_files_are_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"left")
    [problem] = check_folder(folder)
    assert problem.startswith(f"{name}: ")


def test_the_hub_librarys_notes_are_no_content(folder):
    before = upload_plan(folder)
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "note.lock").write_text("x")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert check_folder(folder) == []
    assert [u.path for u in upload_plan(folder)] == [*[u.path for u in before if u.is_weight], ".gitattributes"] + [
        u.path for u in before if not u.is_weight
    ]


def test_weights_come_first_in_the_plan(folder):
    kinds = [upload.is_weight for upload in upload_plan(folder)]
    assert kinds == sorted(kinds, reverse=True) and kinds[0] and not kinds[-1]
    assert sum(u.nbytes for u in upload_plan(folder)) == sum(f.stat().st_size for f in folder.iterdir())


def test_a_huge_header_is_not_read(folder):
    shard = next(folder.glob("*.safetensors"))
    with shard.open("r+b") as stream:
        stream.write(struct.pack("<Q", 1 << 60))
    assert any(problem.startswith(shard.name) for problem in check_folder(folder))


def test_code_config_and_tokenizer_that_do_not_load_in_a_fresh_process(sound, tmp_path):
    """One fresh process: code that needs the package, and a tokenizer that is none."""
    folder = tmp_path / "grok"
    shutil.copytree(sound, folder, ignore=shutil.ignore_patterns("SHA256SUMS"))
    code = folder / "modeling_grok1.py"
    code.write_text("import modeling_grok1\n" + code.read_text())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    (folder / "tokenizer.json").write_text("{}")
    problems = check_folder(folder, trust_remote_code=True)
    assert len(problems) == 2
    assert problems[0].startswith("config.json and code: ") and "modeling_grok1" in problems[0]
    assert problems[1].startswith("tokenizer: ")


@pytest.mark.parametrize("how", ["changed", "added", "auto_map", "elsewhere"])
def test_code_that_is_not_this_packages_is_named_and_not_run(sound, tmp_path, how):
    folder, marker = tmp_path / "grok", tmp_path / "ran"
    shutil.copytree(sound, folder, ignore=shutil.ignore_patterns("SHA256SUMS"))
    attack = f"open({str(marker)!r}, 'w').close()\n"
    if how == "changed":
        code = folder / "modeling_grok1.py"
        code.write_text(attack + code.read_text())
        expected = ["modeling_grok1.py: not the code of this package"]
    elif how == "added":
        (folder / "sub").mkdir()
        (folder / "sub" / "helper.py").write_text(attack)
        expected = ["sub/helper.py: not the code of this package"]
    else:
        target = "mine.Config" if how == "auto_map" else "someone/else--configuration_grok1.GrokConfig"
        (folder / "mine.py").write_text(attack)
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"]["AutoConfig"] = target
        (folder / "config.json").write_text(json.dumps(config))
        expected = ["mine.py: not the code of this package", f"config.json: auto_map names {target!r}"]
    problems = check_folder(folder)
    assert len(problems) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(problems, expected, strict=True))
    assert not marker.exists()


def test_a_file_that_is_not_as_its_sum_says_is_named(folder):
    shard = next(folder.glob("*.safetensors"))
    name, tensor = next((n, t) for n, t in load_file(shard).items() if t.dtype == torch.float32)
    rewrite(shard, name, tensor + 1)
    (folder / "LICENSE").write_text("mine")
    problems = check_folder(folder)
    assert [problem.split(":")[0] for problem in problems] == ["LICENSE", shard.name]
    assert all("as in SHA256SUMS, found" in problem for problem in problems)

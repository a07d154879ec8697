"""GGUF folders from the hub, to the hub, and pushed, against a hub on loopback."""

import hashlib
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fake_hub import TOKEN, FakeHub
from random_checkpoint import write_random_checkpoint

from grok1.conversion.convert import convert
from grok1.errors import ConversionError
from grok1.gguf_files import read_gguf
from grok1.model_card.hub import check_folder, push_folder, upload_plan


pytest.importorskip("gguf")
SOURCE, TARGET = "xai-org/random", "someone/random-gguf"
SETTINGS = {"layout": "gguf", "dtype": "int8", "max_shard_size": "300KB", "no_tokenizer": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("source") / "random")


@pytest.fixture(scope="module")
def local(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("local") / "out"
    convert(source, out, **SETTINGS)
    return out


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        yield hub


def add(hub: FakeHub, source: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file():
            hub.add_file(SOURCE, path.relative_to(source).as_posix(), path)


def sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_hub_to_hub_with_a_disk_for_two_splits(hub, source, local, tmp_path):
    add(hub, source)
    out = tmp_path / "out"
    most = 0

    def watch(done, total):
        nonlocal most
        total = 0
        for path in out.rglob("*.gguf*"):
            with suppress(FileNotFoundError):  # uploaded and deleted by another thread meanwhile
                total += path.stat().st_size
        most = max(most, total)

    convert(
        f"hf://{SOURCE}", out, push_to=TARGET, discard_source=True, discard_output=True, progress=watch, **SETTINGS
    )
    arrived = {path: blob.sha256 for path, blob in hub.files(TARGET).items() if path != ".gitattributes"}
    assert arrived == sums(local)
    assert not list(out.glob("*.gguf"))
    splits = sorted((path.stat().st_size for path in local.glob("*.gguf")), reverse=True)
    assert len(splits) > 3 and most <= splits[0] + splits[1]
    assert {"README.md", "SHA256SUMS", "config.json"} <= set(hub.commits(TARGET)[-1].paths)


def test_scales_of_a_fetched_file_are_checked_when_it_is_read(hub, tmp_path):
    add(hub, write_random_checkpoint(tmp_path / "source", first_scale=0x33A0))
    with pytest.raises(ConversionError, match=r"blk.0.attn_k.weight: cannot be written .*|--round-scales"):
        convert(f"hf://{SOURCE}", tmp_path / "out", **SETTINGS)
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_whole_repository_is_not_overwritten(hub, source, tmp_path):
    hub.add_file(TARGET, "SHA256SUMS", b"")
    with pytest.raises(ConversionError, match="found a whole model"):
        convert(source, tmp_path / "out", push_to=TARGET, **SETTINGS)


def test_a_folder_is_checked_and_pushed_weights_first(hub, local):
    assert check_folder(local) == []
    plan = upload_plan(local)
    assert [upload.is_weight for upload in plan] == sorted((upload.is_weight for upload in plan), reverse=True)
    push_folder(local, TARGET, token=TOKEN)
    arrived = {path: blob.sha256 for path, blob in hub.files(TARGET).items() if path != ".gitattributes"}
    assert arrived == sums(local)
    assert all(path.endswith(".gguf") for path in hub.commits(TARGET)[0].paths if path != ".gitattributes")


def test_what_is_wrong_is_named_before_anything_is_sent(local, tmp_path):
    shutil.copytree(local, tmp_path / "out")
    tensor = read_gguf(tmp_path / "out").tensors["blk.2.attn_v.weight"]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset + 34)
        file.write(np.float16(np.inf).tobytes())
    problems = check_folder(tmp_path / "out")
    assert len(problems) == 1 and problems[0].startswith("blk.2.attn_v.weight in ") and "1 of" in problems[0]
    tensor.file.unlink()
    assert any(f"{tensor.file.name}: expected a file, found none" in line for line in check_folder(tmp_path / "out"))

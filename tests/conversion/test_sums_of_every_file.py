"""SHA256SUMS has the sum of every file that the converter wrote; `grok1 verify FOLDER` and sha256sum compare them."""

import hashlib
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grok1.cli import app
from grok1.conversion.adopt import adopt
from grok1.conversion.convert import convert
from grok1.conversion.facts import card_facts
from grok1.conversion.verify_sums import verify_sums
from grok1.errors import ConversionError
from grok1.files import SUMS_NAME, read_sums
from grok1.model_card.card import write_card


@pytest.fixture(scope="module")
def made(golden, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sums") / "out"
    convert(golden / "tiny-1", out, no_tokenizer=True, max_shard_size="300KB")
    return out


@pytest.fixture
def folder(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "folder")
    return tmp_path / "folder"


def problems(folder: Path) -> list[str]:
    return verify_sums(folder).problems


def test_every_file_has_its_sum(folder):
    names = {path.name for path in folder.iterdir()} - {SUMS_NAME}
    sums = read_sums(folder / SUMS_NAME)
    assert sums.keys() == names
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == sums[name] for name in names)
    report = verify_sums(folder)
    assert (report.problems, report.files, report.from_hub) == ([], len(names), 0)
    assert report.nbytes == sum((folder / name).stat().st_size for name in names)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_it(folder):
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS_NAME], cwd=folder, check=True)
    (folder / "config.json").write_text("{}")
    assert subprocess.run(["sha256sum", "--check", "--quiet", SUMS_NAME], cwd=folder, capture_output=True).returncode


def test_any_flipped_bit_of_any_file_is_found(folder):
    chooser = random.Random(0)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for _ in range(40 if path.name == SUMS_NAME else 2):
            changed = bytearray(data)
            bit = chooser.randrange(8 * len(data))
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            try:
                assert problems(folder), (path.name, bit)
            except ConversionError as error:
                assert path.name == SUMS_NAME and "not a file of SHA-256 sums" in str(error)
        path.write_bytes(data)
    assert problems(folder) == []


def test_missing_added_and_unfinished_are_named(folder, tmp_path):
    (folder / "LICENSE").unlink()
    (folder / "extra.py").write_text("print()")
    (folder / "notes.txt").write_text("mine")
    (folder / ".grok1-conversion.json").write_text("{}")
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    found = problems(folder)
    assert [problem.split(":")[0] for problem in found] == [
        ".grok1-conversion.json",
        "LICENSE",
        "config.json",
        "extra.py",
    ]
    assert "a link out of it" in found[2]


def test_two_sums_of_one_file_are_refused(folder):
    path = folder / "SHA256SUMS"
    path.write_text(path.read_text() + "0" * 64 + "  LICENSE\n")
    with pytest.raises(ConversionError, match="expected one sum per file, found another one of LICENSE"):
        problems(folder)


def test_the_hubs_own_checksums(folder, tmp_path):
    """As huggingface_hub leaves them: notes beside a download, and the names of blobs in its cache."""
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    shard = sorted(folder.glob("*.safetensors"))[0]
    config = (folder / "config.json").read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(config) + config).hexdigest()
    (notes / "config.json.metadata").write_text(f"{'c' * 40}\n{git}\n1.0\n")
    (notes / f"{shard.name}.metadata").write_text(
        f"{'c' * 40}\n{hashlib.sha256(shard.read_bytes()).hexdigest()}\n1.0\n"
    )
    report = verify_sums(folder)
    assert (report.problems, report.from_hub) == ([], 2)
    (folder / SUMS_NAME).unlink()
    assert (verify_sums(folder).problems, verify_sums(folder).files) == ([], 2)
    (folder / "config.json").write_bytes(config + b" ")
    assert [problem.split(",")[0] for problem in problems(folder)] == [f"config.json: expected git {git}"]

    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    data = shard.read_bytes()
    (blobs / hashlib.sha256(data).hexdigest()).write_bytes(data)
    (snapshot / shard.name).symlink_to(blobs / hashlib.sha256(data).hexdigest())
    assert (verify_sums(snapshot).problems, verify_sums(snapshot).from_hub) == ([], 1)
    (blobs / hashlib.sha256(data).hexdigest()).write_bytes(data[:-1])
    assert len(problems(snapshot)) == 1


def test_a_card_that_is_written_again_keeps_the_sums(folder):
    (folder / "routing.png").write_bytes(b"a picture")
    write_card(folder, card_facts(folder))
    assert "routing.png" in (folder / "README.md").read_text()
    assert problems(folder) == []


def test_adopted_folders_have_them_too(made, tmp_path):
    adopt(made, tmp_path / "adopted")
    assert problems(tmp_path / "adopted") == []
    assert (tmp_path / "adopted" / SUMS_NAME).is_file()


def test_the_command(folder, golden):
    def grok1(*words):
        return CliRunner().invoke(app, ["verify", *map(str, words)])

    result = grok1(folder)
    assert result.exit_code == 0 and "files compared with their sums" in result.stdout
    (folder / "README.md").write_text("changed")
    result = grok1(folder)
    assert result.exit_code == 1 and "README.md: expected SHA-256" in result.stdout
    assert grok1(folder, "--json").exit_code == 1
    (folder / SUMS_NAME).unlink()
    result = grok1(folder)
    assert result.exit_code == 2 and "--against" in result.stderr
    assert "not the released checkpoint" in grok1(golden / "tiny-1").stderr

"""USER/NAME in place of a folder: downloaded from the hub with what loading reads, or refused in one sentence."""

import pytest
from fake_hub import FakeHub, Fault
from local_server import DEMO
from typer.testing import CliRunner

from grok1.cli import app
from grok1.conversion.convert import convert
from grok1.downloads import is_repository, local_folder
from grok1.errors import ConversionError


REPOSITORY = "user/grok-1-demo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub-ids") / "folder"
    convert(DEMO, out)
    return out


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub with the demo, an empty cache, and an empty working directory."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        for path in folder.iterdir():
            hub.add_file(REPOSITORY, path.name, path.read_bytes())
        yield hub


def grok1(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def test_generate_downloads_once_and_no_code(hub, tmp_path):
    words = ("generate", REPOSITORY, "Now is the winter of our", "--max-new-tokens", 8, "--device-map", "cpu")
    first = grok1(*words)
    assert first.stdout.startswith("Now is the winter of our discontent")
    assert f"Downloading {REPOSITORY}: 0.0 GB to " in first.stderr
    names = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink()}
    assert "config.json" in names and "tokenizer.json" in names
    assert not any(name.endswith(".py") for name in names)
    sent = len(hub.sent("GET", "/cdn/"))
    second = grok1(*words)
    assert second.stdout == first.stdout and "Downloading" not in second.stderr
    assert len(hub.sent("GET", "/cdn/")) == sent


def test_eval_routing_export_and_plan_take_one_too(hub, tmp_path):
    (tmp_path / "text.txt").write_text("Now is the winter of our discontent")
    text = ("--text", tmp_path / "text.txt")
    assert "agreement" in grok1("eval", REPOSITORY, *text, "--against", REPOSITORY).stdout
    assert "4 layers" in grok1("routing", REPOSITORY, *text).stdout
    assert "50 files" in grok1("export-xai", REPOSITORY, tmp_path / "exported").stdout
    assert f"{REPOSITORY} in bfloat16, 1 x 512 tokens" in grok1("plan", REPOSITORY, "--gpus", "1x80GB").stdout


def test_plan_downloads_the_config_alone(hub):
    grok1("plan", REPOSITORY, "--gpus", "1x80GB")
    assert hub.sent("GET", "/cdn/") == []


def test_verify_compares_every_file_with_both_sums(hub, folder):
    said = grok1("verify", REPOSITORY).stdout
    count = len(list(folder.iterdir())) - 1
    assert f"{count + 1} files compared with their sums" in said and f"{count + 1} of them also with the hub" in said


def test_what_is_no_grok1_is_not_downloaded(hub):
    hub.add_file("user/other", "config.json", b'{"model_type": "llama"}')
    hub.add_file("user/other", "model.safetensors", b"x" * 1000)
    hub.add_file("xai-org/grok-1", "ckpt/tensor00000_000", b"x")
    assert (
        "expected model_type 'grok-1' in its config.json, found 'llama'"
        in grok1("generate", "user/other", "x", code=2).stderr
    )
    assert "grok1 convert hf://xai-org/grok-1 OUT" in grok1("generate", "xai-org/grok-1", "x", code=2).stderr
    refused = grok1("generate", "user/nothing", "x", code=2).stderr
    assert "cannot be downloaded" in refused and "hf download user/nothing --local-dir nothing" in refused
    assert hub.sent("GET", "/cdn/") == []


def test_a_hub_that_fails_is_said_in_one_sentence(hub):
    hub.fail("GET", "/resolve/", Fault.status(403), times=50)
    hub.fail("HEAD", "/resolve/", Fault.status(403), times=50)
    shown = grok1("generate", REPOSITORY, "x", code=2).stderr
    assert "cannot be downloaded from the hub" in shown and "Traceback" not in shown


def test_too_small_a_disk_is_refused_first(hub, monkeypatch):
    from grok1 import downloads

    monkeypatch.setattr(downloads, "free_bytes", lambda place: 1000)
    with pytest.raises(ConversionError, match="bytes to download, and 1,000 free"):
        local_folder(REPOSITORY)
    assert hub.sent("GET", "/cdn/") == []


def test_a_name_of_something_here_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert is_repository("user/name")
    for name in ("models/grok", "./user/name", "/user/name", "name", "a/b/c", "~/grok"):
        assert not is_repository(name), name

"""hf:// to a folder and on to a repository, against a hub on loopback that fails on demand."""

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_hub import FakeHub, Fault

from grok1.conversion import from_hub
from grok1.conversion.convert import convert
from grok1.conversion.journal import JOURNAL_NAME
from grok1.conversion.to_hub import HubSink
from grok1.errors import CheckpointError, ConversionError


SOURCE, TARGET = "xai-org/tiny", "someone/tiny-hf"
SMALL_SHARDS = {"no_tokenizer": True, "max_shard_size": "100KB"}


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def expected(golden, tmp_path_factory) -> dict[str, str]:
    """The folder that a local conversion makes."""
    out = tmp_path_factory.mktemp("local") / "out"
    convert(golden / "tiny-1", out, **SMALL_SHARDS)
    return contents(out)


@pytest.fixture
def hub(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(from_hub, "ATTEMPTS", 4)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        for path in sorted((golden / "tiny-1").rglob("*")):
            if path.is_file() and (path.parent.name == "ckpt-0" or path.name == "config.json"):
                hub.add_file(SOURCE, str(path.relative_to(golden / "tiny-1")), path)
        yield hub


@pytest.mark.parametrize("discard", [False, True])
def test_the_folder_is_the_one_of_a_local_conversion(hub, expected, tmp_path, discard):
    convert(f"hf://{SOURCE}", tmp_path / "out", discard_source=discard, **SMALL_SHARDS)
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "fault",
    [Fault.status(500), Fault.status(503), Fault.drop(after=1000), Fault.short(missing=1), Fault.corrupt(at=5000)],
    ids=["500", "503", "dropped", "short", "flipped bit"],
)
def test_a_fault_on_the_way_is_tried_again(hub, expected, tmp_path, fault):
    hub.fail("GET", r"/cdn/", fault, times=2)
    convert(f"hf://{SOURCE}", tmp_path / "out", discard_source=True, **SMALL_SHARDS)
    assert hub.rules[0].times == 0
    assert contents(tmp_path / "out") == expected


def test_a_fault_that_stays_names_the_file_and_the_next_run_continues(hub, expected, tmp_path):
    hub.fail("GET", r"/cdn/", Fault.corrupt(at=5000), times=10_000)
    with pytest.raises(CheckpointError, match=r"tensor\d{5}_000.*(expected sha256|expected git)"):
        convert(f"hf://{SOURCE}", tmp_path / "out", discard_source=True, **SMALL_SHARDS)
    assert not (tmp_path / "out" / "config.json").exists()
    hub.rules.clear()
    convert(f"hf://{SOURCE}", tmp_path / "out", discard_source=True, **SMALL_SHARDS)
    assert contents(tmp_path / "out") == expected


def test_fetched_files_never_exceed_the_scratch_bound(hub, expected, tmp_path, monkeypatch):
    highest = 0

    def watch(self, *args, **kwargs):
        nonlocal highest
        files = (tmp_path / "out" / from_hub.SCRATCH_NAME).rglob("tensor*")
        highest = max(highest, sum(path.stat().st_size for path in files if path.is_file()))
        return download(self, *args, **kwargs)

    download = from_hub.HubCheckpoint.download
    monkeypatch.setattr(from_hub.HubCheckpoint, "download", watch)
    bound = 330_000
    convert(f"hf://{SOURCE}", tmp_path / "out", discard_source=True, scratch=bound, **SMALL_SHARDS)
    assert contents(tmp_path / "out") == expected
    assert 100_000 < highest <= bound


def test_a_bound_that_cannot_work_is_refused_before_any_download(hub, tmp_path):
    with pytest.raises(ConversionError, match=r"scratch: expected at least [\d,]+ bytes"):
        convert(f"hf://{SOURCE}", tmp_path / "out", discard_source=True, scratch="50KB", **SMALL_SHARDS)
    assert not hub.sent("GET", r"/cdn/")


def test_what_is_missing_is_said_before_any_download(hub, tmp_path):
    blobs = hub.repos[SOURCE].branches["main"]
    del blobs["ckpt-0/tensor00003_000"]
    hub.add_file(SOURCE, "ckpt-0/tensor00004_000", b"short")
    with pytest.raises(CheckpointError) as refused:
        convert(f"hf://{SOURCE}", tmp_path / "out", **SMALL_SHARDS)
    assert [problem.split(":")[0] for problem in refused.value.problems] == ["tensor00003_000", "tensor00004_000"]
    assert not hub.sent("GET", r"/cdn/")


@pytest.mark.parametrize("uri", ["hf://nobody/nothing", "hf://one-word", f"hf://{SOURCE}@no-such-revision"])
def test_an_address_that_leads_nowhere_is_refused(hub, tmp_path, uri):
    with pytest.raises(ConversionError, match=r"expected hf://owner/name|no such repository or revision"):
        convert(uri, tmp_path / "out", **SMALL_SHARDS)


@pytest.mark.parametrize("discard", [False, True])
def test_shards_go_up_one_by_one_and_the_index_last(hub, golden, expected, tmp_path, discard):
    convert(golden / "tiny-1", tmp_path / "out", push_to=TARGET, discard_output=discard, **SMALL_SHARDS)
    uploaded = {path: blob.sha256 for path, blob in hub.files(TARGET).items() if path != ".gitattributes"}
    assert uploaded == expected
    commits = hub.commits(TARGET)
    assert [len(commit.paths) for commit in commits[:-1]] == [1] * (len(commits) - 1)
    assert "model.safetensors.index.json" in commits[-1].paths
    assert "README.md" in commits[-1].paths or "README.md" not in expected
    left = {name for name in contents(tmp_path / "out") if name.endswith(".safetensors")}
    assert left == (set() if discard else {name for name in expected if name.endswith(".safetensors")})


def test_an_upload_that_broke_is_continued(hub, golden, expected, tmp_path):
    hub.fail("POST", r"/commit/", Fault.status(403), times=1)
    with pytest.raises(ConversionError, match="hub refused"):
        convert(golden / "tiny-1", tmp_path / "out", push_to=TARGET, discard_output=True, **SMALL_SHARDS)
    assert "model.safetensors.index.json" not in hub.files(TARGET)
    convert(golden / "tiny-1", tmp_path / "out", push_to=TARGET, discard_output=True, **SMALL_SHARDS)
    assert {path: blob.sha256 for path, blob in hub.files(TARGET).items() if path != ".gitattributes"} == expected


def test_a_pushed_shard_that_was_left_here_is_removed_first(hub, golden, expected, tmp_path, monkeypatch):
    """A run that was killed between the commit and the removal; the disk has no room for both shards."""
    settings = {"push_to": TARGET, "discard_output": True, **SMALL_SHARDS}
    out, unlink = tmp_path / "out", Path.unlink

    def killed(path, **options):
        if path.suffix == ".safetensors":
            raise KeyboardInterrupt
        unlink(path, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", killed)
        convert(golden / "tiny-1", out, **settings)
    (left,) = out.glob("*.safetensors")
    assert left.name in hub.files(TARGET)
    commit = HubSink._commit
    monkeypatch.setattr(HubSink, "_commit", lambda *args: pytest.fail("left") if left.exists() else commit(*args))
    convert(golden / "tiny-1", out, **settings)
    assert uploaded(hub) == expected and not list(out.glob("*.safetensors"))


def test_a_whole_model_is_not_overwritten(hub, golden, tmp_path):
    hub.add_file(TARGET, "model.safetensors.index.json", b"{}")
    with pytest.raises(ConversionError, match="found a whole model"):
        convert(golden / "tiny-1", tmp_path / "out", push_to=TARGET, **SMALL_SHARDS)
    assert not (tmp_path / "out").exists()


def uploaded(hub) -> dict[str, str]:
    return {path: blob.sha256 for path, blob in hub.files(TARGET).items() if path != ".gitattributes"}


@pytest.mark.parametrize("discard", [False, True])
def test_a_finished_upload_is_recognised(hub, golden, expected, tmp_path, discard):
    settings = {"push_to": TARGET, "discard_output": discard, **SMALL_SHARDS}
    convert(golden / "tiny-1", tmp_path / "out", **settings)
    commits = len(hub.commits(TARGET))
    assert convert(golden / "tiny-1", tmp_path / "out", **settings).is_finished
    assert len(hub.commits(TARGET)) == commits and uploaded(hub) == expected


@pytest.mark.parametrize("discard", [False, True])
def test_a_run_that_ended_after_its_last_commit_is_finished_by_the_next_one(
    hub, golden, expected, tmp_path, monkeypatch, discard
):
    """Killed between the last commit and the removal of the journal: everything is on the hub."""

    class KilledError(BaseException):
        pass

    def killed(self, out):
        folder_finished(self, out)
        raise KilledError

    folder_finished = HubSink.folder_finished
    settings = {"push_to": TARGET, "discard_output": discard, **SMALL_SHARDS}
    with monkeypatch.context() as patch:
        patch.setattr(HubSink, "folder_finished", killed)
        with pytest.raises(KilledError):
            convert(golden / "tiny-1", tmp_path / "out", **settings)
    assert (tmp_path / "out" / JOURNAL_NAME).is_file() and uploaded(hub) == expected
    commits = len(hub.commits(TARGET))
    convert(golden / "tiny-1", tmp_path / "out", **settings)
    assert not (tmp_path / "out" / JOURNAL_NAME).exists()
    assert len(hub.commits(TARGET)) == commits and uploaded(hub) == expected


def test_shards_that_were_uploaded_are_discarded_by_the_next_run(hub, golden, expected, tmp_path, monkeypatch):
    """Killed between the commit of a shard and its deletion."""
    settings = {"push_to": TARGET, "discard_output": True, **SMALL_SHARDS}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing_for(".safetensors", Path.unlink))
        with pytest.raises(ConversionError, match="cannot be written"):
            convert(golden / "tiny-1", tmp_path / "out", **settings)
    left = list((tmp_path / "out").glob("model-*.safetensors"))
    assert left and left[0].name in hub.files(TARGET)
    convert(golden / "tiny-1", tmp_path / "out", **settings)
    assert not list((tmp_path / "out").glob("model-*.safetensors")) and uploaded(hub) == expected


def failing_for(suffix: str, function):
    def call(path, *arguments, **keywords):
        if path.suffix == suffix:
            raise OSError(5, "Input/output error")
        return function(path, *arguments, **keywords)

    return call


def test_a_finished_local_conversion_is_pushed_by_the_same_command_with_push_to(hub, golden, expected, tmp_path):
    convert(golden / "tiny-1", tmp_path / "out", **SMALL_SHARDS)
    assert convert(golden / "tiny-1", tmp_path / "out", push_to=TARGET, **SMALL_SHARDS).is_finished
    assert uploaded(hub) == expected


def test_a_finished_conversion_from_the_hub_is_recognised(hub, expected, tmp_path):
    for finished in (False, True):
        plan = convert(f"hf://{SOURCE}", tmp_path / "out", discard_source=True, **SMALL_SHARDS)
        assert plan.is_finished == finished
        assert contents(tmp_path / "out") == expected


def test_no_repository_is_created_for_a_conversion_that_is_refused(hub, golden, tmp_path):
    with pytest.raises(ConversionError, match=r"tokenizer\.model: expected"):
        convert(golden / "tiny-1", tmp_path / "out", push_to=TARGET)
    assert TARGET not in hub.repos


SCRIPT = """
import sys
from grok1.conversion.convert import convert
convert(sys.argv[1], sys.argv[2], push_to=sys.argv[3], discard_source=True, discard_output=True,
        no_tokenizer=True, max_shard_size="100KB")
"""


def test_killed_on_the_way_from_hub_to_hub(hub, expected, tmp_path):
    command = [sys.executable, "-c", SCRIPT, f"hf://{SOURCE}", str(tmp_path / "out"), TARGET]
    environment = {**hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    for wanted in (1, 4):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(hub.commits(TARGET)) < wanted if TARGET in hub.repos else True:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert "model.safetensors.index.json" not in hub.files(TARGET)
    subprocess.run(command, env=environment, check=True)
    assert {path: blob.sha256 for path, blob in hub.files(TARGET).items() if path != ".gitattributes"} == expected
    assert not any(path.name.endswith((".partial", ".safetensors")) for path in (tmp_path / "out").rglob("*"))

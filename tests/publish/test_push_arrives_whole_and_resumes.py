"""`grok1 push` against a hub on loopback: what arrives, in which order, what a break costs, what it prints."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub, Fault
from typer.testing import CliRunner

from grok1.cli import app
from grok1.conversion.convert import convert
from grok1.errors import ConversionError
from grok1.model_card import hub as hub_module
from grok1.model_card.hub import push_folder, upload_plan


REPO = "user/grok-1-hf"


@pytest.fixture(scope="module")
def sound(golden, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "grok"
    convert(golden / "tiny-1", folder, no_tokenizer=True, max_shard_size="300kB")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {upload.path: (folder / upload.path).read_bytes() for upload in upload_plan(folder)}


def arrived(hub: FakeHub, branch: str = "main") -> dict[str, bytes]:
    return {path: blob.read() for path, blob in hub.files(REPO, branch).items()}


def test_everything_arrives_and_the_card_last(sound, monkeypatch):
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        address = push_folder(sound, REPO)
        assert arrived(hub) == content(sound)
        weights, last = hub.commits(REPO)
        assert weights.paths == tuple(u.path for u in upload_plan(sound) if u.is_weight) and len(weights.paths) > 2
        assert {"README.md", "config.json", "model.safetensors.index.json", "modeling_grok1.py"} <= set(last.paths)
        assert address.endswith(last.oid)
        assert not hub.repos[REPO].private


def test_large_files_go_in_parts(sound, monkeypatch):
    with FakeHub(part_size=100_000) as hub:
        hub.patch(monkeypatch)
        push_folder(sound, REPO)
        assert arrived(hub) == content(sound)
        assert len(hub.sent("PUT", r"/lfs/\w+/\d+$")) > 8


def test_a_private_repository_and_a_branch(sound, monkeypatch):
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        push_folder(sound, REPO, private=True, revision="bf16")
        assert hub.repos[REPO].private
        assert arrived(hub, "bf16") == content(sound)
        assert hub.files(REPO, "main") == {}
        assert {commit.branch for commit in hub.commits(REPO)} == {"bf16"}


def test_a_public_repository_is_not_taken_for_a_private_one(sound, monkeypatch):
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        hub.add_repo(REPO)
        with pytest.raises(ConversionError, match="expected a private repository, found a public one"):
            push_folder(sound, REPO, private=True)
        assert hub.objects == {} and hub.commits(REPO) == []


def test_after_a_break_only_what_is_missing_is_sent(sound, monkeypatch):
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        victim = sorted(sound.glob("*.safetensors"))[2]
        oid = hashlib.sha256(victim.read_bytes()).hexdigest()
        hub.fail("PUT", oid, Fault.status(500), times=100)
        with pytest.raises(ConversionError, match=r"failed.*(\n.*)*same command again"):
            push_folder(sound, REPO)
        assert hub.files(REPO) == {}, "no card and no index before the weights are there"
        hub.rules.clear()
        push_folder(sound, REPO)
        assert arrived(hub) == content(sound)
        done = [path for _, path, status, _ in hub.sent("PUT", "/lfs/") if status == 200]
        assert len(done) == len(set(done)) == len(list(sound.glob("*.safetensors")))


@pytest.mark.parametrize("fault", [Fault.status(503), Fault.drop()])
@pytest.mark.parametrize(("method", "route"), [("PUT", "/lfs/"), ("POST", "/preupload/"), ("POST", "/batch")])
def test_a_passing_fault_is_not_even_seen(sound, monkeypatch, method, route, fault):
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        hub.fail(method, route, fault, times=2)
        push_folder(sound, REPO)
        assert arrived(hub) == content(sound) and hub.rules[0].times == 0


@pytest.mark.parametrize("fault", [Fault.status(503), Fault.drop()])
def test_a_commit_that_failed_is_made_by_the_next_run(sound, monkeypatch, fault):
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        hub.fail("POST", "/commit/", fault)
        with pytest.raises(ConversionError, match="failed"):
            push_folder(sound, REPO)
        sent = len(hub.sent("PUT", "/lfs/"))
        push_folder(sound, REPO)
        assert arrived(hub) == content(sound) and len(hub.sent("PUT", "/lfs/")) == sent


def test_pushing_again_sends_nothing(sound, monkeypatch):
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        first = push_folder(sound, REPO)
        sent = len(hub.sent("PUT", "/lfs/"))
        assert push_folder(sound, REPO) == first
        assert len(hub.sent("PUT", "/lfs/")) == sent and len(hub.commits(REPO)) == 2


def test_a_changed_file_alone_is_committed(sound, monkeypatch, tmp_path):
    folder = tmp_path / "grok"
    shutil.copytree(sound, folder)
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        push_folder(folder, REPO)
        with (folder / "README.md").open("a") as card:
            card.write("One more line.")
        push_folder(folder, REPO)
        assert hub.commits(REPO)[-1].paths == ("README.md",)
        assert arrived(hub) == content(folder)


def test_xet_the_hubs_own_storage(sound, tmp_path, monkeypatch):
    """hf_xet's pipeline with its local store: a refused commit is tried again, a second run sends none."""
    with FakeHub(xet_store=tmp_path / "xet") as hub:
        hub.fail("POST", "/commit/", Fault.status(503), times=1)
        result = subprocess.run(
            [sys.executable, "-m", "grok1", "push", str(sound), REPO, "--revision", "v1"],
            env=hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-2] == f"{hub.endpoint}/{REPO}/commit/{hub.commits(REPO)[-1].oid}"
        assert TOKEN not in result.stdout + result.stderr
        assert "%|" not in result.stderr, "no progress bars where there is no terminal"
        files = hub.files(REPO, "v1")
        assert {path: blob.size for path, blob in files.items()} == {u.path: u.nbytes for u in upload_plan(sound)}
        assert all(
            blob.sha256 == hashlib.sha256((sound / path).read_bytes()).hexdigest() for path, blob in files.items()
        )
        assert ["README.md" in commit.paths for commit in hub.commits(REPO)] == [False, True]
        assert hub.sent("PUT", "") == [] and any((tmp_path / "xet").iterdir())
        hub.patch(monkeypatch)
        push_folder(sound, REPO, revision="v1")
        assert len(hub.commits(REPO)) == 2


@pytest.fixture
def command(monkeypatch):
    """The command in this process, without the fresh process that every check starts."""
    monkeypatch.setattr(hub_module, "_clean_load", lambda folder: [])
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_dry_run_shows_everything_and_touches_nothing(sound, monkeypatch, command):
    with FakeHub() as hub:
        hub.patch(monkeypatch, token=None)
        result = command("push", sound, REPO, "--dry-run", "--private")
        assert result.exit_code == 0, result.output
        assert hub.requests == []
        for upload in upload_plan(sound):
            assert upload.path in result.stdout and f"{upload.nbytes:,}" in result.stdout
        total = sum(upload.nbytes for upload in upload_plan(sound))
        assert f"{total:,} bytes, to {REPO}, private" in result.stdout and "nothing was sent" in result.stdout


def test_a_folder_with_problems_is_not_sent(sound, tmp_path, monkeypatch, command):
    folder = tmp_path / "grok"
    shutil.copytree(sound, folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "README.md").unlink()
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        result = command("push", folder, REPO)
        assert result.exit_code == 1
        assert "pytorch_model.bin" in result.stderr and "README.md: missing" in result.stderr
        assert "2 problem(s); nothing was sent" in result.stderr
        assert hub.requests == []


@pytest.mark.parametrize("token", [None, "hf_wrong_but_still_a_secret"])
def test_no_token_is_ever_printed(sound, monkeypatch, command, token):
    with FakeHub() as hub:
        hub.patch(monkeypatch, token)
        result = command("--debug", "push", sound, REPO)
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert "hf_wrong" not in result.output and TOKEN not in result.output
        assert ("hf auth login" in result.stderr) == (token is None)


def test_ctrl_c_says_that_the_command_resumes(sound, monkeypatch, command):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub_module, "push_folder", interrupted)
    result = command("push", sound, REPO)
    assert result.exit_code == 130
    assert "run the same command again to resume" in result.stderr


def test_a_hub_that_cannot_be_reached(sound, monkeypatch):
    hub = FakeHub()
    hub.patch(monkeypatch)
    hub.server.server_close()
    with pytest.raises(ConversionError, match=rf"upload to {REPO} failed"):
        push_folder(sound, REPO)


def test_a_file_that_did_not_arrive_is_noticed(sound, monkeypatch):
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        original = hub.commit

        def lossy(repo, branch, summary, paths):
            repo.branches[branch].pop("config.json", None)
            return original(repo, branch, summary, paths)

        hub.commit = lossy
        with pytest.raises(ConversionError) as caught:
            push_folder(sound, REPO)
        assert [p.split(":")[0] for p in caught.value.problems] == ["config.json"]


def test_the_models_own_push_to_hub(sound, monkeypatch):
    """Weights, config and code; the repository loads with trust_remote_code, so the code must be in it."""
    from modeling_grok1 import Grok1ForCausalLM

    model = Grok1ForCausalLM.from_pretrained(sound)
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        model.push_to_hub(REPO, private=True)
        files = hub.files(REPO)
        assert {"config.json", "model.safetensors", "modeling_grok1.py", "configuration_grok1.py"} <= set(files)
        assert hub.repos[REPO].private
        again = Grok1ForCausalLM.from_pretrained(REPO, cache_dir=str(sound.parent / "cache"))
        for name, tensor in model.state_dict().items():
            assert tensor.equal(again.state_dict()[name]), name

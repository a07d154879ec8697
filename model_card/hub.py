"""From a converted folder to a repository on the hub: checks everything, then uploads, the card last."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from grok1.errors import ConversionError
from grok1.files import BLOCK_BYTES, SUMS_NAME, Progress, StoredTensor, read_model_folder, read_sums, sha256_of
from grok1.gguf_files import is_gguf, nonfinite_numbers, read_gguf
from grok1.model_card.card import name_repository


if TYPE_CHECKING:
    from huggingface_hub import HfApi


# huggingface_hub keeps its upload and download notes here; it never sends them.
CACHE = ".cache"
WEIGHTS = (".safetensors", ".gguf")
WEIGHT_PATTERNS = [f"*{suffix}" for suffix in WEIGHTS]
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".dill", ".marshal"}
LEFTOVERS = (".tmp", ".part", ".partial", ".incomplete", ".lock", ".journal", ".swp", "~")
HIDDEN = {".gitattributes", ".gitignore"}
REQUIRED = ("config.json", "README.md", "LICENSE")
WRITTEN_BY_CARD = ("README.md", "LICENSE")
# What transformers.Trainer leaves in its folder and nobody needs to load the model; the first is a pickle.
TRAINER_FILE, TRAINER_FOLDER = "training_args.bin", re.compile(r"checkpoint-\d+")
BLOCK = 32 << 20
# What a machine without the package does with the folder. Prints one line per problem.
CLEAN_LOAD = """
import sys
sys.modules["modeling_grok1"] = None
folder, tokenizer = sys.argv[1], sys.argv[2] == "True"
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
try:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    print("loaded", type(model).__name__)
except Exception as error:
    print(f"problem config.json and code: {type(error).__name__}: {error}".replace("\\n", " "))
if tokenizer:
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        text = "def f(x):\\n    return x  # caf\\u00e9 \\u4f60"
        found = loaded.decode(loaded(text)["input_ids"])
        if found != text:
            print(f"problem tokenizer.json: expected {text!r} back, found {found!r}")
        if len(loaded) > config.vocab_size:
            print(f"problem tokenizer.json: {len(loaded)} pieces, the model has rows for {config.vocab_size}")
    except Exception as error:
        print(f"problem tokenizer: {type(error).__name__}: {error}".replace("\\n", " "))
"""


@dataclass(frozen=True)
class Upload:
    """One file that will be sent: its path in the repository, and its bytes."""

    path: str
    nbytes: int
    is_weight: bool


def folder_files(folder: Path) -> list[Path]:
    """Every file of the folder, sorted, without huggingface_hub's `.cache` and what is `left_here`."""
    skipped = {CACHE, *left_here(folder)}
    return sorted(
        file
        for file in Path(folder).rglob("*")
        if file.relative_to(folder).parts[0] not in skipped and (file.is_symlink() or not file.is_dir())
    )


def left_here(folder: Path) -> list[str]:
    """Names in a folder that the Trainer wrote for itself and that are not sent: training_args.bin, checkpoint-N."""
    return sorted(
        entry.name
        for entry in Path(folder).iterdir()
        if (entry.name == TRAINER_FILE and entry.is_file())
        or (TRAINER_FOLDER.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink())
    )


def upload_plan(folder: Path) -> list[Upload]:
    """What will be sent, in the order of the commits: weights, then everything else."""
    uploads = [
        Upload(file.relative_to(folder).as_posix(), file.stat().st_size, file.suffix in WEIGHTS)
        for file in folder_files(folder)
    ]
    return sorted(uploads, key=lambda upload: (not upload.is_weight, upload.path))


def check_folder(
    folder: Path, progress: Progress = lambda done, total: None, *, trust_remote_code: bool = False
) -> list[str]:
    """Everything that would make the folder useless or harmful on the hub, one line per problem; none if it is fit.

    Checked are: the index against files and headers, or the headers of one GGUF model; that there are no pickles,
    links, leftovers or hidden files; that the code is this package's; config, code and tokenizer in a fresh process
    without this package, where there is code; that every number of every tensor is finite (read in blocks of 32 MiB,
    one file per thread) and that every file has its recorded sum.

    Args:
        folder: a converted folder.
        progress: called with (bytes of weights read, bytes in all) after each block, from any thread.
        trust_remote_code: accept code in the folder that is not this package's, and run it.
    """
    folder = Path(folder)
    tensors: dict[str, StoredTensor] = {}
    problems = [
        f"{name}: missing" + (f"; `grok1 card {folder}` writes it" if name in WRITTEN_BY_CARD else "")
        for name in REQUIRED
        if not (folder / name).is_file()
    ]
    try:
        tensors = read_gguf(folder).tensors if is_gguf(folder) else read_model_folder(folder)
    except ConversionError as error:
        problems += error.problems or [error.summary]
    else:
        shards = {tensor.file for tensor in tensors.values()}
        problems += [f"{file.name}: in no index" for file in folder.glob("*.safetensors") if file not in shards]
    for file in folder_files(folder):
        problems += _file_problems(folder, file)
    if is_gguf(folder):
        problems += [] if trust_remote_code else _foreign_code(folder)
    elif any(not (folder / name).is_file() for name in ("configuration_grok1.py", "modeling_grok1.py")):
        problems.append(
            "configuration_grok1.py and modeling_grok1.py: expected beside config.json, for trust_remote_code"
        )
    else:
        foreign = [] if trust_remote_code else _foreign_code(folder)
        problems += foreign
        if (folder / "config.json").is_file() and not foreign:
            problems += _clean_load(folder)
    found, sums = _scan(tensors, progress)
    problems += found
    # A damaged file is named once, by what is wrong with it.
    return problems + [
        problem for name, problem in _sum_problems(folder, sums) if not any(name in p for p in problems)
    ]


def push_folder(
    folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None, token: str | None = None
) -> str:
    """Uploads a folder to the hub; returns the address of its last commit.

    The weights go first, in commits of their own; then index, config, code and card in one last commit, so that a
    repository with a card is complete. Called again after an interruption, it resumes: what arrived is not sent again.
    The name of the repository is put into the commands of the folder's card. The folder is not checked here
    (`check_folder`).

    Args:
        folder: a converted folder.
        repo_id: "USER/NAME".
        private: make the repository private; one that exists and is public is refused.
        revision: branch to push to, created if it does not exist; the main branch where None.
        token: of the hub; the saved one (`hf auth login`, HF_TOKEN) where None.

    Raises:
        ConversionError: no token, a public repository where a private one was asked for, files that did not arrive, or
            a hub that refused or could not be reached (huggingface_hub's error is the cause).
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.hf_api import RepoFile

    folder = Path(folder)
    token = token or get_token()
    if token is None:
        raise ConversionError(
            "There is no token for the hub.",
            next_step="Log in with `hf auth login`, or set HF_TOKEN; it needs write access.",
        )
    api = HfApi(token=token, library_name="modeling-grok1")
    try:
        _create(api, repo_id, private, revision)
        name_repository(folder, repo_id)
        address = _upload(api, folder, repo_id, revision)
        found = api.list_repo_tree(repo_id, recursive=True, revision=revision)
        sizes = {entry.path: entry.size for entry in found if isinstance(entry, RepoFile)}
    except (HTTPError, RuntimeError) as error:
        raise ConversionError(
            f"The upload to {repo_id} failed: {error.__cause__ or error}",
            next_step="Run the same command again: what has arrived is not sent again.",
        ) from error
    problems = [
        f"{upload.path}: expected {upload.nbytes:,} bytes, found {sizes.get(upload.path, 'none')}"
        for upload in upload_plan(folder)
        if sizes.get(upload.path) != upload.nbytes
    ]
    if problems:
        raise ConversionError(
            f"{repo_id} does not hold what was sent:", problems, "Push again: what has arrived is kept."
        )
    return address


def _create(api: HfApi, repo_id: str, private: bool, revision: str | None) -> None:
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ConversionError(
            f"{repo_id}: expected a private repository, found a public one.",
            next_step="Take another name, or make it private in its settings on the hub.",
        )
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _upload(api: HfApi, folder: Path, repo_id: str, revision: str | None) -> str:
    """Uploads the weights, then the rest; returns the address of the last commit."""
    left = left_here(folder)
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        allow_patterns=WEIGHT_PATTERNS,
        ignore_patterns=[f"{name}/*" for name in left],
        commit_message="Add the weights of Grok-1",
    )
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        ignore_patterns=[*WEIGHT_PATTERNS, f"{CACHE}/*", *left, *(f"{name}/*" for name in left)],
        commit_message="Add index, config, tokenizer, code and model card",
    )
    return commit.commit_url


def _file_problems(folder: Path, file: Path) -> Iterator[str]:
    name = file.relative_to(folder).as_posix()
    if file.is_symlink():
        yield f"{name}: a link to {os.readlink(file)}; expected a file"
        return
    if not file.is_file():
        yield f"{name}: neither a file nor a folder"
        return
    if any(part.startswith(".") and part not in HIDDEN for part in file.relative_to(folder).parts):
        yield f"{name}: hidden; left over from a conversion, or not meant for the hub"
    elif name.endswith(LEFTOVERS):
        yield f"{name}: left over from a conversion that did not finish"
    elif file.suffix == ".pyc":
        yield f"{name}: compiled Python"
    elif file.suffix in PICKLES or (file.suffix not in WEIGHTS and _looks_pickled(file)):
        yield f"{name}: a pickle, or an archive that may hold one, can run code when it is read"


def _looks_pickled(file: Path) -> bool:
    with file.open("rb") as stream:
        head = stream.read(2)
    return (head[:1] == b"\x80" and head[1:] in b"\x02\x03\x04\x05" and len(head) == 2) or head == b"PK"


def _foreign_code(folder: Path) -> list[str]:
    """Code that would run with trust_remote_code and is not this package's, one line per file or entry of auto_map."""
    own = {file.name: file.read_bytes() for file in resources.files("modeling_grok1").iterdir() if file.is_file()}
    problems = [
        f"{file.relative_to(folder).as_posix()}: not the code of this package, so it was not run; convert again, or "
        "review it and use --trust-remote-code"
        for file in folder_files(folder)
        if file.suffix == ".py" and not file.is_symlink() and file.read_bytes() != own.get(file.name)
    ]
    for name in ("config.json", "tokenizer_config.json"):
        try:
            auto_map = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map") or {}
            values = [value if isinstance(value, list) else [value] for value in auto_map.values()]
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        problems += [
            f"{name}: auto_map names {target!r}: expected a class of this package's files"
            for target in itertools.chain(*values)
            if target is not None and (not isinstance(target, str) or f"{target.split('.')[0]}.py" not in own)
        ]
    return problems


def _sum_problems(folder: Path, sums: dict[str, str]) -> list[tuple[str, str]]:
    """By name, the files whose bytes do not have their recorded sum; `sums` are those of the shards."""
    if not (folder / SUMS_NAME).is_file():
        return []
    try:
        recorded = read_sums(folder / SUMS_NAME)
    except (OSError, ValueError) as error:
        return [(SUMS_NAME, f"{SUMS_NAME}: expected SHA-256 sums, found {error}")]
    return [
        (name, f"{name}: expected SHA-256 {recorded[name]} as in {SUMS_NAME}, found {found}")
        for name in sorted(recorded)
        if (folder / name).is_file() and (found := sums.get(name) or sha256_of(folder / name)) != recorded[name]
    ]


def _clean_load(folder: Path) -> list[str]:
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    with tempfile.TemporaryDirectory() as home:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH"))}
        environment |= {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        result = subprocess.run(
            [sys.executable, "-I", "-W", "ignore", "-c", CLEAN_LOAD, str(folder.resolve()), str(has_tokenizer)],
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    lines = result.stdout.splitlines()
    problems = [line.removeprefix("problem ") for line in lines if line.startswith("problem ")]
    if not problems and "loaded Grok1ForCausalLM" not in lines:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        problems.append(f"config.json and code: expected a Grok1ForCausalLM in a clean process, found {last}")
    return problems


def _scan(tensors: dict[str, StoredTensor], progress: Progress) -> tuple[list[str], dict[str, str]]:
    """Reads every shard once: the tensors with NaN or infinity, one line each, and the SHA-256 of each file."""
    by_file: dict[Path, list[str]] = {}
    done, total, lock = 0, sum(tensor.nbytes for tensor in tensors.values()), Lock()
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.file, []).append(name)

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress(done, total)

    def scan(file: Path) -> tuple[list[str], str]:
        digest, found = hashlib.sha256(), []
        names = sorted((name for name in by_file[file] if tensors[name].nbytes), key=lambda name: tensors[name].offset)
        with file.open("rb") as stream:
            for name in names:
                tensor, bad, missing = tensors[name], 0, 0
                # The header, or the zeros after a tensor of GGUF; safetensors have no gaps.
                digest.update(stream.read(tensor.offset - stream.tell()))
                step = BLOCK // BLOCK_BYTES.get(tensor.dtype, 1) * BLOCK_BYTES.get(tensor.dtype, 1)
                for begin in range(0, tensor.nbytes, step):
                    block = stream.read(wanted := min(step, tensor.nbytes - begin))
                    digest.update(block)
                    missing += wanted - len(block)
                    bad += 0 if missing else nonfinite_numbers(block, tensor.dtype)
                    advance(len(block))
                if missing:
                    found.append(f"{name} in {file.name}: {missing:,} of {tensor.nbytes:,} bytes cannot be read")
                if bad:
                    found.append(f"{name} in {file.name}: {bad:,} of {math.prod(tensor.shape):,} are NaN or infinite")
            digest.update(stream.read())
        return found, digest.hexdigest()

    files = sorted(by_file)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(scan, files))
    sums = {file.name: digest for file, (_, digest) in zip(files, results, strict=True)}
    return [problem for problems, _ in results for problem in problems], sums

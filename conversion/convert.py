"""xAI's checkpoint to a folder for the hub: bounded memory, restartable, byte for byte reproducible.

    plan      what is there, what will be written, every problem at once; nothing is touched
    write     shard after shard: read slabs of a source file, dequantise and turn blocks on all cores, write in place
    finish    config, code, tokenizer, card, and last the index: without it no loader takes the folder for a model

A shard is written under a temporary name and gets its own when its bytes are on the disk. So a run that was killed is
continued by the same command, and the folder is the same as if it had not been.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from transformers import GenerationConfig

from grok1.conversion.journal import PARTIAL_SUFFIX, claimed, output_problems, sync_folder
from grok1.conversion.names import (
    BITS,
    DTYPES,
    LAYOUTS,
    HubTensor,
    checkpoint_entries,
    hub_tensors,
)
from grok1.conversion.packing import group_size_problems
from grok1.conversion.shards import INDEX_NAME, Shard, index_text, parse_size, plan_shards
from grok1.conversion.streaming import BlockStream, available_cores
from grok1.conversion.tokenizer import check_supported, convert_tokenizer, read_sentencepiece
from grok1.conversion.xai.checkpoint import (
    TensorFile,
    examine_folder,
    list_files,
    read_tensor_file,
    resolve_folder,
)
from grok1.errors import CheckpointError, ConversionError
from grok1.model_card.card import write_card
from modeling_grok1.configuration_grok1 import MLX_FILE, GrokConfig
from modeling_grok1.packing_grok1 import GROUP_SIZES, quantization_dict


TOKENIZER_NAME = "tokenizer.model"
TOKENIZER_HELP = (
    "Fetch it from https://github.com/xai-org/grok-1/raw/main/tokenizer.model, put it beside the checkpoint or name "
    "it with --tokenizer; --no-tokenizer goes on without."
)

# Code, tokenizer, card: a generous bound.
COMPANION_BYTES = 32 * 2**20

Progress = Callable[[int, int], None]


class Source(Protocol):
    """Where the files of a checkpoint come from."""

    def scale_blocks(self) -> dict[int, int]:
        """Row blocks with a scale of their own, by index, for each quantised file."""

    def identity(self) -> dict[str, Any]:
        """What tells this source from another one, as JSON values, by file."""

    def schedule(self, indices: Sequence[int]) -> None:
        """Announces the files that will be opened, in order. A file may be opened again until it is released."""

    def open(self, index: int) -> TensorFile:
        """The file, ready to be read; may take its time."""

    def release(self, index: int) -> None:
        """No unfinished shard needs this file any more."""


class Sink:
    """What happens to finished files: nothing, in a local conversion."""

    keeps_shards = True  # whether a finished shard stays on this disk

    def has(self, shard: Shard, out: Path) -> bool:
        """Whether the shard was finished by an earlier run: it has its final name, its size and its header."""
        path = out / shard.name
        if not path.is_file() or path.stat().st_size != shard.nbytes:
            return False
        with path.open("rb") as file:
            return file.read(len(shard.header)) == shard.header

    def shard_finished(self, path: Path) -> None:
        """Called once for each shard, when it lies on the disk under its final name."""

    def folder_finished(self, out: Path) -> None:
        """Called last, when everything else is there."""


@dataclass(frozen=True)
class FolderSource:
    """A checkpoint on this machine."""

    files: dict[int, TensorFile]

    def scale_blocks(self) -> dict[int, int]:
        return {index: file.scales.shape[-2] for index, file in self.files.items() if file.scales is not None}

    def identity(self) -> dict[str, Any]:
        return {file.path.name: [file.size, file.mtime_ns] for file in self.files.values()}

    def schedule(self, indices: Sequence[int]) -> None:
        pass

    def open(self, index: int) -> TensorFile:
        self.files[index].check_unchanged()
        return self.files[index]

    def release(self, index: int) -> None:
        pass


@dataclass(frozen=True)
class Plan:
    """A conversion that was checked and can begin.

    Args:
        out: the folder to be written.
        dtype, layout, max_shard_size: as asked for, the size in bytes.
        config: as it will be written.
        tokenizer: tokenizer.model, or None to go without.
        shards: every file of weights, complete with header and offsets.
        finished: names of the shards that an earlier run left.
        record: what the journal says.
    """

    out: Path
    dtype: str
    layout: str
    max_shard_size: int
    config: GrokConfig
    tokenizer: Path | None
    shards: list[Shard]
    finished: frozenset[str]
    record: dict[str, Any]
    scratch_bytes: int = 0
    keeps_shards: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def finished_bytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards if shard.name in self.finished)

    @property
    def needed_bytes(self) -> int:
        """Free disk that the rest of the conversion needs."""
        remaining = sorted((shard.nbytes for shard in self.shards if shard.name not in self.finished), reverse=True)
        # A shard that is discarded goes when it was uploaded, and by then the next one is begun.
        return sum(remaining if self.keeps_shards else remaining[:2]) + self.scratch_bytes + COMPANION_BYTES


def convert(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    layout: str = "hub",
    config: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    no_tokenizer: bool = False,
    max_shard_size: int | str = "5GB",
    group_size: int | None = None,
    discard_source: bool = False,
    scratch: int | str = "16GB",
    push_to: str | None = None,
    private: bool = False,
    discard_output: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Converts xAI's checkpoint in `src` to a folder `out` that Transformers loads and the hub takes.

    Run again with the same arguments after an interruption, it goes on with the first shard that is not finished.

    Args:
        src: the folder with the tensor files, or the one above its ckpt-0/ or ckpt/; or hf://owner/name[@revision].
        out: a folder that does not exist, is empty, or holds an unfinished conversion of the same source and settings.
        dtype: "bfloat16", "float32", "int8" (keeps xAI's values and scales) or "int4". Norms and routers are float32
            always.
        layout: "hub" (one tensor an expert), "fused" (one an expert matrix of a layer), "hpcai" or "keyfan".
        config: a config.json; by default the one in `src` or its parent, or the release's if the sizes fit.
        tokenizer: a tokenizer.model; by default the one in `src` or its parent.
        no_tokenizer: go without a tokenizer.
        max_shard_size: bytes of tensors in a shard, or "5GB", "4GiB"; a larger tensor has a shard of its own.
        group_size: inputs per scale of int8 and int4, 128 by default; engines have kernels for 128, 64 and 32.
        discard_source: delete a file fetched from the hub when no unfinished shard needs it. Never touches a folder.
        scratch: bound on the disk that fetched files take with `discard_source`.
        push_to: a repository on the hub that gets each shard when it is finished, index and card last.
        private: whether that repository, if it is new, is private.
        discard_output: delete a shard here when the hub has it.
        jobs: worker threads; by default one a core.
        progress: called with (bytes written, bytes in all) after each block, from any thread.

    Returns:
        The plan that was carried out.

    Raises:
        CheckpointError: the source is not, or not wholly, a checkpoint of these sizes; it lists every problem.
        ConversionError: anything else that was refused, with all problems; or the run could not be finished, in which
            case finished shards stay and the same call continues.
    """
    from grok1.conversion.from_hub import SCHEME, plan_hub
    from grok1.conversion.to_hub import HubSink

    if discard_output and not push_to:
        raise ConversionError("discard_output: expected a repository to push to, found none", next_step="See push_to.")
    sink = HubSink(push_to, private, discard_output) if push_to else Sink()
    settings: dict[str, Any] = {
        "dtype": dtype,
        "layout": layout,
        "config": config,
        "tokenizer": tokenizer,
        "no_tokenizer": no_tokenizer,
        "max_shard_size": max_shard_size,
        "group_size": group_size,
        "sink": sink,
    }
    if not os.fspath(src).startswith(SCHEME):
        plan, source = plan_folder(src, out, **settings)
        run(plan, source, sink=sink, jobs=jobs, progress=progress)
        return plan
    plan, hub = plan_hub(os.fspath(src), Path(out), discard=discard_source, scratch=scratch, **settings)
    finished = False
    try:
        run(plan, hub, sink=sink, jobs=jobs, progress=progress)
        finished = True
    finally:
        hub.close(finished)
    return plan


# ---------------------------------------------------------------------------------------------------------------------
# Plan


def plan_folder(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    layout: str = "hub",
    config: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    no_tokenizer: bool = False,
    max_shard_size: int | str = "5GB",
    group_size: int | None = None,
    sink: Sink | None = None,
    check_space: bool = True,
) -> tuple[Plan, FolderSource]:
    """Checks everything that `convert` (see there) needs, before anything is touched; `check_space`: disk too.

    Raises:
        CheckpointError, ConversionError: with all problems at once.
    """
    src, out = Path(src), Path(out)
    problems = setting_problems(dtype, layout, max_shard_size, group_size)
    try:
        folder = resolve_folder(src)
        grok_config = resolve_config(src, folder, config)
    except ConversionError as error:
        raise type(error)(error.summary, error.problems + problems, error.next_step) from None
    model_path, tokenizer_problems = resolve_tokenizer(src, folder, tokenizer, no_tokenizer, grok_config.vocab_size)
    problems += tokenizer_problems
    files, source_problems = examine_folder(folder, checkpoint_entries(grok_config))
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        problems.append(f"{out}: expected a folder outside the checkpoint, found one in {folder}")
    source = FolderSource(files)
    plan = None
    if not setting_problems(dtype, layout, max_shard_size, group_size):
        shard_size = parse_size(max_shard_size)
        plan, place_problems = make_plan(
            *(source, out, grok_config, model_path, dtype, layout, shard_size, sink), group_size=group_size
        )
        problems += place_problems
        problems += space_problems(plan) if check_space else []
    if source_problems:
        next_step = "Fetch damaged or missing files again. If many shapes are wrong, the config is: see --config."
        raise CheckpointError(f"{src}: cannot be converted", source_problems + problems, next_step)
    if problems or plan is None:
        raise ConversionError(f"{src}: cannot be converted to {out}", problems)
    return plan, source


def setting_problems(dtype: str, layout: str, max_shard_size: int | str, group_size: int | None = None) -> list[str]:
    """What is wrong with the settings of a conversion, one line each."""
    problems = []
    if dtype not in DTYPES:
        problems.append(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    if layout not in LAYOUTS:
        problems.append(f"layout: expected one of {', '.join(LAYOUTS)}, found {layout!r}")
    if dtype in BITS and layout != "hub":
        problems.append(f"layout: expected hub with dtype {dtype} (no engine reads another), found {layout!r}")
    if group_size is not None and dtype not in BITS:
        problems.append(f"group_size: expected with dtype {' or '.join(BITS)} only, found with {dtype}")
    if group_size is not None and group_size < 1:
        problems.append(f"group_size: expected a positive number, found {group_size}")
    try:
        parse_size(max_shard_size)
    except ValueError as error:
        problems.append(str(error))
    return problems


def resolve_config(src: Path, folder: Path, given: str | os.PathLike[str] | None = None) -> GrokConfig:
    """The config of a checkpoint: `given`, else config.json in `src` or its parent, else the release's if it fits.

    Raises:
        ConversionError: the file is not a Grok-1's config, or there is none and the checkpoint is not the release.
    """
    candidates = [Path(given)] if given else _beside(src, folder, "config.json")
    for path in candidates:
        if given or path.is_file():
            return read_config(path)
    release = GrokConfig()
    embedding = folder / "tensor00000_000"
    expected = (release.vocab_size, release.hidden_size)
    found = f"no {embedding.name}"
    if embedding.exists():
        found = f"{read_tensor_file(embedding).weight.shape}"
        if found == str(expected):
            return release
    raise ConversionError(
        f"{src}: no config.json, and not the released checkpoint",
        [
            f"config.json: expected one of {', '.join(map(str, candidates))}, found none",
            f"embedding: expected {expected} as in the release, found {found} among {len(list_files(folder))} files",
        ],
        "Name the sizes of this checkpoint with --config FILE.",
    )


def _beside(src: Path, folder: Path, name: str) -> list[Path]:
    """Where a companion of the checkpoint is looked for, in order."""
    return list(dict.fromkeys(place / name for place in (src, folder, src.absolute().parent)))


def read_config(path: Path) -> GrokConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, found {type(values).__name__}")
        model_type = values.get("model_type", GrokConfig.model_type)
        if model_type != GrokConfig.model_type:
            raise ValueError(f"model_type: expected {GrokConfig.model_type!r}, found {model_type!r}")
        for key in ("model_type", "transformers_version", "quantization_config", "_name_or_path"):
            values.pop(key, None)
        return GrokConfig(**values)
    except (OSError, ValueError, TypeError) as error:
        raise ConversionError(f"{path}: not the config of a Grok-1", [f"{path.name}: {error}"]) from None


def resolve_tokenizer(
    src: Path, folder: Path, given: str | os.PathLike[str] | None, without: bool, vocab_size: int
) -> tuple[Path | None, list[str]]:
    """tokenizer.model: `given`, else the one in `src` or its parent; and what is wrong with it, one line each."""
    if without:
        return None, [] if given is None else ["tokenizer: expected a file or none at all, found both asked for"]
    candidates = [Path(given)] if given else _beside(src, folder, TOKENIZER_NAME)
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        where = ", ".join(map(str, candidates))
        return None, [f"{TOKENIZER_NAME}: expected {where}, found none. {TOKENIZER_HELP}"]
    try:
        problems = check_supported(read_sentencepiece(path), vocab_size)
    except ConversionError as error:
        problems = error.problems or [error.summary]
    return path, [f"{path}: {problem}" for problem in problems]


def make_plan(
    source: Source,
    out: Path,
    config: GrokConfig,
    tokenizer: Path | None,
    dtype: str,
    layout: str,
    max_shard_size: int,
    sink: Sink | None = None,
    scratch_bytes: int = 0,
    group_size: int | None = None,
) -> tuple[Plan, list[str]]:
    """The plan for a source, and what is wrong with the place it goes to but for its size, one line each.

    `scratch_bytes` is the disk that the source takes for itself while it is read.
    """
    sink = sink or Sink()
    released = {entry.index: entry.kind.scale_blocks for entry in checkpoint_entries(config) if entry.kind.quantised}
    blocks = released | source.scale_blocks()
    group_size = group_size or GROUP_SIZES[0]
    problems = []
    if dtype in BITS:
        problems = group_size_problems(checkpoint_entries(config), dtype, group_size, blocks)
    shards = plan_shards(hub_tensors(config, layout, dtype, group_size).values(), max_shard_size)
    written = written_config(config, dtype, group_size)
    record = {
        "settings": {
            "dtype": dtype,
            "layout": layout,
            "max_shard_size": max_shard_size,
            "config": json.loads(written.to_json_string(use_diff=False)),
            "tokenizer": None if tokenizer is None else hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
            "version": version("modeling-grok1"),
        },
        "source": source.identity(),
    }
    problems += output_problems(out, record)
    finished = frozenset(shard.name for shard in shards if not problems and sink.has(shard, out))
    plan = Plan(
        *(out, dtype, layout, max_shard_size, written, tokenizer, shards, finished, record),
        scratch_bytes=scratch_bytes,
        keeps_shards=sink.keeps_shards,
    )
    return plan, problems


def space_problems(plan: Plan) -> list[str]:
    """One line if the disk has no room for what is not finished, else none."""
    free, needed = free_bytes(plan.out, plan.shards), plan.needed_bytes
    if free >= needed:
        return []
    return [f"{plan.out}: expected {needed:,} free bytes on the disk, found {free:,} ({needed - free:,} too few)"]


def written_config(config: GrokConfig, dtype: str, group_size: int) -> GrokConfig:
    """The config as the folder has it: the dtype that was written, and how packed weights are read."""
    written = copy.deepcopy(config)
    written.architectures = ["Grok1ForCausalLM"]
    written.dtype = "bfloat16" if dtype in BITS else dtype
    if dtype in BITS:
        written.quantization_config = quantization_dict(BITS[dtype], group_size)
    return written


def free_bytes(out: Path, shards: Sequence[Shard] = ()) -> int:
    """Free bytes where `out` is or will be, counting half-written shards, which are begun again."""
    place = out
    while not place.exists():
        place = place.absolute().parent
    partial = [place / f"{shard.name}{PARTIAL_SUFFIX}" for shard in shards] if place == out else []
    return shutil.disk_usage(place).free + sum(path.stat().st_blocks * 512 for path in partial if path.is_file())


# ---------------------------------------------------------------------------------------------------------------------
# Write


def run(
    plan: Plan,
    source: Source,
    *,
    sink: Sink | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Carries out a plan.

    Raises:
        CheckpointError: a source file changed or cannot be read any more.
        ConversionError: the output cannot be written, or another process is writing it.
        KeyboardInterrupt: passed on. After any of these, running the same plan again continues.
    """
    sink = sink or Sink()
    try:
        with claimed(plan.out, plan.record):
            # Another run may have worked there between the plan and the lock.
            finished = frozenset(shard.name for shard in plan.shards if sink.has(shard, plan.out))
            plan = dataclasses.replace(plan, finished=finished)
            for shard in plan.shards:
                (plan.out / f"{shard.name}{PARTIAL_SUFFIX}").unlink(missing_ok=True)
            with _Writer(plan, source, sink, jobs or available_cores(), progress) as writer:
                writer.write()
            write_companions(plan)
            sink.folder_finished(plan.out)
    except OSError as error:
        raise _unwritable(plan.out, error) from error


def _unwritable(out: Path, error: OSError) -> ConversionError:
    again = "Finished shards are kept: run the same command again to continue."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConversionError(f"{out}: the disk is full", [str(error)], f"Make room. {again}")
    return ConversionError(f"{out}: cannot be written", [str(error)], again)


class _Writer:
    """Writes the shards of a plan that are not finished: one at a time, its blocks on all workers.

    While a shard's last bytes go to the disk, the next one is begun.
    """

    def __init__(self, plan: Plan, source: Source, sink: Sink, jobs: int, progress: Progress | None):
        self.plan, self.source, self.sink = plan, source, sink
        self.blocks = BlockStream(jobs)
        self.finisher = ThreadPoolExecutor(1, "grok1-finish")
        self.write_lock = threading.Lock()
        self.progress, self.progress_lock = progress, threading.Lock()
        self.done, self.total = plan.finished_bytes, plan.nbytes

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.blocks.close()
        self.finisher.shutdown()

    def write(self) -> None:
        remaining = [shard for shard in self.plan.shards if shard.name not in self.plan.finished]
        needed = [source_files(shard) for shard in remaining]
        self.source.schedule(list(dict.fromkeys(index for indices in needed for index in indices)))
        self.advance(0)
        finishing: Future[None] | None = None
        for position, shard in enumerate(remaining):
            later = {index for indices in needed[position + 1 :] for index in indices}
            path = self.plan.out / f"{shard.name}{PARTIAL_SUFFIX}"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                files = {index: self.source.open(index) for index in needed[position]}
                write_at(descriptor, memoryview(shard.header), 0)
                self.blocks.run(shard, files, partial(self.write_block, descriptor))
                if finishing is not None:
                    finishing.result()
            except BaseException:
                self.blocks.close()
                os.close(descriptor)
                path.unlink(missing_ok=True)
                raise
            finishing = self.finisher.submit(self.finish, descriptor, shard, files, set(files) - later)
        if finishing is not None:
            finishing.result()

    def write_block(self, descriptor: int, _: HubTensor, position: int, data: memoryview) -> None:
        # The system writes to a file one call at a time; a thread that waits here for its turn burns no processor.
        with self.write_lock:
            write_at(descriptor, data, position)
        self.advance(len(data))

    def finish(self, descriptor: int, shard: Shard, files: dict[int, TensorFile], unneeded: set[int]) -> None:
        """Gives a shard its final name when its bytes are on the disk and its sources are still what was read."""
        path = self.plan.out / shard.name
        unfinished = path.with_name(f"{shard.name}{PARTIAL_SUFFIX}")
        try:
            os.fsync(descriptor)
            for file in files.values():
                file.check_unchanged()
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        os.replace(unfinished, path)
        sync_folder(self.plan.out)
        self.sink.shard_finished(path)
        for index in sorted(unneeded):
            self.source.release(index)

    def advance(self, count: int) -> None:
        with self.progress_lock:
            self.done += count
            if self.progress is not None:
                self.progress(self.done, self.total)


def source_files(shard: Shard) -> list[int]:
    """The indices of the files that a shard is made of, in the order in which it reads them."""
    return list(dict.fromkeys(part.entry.index for tensor in shard.tensors for part in tensor.parts))


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all bytes of `data` at a position of a file; safe from several threads."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


# ---------------------------------------------------------------------------------------------------------------------
# Finish


def write_companions(plan: Plan) -> None:
    """Everything that is not a shard. The index comes last: without it no loader takes the folder for a model."""
    staging = plan.out / f".companions{PARTIAL_SUFFIX}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    names = companion_files(staging, plan)
    for name in names:
        with (staging / name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(staging / name, plan.out / name)
    shutil.rmtree(staging)
    sync_folder(plan.out)


def companion_files(folder: Path, plan: Plan) -> list[str]:
    """Writes config, code, tokenizer, card, LICENSE and index to `folder`; returns their names, the index last."""
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
    write_card(folder, tensors=tensors, shards=[shard.nbytes for shard in plan.shards])
    names = sorted(path.name for path in folder.iterdir())
    (folder / INDEX_NAME).write_text(index_text(plan.shards), encoding="utf-8")
    return [*names, INDEX_NAME]

"""`verify OUT --against SRC`: a right folder has no problems, and no single bit can change unseen."""

import json
import random
import shutil
from pathlib import Path

import pytest

from grok1.conversion.convert import convert
from grok1.conversion.verify_output import verify_output
from grok1.errors import CheckpointError


CASES = [
    *(("bfloat16", "hub"), ("float32", "fused"), ("int8", "hub"), ("int4", "hub")),
    *(("bfloat16", "hpcai"), ("float32", "keyfan")),
]


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    """converted(dtype, layout): a golden checkpoint in several shards, made once."""
    made: dict[tuple[str, str, str], Path] = {}

    def make(dtype: str, layout: str, name: str = "tiny-1") -> Path:
        if (dtype, layout, name) not in made:
            out = tmp_path_factory.mktemp("converted") / "out"
            sizes = {"int8": {"tiny-1": 16, "tiny-8": 2}, "int4": {"tiny-1": 16, "tiny-8": 16}}
            options = {"no_tokenizer": True, "max_shard_size": "300KB", "group_size": sizes.get(dtype, {}).get(name)}
            convert(golden / name, out, dtype=dtype, layout=layout, **options)
            made[dtype, layout, name] = out
        return made[dtype, layout, name]

    return make


@pytest.mark.parametrize(("dtype", "layout"), CASES)
def test_a_right_folder_has_no_problems(golden, converted, dtype, layout):
    seen = []
    out = converted(dtype, layout, "tiny-8")
    assert verify_output(out, golden / "tiny-8", progress=lambda *numbers: seen.append(numbers)) == []
    assert seen[-1][0] == seen[-1][1] == max(done for done, _ in seen)


def header_size(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ (1 << bit % 8)
        file.seek(bit // 8)
        file.write(bytes([byte]))


def places(out: Path, chooser: random.Random) -> list[tuple[Path, int]]:
    """Random bits: in the data of shards, in their headers (length and padding too), and in every small file."""
    shards = sorted(out.glob("*.safetensors"))
    chosen = []
    for _ in range(15):
        shard = chooser.choice(shards)
        chosen.append((shard, chooser.randrange(8 * header_size(shard), 8 * shard.stat().st_size)))
    for _ in range(15):
        shard = chooser.choice(shards)
        chosen.append((shard, chooser.randrange(8 * header_size(shard))))
    chosen += [(shards[0], bit) for bit in (0, 9, 22, 35, 62)]
    chosen += [(shards[-1], 8 * header_size(shards[-1]) - 1), (shards[-1], 8 * shards[-1].stat().st_size - 1)]
    for path in sorted(out.iterdir()):
        count = 15 if path.name.endswith("index.json") else 6 if path.suffix == ".json" else 1
        if path.suffix != ".safetensors":
            chosen += [(path, chooser.randrange(8 * path.stat().st_size)) for _ in range(count)]
    return chosen


@pytest.mark.parametrize(("dtype", "layout"), [("bfloat16", "hub"), ("int8", "hub"), ("int4", "hub")])
def test_every_flipped_bit_is_found(golden, converted, dtype, layout):
    out = converted(dtype, layout)
    missed = []
    chosen = places(out, random.Random(f"{dtype} {layout}"))
    for path, bit in chosen[:: 6 if dtype == "int4" else 1]:  # each search for scales takes a second
        flip(path, bit)
        problems = verify_output(out, golden / "tiny-1", jobs=1)
        flip(path, bit)
        if not problems:
            missed.append((path.name, bit))
    assert missed == []
    assert verify_output(out, golden / "tiny-1") == []


def test_a_flipped_weight_is_named(golden, converted):
    out = converted("float32", "fused")
    shard = sorted(out.glob("*.safetensors"))[1]
    header = json.loads(shard.read_bytes()[8 : header_size(shard)])
    name = next(name for name in header if name.endswith("gate_up_proj"))
    begin = header_size(shard) + header[name]["data_offsets"][0]
    flip(shard, 8 * (begin + 4 * 1000) + 3)
    problems = verify_output(out, golden / "tiny-1")
    flip(shard, 8 * (begin + 4 * 1000) + 3)
    (problem,) = problems
    assert problem.startswith(f"{name}: 1 bytes differ from the source")
    assert problem.endswith("element 1000")


@pytest.fixture
def copy(converted, tmp_path) -> Path:
    shutil.copytree(converted("bfloat16", "hub"), tmp_path / "out")
    return tmp_path / "out"


def test_damage_to_whole_files_is_named(golden, copy):
    shards = sorted(copy.glob("*.safetensors"))
    shards[0].unlink()
    with shards[1].open("r+b") as file:
        file.truncate(shards[1].stat().st_size - 100)
    with shards[2].open("ab") as file:
        file.write(b"more")
    shutil.copy(shards[2], copy / "model-00099-of-00099.safetensors")
    (copy / "generation_config.json").unlink()
    problems = "\n".join(verify_output(copy, golden / "tiny-1"))
    assert f"{shards[0].name}: expected" in problems
    assert "found no such file" in problems
    assert f"{shards[1].name}: expected" in problems
    assert f"{shards[2].name}: expected" in problems
    assert "model-00099-of-00099.safetensors" in problems
    assert "generation_config.json: expected" in problems


def test_two_shards_that_change_names_are_found(golden, copy):
    first, second = sorted(copy.glob("*.safetensors"))[1:3]
    first.rename(copy / "x")
    second.rename(first)
    (copy / "x").rename(second)
    assert verify_output(copy, golden / "tiny-1")


def test_a_changed_key_of_the_config_is_named(golden, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}, indent=2, sort_keys=True) + "\n")
    assert verify_output(copy, golden / "tiny-1") == [
        "config.json: expected rms_norm_eps 1e-05, found 1e-06",
    ]


def test_an_unfinished_conversion_is_none(golden, tmp_path):
    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(golden / "tiny-1", tmp_path / "out", progress=interrupt, no_tokenizer=True, max_shard_size="100KB")
    problems = "\n".join(verify_output(tmp_path / "out", golden / "tiny-1"))
    assert "found an unfinished one" in problems
    assert "config.json: expected" in problems


def test_another_source_is_found(golden, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden / "tiny-1", source)
    convert(source, tmp_path / "out", no_tokenizer=True)
    victim = source / "ckpt-0" / "tensor00003_000"
    flip(victim, 8 * (victim.stat().st_size // 2))
    assert len(verify_output(tmp_path / "out", source)) == 1
    victim.unlink()
    with pytest.raises(CheckpointError, match="tensor00003_000"):
        verify_output(tmp_path / "out", source)


def test_an_empty_folder(golden, tmp_path):
    (tmp_path / "empty").mkdir()
    assert verify_output(tmp_path / "empty", golden / "tiny-1")
    assert verify_output(tmp_path / "nothing", golden / "tiny-1") == [
        f"{tmp_path / 'nothing'}: expected a converted folder or a GGUF file, found none"
    ]

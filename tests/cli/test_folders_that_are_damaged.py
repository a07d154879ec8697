"""Every command that computes with a folder refuses a damaged one with exit code 2, by the name of what is wrong,
before it reads a weight, and waits for nothing."""

import json
import os
import shutil
import socket
import struct

import pytest
import torch
from local_server import DEMO
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from grok1.cli import app
from grok1.conversion.convert import convert


WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One file of weights without an index, as save_pretrained writes small models."""
    out = tmp_path_factory.mktemp("whole") / "hf"
    convert(DEMO, out)
    tensors = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in (*out.glob("model*"), out / "SHA256SUMS"):
        if file.suffix != ".py":
            file.unlink()
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    (out.parent / "text.txt").write_text("Now is the winter of our discontent")
    return out


def weights(change):
    def fault(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return fault


def config(**values):
    def fault(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return fault


def content(name, data):
    def fault(folder):
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return fault


def replaced(name, make):
    def fault(folder):
        (folder / name).unlink()
        make(folder / name)

    return fault


def bind(path):
    before = os.getcwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def header(described):
    text = json.dumps(described).encode()
    return content(WEIGHTS, struct.pack("<Q", len(text)) + text + bytes(4))


def xai(folder):
    shutil.rmtree(folder)
    shutil.copytree(DEMO, folder)


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')


NORM, ROUTER = "model.norm.weight", "model.layers.0.block_sparse_moe.gate.weight"
EXPERT, QUERY = "model.layers.0.block_sparse_moe.experts.3.w1.weight", "model.layers.0.self_attn.q_proj.weight"
DEEP = '{"a":' * 100_000
# Each fault, and what the message says.
FAULTS = {
    "no norm": (weights(lambda t: t.pop(NORM)), f"{NORM}: missing"),
    "no router": (weights(lambda t: t.pop(ROUTER)), f"{ROUTER}: missing"),
    "no expert": (weights(lambda t: t.pop(EXPERT)), f"{EXPERT}: missing"),
    "no layer": (
        weights(lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.1.")]),
        "model.layers.1.block_sparse_moe.experts.0.w1.weight: missing",
    ),
    "nothing": (weights(lambda t: [t.pop(name) for name in list(t)[1:]]), "more"),
    "left over": (weights(lambda t: t.update(x=torch.zeros(1))), "x: not a tensor of a Grok-1"),
    "shape": (weights(lambda t: t.update({NORM: t[NORM][1:].clone()})), f"{NORM}: expected shape [256], found [255]"),
    "expert's shape": (weights(lambda t: t.update({EXPERT: t[EXPERT][1:].clone()})), f"{EXPERT}: expected shape"),
    "untied without head": (
        lambda folder: (weights(lambda t: t.pop("lm_head.weight"))(folder), config(tie_word_embeddings=False)(folder)),
        "lm_head.weight: expected",
    ),
    "nan": (weights(lambda t: t[NORM][3].fill_(float("nan"))), f"{NORM}: expected finite numbers"),
    "infinity": (weights(lambda t: t[QUERY][3, 4].fill_(float("inf"))), f"{QUERY}: expected finite numbers"),
    "control characters": (weights(lambda t: t.update({"a\x1b[2J\nb": torch.zeros(1)})), r"a\x1b[2J\nb: not a tensor"),
    "torn": (lambda folder: os.truncate(folder / WEIGHTS, 1_000_000), f"{WEIGHTS}: expected 15008192 bytes, found"),
    "torn header": (lambda folder: os.truncate(folder / WEIGHTS, 5), f"{WEIGHTS}: expected a safetensors header"),
    "header with a list": (header({"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}), "of x, found"),
    "header of a million numbers": (
        header({"x": {"dtype": "F32", "shape": [1] * 10**6, "data_offsets": [0, 4]}}),
        "of x, found",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no weights"),
    "bin": (replaced(WEIGHTS, lambda path: torch.save([1], path.with_name("pytorch_model.bin"))), "found .bin files"),
    "llama": (config(model_type="llama"), "model_type: expected 'grok-1', found 'llama'"),
    "unknown model": (config(model_type="x", auto_map={"AutoConfig": "x.X"}), "found 'x'"),
    "grok-2": (config(model_type="git"), "this is Grok-2"),
    "dtype": (config(dtype="float77"), "dtype: expected one of"),
    "dtype of another type": (config(dtype=["x"]), "dtype: expected one of"),
    "quantisation": (config(quantization_config=[1]), "quantization_config: expected an object"),
    "size as text": (config(hidden_size="64"), "hidden_size"),
    "many experts": (config(num_experts=10**9, num_local_experts=10**9), "at most 100000 weight matrices"),
    "many layers": (config(num_hidden_layers=10**5), "at most 100000 weight matrices"),
    "huge": (config(vocab_size=2**62), "vocab_size`: expected a number below"),
    "xai": (xai, "this is xAI's own checkpoint"),
    "adapter": (adapter, "adapter_config.json says that this is an adapter"),
}
for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
    FAULTS |= {
        f"{file} torn": (content(file, '{"a": '), f"{file}: expected a JSON object, found something else"),
        f"{file} list": (content(file, "[]"), f"{file}: expected a JSON object, found a list"),
        f"{file} deep": (content(file, DEEP), f"{file}: expected a JSON object, found one that is too deep"),
        f"{file} binary": (content(file, b"\xff\xfe\x00"), f"{file}: expected a JSON object"),
        f"{file} folder": (replaced(file, os.mkdir), f"{file}: expected a regular file"),
        f"{file} device": (
            replaced(file, lambda path: path.symlink_to("/dev/zero")),
            f"{file}: expected a regular file",
        ),
        f"{file} loop": (
            replaced(file, lambda path: path.symlink_to(path.name)),
            f"{file}: expected a file, found a loop",
        ),
    }
for file in ("config.json", "tokenizer.json", WEIGHTS):
    FAULTS |= {
        f"{file} pipe": (replaced(file, os.mkfifo), f"{file}: expected a regular file"),
        f"{file} socket": (replaced(file, bind), f"{file}: expected a regular file"),
    }
FAULTS |= {
    f"tokenizer.json {data}": (content("tokenizer.json", data), "cannot be read as a tokenizer")
    for data in (
        "{}",
        '{"model": 5, "added_tokens": []}',
        '{"added_tokens": [], "model": {"type": "BPE", "vocab": []}}',
    )
}

COMMANDS = {
    "generate": ["generate", "FOLDER", "the", "--max-new-tokens", "2"],
    "eval": ["eval", "FOLDER", "--text", "TEXT", "--json"],
    "routing": ["routing", "FOLDER", "--text", "TEXT", "--html", "PAGE"],
    "serve": ["serve", "FOLDER", "--port", "0"],
}


def run(command, folder, tmp_path, *more):
    places = {"FOLDER": folder, "TEXT": tmp_path / "text.txt", "PAGE": tmp_path / "page.html"}
    (tmp_path / "text.txt").write_text("Now is the winter of our discontent")
    return CliRunner().invoke(app, [*(str(places.get(word, word)) for word in COMMANDS[command]), *more])


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_wrong_is_named(command, fault, whole, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(whole, folder)
    damage, says = FAULTS[fault]
    damage(folder)
    before = sorted(path.name for path in folder.iterdir())
    result = run(command, folder, tmp_path)
    assert result.exit_code == 2, result.output
    assert says in result.output and str(folder) in result.output
    assert "bug" not in result.output and "Traceback" not in result.output and "\x1b" not in result.output
    assert len(result.output.splitlines()) < 26
    assert sorted(path.name for path in folder.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "text.txt"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("device", ["cuda", "cuda:99", "gpu", "mps", "cpu:x"])
def test_a_device_that_is_not_there(command, device, whole, tmp_path):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    result = run(command, whole, tmp_path, "--device-map", device)
    assert result.exit_code == 2 and f"device_map: {device!r} is not there" in result.output, result.output


def test_finite_numbers_may_add_up_to_infinity(whole, tmp_path):
    """A large weight is no damage."""
    folder = tmp_path / "hf"
    shutil.copytree(whole, folder)
    weights(lambda t: t["model.layers.1.self_attn.v_proj.weight"][0, :2].fill_(2e38))(folder)
    assert run("generate", folder, tmp_path).exit_code == 0

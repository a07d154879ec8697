"""`export-xai` gives back byte for byte what was stored exactly, and the rest within half a step."""

import hashlib
import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from xai_files import tensor_files

from grok1.arrays import RawArray
from grok1.conversion.convert import convert
from grok1.conversion.export_xai import _File, _Writer, export_xai
from grok1.conversion.names import checkpoint_entries, hub_tensors
from grok1.conversion.release import release_files
from grok1.conversion.xai.checkpoint import read_tensor_file
from grok1.conversion.xai.writer import tensor_frame
from grok1.errors import ConversionError
from modeling_grok1 import GrokConfig


BLOCKS = {"tiny-1": 1, "tiny-8": 8}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    """Converted golden checkpoints, each made once."""
    made = {}

    def get(name, dtype, layout="hub"):
        if (name, dtype, layout) not in made:
            out = tmp_path_factory.mktemp("converted") / f"{name}-{dtype}-{layout}"
            group_size = {"tiny-1": 16, "tiny-8": 2}[name] if dtype == "int8" else None
            options = {"no_tokenizer": True, "max_shard_size": "500KB", "group_size": group_size}
            convert(golden / name, out, dtype=dtype, layout=layout, **options)
            made[name, dtype, layout] = out
        return made[name, dtype, layout]

    return get


@pytest.fixture
def folder(converted, tmp_path):
    """A copy of a converted folder with all weights in one file, to be damaged."""
    source = converted("tiny-1", "float32")
    out = tmp_path / "hub"
    out.mkdir()
    shutil.copy(source / "config.json", out)
    tensors = {name: t for shard in sorted(source.glob("*.safetensors")) for name, t in load_file(shard).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def files(folder):
    return {path.name: path.read_bytes() for path in tensor_files(folder)}


def tensors(folder):
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", BLOCKS)
def test_an_int8_folder_gives_back_every_byte(golden, converted, tmp_path, name):
    report = export_xai(converted(name, "int8"), tmp_path / "out")
    source = files(golden / name / "ckpt-0")
    assert files(report.folder) == source
    assert (report.files, report.exact, report.losses, report.widened) == (len(source), len(source), {}, [])
    assert report.nbytes == sum(map(len, source.values()))


@pytest.mark.parametrize("layout", ["hub", "fused", "hpcai", "keyfan"])
def test_a_float32_folder_in_any_layout_gives_back_every_byte(golden, converted, tmp_path, layout):
    """Here each block of the source reaches 127, so that max/127 is its scale again."""
    report = export_xai(converted("tiny-8", "float32", layout), tmp_path / "out")
    assert files(report.folder) == files(golden / "tiny-8" / "ckpt-0")
    assert report.exact == 1 + 1 + 12 * 5
    assert set(report.losses) == {"moe_gate", "moe_down", "moe_up", "attn_k", "attn_o", "attn_q", "attn_v"}
    assert all(loss.largest == 0 for loss in report.losses.values())


@pytest.mark.parametrize("name", BLOCKS)
def test_a_bfloat16_folder_is_requantised_within_half_a_step_and_says_so(converted, golden, tmp_path, name):
    folder = converted(name, "bfloat16")
    report = export_xai(folder, tmp_path / "out", scale_blocks=BLOCKS[name])
    entries = checkpoint_entries(GrokConfig.from_pretrained(folder))
    source = files(golden / name / "ckpt-0")
    assert report.widened == ["tensor00000_000"]
    for entry in entries:
        if entry.kind.name.startswith(("norm", "router")):
            assert (report.folder / entry.file).read_bytes() == source[entry.file]

    again = tmp_path / "again"
    convert(tmp_path / "out", again, dtype="float32", no_tokenizer=True)
    before, after = tensors(folder), tensors(again)
    assert before.keys() == after.keys()
    largest, totals, counts = {}, {}, {}
    for entry in entries:
        if not entry.kind.quantised:
            continue
        file = read_tensor_file(report.folder / entry.file)
        assert file.scales.shape == entry.scales_shape(BLOCKS[name] if entry.kind.scale_blocks > 1 else 1)
        scales = torch.from_numpy(file.scales.read().view(np.int16)).view(torch.bfloat16).float()
        names = [entry.kind.hub.format(e=e) for e in range(8)] if entry.kind.shape[0] == "E" else [entry.kind.hub]
        for e, hub in enumerate(names):
            key = f"model.layers.{entry.layer}.{hub}"
            error = (after[key] - before[key].float()).abs()
            scale = (scales[e] if scales.ndim == 3 else scales).T  # (out, G)
            steps = error.unflatten(1, (scale.shape[1], -1)) / scale.unsqueeze(-1)
            assert steps.max() <= 0.5 + 1e-4, key
            kind = entry.kind.name
            largest[kind] = max(largest.get(kind, 0), error.max().item())
            totals[kind] = totals.get(kind, 0) + error.double().sum().item()
            counts[kind] = counts.get(kind, 0) + error.numel()
    for kind, loss in report.losses.items():
        assert loss.largest == pytest.approx(largest[kind], rel=1e-6)
        assert loss.mean == pytest.approx(totals[kind] / counts[kind], rel=1e-6)
        assert 0 < loss.mean < loss.largest
        assert 0 < loss.largest_in_steps <= 0.5 + 1e-4


def test_requantised_weights_of_any_size_stay_within_half_a_step(folder, tmp_path):
    """Random weights, a row of zeros, tiny and huge rows: nothing that int8 and a bfloat16 scale were made for."""
    weights = load_file(folder / "model.safetensors")
    key = "model.layers.1.self_attn.o_proj.weight"
    torch.manual_seed(0)
    matrix = torch.randn(weights[key].shape)
    matrix[0] = 0
    matrix[1] *= 1e-30
    matrix[2] *= 1e30
    matrix[3, 0] = 1e6
    weights[key] = matrix
    save_file(weights, folder / "model.safetensors")
    report = export_xai(folder, tmp_path / "out", scale_blocks=8)
    assert 0.45 < report.losses["attn_o"].largest_in_steps <= 0.5 + 1e-4
    convert(tmp_path / "out", tmp_path / "again", dtype="float32", no_tokenizer=True)
    after = tensors(tmp_path / "again")[key]
    step = matrix.unflatten(1, (8, -1)).abs().amax(-1, keepdim=True) / 127 * (1 + 2**-8)
    assert ((after - matrix).unflatten(1, (8, -1)).abs() <= step / 2 * (1 + 1e-4)).all()


def test_true_norms_and_routers_hash_to_their_published_checksums(assets, tmp_path):
    """All 321 of them, through a folder of the release's width and depth whose other matrices are slivers."""
    config = GrokConfig(
        vocab_size=16, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1, head_dim=2, hidden_size=6144
    )
    folder = tmp_path / "hub"
    folder.mkdir()
    config.save_pretrained(folder)
    true = {path.name: read_tensor_file(path).weight.read() for path in tensor_files(assets / "small-files")}
    weights = {}
    for name, tensor in hub_tensors(config, dtype="bfloat16").items():
        value = true.get(tensor.parts[0].entry.file)
        if value is None:
            weights[name] = torch.zeros(tensor.shape, dtype=torch.bfloat16)
        else:
            weights[name] = torch.from_numpy(value.T.copy())
    save_file(weights, folder / "model.safetensors")
    report = export_xai(folder, tmp_path / "out", scale_blocks=1)
    hashed = 0
    for file in release_files():
        if file.entry.file in true:
            path = report.folder / file.entry.file
            assert path.stat().st_size == file.size
            assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256, file.entry.path
            hashed += 1
    assert hashed == 257 + 64


def test_config_and_tokenizer_lie_beside_and_the_files_appear_together(folder, tmp_path):
    (folder / "tokenizer.model").write_bytes(b"pieces")
    seen = []
    out = tmp_path / "out"
    export_xai(folder, out, progress=lambda done, total: seen.append((done, total, (out / "ckpt-0").exists())))
    assert sorted(path.name for path in out.iterdir()) == ["ckpt-0", "config.json", "tokenizer.model"]
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    written = json.loads((out / "config.json").read_text())
    kept = json.loads((folder / "config.json").read_text())
    assert written.items() <= kept.items()
    assert kept.keys() - written.keys() <= {"auto_map", "dtype", "quantization_config", "transformers_version"}
    total = sum(path.stat().st_size for path in (out / "ckpt-0").iterdir())
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][:2] == (total, total)
    assert not any(whole for _, _, whole in seen)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_an_output_folder_with_anything_in_it_is_refused_before_any_work(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(ConversionError, match=r"out: expected an empty folder or none, found mine"):
        export_xai(folder, out)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_every_problem_of_a_folder_is_in_one_list(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    del weights["model.layers.2.block_sparse_moe.experts.7.w3.weight"]
    weights["model.layers.0.block_sparse_moe.gate.weight"] = torch.zeros(8, 31)
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(96, 32, dtype=torch.int8)
    weights["model.layers.3.pre_attn_norm.weight"] = torch.zeros(32)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        export_xai(folder, tmp_path / "out")
    assert caught.value.problems == [
        "model.layers.0.block_sparse_moe.gate.weight: expected float32 or bfloat16 (8, 32), found float32 (8, 31)",
        "model.layers.0.self_attn.q_proj.weight: expected float32 or bfloat16 (96, 32), found int8 (96, 32)",
        "model.layers.2.block_sparse_moe.experts.7.w3.weight: expected a tensor (176, 32), found none",
        "model.layers.3.pre_attn_norm.weight: expected only Grok-1's tensors, found this one too",
        "model.norm.weight: expected a tensor (32,), found none",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "blocks, message",
    [(0, "scale_blocks: expected a positive number, found 0"), (5, "expected scale blocks that divide its 176 rows")],
)
def test_scale_blocks_that_do_not_divide_are_refused(folder, tmp_path, blocks, message):
    with pytest.raises(ConversionError, match=message):
        export_xai(folder, tmp_path / "out", scale_blocks=blocks)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("made_before", [False, True])
@pytest.mark.parametrize(
    "key, message",
    [
        ("model.layers.2.self_attn.v_proj.weight", "decoder_layer_2/multi_head_attention/value/w: expected finite"),
        ("lm_head.weight", "lm_head.weight: expected the embedding"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(folder, tmp_path, key, message, made_before):
    weights = load_file(folder / "model.safetensors")
    weights[key] = weights[key].clone()
    weights[key][3, 4] = float("nan") if "proj" in key else 7.0
    save_file(weights, folder / "model.safetensors")
    out = tmp_path / "out"
    if made_before:
        out.mkdir()
    with pytest.raises(ConversionError, match=message):
        export_xai(folder, out)
    assert out.exists() == made_before
    assert not made_before or list(out.iterdir()) == []


def test_scales_that_are_not_finite_are_refused_by_name(converted, tmp_path):
    folder = tmp_path / "hub"
    shutil.copytree(converted("tiny-8", "int8"), folder)
    key = "model.layers.5.self_attn.k_proj.weight_scale"
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][key]
    weights = load_file(shard)
    weights[key][9, 0] = float("inf")
    save_file(weights, shard)
    with pytest.raises(ConversionError, match=f"{key}: expected finite scales, found 1"):
        export_xai(folder, tmp_path / "out")


def test_models_that_xais_code_cannot_compute_are_refused_with_all_reasons(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    for key in ("max_attn_value", "rope_theta"):
        values.pop(key, None)
    values |= {"attn_logit_softcapping": 50.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    values["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConversionError) as caught:
        export_xai(folder, tmp_path / "out")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "attn_logit_softcapping",
        "rope_parameters.rope_theta",
        "rope_parameters.rope_type",
        "rms_norm_eps",
        "tie_word_embeddings",
        "lm_head.weight",
    ]
    assert "expected 30.0, a constant of xAI's code, found 50.0" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"num_experts": 4}, "num_experts: expected 8, a constant of xAI's code, found 4"),
        ({"intermediate_size": 20}, "intermediate_size: expected a multiple of 8, as xAI's code rounds it, found 20"),
    ],
)
def test_sizes_that_xais_code_cannot_have_are_refused(tmp_path, sizes, problem):
    config = GrokConfig(
        **{"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, **sizes},
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    config.save_pretrained(tmp_path / "hub")
    weights = {name: torch.zeros(t.shape) for name, t in hub_tensors(config, dtype="float32").items()}
    save_file(weights, tmp_path / "hub" / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        export_xai(tmp_path / "hub", tmp_path / "out", scale_blocks=1)
    assert caught.value.problems == [problem]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_expert_file_of_the_release_needs_little_memory(tmp_path, dtype):
    """1.6 GB out of a folder whose eight experts are one sparse file; anonymous memory is what the kernel says."""
    published = release_files()[3]
    experts, inputs, outputs = published.entry.shape
    stored = tmp_path / "stored"
    with stored.open("wb") as file:
        file.truncate(2 * inputs * outputs)
    weights = (RawArray(stored, dtype, (outputs, inputs), 0),) * experts
    scales, bits = (), None
    if dtype == "int8":
        weights = (RawArray(stored, "int32", (outputs, inputs // 4), 0),) * experts
        scales, bits = (RawArray(stored, "bfloat16", (outputs, inputs // 128), 0),) * experts, 8
    frame = tensor_frame(published.entry.shape, published.scales_shape)
    before, largest, done = anonymous_memory(), 0, threading.Event()

    def watch():
        nonlocal largest
        while not done.wait(0.01):
            largest = max(largest, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with _Writer(4) as writer:
        writer.write(_File(published.entry, frame, weights, scales, bits), tmp_path / published.entry.file)
    done.set()
    watcher.join()
    assert (tmp_path / published.entry.file).stat().st_size == published.size
    assert largest - before < 512 * 2**20


def anonymous_memory() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

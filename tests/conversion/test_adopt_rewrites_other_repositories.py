"""`grok1 adopt`, and loading hpcai-tech's and keyfan's folders as they are."""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grok1.conversion.adopt import adopt
from grok1.conversion.convert import convert
from grok1.conversion.export_xai import export_xai
from grok1.conversion.inspect import inspect_checkpoint
from grok1.errors import CheckpointError, ConversionError
from grok1.sizing.models import find_model
from modeling_grok1 import Grok1ForCausalLM


def shards(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def foreign_config(folder: Path, **changes) -> None:
    """What such a repository's config.json looks like: no model type, its own spellings, its own code."""
    path = folder / "config.json"
    ours = json.loads(path.read_text())
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keep += (
        "num_key_value_heads",
        "max_position_embeddings",
        "attn_output_multiplier",
        "max_attn_value",
        "num_experts",
    )
    keep += (
        "num_experts_per_tok",
        "embedding_multiplier_scale",
        "output_multiplier_scale",
        "rms_norm_eps",
        "head_dim",
    )
    theirs = {key: ours[key] for key in keep} | {"architectures": ["Grok1ModelForCausalLM"], "torch_dtype": "bfloat16"}
    path.write_text(json.dumps(theirs | changes))


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    for layout in ("hub", "hpcai", "keyfan"):
        convert(golden / "tiny-8", root / layout, layout=layout, no_tokenizer=True, max_shard_size="300KB")
    foreign_config(root / "hpcai")
    foreign_config(root / "keyfan", hidden_act="gelu", rope_theta=1e5)
    return {layout: root / layout for layout in ("hub", "hpcai", "keyfan")}


@pytest.mark.parametrize("layout", ["hpcai", "keyfan"])
def test_the_result_is_the_hub_conversion_byte_for_byte(folders, layout, tmp_path):
    adopt(folders[layout], tmp_path / "out", max_shard_size="300KB")
    assert shards(tmp_path / "out") == shards(folders["hub"])
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_text() == (folders["hub"] / index).read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (folders["hub"] / "config.json").read_text()
    )


@pytest.mark.parametrize("layout", ["hpcai", "keyfan"])
def test_such_a_folder_loads_as_it_is(folders, layout):
    ids = torch.arange(3, 19)[None]
    model, info = Grok1ForCausalLM.from_pretrained(folders[layout], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (model.config.hidden_act, model.config.rope_parameters["rope_theta"]) == ("gelu_pytorch_tanh", 10000.0)
    with torch.no_grad():
        expected = Grok1ForCausalLM.from_pretrained(folders["hub"])(ids).logits
        assert torch.equal(model(ids).logits, expected)


def test_what_keyfan_states_wrongly_is_said(folders, monkeypatch):
    said = []
    monkeypatch.setattr("modeling_grok1.configuration_grok1.logger.warning", said.append)
    Grok1ForCausalLM.config_class.from_pretrained(folders["keyfan"])
    assert [message.split(";")[0] for message in said] == [
        "`hidden_act`: the file says 'gelu'",
        "`rope_theta`: the file says 100000.0",
    ]


def test_bin_shards_are_read_without_running_code(folders, tmp_path):
    source = tmp_path / "bin"
    source.mkdir()
    (source / "config.json").write_text((folders["hpcai"] / "config.json").read_text())
    for path in folders["hpcai"].glob("*.safetensors"):
        torch.save(load_file(path), source / f"{path.stem}.bin")
    adopt(source, tmp_path / "out", max_shard_size="300KB")
    assert shards(tmp_path / "out") == shards(folders["hub"])


def test_a_bin_shard_with_code_is_refused(folders, tmp_path):
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (Path.touch, (marker,))

    source = tmp_path / "bin"
    source.mkdir()
    (source / "config.json").write_text((folders["hpcai"] / "config.json").read_text())
    torch.save({"model.norm.scale": Attack()}, source / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model.bin: expected a file of tensors"):
        adopt(source, tmp_path / "out")
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_everything_that_is_wrong_is_listed_at_once(folders, tmp_path):
    source = tmp_path / "broken"
    source.mkdir()
    (source / "config.json").write_text((folders["hpcai"] / "config.json").read_text())
    tensors = {}
    for path in folders["hpcai"].glob("*.safetensors"):
        tensors |= load_file(path)
    del tensors["model.layers.3.moe_block.experts.2.linear_v.weight"]
    tensors["model.layers.4.attn.q_proj.weight"] = torch.zeros(3, 5, dtype=torch.bfloat16)
    tensors["model.layers.4.attn.q_proj.bias"] = torch.zeros(5, dtype=torch.bfloat16)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ConversionError) as refused:
        adopt(source, tmp_path / "out")
    assert [problem.split(":")[0] for problem in refused.value.problems] == [
        "model.layers.3.block_sparse_moe.experts.2.w3.weight",
        "model.layers.4.self_attn.q_proj.weight",
        "model.layers.4.attn.q_proj.bias",
    ]
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_is_continued(folders, tmp_path, monkeypatch):
    class StoppedError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        adopt(folders["hpcai"], tmp_path / "out", max_shard_size="300KB", progress=stop)
    assert not (tmp_path / "out" / "config.json").exists()
    adopt(folders["hpcai"], tmp_path / "out", max_shard_size="300KB")
    assert shards(tmp_path / "out") == shards(folders["hub"])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("change", ["truncated", "replaced", "rewritten"])
def test_a_folder_that_changes_meanwhile_is_refused(folders, tmp_path, kind, change):
    """Truncated under the reader: one sentence, not the end of the process by SIGBUS."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text((folders["hpcai"] / "config.json").read_text())
    for path in sorted(folders["hpcai"].glob("*.safetensors")):
        if kind == "bin":
            torch.save(load_file(path), source / f"{path.stem}.bin")
        else:
            (source / path.name).write_bytes(path.read_bytes())
    victim = sorted(source.glob(f"*.{kind}"))[-1]
    before, data = victim.stat(), victim.read_bytes()

    def act(done: int, total: int) -> None:
        if act.done:
            return
        act.done = True
        if change == "truncated":
            os.truncate(victim, before.st_size // 3)
        elif change == "rewritten":
            victim.write_bytes(data)
            os.utime(victim, ns=(0, before.st_mtime_ns))
        else:
            (tmp_path / "new").write_bytes(data)
            os.utime(tmp_path / "new", ns=(0, before.st_mtime_ns))
            (tmp_path / "new").rename(victim)

    act.done = False
    with pytest.raises(CheckpointError, match=f"{victim.name}: changed while it was being read"):
        adopt(source, out, max_shard_size="300KB", progress=act)
    assert not (out / "config.json").exists() and not list(out.glob("*.partial"))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.v_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folders, tmp_path, name, value):
    folder = tmp_path / "in"
    folder.mkdir()
    tensors = {key: tensor for file in folders["hub"].glob("*.safetensors") for key, tensor in load_file(file).items()}
    tensors[name].view(-1)[7] = value
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((folders["hub"] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=rf"{name}: expected finite weights, found 1 that are NaN or infinite"):
        adopt(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.partial")) and not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "llama"}, "model_type: expected 'grok-1' or none, found 'llama'"),
        ({"num_hidden_layers": 10**5}, "at most 100000 weight matrices"),
        ({"num_experts": 10**9}, "at most 100000 weight matrices"),
        ({"torch_dtype": ["x"]}, "config.json"),
    ],
)
def test_another_model_or_endless_sizes_are_refused_at_once(folders, tmp_path, changes, says):
    folder = tmp_path / "in"
    folder.mkdir()
    foreign = json.loads((folders["hpcai"] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(foreign | changes))
    with pytest.raises(ConversionError, match=says):
        adopt(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_grok_2_is_named_with_what_runs_it(golden, folders, tmp_path):
    source = tmp_path / "grok-2"
    source.mkdir()
    values = json.loads((folders["hpcai"] / "config.json").read_text())
    values |= {"architectures": ["Grok1ForCausalLM"], "model_type": "git", "residual_moe": True}
    values |= {"moe_intermediate_size": 16384, "intermediate_size": 32768, "load_presharded_moe": True}
    (source / "config.json").write_text(json.dumps(values))
    for refused in (
        lambda: adopt(source, tmp_path / "out"),
        lambda: export_xai(source, tmp_path / "out"),
        lambda: convert(source, tmp_path / "out"),
        lambda: convert(golden / "tiny-1", tmp_path / "out", config=source / "config.json"),
        lambda: inspect_checkpoint(source),
        lambda: find_model(str(source)),
    ):
        with pytest.raises(ConversionError, match=r"(?s)this is Grok-2.*sglang\.launch_server"):
            refused()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pattern", ["pytorch_model-00000-{:03d}.bin", "pytorch_model-00000-TP-{:03d}.safetensors"])
def test_presharded_sets_are_refused_by_name(folders, tmp_path, pattern):
    source = tmp_path / "presharded"
    source.mkdir()
    (source / "config.json").write_text((folders["hpcai"] / "config.json").read_text())
    weights = {"model.layers.0.block_sparse_moe.experts.0.w1.weight": torch.zeros(8, 32, dtype=torch.bfloat16)}
    for rank in range(2):
        path = source / pattern.format(rank)
        torch.save(weights, path) if path.suffix == ".bin" else save_file(weights, path)
    with pytest.raises(ConversionError, match="presharded for tensor parallelism"):
        adopt(source, tmp_path / "out")


def test_compressed_and_nested_bin_files_are_refused(folders, tmp_path):
    source = tmp_path / "bin"
    source.mkdir()
    (source / "config.json").write_text((folders["hpcai"] / "config.json").read_text())
    torch.save([torch.zeros(2)], source / "a.bin")
    torch.save({"x": [torch.zeros(2)]}, source / "b.bin")
    torch.save({"x": torch.zeros(4, 4).T[1:]}, source / "c.bin")
    torch.save({"y": torch.zeros(2)}, source / "plain")
    with zipfile.ZipFile(source / "plain") as plain, zipfile.ZipFile(source / "d.bin", "w") as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    (source / "e.bin").write_bytes(b"PK\x03\x04 torn")
    os.mkfifo(source / "f.bin")
    with pytest.raises(ConversionError) as caught:
        adopt(source, tmp_path / "out")
    for name in "abcdef":
        assert any(problem.startswith(f"{name}.bin: expected a file of tensors") for problem in caught.value.problems)

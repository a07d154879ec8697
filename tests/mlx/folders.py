"""
Write the folders that tests/mlx reads: what needs torch and this package is done here, so that the tests need neither.

    tiny-1, tiny-8          the golden checkpoints, converted in float32
    demo, demo-bfloat16     the demo, with a tokenizer for continuations
    demo-int8               in this package's own int8 format
    demo-fused, demo-hpcai, demo-keyfan   in float32, under other names
    demo-w8a16-g32 ...      the demo's int8 values, packed, in groups of 32, 64 or 128; the rest float32
    demo-w8a16-bfloat16     the same with groups of 128, the rest bfloat16
    demo-w4a16              rounded to 4 bits, groups of 32
    demo-w4a16-unpacked     its values times its scales, in float32, with a float64 model's logits in reference.npz
    deep-w8a16, deep-float32  16 layers of random weights, 56 and 214 MB: for measuring memory

They are written again when a file that they are made from has changed.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from grok1.conversion.convert import convert
from grok1.conversion.tokenizer import convert_tokenizer
from modeling_grok1 import Grok1ForCausalLM, GrokConfig


ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "grok1" / "demo"
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
NOT_QUANTISED = ["lm_head", r"re:.*block_sparse_moe\.gate$"]


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """N K, int8, of `bits` bits -> N K*bits/32, int32: value + 2^(bits-1), the first in the lowest bits."""
    per_integer = 32 // bits
    unsigned = (values.long() + 2 ** (bits - 1)).unflatten(-1, (-1, per_integer))
    packed = (unsigned << (bits * torch.arange(per_integer))).sum(-1)
    return (packed & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def packed_tensors(name: str, values: torch.Tensor, scales: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """The three tensors that compressed-tensors keeps of the matrix `name`.weight."""
    return {
        f"{name}.weight_packed": pack(values, bits),
        f"{name}.weight_scale": scales.to(torch.bfloat16),
        f"{name}.weight_shape": torch.tensor(values.shape),
    }


def round_to_4_bits(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """N K -> the nearest of -8 ... 7, and the scales max|w| / 7.5 of each group."""
    grouped = weight.unflatten(-1, (-1, group_size))
    scales = (grouped.abs().amax(-1) / 7.5).to(torch.bfloat16)
    values = (grouped / scales.float().unsqueeze(-1)).round().clamp(-8, 7)
    return values.to(torch.int8).flatten(-2), scales


def write_packed(out: Path, like: Path, tensors: dict[str, torch.Tensor], bits: int, group_size: int) -> None:
    """A folder with the companions of `like` and these tensors, and what engines read in its config.json."""
    shutil.copytree(like, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, out / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    config = json.loads((like / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None},
        },
        "ignore": NOT_QUANTISED,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def convert_demo(out: Path) -> None:
    for name, dtype in (("demo", "float32"), ("demo-bfloat16", "bfloat16"), ("demo-int8", "int8")):
        convert(DEMO, out / name, dtype=dtype)
        convert_tokenizer(DEMO / "tokenizer.model", out / name, continuations=True)
    for layout in ("fused", "hpcai", "keyfan"):
        convert(DEMO, out / f"demo-{layout}", dtype="float32", layout=layout)


def pack_demo_in_8_bits(out: Path) -> None:
    """xAI's own values: nothing is rounded."""
    source = read(out / "demo-int8")
    scales = {name: tensor for name, tensor in source.items() if name.endswith(".weight_scale")}
    for group_size, rest in ((32, "float32"), (64, "float32"), (128, "float32"), (128, "bfloat16")):
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in source.items():
            path = name.removesuffix(".weight")
            if (scale := scales.get(f"{path}.weight_scale")) is not None:
                repeats = tensor.shape[-1] // group_size // scale.shape[-1]
                tensors |= packed_tensors(path, tensor, scale.repeat_interleave(repeats, dim=-1), bits=8)
            elif name not in scales:
                keep = rest == "float32" or name.endswith(("norm.weight", "gate.weight"))
                tensors[name] = tensor if keep else tensor.to(torch.bfloat16)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        suffix = f"g{group_size}" if rest == "float32" else rest
        like = out / ("demo" if rest == "float32" else "demo-bfloat16")
        write_packed(out / f"demo-w8a16-{suffix}", like, tensors, bits=8, group_size=group_size)


def pack_demo_in_4_bits(out: Path) -> None:
    source = read(out / "demo")
    packed: dict[str, torch.Tensor] = {}
    unpacked: dict[str, torch.Tensor] = {}
    for name, tensor in source.items():
        path = name.removesuffix(".weight")
        if path.endswith("_proj") or ".experts." in path:
            values, scales = round_to_4_bits(tensor, 32)
            packed |= packed_tensors(path, values, scales, bits=4)
            unpacked[name] = (values.unflatten(-1, (-1, 32)).float() * scales.float().unsqueeze(-1)).flatten(-2)
        else:
            packed[name] = unpacked[name] = tensor
    write_packed(out / "demo-w4a16", out / "demo", packed, bits=4, group_size=32)
    folder = out / "demo-w4a16-unpacked"
    shutil.copytree(out / "demo", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(unpacked, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    model = Grok1ForCausalLM.from_pretrained(folder, dtype=torch.float32).double().eval()
    tokens = torch.randint(3, model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits.dtype == torch.float64
    np.savez(folder / "reference.npz", tokens=tokens.numpy(), logits=logits.numpy())


def write_deep(out: Path) -> None:
    """16 layers of random weights, in W8A16 and in float32."""
    config = GrokConfig.from_pretrained(out / "demo", num_hidden_layers=16, intermediate_size=512)
    draw = torch.Generator().manual_seed(0)
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in Grok1ForCausalLM(config, experts_layout="linear").state_dict().items()}
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if path.endswith("_proj") or ".experts." in path:
            values = torch.randint(-127, 128, shape, dtype=torch.int8, generator=draw)
            scales = torch.full((shape[0], shape[1] // 128), 2.0**-11, dtype=torch.bfloat16)
            packed |= packed_tensors(path, values, scales, bits=8)
            plain[name] = values.float() * 2.0**-11
        else:
            ones = path.endswith("norm")
            packed[name] = plain[name] = torch.ones(shape) if ones else torch.randn(shape, generator=draw) / 16
    for tensors in (packed, plain):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    like = out / "like"
    shutil.copytree(out / "demo", like, ignore=shutil.ignore_patterns("*.safetensors*"))
    config.save_pretrained(like)
    write_packed(out / "deep-w8a16", like, packed, bits=8, group_size=128)
    like.rename(out / "deep-float32")
    save_file(plain, out / "deep-float32" / "model-00001-of-00001.safetensors", metadata={"format": "pt"})


def sources() -> str:
    """A digest of every file that the folders are made from."""
    files = [Path(__file__), *DEMO.rglob("*"), *(GOLDEN / "tiny-1").rglob("*"), *(GOLDEN / "tiny-8").rglob("*")]
    files += [*(ROOT / "conversion").rglob("*.py"), *(ROOT / "modeling_grok1").rglob("*.py")]
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file() and "__pycache__" not in file.parts):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def main(out: Path) -> None:
    stamp = out / "sources.sha256"
    if stamp.is_file() and stamp.read_text() == sources():
        return
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in ("tiny-1", "tiny-8"):
        convert(GOLDEN / name, out / name, dtype="float32", no_tokenizer=True)
    convert_demo(out)
    pack_demo_in_8_bits(out)
    pack_demo_in_4_bits(out)
    write_deep(out)
    stamp.write_text(sources())


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""
Write the folders that tests/engines/mlx reads, as `grok1 convert` writes them. What needs torch and this package is
done here: the tests need neither.

    tiny-1, tiny-8          the golden checkpoints in float32
    demo, demo-bfloat16     the demo
    demo-int8, -g64, -g32   packed, in groups of 128, 64 or 32
    demo-int4, -g32         packed, in groups of 128 or 32
    demo-int8-float32       demo-int8 with "dtype": "float32" in config.json, the dtype of its activations
    demo-fused, demo-hpcai, demo-keyfan   in float32, under other names
    deep-int8, deep-float32  16 layers of random weights, for measuring memory

All but the last ones decode continuations (`grok1 tokenizer FOLDER --continuations`); demo-whole-texts is demo without
that. int4.npz has tokens and the logits of a float64 model with the weights of demo-int4-g32.

They are written again when a file that they are made from has changed.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))

from packed_folders import unpacked_weights

from grok1.conversion.convert import convert
from grok1.conversion.names import checkpoint_entries
from grok1.conversion.tokenizer import change_decoder
from grok1.conversion.xai.writer import tensor_frame, write_tensor_file
from modeling_grok1 import Grok1ForCausalLM, GrokConfig


ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "grok1" / "demo"
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
DEMO_FOLDERS = {
    "demo-whole-texts": {"dtype": "float32"},
    "demo": {"dtype": "float32"},
    "demo-bfloat16": {"dtype": "bfloat16"},
    "demo-int8": {"dtype": "int8"},
    "demo-int8-g64": {"dtype": "int8", "group_size": 64},
    "demo-int8-g32": {"dtype": "int8", "group_size": 32},
    "demo-int4": {"dtype": "int4"},
    "demo-int4-g32": {"dtype": "int4", "group_size": 32},
    **{f"demo-{layout}": {"dtype": "float32", "layout": layout} for layout in ("fused", "hpcai", "keyfan")},
}


def write_demo(out: Path) -> None:
    for name, settings in DEMO_FOLDERS.items():
        convert(DEMO, out / name, **settings)
        if name != "demo-whole-texts":
            change_decoder(out / name, continuations=True)
    shutil.copytree(out / "demo-int8", out / "demo-int8-float32")
    file = out / "demo-int8-float32" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}, indent=2))


def write_int4_reference(out: Path) -> None:
    config = GrokConfig.from_pretrained(out / "demo")
    model = Grok1ForCausalLM(config, experts_layout="linear").double().eval()
    missing, unexpected = model.load_state_dict(unpacked_weights(out / "demo-int4-g32", bits=4), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    tokens = torch.randint(3, config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits.dtype == torch.float64
    np.savez(out / "int4.npz", tokens=tokens.numpy(), logits=logits.numpy())


def write_deep(out: Path) -> None:
    """A checkpoint of 16 layers of random weights in xAI's format, converted to int8 and float32."""
    config = GrokConfig.from_pretrained(out / "demo", num_hidden_layers=16, intermediate_size=512)
    checkpoint, draw = out / "deep", np.random.default_rng(0)
    (checkpoint / "ckpt-0").mkdir(parents=True)
    config.to_json_file(checkpoint / "config.json")
    for entry in checkpoint_entries(config):
        file = checkpoint / "ckpt-0" / entry.file
        if entry.kind.quantised:
            scales_shape = entry.scales_shape(1)
            scales = np.full(scales_shape, 0x3A00, np.uint16)  # 2^-11 in bfloat16
            values = draw.integers(-127, 128, entry.shape, dtype=np.int8)
            write_tensor_file(file, tensor_frame(entry.shape, scales_shape), [values], lambda bits=scales: bits)
        else:
            values = np.ones(entry.shape) if len(entry.shape) == 1 else draw.standard_normal(entry.shape) / 16
            write_tensor_file(file, tensor_frame(entry.shape), [values.astype(np.float32)])
    for dtype in ("int8", "float32"):
        convert(checkpoint, out / f"deep-{dtype}", dtype=dtype, no_tokenizer=True)
    shutil.rmtree(checkpoint)


def sources() -> str:
    """A digest of every file that the folders are made from."""
    files = [Path(__file__), *DEMO.rglob("*"), *(GOLDEN / "tiny-1").rglob("*"), *(GOLDEN / "tiny-8").rglob("*")]
    files += [file for name in ("conversion", "modeling_grok1", "model_card") for file in (ROOT / name).rglob("*")]
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
    write_demo(out)
    write_int4_reference(out)
    write_deep(out)
    stamp.write_text(sources())


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Stand-ins for what documentation needs and a test lacks: the hub, other engines, several GPUs.

`install` puts executables in front of PATH. Each checks its arguments as far as it can (a folder to load must be
a converted one) and does the part that the next line of a page relies on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


DEMO = Path(__file__).resolve().parents[2] / "grok1" / "demo"

COMMON = f"""#!{sys.executable}
import shutil, subprocess, sys
from pathlib import Path
words = sys.argv[1:]
DEMO = Path({str(DEMO)!r})
def value(option):
    return words[words.index(option) + 1]
def converted(folder):
    assert (Path(folder) / "config.json").is_file(), f"no model in {{folder}}"
    assert list(Path(folder).glob("*.safetensors")), f"no weights in {{folder}}"
"""
PROGRAMS = {
    "hf": """
assert words[0] == "download", words
out = Path(value("--local-dir"))
out.mkdir(parents=True, exist_ok=True)
shutil.copytree(DEMO / "ckpt-0", out / "ckpt-0", dirs_exist_ok=True)
shutil.copy(DEMO / "config.json", out)  # the release's sizes are the package's default, the demo's are not
""",
    "curl": """
assert [word for word in words if word.endswith("/tokenizer.model")], words
shutil.copy(DEMO / "tokenizer.model", value("-o"))
""",
    "git": """
assert words[0] == "clone" and len(words) == 3, words
Path(words[2]).mkdir()
""",
    "make": """
assert words in (["demo"], ["docs"]) or words[0] == "test", words
""",
    "pip": """
assert words[0] == "install" and len(words) > 1, words
""",
    "vllm": """
assert words[0] == "serve", words
converted(words[1])
""",
    "mlx_lm.generate": 'converted(value("--model"))',
    "ray": 'assert words[0] == "start", words',
    # The real launcher, with two processes in place of eight.
    "torchrun": f"""
words = ["2" if word == "8" else word for word in words]
command = [{sys.executable!r}, "-m", "torch.distributed.run", "--standalone", *words, "--max-new-tokens", "2"]
sys.exit(subprocess.run(command).returncode)
""",
}


def install(folder: Path, monkeypatch: Any) -> None:
    """Write the programs to a folder and put it in front of PATH."""
    folder.mkdir()
    for name, body in PROGRAMS.items():
        program = folder / name
        program.write_text(COMMON + body)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def place_on_cpu(monkeypatch: Any) -> None:
    """`device_map=0` and "cuda:0" load on the CPU."""
    from transformers import PreTrainedModel

    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device_map") in (0, "cuda", "cuda:0"):
            kwargs["device_map"] = "cpu"
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))

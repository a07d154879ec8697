"""On a system without the calls that Windows lacks, the conversion imports, runs and writes the same bytes."""

import hashlib
import subprocess
import sys
from pathlib import Path

from grok1.conversion.convert import convert


SCRIPT = """
import os, sys
sys.modules["fcntl"] = None
import filelock  # falls back to a lock file that exists or does not
for name in ("pread", "preadv", "pwrite", "sched_getaffinity", "posix_fadvise", "O_NONBLOCK", "O_CLOEXEC"):
    delattr(os, name)
from grok1.conversion.convert import convert
from grok1.conversion.verify_output import verify_output
convert(sys.argv[1], sys.argv[2], no_tokenizer=True, max_shard_size="300KB", jobs=4)
assert verify_output(sys.argv[2], sys.argv[1]) == []
"""


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_same_bytes(golden, tmp_path):
    subprocess.run([sys.executable, "-c", SCRIPT, str(golden / "tiny-1"), str(tmp_path / "there")], check=True)
    convert(golden / "tiny-1", tmp_path / "here", no_tokenizer=True, max_shard_size="300KB")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")

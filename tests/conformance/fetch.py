"""Fetch the source distribution of the installed Transformers: its tests/ folder carries the model-test mixins."""

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path


CACHE = Path(__file__).resolve().parents[2] / ".cache" / "conformance"


def fetch() -> Path:
    """The unpacked folder, downloaded with pip if it is not there yet."""
    name = f"transformers-{version('transformers')}"
    folder = CACHE / name
    if not (folder / "tests").is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", "transformers", "--dest", str(CACHE), name.replace("-", "==")]
        subprocess.run(command, check=True)
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    (folder / "tests" / "__init__.py").touch()  # in Transformers' repository, but not in the distribution
    return folder


if __name__ == "__main__":
    print(fetch())

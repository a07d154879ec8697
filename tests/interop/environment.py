"""Build what `make interop` runs in: llama.cpp's converter and runtime, in .cache/interop and nowhere else.

Both come from one source distribution, that of llama-cpp-python: the converter as it lies there, the runtime as pip
builds it (some minutes, once; a wheel that pip finds through PIP_FIND_LINKS is taken as it is). The environment sees
the packages of the one that runs this file, so torch is not installed again; nothing is installed into that one.

With the argument `avx2` the runtime is built for processors that stop at AVX2, in .cache/interop-avx2, for
`make bench`.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path


AVX2 = "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
VERSION = "0.3.36"  # of llama-cpp-python, the tested one
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "interop"
ENVIRONMENT = CACHE / "venv"
PYTHON = ENVIRONMENT / "bin" / "python"
SOURCE = CACHE / f"llama.cpp-{VERSION}"
CONVERTER = SOURCE / "convert_hf_to_gguf.py"


def fetch_converter() -> None:
    """llama.cpp's converter and the gguf package beside it, unpacked from the source distribution."""
    if SOURCE.is_dir():
        return
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    subprocess.run([*command, "--dest", str(CACHE), f"llama-cpp-python=={VERSION}"], check=True)
    name = f"llama_cpp_python-{VERSION}"
    wanted = tuple(f"{name}/vendor/llama.cpp/{part}" for part in ("convert_hf_to_gguf.py", "conversion/", "gguf-py/"))
    partial = CACHE / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
        members = [member for member in archive if member.name.startswith(wanted)]
        archive.extractall(partial, members, filter="data")
    (partial / name / "vendor" / "llama.cpp").rename(SOURCE)
    shutil.rmtree(partial)


def build_runtime(environment: Path = ENVIRONMENT, options: str = "") -> None:
    """The environment, and llama-cpp-python in it, built with these options of CMake."""
    site_packages = environment / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    host = site_packages / "host.pth"
    if not host.exists():
        venv.create(environment, clear=True, with_pip=True)
        # addsitedir, and not the plain path, so that editable installs of the host are seen too.
        lines = [f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})", str(SOURCE / "gguf-py")]
        host.write_text("\n".join(lines) + "\n")
    if not (site_packages / f"llama_cpp_python-{VERSION}.dist-info" / "RECORD").exists():
        command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        if options:
            command += ["--no-binary", "llama-cpp-python", "--no-cache-dir"]
        subprocess.run(
            [*command, f"llama-cpp-python=={VERSION}"], check=True, env=os.environ | {"CMAKE_ARGS": options}
        )


if __name__ == "__main__":
    CACHE.mkdir(parents=True, exist_ok=True)
    fetch_converter()
    if sys.argv[1:] == ["avx2"]:
        build_runtime(CACHE.with_name("interop-avx2") / "venv", AVX2)
    else:
        build_runtime()
        print(PYTHON)

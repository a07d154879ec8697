"""Two import names: `modeling_grok1`, the model as it goes to the hub, and `grok1`, the command and its library.

The tool folders are at the top level of the repository; `package_dir` maps them below `grok1`, so that no name as
generic as `conversion` or `configuration` is installed.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent

FOLDERS = {
    "modeling_grok1": "modeling_grok1",
    "grok1": "grok1",
    "grok1.configuration": "configuration",
    "grok1.conversion": "conversion",
    "grok1.model_card": "model_card",
}
PACKAGES = dict(FOLDERS)
for name, folder in FOLDERS.items():
    PACKAGES |= {f"{name}.{sub}": f"{folder}/{sub.replace('.', '/')}" for sub in find_packages(folder)}

# As wide as tested: people install this beside engines that pin their own. constraints.txt has the newest of each. The
# PyTorch model needs Transformers 5.21 to 5.24 and says so; configuration and conversion work from 5.19, which vLLM
# 0.32 brings.
REQUIREMENTS = [
    "torch>=2.11,<2.16",
    "transformers>=5.19,<6",
    "safetensors>=0.8,<0.9",
    "sentencepiece>=0.2.1,<0.3",
    "tokenizers>=0.23,<0.24",
    "bitsandbytes>=0.50,<0.51; platform_system != 'Darwin'",
    "accelerate>=1.15,<2",
    "huggingface_hub>=2,<3",
    "httpx2>=2,<3",  # the HTTP client of huggingface_hub, whose errors it raises
    "numpy>=2,<3",
    "typer>=0.29,<1",
    "rich>=14,<16",
    "jinja2>=3.1,<4",
]

SERVE = ["starlette>=1.10,<2", "uvicorn>=0.54,<1", "pydantic>=2.14,<3"]

# The files of llama.cpp; numpy, tqdm, requests and pyyaml are all that it needs.
GGUF = ["gguf>=0.19,<0.20"]

EXTRAS = {
    "gguf": GGUF,
    "peft": ["peft>=0.21,<0.22"],
    "plot": ["matplotlib>=3.10,<4"],
    "serve": SERVE,
    "test": [
        "pytest>=9,<10",
        "pytest-xdist>=3.8,<4",
        "hypothesis>=6.150,<7",
        "peft>=0.21,<0.22",
        "matplotlib>=3.10,<4",
        "triton>=3.7,<4; platform_system == 'Linux'",
        *SERVE,
        *GGUF,
        "transformers[serving]>=5.21,<6",
        "openai>=3.52,<4",
    ],
    "check": ["ruff==0.17.5", "mypy==2.4.1", "import-linter==2.17"],
}

VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "modeling_grok1" / "__init__.py").read_text(encoding="utf-8"), re.M
)
assert VERSION is not None

setup(
    name="modeling-grok1",
    version=VERSION[1],
    description="xAI's Grok-1 (314B mixture of experts) for Hugging Face Transformers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={
        "modeling_grok1": ["py.typed"],
        "grok1": ["py.typed"],
        "grok1.demo": ["*.json", "tokenizer.model", "ckpt-0/*"],
        "grok1.configuration": ["*.json", "*.tsv"],
        "grok1.model_card": ["*.md", "LICENSE"],
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["grok1 = grok1.cli:main"],
        "vllm.general_plugins": ["grok1 = grok1.engines.vllm:register"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

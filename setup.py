"""Installs the toolkit; what it needs and in which range is listed here and nowhere else.

torch is never imported here and no version of it is pinned: a build for another device that is
installed already satisfies ``torch>=2.6`` and stays.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "toolkit" / "__init__.py").read_text(), re.MULTILINE)[1]
README = ROOT / "README.md"

DEMO = ["espeakng-loader>=0.2.4", "matplotlib>=3.8"]
TENSORBOARD = ["tensorboard>=2.19"]

setup(
    name="speech-pretraining-toolkit",
    version=VERSION,
    description="Pretrain and fine-tune speech models from recipes: wav2vec 2.0 and CTC, on any device",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["toolkit", "toolkit.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "hyperpyyaml>=1.2.3",
        "ruamel.yaml>=0.17.28,<0.19",  # hyperpyyaml cannot load anything with 0.19
        "sentencepiece>=0.2.0",
        "soundfile>=0.12.1",
        "soxr>=0.5",
        "safetensors>=0.5",
        "jiwer>=4.0",
        "tqdm>=4.60",
        "tokenizers>=0.21",
    ],
    extras_require={
        "demo": DEMO,
        "tensorboard": TENSORBOARD,
        "peers": ["transformers>=4.57"],
        "torchaudio": ["torchaudio>=2.11"],  # needs the build that matches torch: see README
        "npu": ["torch-npu>=2.6"],  # with a constraint, it would replace torch: see README
        "hpu": ["habana-torch-plugin"],  # comes with Intel's installer, not from the package index
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ninja>=1.11",  # builds the device that the tests stand in for an accelerator
            "ruff>=0.12",
            "mypy>=1.15",
            "pre-commit>=4",
            "webdataset>=1.0",  # reads the shards in a test
            *TENSORBOARD,
            *DEMO,
        ],
    },
)

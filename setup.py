"""The wheel's only top-level name is ``graft``; the run folders of a clone are mapped inside it."""

from pathlib import Path

from setuptools import find_packages, setup

RUN_FOLDERS = {"graft.launch": "launch", "graft.shards": "shards", "graft.ds_configs": "ds_configs"}
README = Path(__file__).with_name("README.md")

setup(
    name="graft-speech",
    version="0.1.0",
    description="Grafts a frozen Whisper encoder onto Qwen2-VL: feature shards, DeepSpeed ZeRO-2 training, WER",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["graft", "graft.*"]), *RUN_FOLDERS],
    package_dir=RUN_FOLDERS,
    package_data={"graft.ds_configs": ["*.json"]},
    install_requires=[
        "torch>=2.10",
        "deepspeed>=0.19.3",
        "transformers>=5.20,<6",
        "peft>=0.19",
        "webdataset>=1.0,<2",
        "jiwer>=4,<5",
        "tensorboard>=2.21",
        "soundfile>=0.13",
        "soxr>=0.5",
        "huggingface_hub>=1",
        "safetensors>=0.5",
        "xxhash>=3.4",
        "pydantic>=2.7,<3",
        "pyyaml>=6",
        "rich>=13",
        "numpy>=1.26",
    ],
    extras_require={
        "dev": [
            "pytest>=9",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "ruff>=0.17",
            "setuptools>=77",
        ],
        "bench": ["ctranslate2>=4.6,<5"],  # what benchmarks/encoding.py compares with; left out where it is missing
    },
)

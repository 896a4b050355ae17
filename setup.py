"""Packaging of Helix for Megatron. `pip install -e .` is all a user needs; scripts/env.sh does it."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
SERVE = ["hypercorn", "msgpack", "pyzmq", "quart"]  # Megatron's text-generation server
# `helix convert`. transformers before 5.18.0 drops how a GGUF file says that text is split into tokens, and
# 5.22.0 still whether a text begins with a token of its own.
CONVERT = ["accelerate", "gguf", "safetensors", "transformers>=5.23"]
TEST = ["hypothesis", "pytest", "pytest-timeout", "pytest-xdist"]
# Megatron-Bridge 0.6.2 imports transformers.modeling_attn_mask_utils, which 5.24.0 has no longer. `helix
# convert` passes its tests with 5.24.0.
BRIDGE = ["transformers<5.24"]
DOCS = ["furo", "myst-parser", "sphinx"]  # scripts/docs.sh

setup(
    name="helix-megatron",
    version="0.1.0",
    description="Two-level (head group x head dimension) tensor-parallel attention for Megatron-LM",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The Helix for Megatron authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={"Megatron-LM": "https://github.com/NVIDIA/Megatron-LM"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["helix_megatron", "helix_megatron.*"]),
    package_data={"helix_megatron": ["py.typed"], "helix_megatron.compare": ["*.j2"]},
    install_requires=[
        # Carries megatron.core and megatron.training. 0.20 is not released; its tree: scripts/test_next.sh.
        "megatron-core>=0.19.0,<0.20; python_version>='3.12'",
        "megatron-core>=0.16.1,<0.17; python_version<'3.12'",  # carries megatron.core
        "torch>=2.7",  # 2.6 brings Triton 3.2, which aborts on the prompt kernel for compute capability 9.0
        "numpy",
        "scipy",  # the statistics of `helix compare`
        "matplotlib",  # ... its figures
        "jinja2",  # ... its page
        "isal",  # checksums of checkpoints at memory speed
        "nvidia-ml-py",  # GPU measures of `helix compare`; imported where there is one
        "einops",  # Megatron's dynamic inference path
        "psutil",  # Megatron's torch_dist checkpoints
        "pyyaml",
        "rich",
        "tqdm",  # Megatron's static inference engine
    ],
    extras_require={
        "convert": CONVERT,
        "serve": [*CONVERT, *SERVE],
        "te": ["transformer-engine[pytorch]"],  # used when importable, never needed
        "test": TEST,
        "docs": DOCS,
        "dev": [*CONVERT, *SERVE, *TEST, *BRIDGE, *DOCS, "import-linter", "mypy", "ruff", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["helix=helix_megatron.cli:main"]},
)

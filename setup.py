from setuptools import find_packages, setup

ROOMS = ("mujina", "tokenization", "data_prep", "moe", "megatron_jobs", "evaluation", "slurm")

setup(
    name="mujina",
    version="0.1.0",
    description="Continued pretraining on Megatron Core: raw text to a dense 8B and an upcycled 8x8B mixture of experts",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=[name for room in ROOMS for name in find_packages(include=(room, f"{room}.*"))],
    package_data={
        "": ["py.typed"],
        "tokenization": ["chat_templates/*.jinja"],
        "data_prep": ["configs/*.yaml", "steps/*.ftz", "steps/words/*.txt"],
        "megatron_jobs": ["configs/*.yaml"],
        "evaluation": ["preferences/prompts/*.yaml"],
        "slurm": ["*.sh", "chain.yaml", "rounds.yaml", "cluster.env.example", "grafana.json"],
    },
    entry_points={"console_scripts": ["mujina = mujina.cli:main"]},
    install_requires=[
        "datasets",
        "gigatoken==0.10.0",  # each version may split anew: tokenization/hf.py is tested against this one
        "httptools>=0.9",  # the client of servers: mujina/answers/connection.py
        "megatron-core>=0.19,<0.20",
        "numpy",
        "nvidia-ml-py",
        "prometheus-client",
        "orjson",
        "protobuf",
        "psutil",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "tokenizers",
        "torch>=2.11",
        "transformers>=5",
        "typer",
        "zstandard",
    ],
    extras_require={
        # What `mujina prepare` and `presplit: mecab` need; a cluster that only trains can do without.
        "data": [
            "datatrove[io,processing]>=0.10.1,<0.11",  # its readers, filters and executors
            "fastwarc",
            "lxml_html_clean",  # without it trafilatura's lxml has no cleaner, and pip passes over datatrove's way to ask for it
            "mecab-python3",
            "rensa",  # MinHash in Rust
            "resiliparse",
            "unidic-lite",
            "xxhash<4",  # as datatrove asks for, where pip would take datasets' word
        ],
        "docs": ["mkdocs-material==9.8.2"],  # the site of docs/; the version decides what the pages load
        "gguf": ["accelerate", "gguf"],  # `mujina import` of a GGUF file, which transformers reads with them
        # NVIDIA Apex is used where it is found and is built from source; the package called "apex" on PyPI is another project.
        "gpu": ["transformer-engine[core_cu13,pytorch]==2.20.2"],
        "ray": ["ray"],
        "test": [
            "accelerate",
            "gguf",
            "grafana-foundation-sdk",
            "hypothesis",
            "jsonschema",
            "mypy",
            "pytest",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
            "types-psutil",  # what mypy knows psutil by, which has no types of its own; PyYAML likewise
            "types-pyyaml",
        ],
        "wandb": ["wandb>=0.31"],
    },
)

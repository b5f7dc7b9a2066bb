"""Messages: printable and bounded, whatever a file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tierlm.checkpoints.checkpoint import Checkpoint
from tierlm.checkpoints.hub import find_model
from tierlm.errors import MAX_MESSAGE, CheckpointError, TierlmError, shown
from tierlm.planning.known import find_config

NAMES = ["x" * 100_000, "\0", "\ud800", "a\x1b[31m\r", "naïve 日本"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_message_is_printable_and_of_bounded_length(name: str) -> None:
    message = str(TierlmError(f"here: {name} is wrong;\nwhat to do"))
    assert message.startswith("here: ") and message.endswith("what to do")
    assert len(message) < MAX_MESSAGE + 10
    assert message.replace("\n", "").isprintable() and message.encode()


def test_a_message_that_is_printable_is_not_changed() -> None:
    assert str(TierlmError("naïve 日本:\n50%")) == "naïve 日本:\n50%"


def test_large_and_deep_values_are_shown_short() -> None:
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    for value in (deep, [0] * 10**6, {str(i): i for i in range(1000)}, "x" * 10**6, 10**4000):
        assert len(shown(value)) < 1000
    assert shown("ab") == "'ab'" and shown([1, None]) == "[1, None]"


@pytest.mark.parametrize("name", [*NAMES[:4], "x" * 256], ids=ascii)
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="missing shard"):
        Checkpoint(tmp_path)
    for find in (find_model, find_config):
        with pytest.raises(CheckpointError, match="no such folder"):
            find(name)

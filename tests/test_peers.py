"""The comparison with other engines: measurements, failures, and that all engines compute the same."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import disk
import limited
import peer_runs
import peers
import synthetic

PROMPT = list(range(5, 37))
needs_cgroup = pytest.mark.skipif(not limited.available(), reason="memory cgroups cannot be made here")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers") / "toy-v2"
    synthetic.write_model("toy-v2", folder)
    return folder


def request_of(peer: str, model: Path, **changes: Any) -> dict[str, Any]:
    fields = {"peer": peer, "model": str(model), "gguf": None, "ram": 2**30, "prompt": PROMPT, "tokens": 4}
    return {**fields, "threads": 1, "pause": 0.0, **changes}


def test_decode_lies_between_the_first_token_and_the_last(tmp_path: Path) -> None:
    clock = peer_runs.Clock(tmp_path, started=0.0, load=1.0, ready=3.0)
    clock.marks = [(4.0, 1000, 10), (5.0, 1300, 40), (6.0, 1800, 50)]
    found = clock.result()
    assert found["tokens_per_second"] == 1.0
    assert (found["bytes_per_token"], found["own_bytes_per_token"]) == (400, 20)
    assert (found["load_seconds"], found["first_token_seconds"], found["start_to_first_token_seconds"]) == (
        1,
        1,
        2,
    )  # the pause in between does not count


def test_all_peers_compute_the_same(toy: Path, tmp_path: Path) -> None:
    """accelerate must offload, since it gets less than the toy needs."""
    for name in ("gguf", "xllamacpp", "accelerate"):
        pytest.importorskip(name, reason=f"needs {name}: pip install tierlm[peers]")
    from gguf_twin import write_twin

    write_twin(toy, tmp_path / "twin.gguf")
    found = {}
    for peer, run in peer_runs.PEERS.items():
        scratch = tmp_path / peer
        scratch.mkdir()
        ram = 8 * 2**20 if peer == "accelerate" else 2**33
        paths = {"model": toy, "gguf": tmp_path / "twin.gguf", "scratch": scratch}
        fields = request_of(peer, toy, ram=ram) | paths | {"started": time.monotonic()}
        found[peer] = run(peer_runs.Request(**fields))
        assert set(peers.COLUMNS) - {"peak", "hit_rate", "ceiling_share"} <= set(found[peer])
    assert peers.common_start([result["ids"] for result in found.values()]) == 4
    assert found["accelerate"]["offload_bytes_written"] > 2**20 and found["accelerate"]["modules_on_disk"] > 0


@needs_cgroup
def test_a_run_has_a_process_and_a_cgroup_of_its_own(toy: Path, tmp_path: Path) -> None:
    found = peers.run_peer(request_of("tierlm", toy), 60, str(tmp_path))
    assert len(found["ids"]) == 4
    assert 0 < found["load_seconds"] < found["start_to_first_token_seconds"]
    assert 50 * 2**20 < found["peak"] < 2**30
    assert not list(toy.parent.glob("offload-*"))


@needs_cgroup
@pytest.mark.parametrize(
    ("peer", "changes", "timeout", "why"),
    [
        ("llama.cpp", {}, 60, "needs --gguf FILE (exit code 1)"),
        ("tierlm", {"ram": 20 * 2**20}, 60, "killed for memory"),
        ("tierlm", {}, 0.1, "not done after 0.1 s"),
    ],
)
def test_a_peer_that_cannot_run_says_why(
    peer: str, changes: dict[str, Any], timeout: float, why: str, toy: Path, tmp_path: Path
) -> None:
    assert peers.run_peer(request_of(peer, toy, **changes), timeout, str(tmp_path)) == {"failed": why}


def test_texts_are_the_same_up_to_the_first_other_id() -> None:
    assert peers.common_start([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert peers.common_start([[1, 2], [3]]) == 0 and peers.common_start([[7, 8]]) == 2


def test_the_table_shows_medians_ratios_and_failures() -> None:
    def run(speed: float) -> peers.Run:
        return dict.fromkeys(peers.COLUMNS, 1e9) | {"tokens_per_second": speed}

    cases = {
        ("1GiB", "tierlm"): [run(4.0), run(8.0), run(5.0)],
        ("1GiB", "llama.cpp"): [run(2.0), run(2.0), {"failed": "killed for memory"}],
        ("1GiB", "accelerate"): [{"failed": "not installed"}],
    }
    assert peers.ratios(cases["1GiB", "tierlm"], cases["1GiB", "llama.cpp"]) == [2.0, 4.0]
    assert peers.summary(cases["1GiB", "tierlm"])["tokens_per_second"] == {"median": 5.0, "least": 4.0, "most": 8.0}
    assert peers.summary(cases["1GiB", "accelerate"]) == {}
    columns = peers.table_of("title", cases).columns
    rows = list(zip(*(column.cells for column in columns), strict=True))
    assert rows[0][2] == "5.00 [4.00-8.00]" and rows[0][-2:] == ("-", "3")
    assert rows[1][2] == "2.00 [2.00-2.00]" and rows[1][-2:] == ("3.00 [2.00-4.00]", "2; killed for memory")
    assert rows[2][2:-1] == ("-",) * (len(peers.COLUMNS) + 1) and rows[2][-1] == "0; not installed"


@pytest.mark.parametrize(
    "arguments",
    [["--ram", "x"], ["--tokens", "1"], ["--peer-tokens", "accelerate"], ["--peer-tokens", "x=3"], ["--gguf", "none"]],
)
def test_wrong_use_is_refused(arguments: list[str], toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", str(toy), *arguments])
    with pytest.raises(SystemExit) as raised:
        peers.main()
    assert raised.value.code == 2


def test_the_page_cache_is_dropped_as_far_as_permitted(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "DROP_CACHES", tmp_path / "drop_caches")
    assert "whole page cache" in disk.drop_page_cache([])
    assert (tmp_path / "drop_caches").read_text() == "3"
    monkeypatch.setattr(disk, "DROP_CACHES", tmp_path / "none" / "drop_caches")
    assert "model's files" in disk.drop_page_cache(list(toy.glob("*.safetensors")))


def test_a_model_smaller_than_a_read_has_no_ceiling(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="no file is larger"):
        disk.disk_ceiling(tmp_path)

"""How many threads compute: affinity, cores, kinds of cores and cpu quotas, on made-up systems."""

from __future__ import annotations

from pathlib import Path

import pytest

from tierlm.processors import compute_threads, nodes, numbers

CPU = "sys/devices/system/cpu"


def write(system: Path, **files: str) -> None:
    for name, text in files.items():
        file = system / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")


def pairs(system: Path, count: int) -> None:
    """Cores of two processors each: 0 and ``count``, 1 and ``count`` + 1, ..."""
    for cpu in range(2 * count):
        write(system, **{f"{CPU}/cpu{cpu}/topology/thread_siblings_list": f"{cpu % count},{cpu % count + count}"})


def test_one_thread_for_each_core_of_the_affinity(tmp_path: Path) -> None:
    assert compute_threads(tmp_path, range(6)) == 6  # a system that says nothing
    pairs(tmp_path, 4)
    assert compute_threads(tmp_path, range(8)) == 4
    assert compute_threads(tmp_path, {0, 4, 1}) == 2
    assert compute_threads(tmp_path, {6, 7}) == 2  # the second processors of two cores


def test_efficiency_cores_are_left_alone(tmp_path: Path) -> None:
    arm, hybrid, clocked = tmp_path / "arm", tmp_path / "hybrid", tmp_path / "clocked"
    for cpu in range(8):
        write(arm, **{f"{CPU}/cpu{cpu}/cpu_capacity": "1024" if cpu >= 4 else "446"})
        hertz = "5000000" if cpu < 2 else "4700000" if cpu < 6 else "3300000"
        write(clocked, **{f"{CPU}/cpu{cpu}/cpufreq/cpuinfo_max_freq": hertz})
    assert compute_threads(arm, range(8)) == 4
    assert compute_threads(arm, range(3)) == 3  # nothing else is allowed
    assert compute_threads(clocked, range(8)) == 6
    pairs(hybrid, 2)
    write(hybrid, **{"sys/devices/cpu_core/cpus": "0-3", "sys/devices/cpu_atom/cpus": "4-11"})
    assert compute_threads(hybrid, range(12)) == 2


@pytest.mark.parametrize(
    ("quotas", "threads"),
    [
        ({"a/b/cpu.max": "max 100000", "cpu.max": "max 100000"}, 8),
        ({"a/b/cpu.max": "350000 100000"}, 3),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),  # a parent's
        ({"a/b/cpu.max": "50000 100000"}, 1),
        ({"a/b/cpu.max": "nonsense"}, 8),
    ],
)
def test_cpu_quotas_of_all_cgroups(quotas: dict[str, str], threads: int, tmp_path: Path) -> None:
    write(tmp_path, **{"proc/self/cgroup": "0::/a/b"})
    write(tmp_path, **{f"sys/fs/cgroup/{name}": text for name, text in quotas.items()})
    assert compute_threads(tmp_path, range(8)) == threads


def test_cpu_quotas_of_the_first_version(tmp_path: Path) -> None:
    write(tmp_path, **{"proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/a\n0::/"})
    folder = "sys/fs/cgroup/cpu/a/cpu.cfs_"
    write(tmp_path, **{f"{folder}quota_us": "-1", f"{folder}period_us": "100000"})
    assert compute_threads(tmp_path, range(8)) == 8
    write(tmp_path, **{f"{folder}quota_us": "400000"})
    assert compute_threads(tmp_path, range(8)) == 4


def test_nodes(tmp_path: Path) -> None:
    assert nodes(tmp_path, {3, 1}) == {0: [1, 3]}
    for node, cpus in (("node10", "4-5"), ("node2", "0-2,7"), ("node3", "")):
        write(tmp_path, **{f"sys/devices/system/node/{node}/cpulist": cpus})
    assert list(nodes(tmp_path, range(6)).items()) == [(2, [0, 1, 2]), (10, [4, 5])]
    assert numbers("0-2,7") == {0, 1, 2, 7}

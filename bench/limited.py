"""Run a command in its own memory cgroup (v1 or v2; needs root) and report its peak.

    python bench/limited.py 2GiB -- tierlm run MODEL -p TEXT --ram 2GiB

The last line, on standard error, is JSON: exit code, limit, peak bytes, whether the limit was hit and anything killed,
and bytes read from block devices.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tierlm.config import parse_size

ROOT = Path("/sys/fs/cgroup")


def available() -> bool:
    """Whether memory cgroups can be created here."""
    try:
        folder, _ = _make("probe")
        folder.rmdir()
    except OSError:
        return False
    return True


class Cgroup:
    """A memory cgroup."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit, self._before = folder, limit, _sectors()

    def command(self, command: Sequence[str]) -> list[str]:
        """``command`` within it."""
        return ["/bin/sh", "-c", f'echo $$ > {self.folder}/cgroup.procs && exec "$@"', "sh", *command]

    def report(self) -> dict[str, Any]:
        """Its limit and peak, whether anything was killed, and bytes read from block devices by all processes."""
        return {
            "limit": self.limit,
            "peak": _number(self.folder, "memory.max_usage_in_bytes", "memory.peak"),
            "killed": _events(self.folder).get("oom_kill", 0),
            "disk_bytes": (_sectors() - self._before) * 512,
        }


@contextmanager
def memory_limit(limit: int) -> Iterator[Cgroup]:
    """A cgroup of ``limit`` bytes, whose processes must have ended at the end. Raises OSError."""
    folder, version = _make(uuid.uuid4().hex)
    try:
        if version == 1:
            (folder / "memory.limit_in_bytes").write_text(str(limit))
        else:
            (folder / "memory.max").write_text(str(limit))
            (folder / "memory.swap.max").write_text("0")
        yield Cgroup(folder, limit)
    finally:
        folder.rmdir()


def run_limited(
    command: Sequence[str], limit: int, **options: Any
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run ``command`` within ``limit`` bytes. ``options`` go to subprocess.run. Returns the process and the report."""
    with memory_limit(limit) as cgroup:
        process = subprocess.run(cgroup.command(command), text=True, check=False, **options)
        return process, {"exit_code": process.returncode, **cgroup.report()}


def run_case(command: Sequence[str], limit: int | None) -> Any:
    """The JSON that ``command`` prints, run within ``limit`` bytes if given. Exits with its error if it fails."""
    if limit is None:
        process = subprocess.run(command, text=True, check=False, capture_output=True)
    else:
        process, report = run_limited(command, limit, capture_output=True)
        if report["killed"]:
            raise SystemExit(f"killed for memory: {' '.join(command)}")
    if process.returncode:
        raise SystemExit(process.stderr)
    return json.loads(process.stdout)


def _make(name: str) -> tuple[Path, int]:
    if (ROOT / "memory").is_dir():
        folder, version = ROOT / "memory" / f"tierlm-{name}", 1
    else:
        folder, version = ROOT / f"tierlm-{name}", 2
    folder.mkdir()
    if version == 2 and not (folder / "memory.max").exists():
        folder.rmdir()
        raise OSError("the memory controller is not delegated")
    return folder, version


def _number(folder: Path, *names: str) -> int | None:
    return next((int((folder / name).read_text()) for name in names if (folder / name).exists()), None)


def _events(folder: Path) -> dict[str, int]:
    for name in ("memory.oom_control", "memory.events"):
        if (folder / name).exists():
            rows = (line.split() for line in (folder / name).read_text().splitlines())
            return {key: int(value) for key, value in rows}
    return {}


def _sectors() -> int:
    """Sectors of 512 bytes read from all block devices, partitions excluded."""
    return sum(int((device / "stat").read_text().split()[2]) for device in Path("/sys/block").iterdir())


def main() -> None:
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.exit(__doc__)
    _, report = run_limited(sys.argv[3:], parse_size(sys.argv[1]), env=os.environ)
    print(json.dumps(report), file=sys.stderr)
    sys.exit(report["exit_code"])


if __name__ == "__main__":
    main()

"""Run a command with the disk under a folder limited to a rate (cgroup v1; needs root).

    python bench/slow_disk.py 1GB /models -- python bench/decode.py /models/DeepSeek-V2-Lite --ram 4GiB

The rate limits reads past the page cache, in bytes/s over all processes of the group. A disk held below its worst speed
does not drift and costs the processors little, which shows how well reads are hidden.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from tierlm.config import parse_size

ROOT = Path("/sys/fs/cgroup/blkio")


def device_of(path: Path) -> str:
    """The disk that holds ``path``, as "major:minor"; for a partition, the whole disk."""
    number = os.stat(path).st_dev
    folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve(strict=True)
    if (folder / "partition").exists():
        folder = folder.parent
    return (folder / "dev").read_text().strip()


@contextlib.contextmanager
def held(path: Path, rate: int) -> Iterator[Path]:
    """A cgroup that limits the disk of ``path`` to ``rate`` bytes/s. Raises OSError if none can be created."""
    folder = ROOT / f"tierlm-{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        (folder / "blkio.throttle.read_bps_device").write_text(f"{device_of(path)} {rate}")
        yield folder
    finally:
        folder.rmdir()


def main() -> None:
    if len(sys.argv) < 5 or sys.argv[3] != "--":
        sys.exit(__doc__)
    try:
        with held(Path(sys.argv[2]), parse_size(sys.argv[1])) as folder:
            script = f'echo $$ > {folder}/cgroup.procs && exec "$@"'
            sys.exit(subprocess.run(["/bin/sh", "-c", script, "sh", *sys.argv[4:]], check=False).returncode)
    except OSError as error:
        sys.exit(f"the disk of {sys.argv[2]} cannot be limited to a rate here: {error}")


if __name__ == "__main__":
    main()

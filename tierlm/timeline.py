"""A timeline: spans of time on tracks, to show what overlaps.

The file is in Chrome's Trace Event Format (complete events, microseconds), which ui.perfetto.dev and chrome://tracing
open: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from tierlm.files import write_whole

LIMIT = 500_000  # the latest spans are kept: about 100 MB


class Timeline:
    """Spans, added from any thread."""

    def __init__(self) -> None:
        self._spans: deque[tuple[str, int, str, float, float, dict[str, object]]] = deque(maxlen=LIMIT)
        self._origin = time.perf_counter()

    def add(
        self, track: str, name: str, began: float, ended: float, lane: int | None = None, **details: object
    ) -> None:
        """Add a span; ``began`` and ``ended`` are times of time.perf_counter. Spans of one ``lane`` of a track do not
        overlap; the default lane is the current thread's."""
        lane = threading.get_ident() if lane is None else lane
        self._spans.append((track, lane, name, began, ended, details))

    @contextmanager
    def span(self, track: str, name: str, **details: object) -> Iterator[None]:
        """Add the span of a ``with`` block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(track, name, began, time.perf_counter(), None, **details)

    def write(self, file: Path) -> None:
        """Write all spans to ``file``. Raises OSError."""
        spans = list(self._spans)
        tracks = {track: number for number, track in enumerate(sorted({span[0] for span in spans}), 1)}
        lanes: dict[tuple[str, int], int] = {}
        for track, thread, *_ in spans:
            lanes.setdefault((track, thread), len(lanes) + 1)
        events: list[dict[str, object]] = [
            {"ph": "M", "name": "process_name", "pid": number, "args": {"name": track}}
            for track, number in tracks.items()
        ]
        for track, thread, name, began, ended, details in spans:
            at, duration = (began - self._origin) * 1e6, (ended - began) * 1e6
            place = {"pid": tracks[track], "tid": lanes[track, thread]}
            events.append({"ph": "X", "name": name, "ts": at, "dur": duration, **place, "args": details})
        write_whole(file, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def span(timeline: Timeline | None, track: str, name: str) -> AbstractContextManager[None]:
    """``timeline.span``, or no-op without a timeline."""
    return nullcontext() if timeline is None else timeline.span(track, name)

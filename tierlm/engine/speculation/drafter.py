"""The interface of what drafts tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from tierlm.engine.sequence import Sequence


class Drafter(Protocol):
    """Drafts the next tokens of one sequence. The same ids always give the same drafts.

    ``free``: drafts cost no time worth counting, so they are also made to see how often they would be right.
    """

    free: bool

    def observe(self, sequence: Sequence, states: Tensor) -> None:
        """The model has run the last tokens in the span of ``sequence``, and the token after them is known. ``states``,
        float32 [n, hidden]: its normed residual stream at these. Called only if Speculation has a ``width``."""

    def kinds(self, sequence: Sequence, most: int) -> list[int]:
        """What ``draft`` can draft now, at most ``most`` tokens: the kind of each. Drafts of one kind are right about
        equally often, given that those before them are."""

    def draft(self, sequence: Sequence, count: int) -> list[int]:
        """The next tokens of ``sequence``, at most the first ``count`` of those that ``kinds`` has announced."""

"""Drafts from the text so far: prompt lookup (Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding)."""

from __future__ import annotations

from torch import Tensor

from tierlm.engine.sequence import Sequence

LENGTHS = (4, 2)  # tokens by which an earlier place is found; the longer ones first
LONGEST = 16  # tokens by which two places are compared


class PromptLookup:
    """Drafts what followed where the last tokens were before, in the prompt or in the answer. A draft's kind is how
    many tokens before it are the same at both places, in powers of two."""

    free = True

    def __init__(self) -> None:
        self._ids: list[int] = []  # of the sequence, as far as they are indexed
        self._ends: dict[tuple[int, ...], int] = {}  # by its tokens: the end of a run's latest place
        self._source = 0  # of the next draft

    def observe(self, sequence: Sequence, states: Tensor) -> None:
        """Text is all that it reads."""

    def kinds(self, sequence: Sequence, most: int) -> list[int]:
        found = self._find(sequence)
        return [min(found + at, LONGEST).bit_length() for at in range(most)] if found else []

    def draft(self, sequence: Sequence, count: int) -> list[int]:
        text = self._ids[self._source :]
        return [text[at % len(text)] for at in range(count)]  # past its end, the drafts themselves are what follows

    def _find(self, sequence: Sequence) -> int:
        """Find the earlier place, and index the new tokens. Returns how many tokens are the same before both."""
        ids, indexed = self._ids, len(self._ids)
        ids += sequence.prompt[indexed:]
        ids += sequence.ids[len(ids) - len(sequence.prompt) :]
        for end in range(indexed, len(ids)):  # a run is indexed when a token follows it
            for length in LENGTHS:
                if end >= length:
                    self._ends[tuple(ids[end - length : end])] = end
        for length in LENGTHS:
            if (end := self._ends.get(tuple(ids[-length:]), 0)) > 0:
                self._source, same = end, length
                while same < min(LONGEST, end) and ids[end - 1 - same] == ids[-1 - same]:
                    same += 1
                return same
        return 0

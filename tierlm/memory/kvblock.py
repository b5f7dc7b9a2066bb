"""A block of KV values: the tokens it holds, its name, and its bytes in memory and on disk."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tierlm.checkpoints.record import ALIGNMENT
from tierlm.errors import UsageError
from tierlm.policies.chains import BlockKey

FORMATS = ("exact", "int8")
TARGET = 2 * 2**20  # bytes of a block in memory, at most, unless MIN_TOKENS need more
MIN_TOKENS, MAX_TOKENS = 16, 64
NAME = 16  # bytes of a name

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class BlockLayout:
    """Where the values of a block of ``tokens`` are. ``widths``: values per token, by layer, then of index keys.

    In memory, the rows [tokens, width] of each layer follow each other, in ``dtype``. On disk they are the same bytes
    ("exact"), or each layer is its scales, float32 [width], and int8 [tokens, width]: a channel is divided by its
    largest magnitude in the block, as keys are in KIVI (Liu et al., arXiv 2402.02750).
    """

    widths: tuple[int, ...]
    dtype: torch.dtype
    tokens: int
    format: str

    @classmethod
    def of(cls, widths: Sequence[int], dtype: torch.dtype, format: str) -> BlockLayout:
        """The layout with the most tokens, a power of two, whose block has at most TARGET bytes in memory."""
        each, tokens = sum(widths) * dtype.itemsize, MAX_TOKENS
        while tokens > MIN_TOKENS and tokens * each > TARGET:
            tokens //= 2
        return cls(tuple(widths), dtype, tokens, format)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a block in memory."""
        return self.tokens * sum(self.widths) * self.dtype.itemsize

    @cached_property
    def stored(self) -> int:
        """Bytes of a block on disk, a multiple of ALIGNMENT."""
        used = self.nbytes if self.format == "exact" else sum(4 * w + self.tokens * w for w in self.widths)
        return -(-used // ALIGNMENT) * ALIGNMENT

    @cached_property
    def buffer(self) -> int:
        """Bytes to reserve for a block in memory, so that ``stored`` bytes can be written from it."""
        return max(self.stored, -(-self.nbytes // ALIGNMENT) * ALIGNMENT)

    def rows(self, block: Tensor) -> Iterator[Tensor]:
        """Views of a block in memory, uint8 [nbytes or more]: the rows of each layer, [tokens, width]."""
        at = 0
        for width in self.widths:
            end = at + self.tokens * width * self.dtype.itemsize
            yield block[at:end].view(self.dtype).view(self.tokens, width)
            at = end

    def encode(self, block: Bytes, out: Bytes) -> bool:
        """Write the int8 form of ``block`` to ``out``. False if a value is not finite, which it cannot hold."""
        at = 0
        for values in self._values(block):
            scales = np.abs(values).max(axis=0, initial=0.0) / np.float32(127)
            if not np.isfinite(scales).all():
                return False
            whole = np.rint(values / np.where(scales, scales, np.float32(1))).astype(np.int8)
            for part in (scales.view(np.uint8), whole.view(np.uint8).reshape(-1)):
                out[at : at + part.size] = part
                at += part.size
        return True

    def decode(self, stored: Bytes, block: Bytes) -> None:
        """The inverse of ``encode``, rounded to ``dtype``."""
        at = start = 0
        for width in self.widths:
            scales = stored[at : at + 4 * width].view(np.float32)
            at += 4 * width
            whole = stored[at : at + self.tokens * width].view(np.int8).reshape(self.tokens, width)
            at += whole.size
            values = whole * scales
            if self.dtype is torch.bfloat16:  # rounded to the nearest
                raw = ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).view(np.uint8).reshape(-1)
            else:
                raw = values.view(np.uint8).reshape(-1)
            block[start : start + raw.size] = raw
            start += raw.size

    def _values(self, block: Bytes) -> Iterator[NDArray[np.float32]]:
        """The rows of each layer as float32. numpy, since torch would begin a second team of threads here."""
        at = 0
        for width in self.widths:
            end = at + self.tokens * width * self.dtype.itemsize
            if self.dtype is torch.bfloat16:
                wide = block[at:end].view(np.uint16).astype(np.uint32) << 16
                yield wide.view(np.float32).reshape(self.tokens, width)
            else:
                yield block[at:end].view(np.float32).reshape(self.tokens, width)
            at = end


def identity_of(layout: BlockLayout, *what: object) -> bytes:
    """Names what blocks can be of use for: ``what`` computes the values, and how they are stored."""
    told = "\n".join(map(str, (layout.widths, layout.dtype, layout.tokens, layout.format, *what)))
    return hashlib.blake2b(told.encode(), digest_size=NAME).digest()


def extend(chain: list[BlockKey], identity: bytes, ids: Sequence[int], tokens: int) -> None:
    """Extend the keys of the first blocks of ``ids`` to all its whole blocks. A name is a hash of the ids and of the
    name before, so it stands for all tokens up to its block's last."""
    parent = chain[-1].name if chain else identity
    whole = np.asarray(ids[len(chain) * tokens : len(ids) // tokens * tokens], dtype="<u4").reshape(-1, tokens)
    for row in whole:
        name = hashlib.blake2b(parent + row.tobytes(), digest_size=NAME).digest()
        chain.append(BlockKey(len(chain), name, parent))
        parent = name


def require_cut(states: Sequence[int]) -> None:
    """Raises UsageError for a model with states, which cannot be cut into blocks."""
    if any(itertools.chain(states)):
        raise UsageError(
            "kv_disk: this model has states (gated DeltaNet), and a state cannot be cut into blocks of tokens; load it "
            "without kv_disk"
        )

"""What the implementations of NT-Xent pass around: prepared rows, which columns to leave out, and blocks of columns."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

EPS = 1e-12
"""Rows shorter than this are divided by it instead of by their length, as ``F.normalize`` does."""

Skip: TypeAlias = Sequence[Tensor] | None
"""(self_column, positive_column), (N,) int64 each: columns that row i leaves out, -1 for none.  None: the rows are [z1;
z2] and the columns too, so that row i leaves out columns i and (i + N/2) mod N.  Empty: no column is left out."""


class Rows(NamedTuple):
    """Rows (N, D) as an implementation multiplies them, and what has scaled them, as it needs it."""

    x: Tensor
    scales: Tensor

    def part(self, which: slice) -> "Rows":
        """Some of the rows, if their scales are (.., N)."""
        return Rows(self.x[which], self.scales[..., which])


class Block(NamedTuple):
    """Columns of a row's sum, None for the rows themselves; the columns' own denominators, of sums that hold the rows,
    None for none."""

    columns: Rows | None
    skip: Skip
    denominators: Tensor | None = None

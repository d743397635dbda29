"""Types that the implementations of NT-Xent share: prepared rows, excluded columns, and blocks of columns."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

EPS = 1e-12
"""Rows shorter than this are divided by it instead of by their length, as in ``F.normalize``."""

Excluded: TypeAlias = Sequence[Tensor] | None
"""The columns that each row excludes from its sum over negatives.

A tuple (self_column, positive_column), each (N,) int64, excludes these two columns of row i, with -1 for no column.
None says that rows and columns are both [z1; z2], so row i excludes columns i and (i + N/2) mod N.
An empty tuple excludes no columns."""


class Rows(NamedTuple):
    """Prepared rows x (N, D), as an implementation multiplies them, and the scales that it needs besides them."""

    x: Tensor
    scales: Tensor

    def part(self, rows: slice) -> "Rows":
        """Return some of the rows.  The scales must be (..., N)."""
        return Rows(self.x[rows], self.scales[..., rows])


class Block(NamedTuple):
    """A block of the columns in the rows' sums.

    columns: None if they are the rows themselves.
    excluded: the columns that each row excludes.
    denominators: softmax denominators of the columns, if the columns' losses have the rows among their negatives.
    """

    columns: Rows | None
    excluded: Excluded
    denominators: Tensor | None = None

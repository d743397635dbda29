"""Many short texts in one block of memory: a Python string takes 50 bytes besides its characters."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

_NUM_AT_ONCE = 1 << 14  # texts that are Python's objects at a time


@dataclass(frozen=True, eq=False)
class Packed:
    """Texts or missing ones by index.  data: their bytes, one after another.  lengths: (N,) int32, -1 if missing."""

    data: bytes = field(repr=False)
    lengths: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64] = field(init=False, repr=False)

    @classmethod
    def of(cls, texts: Iterable[bytes | None]) -> Self:
        """Pack these texts, one after another, so that they need not be in memory at once."""
        data, lengths = bytearray(), array("i")
        for text in texts:
            lengths.append(-1 if text is None else len(text))
            data += text or b""
        return cls(bytes(data), np.array(lengths, dtype=np.int32))

    @classmethod
    def joined(cls, parts: Sequence["Packed"]) -> Self:
        """Pack the texts of all parts in order."""
        lengths = [np.empty(0, np.int32), *(part.lengths for part in parts)]
        return cls(b"".join(part.data for part in parts), np.concatenate(lengths))

    def __post_init__(self) -> None:
        ends = np.cumsum(np.maximum(self.lengths, 0), dtype=np.int64)
        if (ends[-1] if len(ends) else 0) != len(self.data):
            raise ValueError("the lengths of packed texts do not fit their bytes")
        object.__setattr__(self, "ends", ends)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> bytes | None:
        length, end = self.lengths.item(index), self.ends.item(index)
        return None if length < 0 else self.data[end - length : end]

    def __iter__(self) -> Iterator[bytes | None]:
        for part in self.parts():
            yield from part

    def parts(self) -> Iterator[list[bytes | None]]:
        """Yield all texts in order, some thousands at a time, which is faster than one by one."""
        data = self.data
        for first in range(0, len(self), _NUM_AT_ONCE):
            part = slice(first, first + _NUM_AT_ONCE)
            pairs = zip(self.lengths[part].tolist(), self.ends[part].tolist(), strict=True)
            yield [None if length < 0 else data[end - length : end] for length, end in pairs]

    def take(self, index: npt.NDArray[np.int64]) -> "Packed":
        """Return the texts at these indices (K,)."""
        return Packed.of(self[i] for i in index.tolist())

"""Many short texts in one block of memory: a Python string takes 50 bytes besides its characters."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Packed:
    """Texts or missing ones by index.  data: their bytes, one after another.  lengths: (N,) int32, -1 if missing."""

    data: bytes = field(repr=False)
    lengths: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64] = field(init=False, repr=False)

    @classmethod
    def of(cls, texts: Iterable[bytes | None]) -> Self:
        """Pack these texts."""
        texts = list(texts)
        lengths = np.array([-1 if text is None else len(text) for text in texts], dtype=np.int32)
        return cls(b"".join(text for text in texts if text), lengths)

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

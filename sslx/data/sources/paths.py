"""The paths of many files, in about half the memory of a list of strings."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self, overload

import numpy as np
import numpy.typing as npt

from sslx.data.sources.packed import Packed

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Paths(Sequence[str]):
    """Paths, each of which is a root and a name below it.

    roots: the beginnings of the paths, each with a slash at its end, or "".  names: the rest of each path, as bytes.
    root_of: (N,) uint16, of each path its root, or None if there is only one.
    """

    roots: tuple[str, ...]
    names: Packed = field(repr=False)
    root_of: npt.NDArray[np.uint16] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, paths: Iterable[str], root: str = "") -> Self:
        """Pack these paths, all of which begin with ``root``."""
        return cls((root,), Packed.of(os.fsencode(path[len(root) :]) for path in paths))

    @classmethod
    def joined(cls, parts: Sequence["Paths"]) -> Self:
        """Return the paths of all parts in order.  Each part has one root."""
        roots = tuple(root for part in parts for root in part.roots)
        root_of = np.repeat(np.arange(len(parts), dtype=np.uint16), list(map(len, parts)))
        return cls(roots, Packed.joined([part.names for part in parts]), root_of if len(parts) > 1 else None)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        root = self.roots[0 if self.root_of is None else int(self.root_of[index])]
        return root + os.fsdecode(self.names[index] or b"")

    def __iter__(self) -> Iterator[str]:
        if self.root_of is None:
            yield from (self.roots[0] + os.fsdecode(name or b"") for name in self.names)
            return
        for root, name in zip(self.root_of, self.names, strict=True):
            yield self.roots[root] + os.fsdecode(name or b"")

    def below_roots(self) -> Iterator[list[bytes]]:
        """Yield the paths without their roots, some thousands at a time.  Of several roots, the number comes first."""
        numbers = [b"%d/" % number for number in range(len(self.roots))]
        first = 0
        for part in self.names.parts():
            names = [name or b"" for name in part]
            if self.root_of is not None:
                roots = self.root_of[first : first + len(names)].tolist()
                names = [numbers[root] + name for root, name in zip(roots, names, strict=True)]
            first += len(names)
            yield names

    def take(self, index: Indices) -> Self:
        """Return the paths at these indices (K,)."""
        root_of = None if self.root_of is None else self.root_of[index]
        return type(self)(self.roots, self.names.take(index), root_of)

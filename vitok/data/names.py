"""Very many names in little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload


class Names(Sequence[str]):
    """Texts that can be added to, kept as bytes one after another.

    That is their length and eight bytes each, where a list of str takes 60 more; and a worker process that reads them
    shares the memory, where counting references to a str would copy its page.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._bytes, self._ends = bytearray(), array("q")
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        self._bytes += name.encode("utf-8", "surrogatepass")  # as names of files may hold what is no text
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        begin = 0
        for end in self._ends:
            yield self._bytes[begin:end].decode("utf-8", "surrogatepass")
            begin = end

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        begin = self._ends[number - 1] if number else 0
        return self._bytes[begin : self._ends[number]].decode("utf-8", "surrogatepass")

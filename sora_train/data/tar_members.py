"""The members of a tar, read once from its beginning to its end, and whether it has one.

webdataset and tarfile stop silently at a cut or at a header they cannot read: what follows is lost and nobody knows.
Here every byte passes through a digest, and what stands behind the last member tells how the tar ends.
"""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

_BLOCK = 512
_READ_BYTES = 1 << 20


class Readable(Protocol):
    """Anything with `read`."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; empty at the end."""


@dataclass(frozen=True)
class Member:
    """What stands in a tar under a name; folders are left out."""

    name: str
    offset: int  # of its bytes
    size: int
    is_file: bool  # and not a link, a device or a file with holes
    data: bytes | None  # None: not wanted, or cut


@dataclass(frozen=True)
class TarEnd:
    """What a tar was, known once it has been read to the end."""

    num_bytes: int
    sha256: str
    trouble: str  # "": whole; `truncated_tar` or `damaged_tar`: what follows the last member is lost
    detail: str
    is_member_cut: bool = False  # the last member lacks bytes


class TarReader:
    """Reads a tar: first its `members`, then `end` says what it was."""

    def __init__(self, file: Readable, on_read: Callable[[int], None] = lambda num_bytes: None) -> None:
        """`on_read`: told how many bytes were read, each time."""
        self.digest = _Digest(file, on_read)
        self.end: TarEnd | None = None

    def members(self, is_wanted: Callable[[str, int], bool]) -> Iterator[Member]:
        """The members in their order, with the bytes of the files whose (name, size) are wanted.

        Raises nothing for a damaged tar: iteration ends, and `end` says so. OSError from the file passes through.
        """
        offset, last, error = 0, 0, ""
        try:
            with tarfile.open(fileobj=self.digest, mode="r|", bufsize=_READ_BYTES) as tar:
                while (info := tar.next()) is not None:
                    offset, last = info.offset_data, info.offset_data + info.size
                    is_file = info.isreg() and not info.issparse()
                    data = None
                    if is_file and is_wanted(info.name, info.size):
                        data, error = _content(tar, info)
                    if not info.isdir():
                        yield Member(info.name, info.offset_data, info.size, is_file, data)
                    if error:
                        break
                offset = tar.offset
        # ValueError and the like: what tarfile lets through of absurd numbers in headers.
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as caught:
            error = str(caught) or repr(caught)
        self.digest.drain()
        self.end = self._ending(offset, last, error)

    def _ending(self, offset: int, last: int, error: str) -> TarEnd:
        total, sha256 = self.digest.num_bytes, self.digest.sha256.hexdigest()
        is_cut = last > total
        if total == 0:
            return TarEnd(total, sha256, "truncated_tar", "an empty file")
        if is_cut or "end of data" in error:
            return TarEnd(total, sha256, "truncated_tar", f"ends inside a member, after {total} bytes", is_cut)
        if error:
            return TarEnd(total, sha256, "damaged_tar", f"not readable from byte {offset}: {error}")
        if total - offset < _BLOCK:
            return TarEnd(total, sha256, "truncated_tar", f"has no end-of-archive mark after {total} bytes")
        if self.digest.last_nonzero > offset:
            return TarEnd(total, sha256, "damaged_tar", f"not readable from byte {offset}, where more follows")
        return TarEnd(total, sha256, "", "")


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> tuple[bytes | None, str]:
    """The bytes of a member, or why there are none."""
    file = tar.extractfile(info)
    assert file is not None
    try:
        data = file.read()
    except tarfile.TarError as error:
        return None, str(error) or repr(error)
    return (data, "") if len(data) == info.size else (None, "unexpected end of data")


class _Digest(io.RawIOBase):
    """A file that hashes what is read of it, and remembers where its last byte that is not zero ends."""

    def __init__(self, file: Readable, on_read: Callable[[int], None]) -> None:
        super().__init__()
        self.file = file
        self.on_read = on_read
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self.last_nonzero = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self.file.read(size)
        self.sha256.update(data)
        length = len(data.rstrip(b"\0"))
        if length:
            self.last_nonzero = self.num_bytes + length
        self.num_bytes += len(data)
        self.on_read(len(data))
        return data

    def drain(self) -> None:
        while self.read(_READ_BYTES):
            pass

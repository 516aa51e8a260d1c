"""How the training process and its decoding processes meet: messages, memory that both see, signs of life.

Frames never travel: the training process makes a piece of memory without a name, a child maps its part of it and
writes there. Nothing is left behind whatever dies: the memory goes with the last process that holds it.
"""

import json
import mmap
import os
import socket
import struct
import tempfile
from enum import IntEnum
from typing import Any

# Longest message that is believed: a caption and a few numbers.
MAX_MESSAGE = 1 << 20
LENGTH = struct.Struct("<I")
SIGNS = struct.Struct("<QQQ")
STATUS_BYTES = mmap.PAGESIZE


class Phase(IntEnum):
    """What a child is doing; each has its own patience."""

    starting = 0
    idle = 1
    reading = 2
    decoding = 3


class Status:
    """A child's signs of life, in memory shared with its parent: reading them disturbs no one."""

    def __init__(self, file: int) -> None:
        self._map = mmap.mmap(file, STATUS_BYTES)
        self._task = self._count = 0

    def begin(self, task: int) -> None:
        """In the child: it has taken up a task."""
        self._task = task
        self.tell(Phase.reading)

    def tell(self, phase: Phase) -> None:
        """In the child: it has come one thing further."""
        self._count += 1
        SIGNS.pack_into(self._map, 0, self._task, phase, self._count)

    def look(self) -> tuple[int, Phase, int]:
        """In the parent: the last task, the phase, and a number that changes whenever something happens."""
        task, phase, count = SIGNS.unpack_from(self._map)
        return task, Phase(phase) if phase < len(Phase) else Phase.decoding, count  # a child gone wild may write there


def memory_file(num_bytes: int) -> int:
    """Descriptor of a file of zeros without a name: memory where there is memfd, else in the temporary folder."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("sora_train", os.MFD_CLOEXEC)
    else:
        file, path = tempfile.mkstemp()
        os.unlink(path)
    os.ftruncate(file, num_bytes)
    return file


def send(control: socket.socket, message: bytes, file: int | None = None) -> None:
    """A message, and a descriptor with it."""
    head = LENGTH.pack(len(message))
    if file is None:
        control.sendall(head + message)
    else:
        socket.send_fds(control, [head], [file])  # four bytes go whole or not at all
        control.sendall(message)


def receive(control: socket.socket) -> tuple[bytes, int | None]:
    """The next message and the descriptor sent with it. Raises EOFError when the other side is gone."""
    head, files, _, _ = socket.recv_fds(control, LENGTH.size, 1)
    head += _exactly(control, LENGTH.size - len(head)) if head else b""
    if not head:
        raise EOFError
    (size,) = LENGTH.unpack(head)
    return _exactly(control, size), files[0] if files else None


def _exactly(control: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = control.recv(size - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def take_messages(inbox: bytearray) -> list[dict[str, Any]]:
    """The whole messages at the front of what a child has sent so far, removed from it.

    Raises:
        ValueError: the child does not speak like one.
    """
    messages = []
    while len(inbox) >= LENGTH.size:
        (size,) = LENGTH.unpack_from(inbox)
        if size > MAX_MESSAGE:
            raise ValueError(f"a message of {size} bytes")
        if len(inbox) < LENGTH.size + size:
            break
        message = json.loads(inbox[LENGTH.size : LENGTH.size + size])
        if not isinstance(message, dict):
            raise ValueError(f"a message that is a {type(message).__name__}")
        messages.append(message)
        del inbox[: LENGTH.size + size]
    return messages

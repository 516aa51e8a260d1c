"""A decoding process that misbehaves at chosen clips: `misbehaving.py KEY=HOW,… CONTROL LIFELINE STATUS`."""

import ctypes
import os
import signal
import socket
import sys
import time
from typing import Any

from sora_train.data import decoder, sample
from sora_train.data.handover import Status

decode = sample.decode_clip
ways = dict(word.split("=") for word in sys.argv[1].split(",") if word)
control, lifeline, status = (int(word) for word in sys.argv[2:])


def misbehave(data: bytes, row: Any, size: Any, progress: Any, **more: Any) -> Any:
    way = ways.get(row.key, ways.get("every"))
    more["out"][:] = 77  # half-written memory is nobody's
    if way == "segfault":
        ctypes.string_at(0)
    elif way == "abort":
        os.abort()
    elif way == "exit":
        os._exit(3)
    elif way == "hang":
        time.sleep(1000)
    elif way == "hang_in_c":  # holding the interpreter's lock
        ctypes.PyDLL(None).sleep(1000)
    elif way == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif way == "allocate":
        return b"x" * (64 << 30)
    elif way == "allocate_in_c":
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        place = libc.malloc(ctypes.c_size_t(64 << 30))
        ctypes.memset(place, 1, 64 << 30)  # where it got none, as code that does not look
    elif way == "garbage":
        os.write(control, b"\xff" * 100_000)
        time.sleep(1000)
    elif way == "lie":
        os.write(control, b'\x20\x00\x00\x00{"number": 1, "facts": {"t": 2}}')
        time.sleep(1000)
    elif way == "close":
        os.close(control)
        time.sleep(1000)
    elif way == "raise":
        raise LookupError("no such thing")
    elif way == "slow":  # longer than the patience of the test, but always at work
        for _ in range(30):
            time.sleep(0.1)
            progress()
    return decode(data, row, size, progress, **more)


if ways.get("start") == "exit":
    os._exit(4)
sample.decode_clip = misbehave
decoder.main(socket.socket(fileno=control), lifeline, Status(status))
os._exit(0)

"""Damage to media, decided by a seed: what disks, networks and people with bad intentions do to files."""

from collections.abc import Sequence

import numpy as np

# Boxes of mp4 that hold boxes.
PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"udta")
KINDS = ("flips", "header flips", "cut", "hole", "zeros", "splice", "swapped boxes", "renamed box")


def mutate(media: Sequence[bytes], seed: int) -> tuple[int, str, bytes]:
    """One of some media, damaged: its place in the list, the kind of damage, its bytes. The same for a seed always."""
    rng = np.random.default_rng(seed)
    which, kind = int(rng.integers(len(media))), KINDS[rng.integers(len(KINDS))]
    data = media[which]
    if kind == "flips":
        return which, kind, _flip(data, rng.integers(0, len(data), 2 ** int(rng.integers(0, 7))), rng)
    if kind == "header flips":
        ends = np.concatenate([np.arange(min(2048, len(data))), np.arange(max(0, len(data) - 2048), len(data))])
        return which, kind, _flip(data, rng.choice(ends, 2 ** int(rng.integers(0, 4))), rng)
    start, end = sorted(int(i) for i in rng.integers(0, len(data), 2))
    if kind == "cut":
        return which, kind, data[:end]
    if kind == "hole":
        return which, kind, data[:start] + data[end:]
    if kind == "zeros":
        return which, kind, data[:start] + bytes(min(end - start, 4096)) + data[min(end, start + 4096) :]
    if kind == "splice":
        other = media[rng.integers(len(media))]
        return which, kind, data[:end] + other[int(rng.integers(len(other))) :]
    boxes = _boxes(data, 0, len(data))
    if len(boxes) < 3:  # not an mp4: blocks of bytes change places instead
        middle = (start + end) // 2
        return which, kind, data[:start] + data[middle:end] + data[start:middle] + data[end:]
    if kind == "swapped boxes":
        return which, kind, _swap(data, boxes, rng)
    at = boxes[rng.integers(len(boxes))][0] + int(rng.choice([0, 4]))  # its size, or its name
    name = boxes[rng.integers(len(boxes))][0] + 4
    return which, kind, data[:at] + data[name : name + 4] + data[at + 4 :]


def _flip(data: bytes, places: np.ndarray, rng: np.random.Generator) -> bytes:
    flipped = np.frombuffer(data, np.uint8).copy()
    np.bitwise_xor.at(flipped, places, (1 << rng.integers(0, 8, len(places))).astype(np.uint8))
    return flipped.tobytes()


def _boxes(data: bytes, start: int, end: int) -> list[tuple[int, int]]:
    # Start and end of every box, parents before their children.
    found = []
    while start + 8 <= end:
        size, name = int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
        if size < 8 or start + size > end:
            break
        found.append((start, start + size))
        if name in PARENTS:
            found += _boxes(data, start + 8, start + size)
        start += size
    return found


def _swap(data: bytes, boxes: list[tuple[int, int]], rng: np.random.Generator) -> bytes:
    for _ in range(100):
        (a, b), (c, d) = sorted(boxes[i] for i in rng.integers(len(boxes), size=2))
        if b <= c:
            return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]
    return data

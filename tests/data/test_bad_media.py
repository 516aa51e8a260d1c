"""Every way in which a medium can be bad has its own reason, when it is indexed and when it is trained on."""

import io
import json
import socket
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from media import Kind, audio, clip, image, row_of, whole

from sora_train.data.clip import DecodeError, decode_clip
from sora_train.data.probe import CONTAINERS, probe_media

BASELINE = Kind(options=(("profile", "baseline"),))
VP9 = Kind("libvpx-vp9", "webm")
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"


def flipped_in_the_middle(data: bytes) -> bytes:
    changed = np.frombuffer(data, np.uint8).copy()
    changed[len(data) // 2 : len(data) // 2 + 64 : 4] ^= 0x5A
    return changed.tobytes()


def without_samples(data: bytes) -> bytes:
    """An mp4 whose tables list no frame."""
    changed = bytearray(data)
    for table in (b"stsz", b"stts", b"stsc", b"stco", b"ctts", b"stss"):
        at = data.index(table) + (12 if table == b"stsz" else 8)
        changed[at : at + 4] = bytes(4)
    return bytes(changed)


def h264_of(data: bytes, side: int) -> bytes:
    """A baseline clip whose sequence parameters say side x side (ITU-T H.264, 7.3.2.1.1); its container still 64."""
    at = data.index(b"avcC") + 4 + 8
    length = int.from_bytes(data[at - 2 : at])
    bits, place = "".join(f"{byte:08b}" for byte in data[at + 4 : at + length]), 0
    for number in range(4):  # its id, bits of frame numbers, kind of order (then: bits of it), reference frames
        zeros = bits.index("1", place) - place
        is_order = number == 2 and zeros == 0
        place += 2 * zeros + 1
        if is_order:
            place = bits.index("1", place) * 2 - place + 1
    blocks = f"{side // 16:b}"
    changed = bits[: place + 1] + 2 * ("0" * (len(blocks) - 1) + blocks) + "11001"
    packed = int(changed.ljust(-(-len(changed) // 8) * 8, "0"), 2).to_bytes(-(-len(changed) // 8))
    return data[: at + 4] + packed.ljust(length - 4, b"\0") + data[at + length :]


def vp9_of(data: bytes, side: int) -> bytes:
    """A clip whose first frame says side x side: 36 bits, then width - 1 and height - 1 in 16 bits each."""
    at = data.index(b"\x49\x83\x42") - 1
    head = int.from_bytes(data[at : at + 12])
    low = 96 - 36 - 32
    head = head & ~(0xFFFFFFFF << low) | (side - 1) * 0x10001 << low
    return data[:at] + head.to_bytes(12) + data[at + 12 :]


def png_of(data: bytes, side: int) -> bytes:
    header = b"IHDR" + side.to_bytes(4) * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4) + data[33:]


def webp_of(data: bytes, side: int) -> bytes:
    at = data.index(b"\x9d\x01\x2a") + 3
    return data[:at] + side.to_bytes(2, "little") * 2 + data[at + 4 :]


MP4, H264 = ("mp4", clip(24, 64, 64)), ("mp4", clip(5, 64, 64, BASELINE))
WEBM = ("webm", clip(24, 64, 64, VP9))
PNG, JPG, WEBP = ((suffix, image(64, 64, suffix)) for suffix in ("png", "jpg", "webp"))
# What is wrong: a good medium, what becomes of it, the reason at indexing, the reason at training.
CASES: dict[str, tuple[tuple[str, bytes], Callable[[bytes], bytes], str, str]] = {
    "zero bytes": (MP4, lambda data: b"", "decode", "decode"),
    "zeros": (MP4, lambda data: bytes(len(data)), "decode", "decode"),
    "sound alone": (MP4, lambda data: audio(), "no_video", "no_video"),
    "no moov": (MP4, lambda data: data.replace(b"moov", b"none"), "decode", "decode"),
    "a playlist": (MP4, lambda data: PLAYLIST, "decode", "decode"),
    "another container": (MP4, lambda data: clip(24, 64, 64, VP9), "decode", "decode"),
    "a truncated mp4": (MP4, lambda data: data[: len(data) * 7 // 10], "frame_count", "frame_count"),
    "a truncated webm": (WEBM, lambda data: data[: len(data) * 7 // 10], "frame_count", "frame_count"),
    "zero frames": (MP4, without_samples, "zero_frames", "zero_frames"),
    # Only its middle: the index looks at the first frame and at the tables.
    "corrupt middle": (MP4, flipped_in_the_middle, "", "decode"),
    "a shorter clip": (MP4, lambda data: clip(23, 64, 64), "", "frame_count"),
    "a longer clip, decoded to be counted": (
        ("mp4", clip(24, 64, 64, Kind("mpeg4"))),
        lambda data: clip(25, 64, 64, Kind("mpeg4")),
        "",
        "frame_count",
    ),
    "another size": (MP4, lambda data: clip(24, 64, 80), "", "frame_size"),
    "turned on its side": (MP4, lambda data: clip(24, 64, 64, Kind(rotation=90)), "", "frame_size"),
    "h264 of 16k x 16k": (H264, lambda data: h264_of(data, 16000), "too_large", "too_large"),
    "h264 of 1k x 1k": (H264, lambda data: h264_of(data, 1024), "decode", "too_large"),
    "vp9 of 16k x 16k": (WEBM, lambda data: vp9_of(data, 16000), "too_large", "too_large"),
    "png of 16k x 16k": (PNG, lambda data: png_of(data, 16000), "too_large", "too_large"),
    "webp of 16k x 16k": (WEBP, lambda data: webp_of(data, 16000), "too_large", "too_large"),
    "a truncated png": (PNG, lambda data: data[: len(data) // 2], "decode", "decode"),
    "a truncated jpg": (JPG, lambda data: data[: len(data) // 2], "decode", "decode"),
    "a truncated webp": (WEBP, lambda data: data[: len(data) // 2], "decode", "decode"),
    "an empty png": (PNG, lambda data: b"", "zero_frames", "zero_frames"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_media_have_a_reason_each(name: str) -> None:
    (suffix, good), damage, at_indexing, at_training = CASES[name]
    row = row_of(good, suffix)
    bad = damage(good)
    assert bad != good
    assert decode_clip(good, row, whole(row)).shape == (row.num_frames, 64, 64, 3)
    with pytest.raises(DecodeError) as caught:
        decode_clip(bad, row, whole(row))
    assert caught.value.reason == at_training, caught.value
    if at_indexing:
        with pytest.raises(DecodeError) as caught:
            probe_media(bad, suffix)
        assert caught.value.reason == at_indexing, caught.value
    else:
        probe_media(bad, suffix)


def test_times_that_contradict_the_decoder_are_refused() -> None:
    data = clip(24, 64, 64, Kind(suffix="mkv", options=(("bf", "0"),)))
    sink = io.BytesIO()
    with av.open(io.BytesIO(data), format="matroska") as source, av.open(sink, "w", format="matroska") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        packets[14].pts, packets[15].pts = packets[15].pts, packets[14].pts
        for number, packet in enumerate(packets):
            packet.stream, packet.dts = stream, 125 * (number - 2)
            output.mux(packet)
    row = row_of(data, "mkv")
    assert decode_clip(sink.getvalue(), row, whole(row, 0, 12)).shape[0] == 12
    with pytest.raises(DecodeError, match="is missing: after"):
        decode_clip(sink.getvalue(), row, whole(row))


def test_a_frame_that_never_comes_is_missed() -> None:
    suffix, data = WEBM
    row = row_of(data, suffix)
    with av.open(io.BytesIO(data), format="matroska") as container:
        last = [bytes(packet) for packet in container.demux(video=0) if packet.size][-1]
    at = data.index(last)
    bad = data[:at] + bytes([data[at] & ~0x02]) + data[at + 1 :]  # its show_frame bit: decoded, and kept back
    assert probe_media(bad, suffix).num_frames == 24
    with pytest.raises(DecodeError, match="frame_count: 23 of 24"):
        decode_clip(bad, row, whole(row))


def test_the_size_that_is_refused_is_named() -> None:
    with pytest.raises(DecodeError, match="16000x16000 is declared"):
        probe_media(h264_of(H264[1], 16000), "mp4")


def test_a_row_that_fits_no_memory_is_refused_unread() -> None:
    row = replace(row_of(clip(5, 64, 64)), height=16000, width=16000)
    with pytest.raises(DecodeError, match="too_large"):
        decode_clip(b"", row, whole(row))


def test_no_medium_reaches_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        playlist = PLAYLIST.replace(b":9/", f":{server.getsockname()[1]}/".encode())
        # Its suffix is what keeps it from being a playlist; and if that were to fail, no protocol is open.
        for container in ("mp4", "hls"):
            monkeypatch.setitem(CONTAINERS, "mp4", container)
            with pytest.raises(DecodeError):
                probe_media(playlist, "mp4")
            with pytest.raises(TimeoutError):
                server.accept()


def test_damage_outside_the_clip_does_not_matter_and_inside_is_never_patched_over() -> None:
    data = clip(48, 64, 64, seed=1)
    row = row_of(data)
    bad = flipped_in_the_middle(data)
    before = decode_clip(bad, row, whole(row, 0, 12))
    assert np.array_equal(before, decode_clip(data, row, whole(row, 0, 12)))
    with pytest.raises(DecodeError, match="decode"):
        decode_clip(bad, row, whole(row, 20, 12))


def test_a_frame_that_the_decoder_patches_over_is_refused() -> None:
    data = clip(48, 64, 64, seed=1)
    row = row_of(data)
    for seed in range(1000):  # most flips are errors at once; look for one that is only told beside a frame
        rng, bad = np.random.default_rng(seed), bytearray(data)
        bad[rng.integers(data.index(b"mdat") + 1000, len(data))] ^= 1 << rng.integers(8)
        if is_patched(bytes(bad)):
            break
    with pytest.raises(DecodeError, match="is damaged"):
        decode_clip(bytes(bad), row, whole(row))


def is_patched(data: bytes) -> bool:
    with av.open(io.BytesIO(data), format="mp4") as container:
        codec = container.streams.video[0].codec_context
        codec.options, codec.thread_count = {"err_detect": "explode"}, 1
        try:
            return sum(frame.is_corrupt for frame in container.decode(video=0)) > 0
        except av.FFmpegError:
            return False


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_a_declared_frame_of_16k_takes_no_memory(codec: str) -> None:
    code = f"""
import test_bad_media as t
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmPeak")).split()[1])
(suffix, good), damage, _, _ = t.CASES["{codec} of 16k x 16k"]
row = t.row_of(good, suffix)
bad = damage(good)
t.decode_clip(good, row, t.whole(row))
before = peak()
for attempt in (lambda: t.decode_clip(bad, row, t.whole(row)), lambda: t.probe_media(bad, suffix)):
    try:
        attempt()
    except t.DecodeError as error:
        assert error.reason == "too_large"
print((peak() - before) // 1024)
"""
    # The frame alone would be 384 MB.
    assert int(in_child(code)) < 150


def test_damaged_files_of_all_codecs_are_dropped_with_a_reason_or_give_whole_clips() -> None:
    """A share of what benchmarks/data_fuzz.py does: no crash, and never a short or an empty clip."""
    code = """
import json, sys
import test_bad_media as t
from mutations import mutate
from collections import Counter
kinds = [t.Kind(), t.Kind("libx265"), t.Kind("libsvtav1"), t.Kind("libvpx-vp9", "webm")]
media = [t.clip(16, 64, 64, kind) for kind in kinds]
rows = [t.row_of(data, kind.suffix) for data, kind in zip(media, kinds)]
counts = Counter()
for seed in range(400):
    which, damage, data = mutate(media, seed)
    try:
        frames = t.decode_clip(data, rows[which], t.whole(rows[which]))
    except t.DecodeError as error:
        counts[error.reason] += 1
    else:
        assert frames.shape == (16, 64, 64, 3) and frames.std((1, 2, 3)).min() > 0, (seed, damage)
        counts["accepted"] += 1
print(json.dumps(counts))
"""
    counts = Counter(json.loads(in_child(code)))
    assert counts.total() == 400
    assert counts["accepted"] < 200
    assert set(counts) <= {"accepted", "decode", "frame_count", "frame_size", "no_video", "zero_frames", "too_large"}


def in_child(code: str) -> str:
    """What a program prints that may die."""
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]

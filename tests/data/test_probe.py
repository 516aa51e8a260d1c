import io
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from media import Kind, audio, clip, drifting, encode_frames, image, remux, row_of, whole

from sora_train.data.clip import decode_clip
from sora_train.data.probe import CONTAINERS, DecodeError, probe_media

OPEN = (("x264-params", "open-gop=1:keyint=8:bframes=3:b-adapt=0"),)


@pytest.mark.parametrize(
    "kind",
    [
        Kind(),
        Kind(suffix="mov"),
        Kind(suffix="mkv"),
        Kind("libx265"),
        Kind("libsvtav1"),
        Kind("libvpx-vp9", "webm"),
        Kind("libx265", pixels="yuv420p10le"),
        # Frames that are only referred to are packets of their own in VP8; MPEG-4 is decoded to be counted.
        Kind("libvpx", "webm"),
        Kind("mpeg4"),
    ],
    ids=lambda kind: f"{kind.codec}-{kind.suffix}-{kind.pixels}",
)
def test_facts_of_every_kind(kind: Kind) -> None:
    facts = probe_media(clip(30, 64, 80, kind), kind.suffix)
    assert (facts.num_frames, facts.height, facts.width, facts.rotation) == (30, 64, 80, 0)
    assert (facts.fps, facts.duration_seconds, facts.is_variable_rate) == (8.0, 3.75, False)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_is_one_frame_without_a_rate(suffix: str) -> None:
    facts = probe_media(image(37, 65, suffix), suffix)
    assert (facts.num_frames, facts.fps, facts.height, facts.width, facts.duration_seconds) == (1, 0.0, 37, 65, 0.0)


def test_one_frame_of_video_has_the_declared_rate() -> None:
    facts = probe_media(clip(1, 64, 80), "mp4")
    assert (facts.num_frames, facts.fps, facts.duration_seconds, facts.is_variable_rate) == (1, 8.0, 0.125, False)


@pytest.mark.parametrize(("rotation", "size"), [(90, (80, 64)), (180, (64, 80)), (270, (80, 64))])
def test_sizes_are_as_displayed(rotation: int, size: tuple[int, int]) -> None:
    facts = probe_media(clip(5, 64, 80, Kind(rotation=rotation)), "mp4")
    assert (facts.rotation, (facts.height, facts.width)) == (rotation, size)


def test_pixels_that_are_not_square_widen_the_frame() -> None:
    assert probe_media(clip(5, 64, 80, Kind(pixel_aspect="3/2")), "mp4").width == 120
    turned = probe_media(clip(5, 64, 80, Kind(pixel_aspect="3/2", rotation=90)), "mp4")
    assert (turned.height, turned.width) == (120, 64)


def test_uneven_times_are_a_variable_rate_and_rounded_ones_are_not() -> None:
    uneven = tuple(int(t) for t in np.cumsum([0, 40, 40, 120, 40, 200, 40, 40, 80]))
    facts = probe_media(clip(9, 64, 80, Kind(milliseconds=uneven)), "mp4")
    assert facts.is_variable_rate
    assert facts.fps == pytest.approx(8 / 0.6)
    # Milliseconds of 30 frames a second are 33, 34, 33, …
    rounded = probe_media(clip(30, 64, 80, Kind(suffix="mkv", fps=30)), "mkv")
    assert (rounded.fps, rounded.is_variable_rate) == (30.0, False)
    # A clock that trembles by a tenth of a frame shows each frame for its time.
    trembling = tuple(40 * i + (4 if i % 3 else 0) for i in range(30))
    assert not probe_media(clip(30, 64, 80, Kind(milliseconds=trembling)), "mp4").is_variable_rate
    # One frame was dropped: half of the frames would be taken for their neighbours.
    dropped = tuple(33 * i for i in range(30) if i != 11)
    assert probe_media(clip(29, 64, 80, Kind(milliseconds=dropped)), "mp4").is_variable_rate


def test_what_an_edit_list_hides_is_not_counted() -> None:
    assert probe_media(remux(clip(40, 64, 80), first_pts=5), "mp4").num_frames == 35


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_that_refer_to_what_was_cut_off_are_not_counted(suffix: str) -> None:
    # From its second keyframe, which comes sixth: three frames shown before it need the group before.
    cut = remux(clip(40, 64, 80, Kind(options=OPEN)), first_packet=5, suffix=suffix)
    assert probe_media(cut, suffix).num_frames == 32


@pytest.mark.parametrize(
    ("codec", "suffix", "byte", "bit"),
    [
        ("libvpx", "webm", 0, 0x10),  # show_frame
        ("mpeg4", "mp4", 5, 0x80),  # vop_coded, behind start code, kind (2 bits), second, time (3) and their markers
    ],
)
def test_frames_that_are_never_shown_are_not_counted(codec: str, suffix: str, byte: int, bit: int) -> None:
    data = clip(12, 64, 80, Kind(codec, suffix))
    row = row_of(data, suffix)
    with av.open(io.BytesIO(data), format=CONTAINERS[suffix]) as container:
        packet = [bytes(packet) for packet in container.demux(video=0) if packet.size][7]
    at = data.index(packet) + byte
    assert data[at] & bit
    hidden = data[:at] + bytes([data[at] & ~bit]) + data[at + 1 :]
    rest = row_of(hidden, suffix)
    assert (row.num_frames, rest.num_frames) == (12, 11)
    before = decode_clip(data, row, whole(row))[:7]
    assert np.array_equal(decode_clip(hidden, rest, whole(rest, 0, 7)), before)


def test_a_song_with_a_picture_on_its_cover_is_no_video() -> None:
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as output, av.open(io.BytesIO(audio()), format="mp4") as source:
        cover = output.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 96, 96, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        sound = output.add_stream_from_template(source.streams.audio[0])
        packet = av.Packet(image(96, 96, "jpg"))
        packet.stream, packet.pts, packet.dts, packet.time_base = cover, 0, 0, Fraction(1, 1)
        output.mux(packet)
        for part in source.demux(audio=0):
            if part.size:
                part.stream = sound
                output.mux(part)
    with pytest.raises(DecodeError, match="no_video"):
        probe_media(sink.getvalue(), "mp4")


def test_sound_that_outlasts_the_pictures_is_no_truncation() -> None:
    data = encode_frames(drifting(9, 64, 80), Kind(suffix="mkv"), sound_seconds=4.0)
    assert probe_media(data, "mkv").num_frames == 9


@pytest.mark.parametrize("kind", [Kind(), Kind(suffix="mkv"), Kind("libvpx-vp9", "webm")], ids=lambda k: k.suffix)
def test_a_truncated_file_is_no_shorter_clip(kind: Kind) -> None:
    data = clip(40, 64, 80, kind)
    with pytest.raises(DecodeError) as caught:
        probe_media(data[: len(data) * 7 // 10], kind.suffix)
    assert caught.value.reason == "frame_count"


def test_half_a_frame_at_the_end_is_no_frame() -> None:
    data = clip(40, 64, 80)
    with pytest.raises(DecodeError, match="frame_count: 39 of 40"):
        probe_media(data[:-20], "mp4")


def test_sound_alone_is_no_video() -> None:
    with pytest.raises(DecodeError, match="no_video"):
        probe_media(audio(), "mp4")

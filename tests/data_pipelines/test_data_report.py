"""The page about a data set: it says what is there, shows what training would see, and needs nothing beside it."""

import base64
import io
import json
import re
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.config_store import ConfigStore
from markupsafe import escape
from PIL import Image

from data_pipelines import report
from data_pipelines.report import build_page, duration, num_bytes, output_path
from data_pipelines.reporting.clips import latent_pictures, pick, show
from data_pipelines.reporting.figures import aspects, histogram, short
from data_pipelines.reporting.rejects import count_rejects
from data_pipelines.reporting.simulation import Simulation, advice, rank_counts, simulate, training_loader
from data_pipelines.reporting.survey import Survey, survey
from sora_train.config.command import check_arguments
from sora_train.config.curation import ReportConfig
from sora_train.config.data import DataConfig, SizeConfig
from sora_train.config.encoders import CodecConfig
from sora_train.config.model import ModelConfig
from sora_train.config.root import ConfigError, schema_name, writable
from sora_train.data.index import Dataset, open_dataset
from sora_train.data.index_writer import write_index
from sora_train.data.loader import Loader
from sora_train.data.order import GlobalBatch
from sora_train.data.precomputed import latents_member
from sora_train.data.schema import Caption, ClipRecord, Origin, Source, Style
from sora_train.data.selection import is_held_out
from sora_train.data.size import clip_size, token_stride
from sora_train.data.video_file import save_video
from sora_train.encoders.video_codec import build_codec, codec_shape

EVIL = '<script src="http://x.y/z.js"></script> & <img src=http://x.y/z.png>'
MODEL = ModelConfig(width=128, depth=2, heads=4, mlp_width=256, in_channels=96, out_channels=96)
DATA = DataConfig(
    tokens_per_step=4000, max_tokens_per_pack=2000, held_out_fraction=0.2, size=SizeConfig(max_pixels=64 * 96)
)
VOID = {"meta", "img", "br", "path", "use", "rect", "line"}


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def brightening(folder: Path, num_frames: int, height: int, width: int) -> bytes:
    """A video whose frame i is gray of level 10 i."""
    levels = 10 * np.arange(num_frames, dtype=np.uint8)
    frames = np.ones((num_frames, height, width, 3), np.uint8) * levels[:, None, None, None]
    save_video(frames, folder / "clip.mp4", 8.0)
    return (folder / "clip.mp4").read_bytes()


def picture(height: int, width: int, seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), seed, np.uint8)).save(file, "PNG")
    return file.getvalue()


def record(num_frames: int, height: int, width: int, source: str) -> bytes:
    captions = (
        Caption(f"weak {source}", Origin.original, Style.short),
        Caption(f"a square {source}", Origin.recaption, Style.short),
        Caption("long " * 300, Origin.recaption, Style.dense),
    )
    place = Source(sha256(source.encode()).hexdigest(), 0.0, num_frames / 8)
    return ClipRecord(captions, num_frames, 8.0, height, width, num_frames / 8, place).to_json().encode()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, images and latents in three shards, some of them impossible, one damaged since it was indexed."""
    folder = tmp_path_factory.mktemp("report")
    place = folder / "shards"
    place.mkdir()
    videos: dict[str, bytes] = {}
    for i, (height, width) in enumerate([(64, 64), (64, 96), (96, 64), (128, 192), (64, 64), (64, 64)]):
        videos[f"video{i}.mp4"] = brightening(folder, 9 + 4 * (i % 3), height, width)
        videos[f"video{i}.json"] = record(9 + 4 * (i % 3), height, width, f"source{i // 2}")
    write_tar(place / "a.tar", videos)
    images: dict[str, bytes] = {}
    for i in range(12):
        images[f"image{i}.png"] = picture(64 + 8 * i, 96, 20 * i)
        images[f"image{i}.txt"] = EVIL.encode() if i == 5 else f"image caption {i}".encode()
    write_tar(place / "b.tar", {**images, "broken.mp4": b"no video", "broken.txt": b"none"})
    identity = build_codec(CodecConfig(), "cpu").identity
    latents = torch.linspace(-1, 1, 96 * 5 * 16 * 16).view(96, 5, 16, 16)
    write_tar(
        place / "c.tar",
        {f"latent{i}.latents.safetensors": latents_member(latents, identity, 9, 64, 64, 8.0) for i in range(2)},
    )
    write_index(place, allow_rejects=True)
    flip(place / "a.tar", "video4.mp4")
    curation = [
        {"key": "k1", "path": "k1.mp4", "stage": "filter_quality", "reason": "too small: 20x30 under min_side=32"},
        {"key": "k2", "path": "k2.mp4", "stage": "filter_quality", "reason": "too small: 22x30 under min_side=32"},
        {"key": "k3", "path": "<b>.mp4", "stage": "probe", "reason": "no video"},
    ]
    (place / "rejects.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curation) + "{half a li")
    return place


def flip(shard: Path, member: str) -> None:
    """Damages the bytes of a member in place."""
    with tarfile.open(shard) as tar:
        found = tar.getmember(member)
    data = bytearray(shard.read_bytes())
    middle = found.offset_data + found.size // 2
    data[middle] ^= 0xFF
    shard.write_bytes(data)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the charts out, which take most of the time."""
    monkeypatch.setattr(report, "charts", lambda facts, data: [])


def config_of(shards: Path, **changes: object) -> ReportConfig:
    config = ReportConfig(shards=str(shards), ranks=2, steps=6, clips=20, model=MODEL, data=DATA)
    return replace(config, **changes)  # type: ignore[arg-type]


def survey_of(shards: Path) -> tuple[Dataset, Survey]:
    dataset = open_dataset(shards)
    config = config_of(shards)
    return dataset, survey(dataset, DATA, token_stride(MODEL, codec_shape(config.codec)))


@pytest.fixture(scope="module")
def page(shards: Path) -> str:
    return build_page(config_of(shards))[0]


class Page(HTMLParser):
    """Counts open tags; collects what the page would load, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert all(value.startswith(("data:image/webp;base64,", "#")) for value in parsed.loads)
    assert "script" not in parsed.tags
    assert EVIL in parsed.text
    assert "://" not in re.sub(r'"data:[^"]*"', "", page.replace(str(escape(EVIL)), ""))
    assert "<b>.mp4" in parsed.text, "so are reasons"
    assert "prefers-color-scheme: dark" in page


def test_the_same_data_gives_the_same_page(shards: Path, page: str) -> None:
    assert build_page(config_of(shards))[0] == page


def test_the_page_counts_what_is_there(shards: Path, page: str) -> None:
    tiles = re.findall(r'class="value">([^<]*)</div><div class="label">([^<]*)', page)
    values = {label: value for value, label in tiles}
    dataset, facts = survey_of(shards)
    assert values["clips"] == str(len(facts)) == "20"
    assert (values["videos"], values["images"], values["pre-encoded"]) == ("6", "12", "2")
    assert values["shards"] == "3"
    # Three files gave two videos each, and the two latents are of equal bytes.
    assert values["sources"] == str(facts.num_sources) == str(3 + 12 + 1)
    assert values["left out by the index"] == str(dataset.manifest.num_rejected) == "1"
    assert values["tokens under the size rule"] == short(int(facts.num_tokens.sum()))
    assert values["in shards"] == num_bytes(sum(path.stat().st_size for path in shards.glob("*.tar")))
    assert sha256((shards / "dataset.json").read_bytes()).hexdigest() in page


def test_the_survey_says_what_the_rows_say(shards: Path) -> None:
    dataset, facts = survey_of(shards)
    stride = token_stride(MODEL, codec_shape(config_of(shards).codec))
    clip = 0
    for shard in range(3):
        for place, row in enumerate(dataset.table(shard).rows()):
            assert facts.place(clip) == (shard, place)
            size = clip_size(row, DATA.size, stride)
            tokens = (1 + (size.num_frames - 1) // 2) * (size.height // 8) * (size.width // 8)
            assert (facts.height[clip], facts.width[clip], facts.num_tokens[clip]) == (row.height, row.width, tokens)
            assert facts.is_held_out[clip] == is_held_out(row.source_sha256, DATA.held_out_fraction)
            assert facts.is_latent[clip] == (row.latent_shape is not None)
            clip += 1
    assert clip == len(facts)
    assert facts.is_held_out.any(), "the share held out is shown of something"
    assert set(facts.clips_with("recaption/dense")) == set(range(6))
    assert list(facts.clips_with("original/short")) == list(range(18)), "the latents have none"
    assert {kind: len(lengths) for kind, lengths in facts.caption_lengths().items()} == {
        "original/short": 18,
        "recaption/short": 6,
        "recaption/dense": 6,
    }


def test_held_out_is_counted_by_source_clip_and_token(shards: Path, page: str) -> None:
    _, facts = survey_of(shards)
    rows = re.findall(r"<tr><td>(sources|clips|tokens)</td><td>([^<]*)</td><td>([^<]*)</td>", page)
    kept = facts.is_held_out
    assert rows == [
        ("sources", "16", str(len({int(source) for source in facts.source[kept]}))),
        ("clips", "20", str(kept.sum())),
        ("tokens", f"{facts.num_tokens.sum():,}", f"{facts.num_tokens[kept].sum():,}"),
    ]


def test_clips_come_from_all_over_and_are_the_same_each_time(shards: Path) -> None:
    _, facts = survey_of(shards)
    chosen = pick(facts, 5, seed=3)
    assert chosen == pick(facts, 5, seed=3)
    assert [clip // 4 for clip in chosen] == [0, 1, 2, 3, 4], "one of each fifth of the twenty"
    assert pick(facts, 100, seed=0) == list(range(20))
    assert pick(facts, 0, seed=0) == []


def shown(shards: Path) -> dict[str, object]:
    dataset, facts = survey_of(shards)
    stride = token_stride(MODEL, codec_shape(config_of(shards).codec))
    cards = [show(dataset, facts, DATA.size, stride, clip) for clip in range(len(facts))]
    return {card.row.key: card for card in cards}


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def test_a_card_shows_what_training_sees(shards: Path) -> None:
    cards = shown(shards)
    card = cards["video2"]  # 17 frames of 96 x 64
    assert [round(pixels(picture).mean() / 10) for picture in card.pictures] == [0, 8, 16], "first, middle and last"
    assert pixels(card.pictures[0]).shape == (96, 64, 3)
    big = cards["video3"]  # 128 x 192, over the budget of pixels
    assert pixels(big.pictures[0]).shape == (big.size.height, big.size.width, 3) == (64, 96, 3)
    assert card.captions[:2] == (("original/short", "weak source1"), ("recaption/short", "a square source1"))
    assert card.captions[2][1].endswith("long […]"), "long texts are cut"
    image = cards["image3"]
    assert len(image.pictures) == 1
    assert abs(pixels(image.pictures[0]).mean() - 60) < 3
    assert image.captions == (("original/short", "image caption 3"),)
    assert len(cards["latent0"].pictures) == 3


def test_a_clip_that_fails_says_why_and_costs_no_other(shards: Path, page: str) -> None:
    cards = shown(shards)
    assert [key for key, card in cards.items() if card.problem] == ["video4"]
    assert cards["video4"].problem == "hash: not the bytes that were indexed"
    assert cards["video4"].pictures == ()
    assert page.count("hash: not the bytes") == 1
    assert page.count("<img") == 5 * 3 + 12 + 2 * 3


def test_latents_are_shown_in_color_or_gray() -> None:
    for channels in (1, 2, 16):
        frames = latent_pictures(latents_member(torch.randn(channels, 7, 8, 10), "vae", 25, 64, 80, 8.0))
        assert frames.shape == (3, 160, 200, 3)
        assert frames.dtype == np.uint8
        is_gray = bool((frames[..., 0] == frames[..., 1]).all())
        assert is_gray == (channels < 3)
    assert len(latent_pictures(latents_member(torch.zeros(16, 1, 8, 8), "vae", 1, 64, 64, 0.0))) == 1


@pytest.mark.usefixtures("undrawn")
def test_only_the_clips_that_are_shown_are_read(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = Dataset.read

    def counted(self: Dataset, shard: int, offset: int, size: int) -> bytes:
        read.append(size)
        return original(self, shard, offset, size)

    monkeypatch.setattr(Dataset, "read", counted)
    dataset, _ = survey_of(shards)
    assert read == [], "the survey opens no shard"
    media = {size for shard in range(3) for size in dataset.table(shard).medium_size}
    build_page(config_of(shards, clips=2))
    assert len([size for size in read if size in media]) == 2


def test_rejects_are_counted_by_stage_and_reason(shards: Path, tmp_path: Path) -> None:
    dataset = open_dataset(shards)
    found = {(item.stage, item.reason): (item.count, item.is_note, item.example) for item in count_rejects(dataset)}
    assert found[("filter_quality", "too small")] == (2, False, "k1.mp4: too small: 20x30 under min_side=32")
    assert found[("probe", "no video")][0] == 1
    assert found[("rejects.jsonl", "unreadable line")] == (1, False, "{half a li")
    assert found[("index", "decode")][2].startswith("broken of b.tar: ")
    notes = [reason for (_, reason), (_, is_note, _) in found.items() if is_note]
    assert "decode" not in notes
    elsewhere = Dataset(dataset.files, str(tmp_path), dataset.manifest)
    assert count_rejects(elsewhere) == []
    line = {"shard": "a.tar", "key": "", "reason": "truncated_tar", "detail": "x", "is_sample": False}
    (tmp_path / "index_rejects.jsonl").write_text(json.dumps(line))
    (note,) = count_rejects(elsewhere)
    assert (note.is_note, note.example) == (True, "a.tar: x")


def simulated(shards: Path, data: DataConfig, ranks: int) -> tuple[Simulation, list[GlobalBatch], Loader]:
    """Six steps."""
    config, data = config_of(shards, ranks=ranks), replace(data, shards=str(shards))
    loader = training_loader(config, data, codec_shape(config.codec), open_dataset(shards))
    batches = [loader.order.batch(step) for step in range(6)]
    return simulate(batches, ranks, loader), batches, loader


def test_the_simulation_is_what_training_would_do(shards: Path) -> None:
    row, batches, loader = simulated(shards, DATA, 2)
    micro_steps = sum(len(loader.plans(step)) for step in range(6))
    tokens = sum(batch.num_tokens for batch in batches)
    assert row.ranks == 2
    assert row.micro_steps == pytest.approx(micro_steps / 6)
    assert row.tokens == pytest.approx(tokens / 6)
    assert row.clips_per_rank == pytest.approx(sum(len(batch.samples) for batch in batches) / 6 / 2)
    assert row.fill == pytest.approx(tokens / (2 * micro_steps * 2000))
    assert 0.5 < row.balance <= 1
    assert row.useful == row.balance
    assert simulate(batches, 1, loader).balance == 1


def test_balance_falls_with_ranks_until_there_is_a_warning_and_its_advice_helps(shards: Path) -> None:
    row, _, _ = simulated(shards, DATA, 32)
    assert row.balance < 0.9
    assert row.clips_per_rank < 1
    assert 0.2 < row.idle < 1 - row.clips_per_rank, "many ranks have no clip, fewer than if none were shared"
    text = advice(row, DATA)
    assert "On 32 ranks" in text
    found = re.search(r"Raise data.tokens_per_step=4000 to about (\d+)", text)
    assert found, text
    improved, _, _ = simulated(shards, replace(DATA, tokens_per_step=int(found[1])), 32)
    assert improved.balance > row.balance + 0.1
    assert advice(replace(row, balance=0.9), DATA) == ""
    many = replace(row, clips_per_rank=9.0, micro_steps=3.0)
    assert "data.tokens_per_step=4000 or data.max_tokens_per_pack=2000" in advice(many, DATA)


@pytest.mark.usefixtures("undrawn")
def test_half_and_twice_the_ranks_stand_beside_them(shards: Path) -> None:
    assert rank_counts(8) == (4, 8, 16)
    assert rank_counts(1) == (1, 2)
    text, warnings = build_page(config_of(shards, ranks=4, clips=0))
    rows = re.findall(r"<tr( class=\"asked\")?><td>(\d+)</td><td>[\d,]+</td>", text)
    assert rows == [("", "2"), (' class="asked"', "4"), ("", "8")]
    assert all("On 4 ranks" in warning for warning in warnings), "of what was asked for, not of what stands beside it"
    assert all(str(escape(warning)) in text for warning in warnings)


@pytest.mark.usefixtures("undrawn")
def test_a_clip_that_fits_no_pack_is_a_warning_with_what_to_change(shards: Path) -> None:
    _, facts = survey_of(shards)
    limit = int(facts.num_tokens.max()) - 1
    num_over = int((facts.num_tokens > limit).sum())
    config = config_of(shards, clips=0, ranks=1, data=replace(DATA, max_tokens_per_pack=limit))
    assert not [warning for warning in build_page(replace(config, ranks=2))[1] if "do not fit" in warning], "shared"
    text, warnings = build_page(config)
    assert warnings[0].startswith("Training would not start: clip ")
    assert f"data.max_tokens_per_pack={limit}" in warnings[0]
    (over,) = [warning for warning in warnings if "do not fit" in warning]
    assert over.startswith(f"{num_over} clips ({num_over / 20:.1%}, ")
    assert f"Raise data.max_tokens_per_pack={limit} or lower data.size.max_pixels or max_frames" in over
    assert "see the first warning above" in text


@pytest.mark.usefixtures("undrawn")
def test_clips_of_less_than_a_token_are_counted_and_shown(shards: Path) -> None:
    tiny = replace(DATA, size=SizeConfig(max_pixels=60))
    text, warnings = build_page(config_of(shards, data=tiny, clips=20))
    assert any("18 of 20 clips cannot be trained on" in warning for warning in warnings)
    assert text.count("cannot be trained on</b>") == 18
    assert "is smaller than one token" in text


@pytest.mark.usefixtures("undrawn")
def test_latents_of_another_codec_are_a_warning(shards: Path) -> None:
    other = CodecConfig(temporal_ratio=4, spatial_ratio=8)
    model = replace(MODEL, in_channels=768, out_channels=768)
    _, warnings = build_page(config_of(shards, clips=0, codec=other, model=model))
    assert warnings[0].startswith("Training would not start: data set main has latents made by ")
    assert any("2 of 20 clips cannot be trained on" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": 0}, "ranks=0: choose 1 or more"),
        ({"steps": 0}, "steps=0: choose 1 or more"),
        ({"clips": -1}, "clips=-1: choose 0 or more"),
        ({"data": replace(DATA, shards="x")}, "data.shards is set: a report is on one data set"),
        ({"data": replace(DATA, size=SizeConfig(max_pixels=0))}, "data.size.max_pixels=0"),
        ({"shards": "nowhere"}, "nowhere holds no dataset.json"),
    ],
)
def test_mistakes_are_one_line(shards: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_page(replace(config_of(shards), **changes))  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_settings_are_those_of_training() -> None:
    ConfigStore.instance().store(name=schema_name(ReportConfig), node=writable(ReportConfig))
    check_arguments(["shards=x"], ReportConfig, "report")
    check_arguments(
        ["shards=x", "model=s", "codec=diffusers", "codec.path=y", "data.size.max_frames=81"], ReportConfig, "report"
    )
    with pytest.raises(ConfigError, match="shards is not set: pass shards=VALUE"):
        check_arguments([], ReportConfig, "report")


def test_the_page_goes_beside_the_shards_unless_told_otherwise() -> None:
    config = ReportConfig(shards="a/b")
    assert output_path(config) == Path("a/b/report.html")
    assert output_path(replace(config, output="c.html")) == Path("c.html")
    assert output_path(replace(config, shards="s3://a/b")) == Path("report.html")


def test_the_command_writes_the_page(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [f"shards={shards}", "output=new/page.html", "clips=1", "steps=2", "data.held_out_fraction=0"]
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    report.main()
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "new/page.html"
    text = (tmp_path / "new" / "page.html").read_text()
    assert Page(text).open == []
    warnings = [line.removeprefix("warning: ") for line in said if line.startswith("warning: ")]
    assert warnings, "eight ranks for twenty clips"
    assert all(str(escape(warning)) in text for warning in warnings)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_charts_are_the_same_each_time_and_take_the_colors_of_the_page() -> None:
    series = {"videos": [64, 128, 128], "images": [], "pre-encoded": [720]}
    drawn = histogram(series, "pixels", log=True)
    assert drawn == histogram(series, "pixels", log=True)
    assert drawn.startswith("<svg")
    assert "var(--series-1)" in drawn
    assert "var(--series-2)" not in drawn, "of a name without values"
    assert "var(--series-3)" in drawn, "which leaves the others their colors"
    assert not re.search(r"#0[0a]0[0a]0\d", drawn)
    assert "<style" not in drawn
    assert "images" not in drawn


@pytest.mark.parametrize("values", [[5], [0, 0], [1, 10**7], [-1.0, 2.0], list(range(100))])
@pytest.mark.parametrize("log", [False, True])
def test_every_value_is_in_some_bar(values: list[float], log: bool) -> None:
    drawn = histogram({"a": values}, "x", log=log, limit=(3.0, "limit"))
    assert "nan" not in drawn
    assert "a" in drawn


def test_nothing_gives_no_chart() -> None:
    assert histogram({"a": [], "b": []}, "x") == ""
    assert aspects({"a": []}) == ""
    assert histogram({}, "x") == ""


def test_a_limit_is_drawn_unless_it_is_far_away() -> None:
    assert "a pack" in histogram({"a": [10, 90]}, "x", limit=(100, "a pack"))
    assert "a pack" not in histogram({"a": [10, 90]}, "x", limit=(1000, "a pack"))


def test_numbers_are_short() -> None:
    assert [short(number) for number in (0, 0.5, 9999, 12_345, 250_000, 1e6, 1.25e6, 3e9)] == [
        "0", "0.5", "9,999", "12.35k", "250k", "1M", "1.25M", "3G",
    ]
    assert [num_bytes(count) for count in (12, 1536, 5 * 2**30)] == ["12 B", "1.5 KiB", "5 GiB"]
    assert [duration(seconds) for seconds in (90, 7200, 3.6e7)] == ["1.5 min", "2 h", "10k h"]

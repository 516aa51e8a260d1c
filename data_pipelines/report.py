"""A page about an indexed data set: `python -m data_pipelines.report shards=DIR`, then open DIR/report.html.

What is in it (from the index), what it looks like (a few clips are decoded), what was left out, and how it would train
on some number of ranks. The page is one file that loads nothing; it is made again in full each time.
"""

import hashlib
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipelines.reporting.clips import caption_samples, pick, show
from data_pipelines.reporting.figures import aspects, histogram, short
from data_pipelines.reporting.rejects import count_rejects
from data_pipelines.reporting.simulation import Simulation, advice, rank_counts, simulate, training_loader
from data_pipelines.reporting.survey import Survey, survey
from sora_train.config.command import hydra_app
from sora_train.config.curation import ReportConfig
from sora_train.config.data import DataConfig
from sora_train.config.parallel import ParallelConfig, group_size
from sora_train.config.root import ConfigError
from sora_train.data.index import Dataset, open_dataset
from sora_train.data.schema import MANIFEST_NAME
from sora_train.data.size import check_size, token_stride
from sora_train.encoders.video_codec import codec_shape

PAGE = "report.html"
CAPTIONS_SHOWN = 6  # of each kind


@hydra_app(ReportConfig, "report")
def main(config: ReportConfig) -> None:
    """Writes the page and says where it is, and what would keep the data from training well."""
    page, warnings = build_page(config)
    path = output_path(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output={path} cannot be written, {error.strerror}: give another") from error
    for warning in warnings:
        print(f"warning: {warning}")
    print(path)


def output_path(config: ReportConfig) -> Path:
    """Where the page goes: beside the shards unless told otherwise, or here where they are behind a URL."""
    if config.output:
        return Path(config.output)
    return Path(PAGE) if "://" in config.shards else Path(config.shards) / PAGE


def build_page(config: ReportConfig) -> tuple[str, list[str]]:
    """The HTML and its warnings.

    Raises:
        ConfigError: no data set, a damaged index, or settings that no training would take.
    """
    data = data_config(config)
    codec = codec_shape(config.codec)
    stride = token_stride(config.model, codec)
    dataset = open_dataset(config.shards)
    simulations: list[Simulation] = []
    warnings: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("reading the index", total=dataset.manifest.num_samples)
        facts = survey(dataset, data, stride, lambda samples: progress.advance(bar, samples))
        shown = progress.track(pick(facts, config.clips, config.seed), description="decoding clips")
        cards = [show(dataset, facts, data.size, stride, clip) for clip in shown]
        try:
            loader = training_loader(config, data, codec, dataset)
            steps = progress.track(range(config.steps), description="planning steps")
            batches = [loader.order.batch(step) for step in steps]
            for ranks in rank_counts(config.ranks):
                # Fewer ranks may be too few to share the largest clips: no matter, they were not asked about.
                with nullcontext() if ranks == config.ranks else suppress(ConfigError):
                    simulations.append(simulate(batches, ranks, loader))
        except ConfigError as error:
            warnings.append(f"Training would not start: {error}.")
    asked = [advice(row, data) for row in simulations if row.ranks == config.ranks]
    group = group_size(ParallelConfig().largest_group, config.ranks, config.model.heads)
    warnings = [text for text in (*warnings, *data_warnings(facts, data, group), *asked) if text]
    page = fill(
        "report.html.j2",
        config=config,
        data=data,
        facts=facts,
        warnings=warnings,
        fingerprint=hashlib.sha256(dataset.files.cat_file(f"{dataset.folder}/{MANIFEST_NAME}")).hexdigest(),
        totals=totals(dataset, facts),
        cards=cards,
        figures=charts(facts, data),
        captions=captions_by_kind(dataset, facts, config.seed),
        rejects=count_rejects(dataset),
        held_out=held_out(facts),
        simulations=simulations,
    )
    return page, warnings


def data_config(config: ReportConfig) -> DataConfig:
    """The data section of a training on these shards alone.

    Raises:
        ConfigError: settings that cannot work, or that speak of more than one data set and one size rule.
    """
    for name in ("shards", "datasets", "stages"):
        if getattr(config.data, name):
            raise ConfigError(
                f"data.{name} is set: a report is on one data set and one stage, give shards=DIR and that stage's "
                "data.size and data.tokens_per_step"
            )
    for name, least in (("ranks", 1), ("steps", 1), ("clips", 0)):
        if getattr(config, name) < least:
            raise ConfigError(f"{name}={getattr(config, name)}: choose {least} or more")
    check_size(config.data.size)
    return replace(config.data, shards=config.shards)


def totals(dataset: Dataset, facts: Survey) -> list[tuple[str, str]]:
    """The numbers on top: value and name."""
    manifest = dataset.manifest
    num_images = int((facts.is_image & ~facts.is_latent).sum())
    counts = [
        (len(manifest.shards), "shards"),
        (len(facts), "clips"),
        (facts.num_sources, "sources"),
        (int(facts.is_pixel_video.sum()), "videos"),
        (num_images, "images"),
        (int(facts.is_latent.sum()), "pre-encoded"),
        (int(facts.num_tokens.sum(dtype=np.int64)), "tokens under the size rule"),
    ]
    shard_bytes = sum(shard.num_bytes for shard in manifest.shards)
    return [
        *((short(count), name) for count, name in counts),
        (duration(facts.seconds[~facts.is_image].sum(dtype=np.float64)), "of video"),
        (num_bytes(shard_bytes), "in shards"),
        (short(manifest.num_rejected), "left out by the index"),
    ]


def data_warnings(facts: Survey, data: DataConfig, group: int) -> list[str]:
    """Clips that no token, or no `group` of ranks' packs, can hold, and a validation without clips, in sentences."""
    warnings = []
    if data.held_out_fraction > 0 and not facts.is_held_out.any():
        warnings.append(
            f"None of {facts.num_sources:,} sources is held out, validation would have no clip: raise "
            f"data.held_out_fraction={data.held_out_fraction}."
        )
    num_small = int((facts.num_tokens == 0).sum())
    if num_small:
        warnings.append(
            f"{num_small:,} of {len(facts):,} clips cannot be trained on (less than one token, or latents of another "
            "codec): leave them out of the shards, or raise data.size.max_pixels."
        )
    is_over = facts.num_tokens > data.max_tokens_per_pack * group
    if is_over.any():
        tokens = facts.num_tokens.astype(np.int64)
        packs = "one pack" if group == 1 else f"the packs of {group} ranks"
        warnings.append(
            f"{is_over.sum():,} clips ({is_over.mean():.1%}, with {tokens[is_over].sum() / tokens.sum():.1%} of the "
            f"tokens) do not fit {packs}: the longest has {tokens.max():,} tokens. Raise "
            f"data.max_tokens_per_pack={data.max_tokens_per_pack} or lower data.size.max_pixels or max_frames."
        )
    return warnings


def charts(facts: Survey, data: DataConfig) -> list[tuple[str, Markup]]:
    """Title and SVG of each chart that has something to show."""
    kinds = {
        "videos": facts.is_pixel_video,
        "images": facts.is_image & ~facts.is_latent,
        "pre-encoded": facts.is_latent,
    }

    def split(values: NDArray[Any], which: NDArray[np.bool_] | None = None) -> dict[str, NDArray[Any]]:
        return {name: values[mask if which is None else mask & which] for name, mask in kinds.items()}

    limit = (float(data.max_tokens_per_pack), "a pack")
    moves = ~facts.is_image
    drawn = {
        "Resolution": histogram(split(np.minimum(facts.height, facts.width)), "shorter side, pixels", log=True),
        "Aspect": aspects(split(facts.width / facts.height)),
        "Duration": histogram(split(facts.seconds, moves & (facts.seconds > 0)), "seconds", log=True),
        "Frame rate": histogram(split(facts.fps, moves), "frames a second"),
        "Tokens in training": histogram(split(facts.num_tokens, facts.num_tokens > 0), "tokens", True, limit),
        "Caption length": histogram(
            {kind: lengths[lengths > 0] for kind, lengths in facts.caption_lengths().items()}, "bytes", log=True
        ),
    }
    return [(title, Markup(figure)) for title, figure in drawn.items() if figure]


def captions_by_kind(dataset: Dataset, facts: Survey, seed: int) -> dict[str, dict[str, Any]]:
    """How many captions of each kind there are, on what share of the clips, and some of them."""
    texts = caption_samples(dataset, facts, CAPTIONS_SHOWN, seed)
    return {
        kind: {
            "count": len(lengths),
            "share": percent(len(np.unique(facts.clips_with(kind))), len(facts)),
            "texts": texts[kind],
        }
        for kind, lengths in facts.caption_lengths().items()
    }


def held_out(facts: Survey) -> list[tuple[str, str, str, str]]:
    """What is kept for validation: name, in all, held out, share."""
    is_kept = facts.is_held_out
    rows = [
        ("sources", facts.num_sources, facts.num_sources_held_out),
        ("clips", len(facts), int(is_kept.sum())),
        ("tokens", int(facts.num_tokens.sum(dtype=np.int64)), int(facts.num_tokens[is_kept].sum(dtype=np.int64))),
    ]
    return [(name, f"{total:,}", f"{kept:,}", percent(kept, total)) for name, total, kept in rows]


def percent(part: float, whole: float) -> str:
    """A share for people; of nothing it is 0."""
    return f"{part / max(whole, 1):.1%}"


def duration(seconds: float) -> str:
    """In minutes under an hour, in hours above."""
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{short(round(seconds / 3600, 1))} h"


def num_bytes(count: int) -> str:
    """1536 -> 1.5 KiB."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"


def fill(template: str, **values: Any) -> str:
    """The text of data_pipelines/templates/<template>; what is not marked as HTML is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("data_pipelines"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    return environment.get_template(template).render(**values)


if __name__ == "__main__":
    main()

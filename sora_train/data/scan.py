"""From the members of a shard to the rows of its index, and to the names of what has no row and why.

A sample with trouble never stops the index: it is left out under one word (`reason`), and indexed and rejected samples
together are all that the tar holds. What is odd but harms no sample (a member that is not read, a caption that is too
long, what follows a cut) is noted beside them. Members such as .pyd, .pickle or .pt are not opened at all.

reasons of samples: duplicate_key, dotted_key, malformed_key, no_medium, two_media, zero_bytes, too_large, missing_json,
    missing_text, malformed_json, malformed_record, no_caption_field, not_utf8, malformed_latents, not_finite,
    malformed_text_rows, frame_count, frame_size, truncated_tar, damaged_tar, crash, timeout, and those of data.probe
    (decode, no_video, zero_frames, ...)
reasons of notes: ignored_member, caption_too_long, truncated_tar, damaged_tar
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import xxhash

from sora_train.data.precomputed_header import has_only_finite, latents_header, text_header
from sora_train.data.probe import DecodeError, probe_media
from sora_train.data.sample_members import Sample
from sora_train.data.schema import LATENT_SUFFIX, MEDIA, TEXT_SUFFIX, IndexRow
from sora_train.data.tar_members import Member, Readable, TarEnd, TarReader

KEY = re.compile(r"[A-Za-z0-9_/-]{1,512}")
# A medium is held in memory while it is probed, the texts of a shard until its end.
MAX_MEDIUM_BYTES = 2 << 30
MAX_TEXT_BYTES = 4 << 20
_KNOWN = (*MEDIA, TEXT_SUFFIX, "json", "txt")


@dataclass(frozen=True)
class Reject:
    """A line of index_rejects.jsonl."""

    shard: str
    key: str  # empty for what is no sample's
    reason: str
    detail: str
    is_sample: bool = True  # left out of the index; False: a note, all samples it touches are in

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class ShardScan:
    """What a tar holds."""

    rows: tuple[IndexRow, ...]
    rejects: tuple[Reject, ...]
    num_bytes: int
    sha256: str
    encoders: tuple[str, ...]
    text_encoders: tuple[str, ...]


class Watch:
    """Whom a scan tells how far it is; this one does not listen."""

    # Keys whose medium is not to be opened, since that ended an earlier process, and the reason to give.
    skipped: Mapping[str, str] = {}

    def on_read(self, num_bytes: int) -> None:
        """So many more bytes of the tar have been read."""

    def on_probe(self, key: str) -> None:
        """The medium of a sample is opened now; empty: it has been."""


def scan_shard(file: Readable, shard: str, caption_fields: Sequence[str], watch: Watch) -> ShardScan:
    """Reads a tar once, from its beginning to its end.

    Args:
        file: the tar, opened in binary.
        shard: its name in the data set.
        caption_fields: of a foreign KEY.json; the first that is there holds the caption.
        watch: is told how far the scan is.

    Raises:
        OSError: the file cannot be read.
    """
    scan = _Scan(shard, tuple(caption_fields), watch)
    tar = TarReader(file, watch.on_read)
    for member in tar.members(scan.is_wanted):
        scan.take(member)
    assert tar.end is not None
    return scan.finish(tar.end)


class _Scan:
    def __init__(self, shard: str, caption_fields: tuple[str, ...], watch: Watch) -> None:
        self.shard = shard
        self.caption_fields = caption_fields
        self.watch = watch
        self.samples: list[Sample] = []
        self.by_key: dict[str, Sample] = {}  # the latest of each key
        self.last: Sample | None = None
        self.ignored: Counter[str] = Counter()
        self.notes: list[Reject] = []

    def is_wanted(self, name: str, size: int) -> bool:
        suffix = split_name(name)[1]
        if suffix in MEDIA:
            return 0 < size <= MAX_MEDIUM_BYTES
        return suffix in _KNOWN and size <= (MAX_MEDIUM_BYTES if suffix == TEXT_SUFFIX else MAX_TEXT_BYTES)

    def take(self, member: Member) -> None:
        key, suffix, is_dotted = split_name(member.name)
        if not key:  # a hidden file
            self.ignored["hidden files"] += 1
            return
        sample = self.last = self._sample(key, suffix, is_dotted)
        sample.suffixes.add(suffix)
        if suffix not in _KNOWN or not member.is_file:
            self.ignored[f".{suffix[:32]}" if member.is_file else "links and the like"] += 1
        elif sample.reason:
            return
        elif suffix in MEDIA:
            self._take_medium(sample, suffix, member)
        elif member.data is None:
            sample.reject("too_large", f"{suffix} has {member.size} bytes")
        elif suffix == TEXT_SUFFIX:
            self._take_rows(sample, member)
        elif suffix == "json":
            sample.json_member = member
        else:
            sample.text_member = member

    def _sample(self, key: str, suffix: str, is_dotted: bool) -> Sample:
        sample = self.by_key.get(key)
        if sample is not None and suffix not in sample.suffixes:
            return sample
        is_repeated = sample is not None
        sample = Sample(key, is_dotted=is_dotted)
        if is_repeated:
            sample.reject("duplicate_key", f"{suffix} for the second time: the first is kept")
        elif is_dotted:
            sample.reject("dotted_key", "readers cut keys at the first dot")
        elif not KEY.fullmatch(key):
            sample.reject("malformed_key", f"expected {KEY.pattern}")
        self.samples.append(sample)
        self.by_key[key] = sample
        return sample

    def _take_medium(self, sample: Sample, suffix: str, member: Member) -> None:
        if sample.medium:
            sample.reject("two_media", f"{sample.medium} and {suffix}")
            return
        sample.medium, sample.medium_member = suffix, member
        if member.size == 0:
            sample.reject("zero_bytes", f"{suffix} has 0 bytes")
        elif member.data is None:
            sample.reject("too_large", f"{suffix} has {member.size} bytes, at most {MAX_MEDIUM_BYTES} are read")
        elif sample.key in self.watch.skipped:
            sample.reject(self.watch.skipped[sample.key], "opening its medium ended the process that did it")
        else:
            self.watch.on_probe(sample.key)
            try:
                if suffix == LATENT_SUFFIX:
                    sample.latents = latents_header(member.data)
                    if not has_only_finite(member.data, sample.latents.place):
                        sample.reject("not_finite", "its latents hold numbers that are infinite or none")
                else:
                    sample.facts = probe_media(member.data, suffix)
            except DecodeError as error:
                sample.reject(error.reason, error.detail)
            except ValueError as error:
                sample.reject("malformed_latents", str(error))
            self.watch.on_probe("")
            sample.xxh3 = xxhash.xxh3_64_intdigest(member.data)
            sample.sha256 = hashlib.sha256(member.data).hexdigest()
        sample.medium_member = _without_data(member)

    def _take_rows(self, sample: Sample, member: Member) -> None:
        assert member.data is not None
        try:
            sample.rows, sample.rows_member = text_header(member.data), _without_data(member)
            for place in (*sample.rows.captions, *([sample.rows.empty] if sample.rows.empty else [])):
                if not has_only_finite(member.data, place):
                    sample.reject("not_finite", "its text rows hold numbers that are infinite or none")
                    break
        except ValueError as error:
            sample.reject("malformed_text_rows", str(error))

    def finish(self, end: TarEnd) -> ShardScan:
        if end.trouble:
            self._reject_last(end)
            self.notes.append(Reject(self.shard, "", end.trouble, end.detail, is_sample=False))
        for what, count in sorted(self.ignored.items()):
            detail = f"{count} members are not read: {what}"
            self.notes.append(Reject(self.shard, "", "ignored_member", detail, is_sample=False))
        # x.mask.png beside x.jpg is no sample with a dot in its key, but a member of x that is not read.
        samples = [s for s in self.samples if not (s.is_dotted and self._undotted(s.key) in self.by_key)]
        if len(samples) < len(self.samples):
            detail = f"{len(self.samples) - len(samples)} members are not read: more than one dot in the name"
            self.notes.append(Reject(self.shard, "", "ignored_member", detail, is_sample=False))
        for sample in samples:
            if not sample.reason:
                for i, num_characters in sample.resolve(self.caption_fields):
                    detail = f"caption {i} has {num_characters} characters and is left out"
                    self.notes.append(Reject(self.shard, sample.key, "caption_too_long", detail, is_sample=False))
        self._check_captions_are_there(samples)
        return ShardScan(
            rows=tuple(sample.row() for sample in samples if not sample.reason),
            rejects=(
                *(Reject(self.shard, s.key[:600], s.reason, s.detail[:600]) for s in samples if s.reason),
                *self.notes,
            ),
            num_bytes=end.num_bytes,
            sha256=end.sha256,
            encoders=tuple(sorted({s.latents.encoder for s in samples if s.latents and not s.reason})),
            text_encoders=tuple(sorted({s.rows.encoder for s in samples if s.rows and not s.reason})),
        )

    def _reject_last(self, end: TarEnd) -> None:
        # More members of the last sample may have followed: it is kept if it has all that the first has.
        if self.last is not None:
            first = self.samples[0]
            is_complete = self.last is not first and self.last.suffixes >= first.suffixes and not end.is_member_cut
            if not is_complete:
                self.last.reason, self.last.detail = end.trouble, end.detail

    @staticmethod
    def _undotted(key: str) -> str:
        folder, slash, name = key.rpartition("/")
        return folder + slash + name.partition(".")[0]

    def _check_captions_are_there(self, samples: list[Sample]) -> None:
        """Media alone are a data set too; in a shard that has captions, a sample without has lost them."""
        has_json = any("json" in sample.suffixes for sample in samples)
        has_text = any("txt" in sample.suffixes for sample in samples)
        for sample in samples:
            if (has_json or has_text) and not sample.suffixes & {"json", "txt"}:
                reason = "missing_text" if has_text else "missing_json"
                sample.reject(reason, "other samples of the shard have it")


def split_name(name: str) -> tuple[str, str, bool]:
    """(key, suffix, whether the key has a dot) of a member's name; an empty key for a hidden file."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    suffix = suffix.lower()
    if not stem:
        return "", suffix, False
    if suffix not in _KNOWN:
        for known in _KNOWN:
            if suffix.endswith(f".{known}"):
                return folder + slash + base[: -len(known) - 1], known, True
    return folder + slash + stem, suffix, False


def _without_data(member: Member) -> Member:
    return Member(member.name, member.offset, member.size, member.is_file, None)

"""A sample while its shard is being scanned: members in whatever order they come, then a row of the index, or a reason.

The other half of data.scan, which walks the tar and hands the members over.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sora_train.data.caption_text import (
    CaptionError,
    clean_text,
    decode_text,
    foreign_text,
    is_record,
    read_json,
    read_record,
    usable_text,
)
from sora_train.data.precomputed_header import LatentsHeader, TextHeader
from sora_train.data.probe import MediaFacts
from sora_train.data.schema import MEDIA, CaptionEntry, CaptionsIn, ClipRecord, IndexRow, Origin, Source, Style
from sora_train.data.tar_members import Member

FOREIGN_KIND = f"{Origin.original.value}/{Style.short.value}"


@dataclass
class Sample:
    """A sample, by the members of its key that have been met so far."""

    key: str
    reason: str = ""  # the first trouble; empty while there is none
    detail: str = ""
    is_dotted: bool = False
    suffixes: set[str] = field(default_factory=set)
    medium: str = ""
    medium_member: Member | None = None
    xxh3: int = 0
    sha256: str = ""
    facts: MediaFacts | None = None
    latents: LatentsHeader | None = None
    json_member: Member | None = None
    text_member: Member | None = None
    rows_member: Member | None = None
    rows: TextHeader | None = None
    captions_in: CaptionsIn = CaptionsIn.nowhere
    captions: tuple[CaptionEntry, ...] = ()
    source: Source | None = None

    def reject(self, reason: str, detail: str) -> None:
        """Leaves it out of the index, unless an earlier trouble has."""
        if not self.reason:
            self.reason, self.detail = reason, detail

    def resolve(self, caption_fields: Sequence[str]) -> list[tuple[int, int]]:
        """Once all members are known: finds the captions, and rejects what does not fit together.

        Returns:
            (which, characters) of captions that are too long to be used.
        """
        if not self.medium:
            suffixes = ", ".join(sorted(self.suffixes))
            self.reject("no_medium", f"has {suffixes[:200]}; the media are {', '.join(MEDIA)}")
            return []
        try:
            texts = self._texts(caption_fields)
        except CaptionError as error:
            self.reject(error.reason, error.detail)
            return []
        self.captions = tuple(CaptionEntry(kind, len(usable_text(text).encode())) for kind, text in texts)
        if self.rows is not None and len(self.rows.captions) != len(self.captions):
            detail = f"rows for {len(self.rows.captions)} captions, the sample has {len(self.captions)}"
            self.reject("malformed_text_rows", detail)
        entries = enumerate(zip(self.captions, texts, strict=True))
        return [(i, len(text)) for i, (entry, (_, text)) in entries if entry.num_bytes == 0 and clean_text(text)]

    def _texts(self, caption_fields: Sequence[str]) -> list[tuple[str, str]]:
        """(kind, text), as data.caption_text.read_captions will find them in the member that the row names."""
        if self.json_member is not None:
            assert self.json_member.data is not None
            values = read_json(self.json_member.data)
            if is_record(values, caption_fields):
                record = read_record(self.json_member.data)
                self.captions_in, self.source = CaptionsIn.record, record.source
                self._check_facts(record)
                return [(caption.kind, caption.text) for caption in record.captions]
            if self.text_member is None or any(name in values for name in caption_fields):
                self.captions_in = CaptionsIn.field
                return [(FOREIGN_KIND, foreign_text(values, caption_fields))]
        if self.text_member is not None:
            assert self.text_member.data is not None
            self.captions_in = CaptionsIn.text
            return [(FOREIGN_KIND, decode_text(self.text_member.data))]
        return []

    def _check_facts(self, record: ClipRecord) -> None:
        """A record that says another thing than the medium: one of them is damaged."""
        found = self.facts or self.latents
        assert found is not None
        if found.num_frames != record.num_frames:
            self.reject("frame_count", f"{found.num_frames} frames, the record says {record.num_frames}")
        if (found.height, found.width) != (record.height, record.width):
            size = f"{record.height}x{record.width}"
            self.reject("frame_size", f"{found.height}x{found.width}, the record says {size}")

    def row(self) -> IndexRow:
        """What the index has of it."""
        medium, latents, facts = self.medium_member, self.latents, self.facts
        found = facts or latents
        assert medium is not None
        assert found is not None
        holder = self.text_member if self.captions_in is CaptionsIn.text else self.json_member
        if self.captions_in is CaptionsIn.nowhere:
            holder = None
        return IndexRow(
            key=self.key,
            medium=self.medium,
            medium_offset=medium.offset,
            medium_size=medium.size,
            num_frames=found.num_frames,
            fps=found.fps,
            height=found.height,
            width=found.width,
            duration_seconds=facts.duration_seconds if facts else found.num_frames / found.fps if found.fps else 0.0,
            # Where nobody says what a clip was cut from, its bytes stand for it: copies of a file are then held out, or
            # trained on, together, whatever their keys and shards.
            source_sha256=self.source.sha256 if self.source else self.sha256,
            captions=self.captions,
            medium_xxh3=self.xxh3,
            captions_in=self.captions_in,
            record_offset=holder.offset if holder else 0,
            record_size=holder.size if holder else 0,
            text_offset=self.rows_member.offset if self.rows_member else 0,
            text_size=self.rows_member.size if self.rows_member else 0,
            rotation=facts.rotation if facts else 0,
            is_variable_rate=facts.is_variable_rate if facts else False,
            latent_shape=latents.shape if latents else None,
        )

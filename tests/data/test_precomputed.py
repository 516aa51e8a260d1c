import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load, save

from sora_train.data.precomputed import latents_member, read_latents, read_text, text_member
from sora_train.data.precomputed_header import has_only_finite, latents_header, text_header

LATENTS = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)


def member(number: torch.dtype = torch.float32) -> bytes:
    return latents_member(LATENTS.to(number), "vae-1", 9, 40, 50, 8.0)


@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16, torch.float16])
def test_latents_come_back_as_they_were_and_are_not_copied(number: torch.dtype) -> None:
    data = bytearray(member(number))
    found = read_latents(memoryview(data))
    assert found.dtype == number
    assert torch.equal(found, LATENTS.to(number))
    data[-1] ^= 1
    assert not torch.equal(found, LATENTS.to(number))
    assert torch.equal(read_latents(member(number)), load(member(number))["latents"])


def test_the_header_alone_tells_what_planning_needs() -> None:
    header = latents_header(member())
    assert (header.encoder, header.shape) == ("vae-1", (2, 3, 4, 5))
    assert (header.num_frames, header.height, header.width, header.fps) == (9, 40, 50, 8.0)


def test_rows_of_captions_keep_their_order_and_the_empty_one_its_name() -> None:
    rows = [torch.full((1 + i % 3, 4), float(i)) for i in range(11)]
    rows.append(rows[0])
    data = text_member(rows, "t5", empty=torch.zeros(1, 4))
    found = read_text(data)
    assert all(torch.equal(a, b) for a, b in zip(found.captions, rows, strict=True))
    assert found.empty is not None
    assert text_header(data).encoder == "t5"
    assert read_text(text_member(rows, "t5")).empty is None


def test_equal_members_are_equal_bytes_in_every_process() -> None:
    code = (
        "import hashlib, torch; from sora_train.data.precomputed import *;"
        "x = torch.arange(120, dtype=torch.float32).view(2, 3, 4, 5);"
        "print(hashlib.sha256(latents_member(x, 'vae-1', 9, 40, 50, 8.0)).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == hashlib.sha256(member()).hexdigest()


def test_what_no_clip_has_is_not_written() -> None:
    with pytest.raises(ValueError, match=r"expected \[C, T, H, W\]"):
        latents_member(LATENTS[0], "vae-1", 9, 40, 50, 8.0)
    with pytest.raises(ValueError, match="no clip has"):
        latents_member(LATENTS, "", 9, 40, 50, 8.0)
    with pytest.raises(ValueError, match="type F64"):
        latents_member(LATENTS.double(), "vae-1", 9, 40, 50, 8.0)
    with pytest.raises(ValueError, match="different widths"):
        text_member([torch.zeros(1, 4), torch.zeros(1, 5)], "t5")
    with pytest.raises(ValueError, match=r"expected \[M, D\]"):
        text_member([], "t5")


def test_damaged_members_are_told_by_the_header() -> None:
    whole = member()
    for data in (b"", whole[:7], whole[:100], whole[:-1], bytes(len(whole)), b"\xff" * len(whole)):
        with pytest.raises(ValueError, match=r"safetensors|cut"):
            latents_header(data)
    for metadata in (None, {"encoder": "vae-1"}, {"encoder": "v", "num_frames": "x", "height": "1", "width": "1"}):
        with pytest.raises(ValueError, match=r"lacks|invalid literal"):
            latents_header(save({"latents": LATENTS}, metadata=metadata))
    with pytest.raises(ValueError, match="expected `latents` alone"):
        latents_header(save({"latents": LATENTS, "more": LATENTS.clone()}))
    header = json.dumps({"latents": {"dtype": "F32", "shape": [2**40, 2**40, 1, 1], "data_offsets": [0, 4]}}).encode()
    with pytest.raises(ValueError, match="does not fit"):
        latents_header(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="expected caption_0"):
        text_header(save({"caption_1": torch.zeros(1, 4)}, metadata={"encoder": "t5"}))


@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_that_is_none_is_found(number: torch.dtype) -> None:
    largest = torch.finfo(number).max
    for value, is_good in ((largest, True), (-largest, True), (float("inf"), False), (float("nan"), False)):
        latents = LATENTS.clone().to(number)
        latents[1, 2, 3, 4] = value
        data = latents_member(latents, "vae-1", 9, 40, 50, 8.0)
        assert has_only_finite(data, latents_header(data).place) is is_good

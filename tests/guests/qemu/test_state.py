"""The blob of a guest's state: whole, or refused before anything of it is used."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from ckptd.errors import GuestError
from ckptd.guests.qemu import state as module
from ckptd.guests.qemu.state import decode, describe, encode
from ckptd.guests.qemu.survey import Survey

from .test_refusals import FINE

DEVICES = random.Random(1).randbytes(5000)


def blob() -> bytes:
    return encode(describe(FINE), DEVICES)


def test_it_comes_back() -> None:
    found = decode(blob())
    assert found.survey == FINE and found.devices == DEVICES
    assert decode(encode(describe(replace(FINE, cpus=3)), b"")).survey.cpus == 3


def test_every_flipped_byte_is_refused_before_anything_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(_: Any) -> Survey:
        raise AssertionError("it was used")

    monkeypatch.setattr(module.Survey, "from_dict", used)
    good = blob()
    for at in [*range(200), *range(200, len(good), 37), len(good) - 1]:
        bad = bytearray(good)
        bad[at] ^= 0x40
        with pytest.raises(GuestError, match=r"damaged|is not the state|of version"):
            decode(bytes(bad))


def test_truncated_is_refused() -> None:
    good = blob()
    for size in [*range(64), *range(64, len(good), 101), len(good) - 1]:
        with pytest.raises(GuestError, match=r"cut off|damaged"):
            decode(good[:size])
    with pytest.raises(GuestError, match="damaged"):
        decode(good + b"\0")


def test_another_version_and_another_thing_are_named() -> None:
    good = blob()
    with pytest.raises(GuestError, match="is of version 2, and this ckptd knows 1"):
        decode(good[:8] + (2).to_bytes(4, "little") + good[12:])
    with pytest.raises(GuestError, match="not the state of a QEMU guest"):
        decode(b"CKPTKVM\0" + good[8:])


def test_a_description_that_is_whole_but_no_survey_is_refused() -> None:
    for about in (b"\xc0", b"", b"\x81\xa1x\x01"):
        with pytest.raises(GuestError, match="cannot be read"):
            decode(encode(about, DEVICES))

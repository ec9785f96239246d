"""The meta of PAGES: order, range, counts and kinds are all checked before the payload is looked at."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import CorruptFrame
from ckptd.memory.batch import DELTA, RAW, ZERO
from ckptd.memory.hashing import PageHasher
from ckptd.memory.regions import Geometry
from ckptd.protocol.pages import decode_pages, encode_pages
from ckptd.protocol.wire import Header, Type

GEOMETRY = Geometry.of(low=64, ram=256)
HASHER = PageHasher(9)
PAGE = 4096


def header(payload: int, version: int = 2) -> Header:
    return Header(Type.PAGES, 1, 1, 1, 0, payload, 0, version)


def meta(gfns: list[int], kinds: list[int], region: int = 1, iteration: int = 0) -> bytes:
    hashes = np.arange(2 * len(gfns), dtype=np.uint64).reshape(-1, 2) + 5
    where = np.array(kinds, dtype=np.uint8)
    hashes[where == ZERO] = HASHER.zero
    return encode_pages(region, np.array(gfns, dtype=np.int64), hashes, iteration, where, HASHER.zero)


def decode(data: bytes, payload: int, version: int = 2) -> Any:
    return decode_pages(header(payload, version), data, GEOMETRY, HASHER)


@given(st.data())
def test_pages_go_there_and_back(data: Any) -> None:
    gfns = sorted(data.draw(st.sets(st.integers(0, 255), min_size=1, max_size=50)))
    kinds = data.draw(st.lists(st.sampled_from([ZERO, RAW, DELTA]), min_size=len(gfns), max_size=len(gfns)))
    deltas = kinds.count(DELTA)
    iteration = 0 if deltas else data.draw(st.integers(0, 0xFFFFFFFF))
    pages = decode(meta(gfns, kinds, iteration=iteration), kinds.count(RAW) * PAGE + 100 * bool(deltas))
    assert (pages.region, pages.iteration) == (1, iteration)
    assert pages.gfns.tolist() == gfns and pages.kinds.tolist() == kinds
    assert pages.run == (gfns[-1] - gfns[0] + 1 == len(gfns))
    assert pages.raw == kinds.count(RAW)
    assert pages.contiguous == (pages.run and set(kinds) == {RAW})


def test_a_run_names_only_its_first_page() -> None:
    assert len(meta([7, 8, 9], [RAW] * 3)) == 24 + 4 + 48
    assert len(meta([7, 8, 10], [RAW] * 3)) == 24 + 12 + 48
    assert len(meta([7, 8, 9], [RAW, DELTA, ZERO])) == 24 + 4 + 48 + 3


def changed(data: bytes, at: int, form: str, value: int) -> bytes:
    size = struct.calcsize(form)
    return data[:at] + struct.pack(form, value) + data[at + size :]


GOOD = meta([3, 5, 9], [RAW, RAW, ZERO])
MIXED = meta([3, 5, 9], [RAW, DELTA, ZERO])


@pytest.mark.parametrize(
    ("data", "payload", "where"),
    [
        (GOOD[:23], 2 * PAGE, {"field": "meta_length"}),
        (changed(GOOD, 0, "<H", 2), 2 * PAGE, {"region": 2}),
        (changed(GOOD, 2, "<B", 4), 2 * PAGE, {"field": "flags"}),
        (changed(GOOD, 3, "<B", 1), 2 * PAGE, {"field": "flags"}),
        (changed(GOOD, 20, "<I", 1), 2 * PAGE, {"field": "flags"}),
        (changed(GOOD, 4, "<I", 0), 2 * PAGE, {"field": "count"}),
        (changed(GOOD, 4, "<I", 4097), 2 * PAGE, {"field": "count"}),
        (changed(GOOD, 4, "<I", 0xFFFFFFFF), 2 * PAGE, {"field": "count"}),
        (changed(GOOD, 4, "<I", 2), 2 * PAGE, {"field": "count"}),
        (GOOD + b"\x00", 2 * PAGE, {"field": "count"}),
        (changed(GOOD, 12, "<I", 3), 3 * PAGE, {"field": "raw"}),
        (changed(GOOD, 16, "<I", 1), 2 * PAGE, {"field": "raw"}),
        (changed(GOOD, 28, "<I", 3), 2 * PAGE, {"gfn": 3}),
        (changed(GOOD, 28, "<I", 2), 2 * PAGE, {"gfn": 2}),
        (changed(GOOD, 32, "<I", 5), 2 * PAGE, {"gfn": 5}),
        (changed(GOOD, 32, "<I", 256), 2 * PAGE, {"gfn": 256}),
        (changed(GOOD, 32, "<I", 0xFFFFFFFF), 2 * PAGE, {"gfn": 0xFFFFFFFF}),
        (changed(GOOD, 0, "<H", 0)[:32] + struct.pack("<I", 64) + GOOD[36:], 2 * PAGE, {"region": "low", "gfn": 64}),
        (changed(meta([250, 251], [RAW, RAW]), 24, "<I", 255), 2 * PAGE, {"gfn": 256}),
        (GOOD, 2 * PAGE + 1, {"field": "payload_length"}),
        (GOOD, 2 * PAGE - 1, {"field": "payload_length"}),
        (GOOD, 0, {"field": "payload_length"}),
        (MIXED, PAGE, {"field": "payload_length"}),
        (MIXED, 2 * PAGE + 1, {"field": "payload_length"}),
        (MIXED[:-1] + b"\x01", 2 * PAGE + 10, {"field": "kinds"}),
        (MIXED[:-3] + b"\x00" + MIXED[-2:], PAGE + 10, {"field": "kinds"}),
        (MIXED[:-3] + b"\x03" + MIXED[-2:], PAGE + 10, {"field": "kinds"}),
        (changed(MIXED, 8, "<I", 1), PAGE + 10, {"field": "kinds"}),
    ],
    ids=lambda one: "meta" if isinstance(one, bytes) else str(one),
)  # fmt: skip
def test_every_lie_is_named(data: bytes, payload: int, where: dict[str, object]) -> None:
    with pytest.raises(CorruptFrame) as caught:
        decode(data, payload)
    assert {**caught.value.where, **where} == caught.value.where
    assert caught.value.where["frame"] == "PAGES"


def test_version_1_has_no_deltas() -> None:
    assert decode(GOOD, 2 * PAGE, version=1).raw == 2
    with pytest.raises(CorruptFrame, match="version 1"):
        decode(MIXED, PAGE + 10, version=1)


@given(st.binary(max_size=300), st.integers(0, 1 << 24))
def test_no_bytes_raise_anything_else(data: bytes, payload: int) -> None:
    with contextlib.suppress(CorruptFrame):
        decode(data, payload)

"""Control messages: there and back, every field checked, bombs refused in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import CorruptFrame, LocalProtocolError
from ckptd.protocol import messages as m
from ckptd.protocol.wire import Type

D = bytes(range(16))
EXAMPLES: list[m.Message] = [
    m.Hello(1, 2, "ckptd 1", "vm", "sim", D, [["low", 160], ["ram", 256]], 7, "memory", False),
    m.Welcome(2, "ckptd 1", "committed", 5, 7, D, D),
    m.Nack("gap", "why", 5, 3),
    m.TableRequest(),
    m.Table(0, 12, True),
    m.Iteration(1, 9),
    m.State(5),
    m.Output(5, 1, 2),
    m.Commit(9, D, D, "durable", True),
    m.Ack("memory", D),
    m.Heartbeat(),
    m.Handover(),
    m.Promoted(D),
    m.Verify(),
    m.Verified(D),
    m.Bye("so long"),
]
BY_TYPE = {example.TYPE: example for example in EXAMPLES}
FIELDS = [(example, name) for example in EXAMPLES for name in example.CHECKS]
STRANGE: list[Any] = [None, 1.5, -1, 1 << 63, "x" * 1025, b"", b"x" * 17, [], [[]], {}, {"a": 1}, "other"]
BAD: dict[tuple[type[m.Message], str], list[Any]] = {
    (m.Hello, "oldest"): [256, -1, True, "1"],
    (m.Hello, "newest"): [256, False],
    (m.Hello, "software"): ["x" * 257, "ü" * 129],
    (m.Hello, "guest"): ["x" * 65, b"vm"],
    (m.Hello, "run"): [b"x" * 15, "x" * 16],
    (m.Hello, "regions"): [
        [], [["ram", 0]], [["ram", (1 << 32) + 1]], [["ram", 1], ["ram", 2]], [["ram"]], [["x" * 65, 1]],
        [["ram", True]], [[1, "ram"]], {"ram": 1}, "ram",
    ],
    (m.Hello, "level"): ["disk", 1],
    (m.Hello, "replace"): [0, 1, "no"],
    (m.Welcome, "holding"): ["promoted", "some"],
    (m.Welcome, "digest"): [b"x" * 15, b"x" * 17],
    (m.Nack, "code"): ["because"],
    (m.Nack, "text"): ["x" * 1025, "ü" * 513],
    (m.Table, "region"): [1024],
    (m.Table, "first"): [1 << 32],
    (m.Iteration, "iteration"): [1 << 32],
    (m.State, "crc"): [1 << 32],
    (m.Commit, "final"): [0],
    (m.Commit, "level"): ["Memory"],
}  # fmt: skip


def meta_with(example: m.Message, name: str, value: Any) -> bytes:
    return msgpack.packb({**dataclasses.asdict(example), name: value})


def test_every_type_but_pages_has_a_message() -> None:
    assert set(BY_TYPE) == set(Type) - {Type.PAGES}
    assert all(set(example.CHECKS) == {field.name for field in dataclasses.fields(example)} for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.TYPE.name)
def test_a_message_goes_there_and_back(example: m.Message) -> None:
    assert m.decode(example.TYPE, m.encode(example)) == example


@pytest.mark.parametrize(("example", "name"), FIELDS, ids=lambda one: one if isinstance(one, str) else one.TYPE.name)
def test_every_field_is_checked(example: m.Message, name: str) -> None:
    refused = 0
    for value in [*STRANGE, *BAD.get((type(example), name), [])]:
        try:
            decoded = m.decode(example.TYPE, meta_with(example, name, value))
        except CorruptFrame as error:
            refused += 1
            assert error.where["frame"] == example.TYPE.name and error.code == "corrupt"
        else:
            assert type(getattr(decoded, name)) is type(getattr(example, name))
            assert value not in BAD.get((type(example), name), [])
    assert refused >= 9


def test_the_error_names_the_field() -> None:
    for (cls, name), values in BAD.items():
        example = next(one for one in EXAMPLES if type(one) is cls)
        for value in values:
            if isinstance(value, str) and len(value.encode()) > m.MAX_TEXT:
                continue  # msgpack itself stops at that
            with pytest.raises(CorruptFrame) as caught:
                m.decode(cls.TYPE, meta_with(example, name, value))
            assert caught.value.where["field"] == name
            with pytest.raises(LocalProtocolError) as local:
                m.encode(dataclasses.replace(example, **{name: value}))
            assert local.value.where["field"] == name


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.TYPE.name)
def test_fields_are_exactly_those_of_the_message(example: m.Message) -> None:
    fields = dataclasses.asdict(example)
    with pytest.raises(CorruptFrame, match="must have the fields"):
        m.decode(example.TYPE, msgpack.packb({**fields, "extra": 1}))
    for name in fields:
        with pytest.raises(CorruptFrame, match="must have the fields"):
            m.decode(example.TYPE, msgpack.packb({key: value for key, value in fields.items() if key != name}))
    with pytest.raises(CorruptFrame):
        m.decode(example.TYPE, msgpack.packb([fields]))
    with pytest.raises(CorruptFrame):
        m.decode(example.TYPE, m.encode(example) + b"\x00")


def test_a_field_named_twice_is_refused() -> None:
    twice = b"\x82" + 2 * (msgpack.packb("crc") + msgpack.packb(5))
    with pytest.raises(CorruptFrame, match="twice"):
        m.decode(Type.STATE, twice)


BOMBS = {
    "deep arrays": b"\x91" * 60_000,
    "deep wide arrays": b"\xdc\x04\x00" * 20_000,
    "deep maps": b"\x81\xa1a" * 20_000,
    "huge array": b"\xdd\xff\xff\xff\xff",
    "huge map": b"\xdf\xff\xff\xff\xff",
    "huge str": b"\xdb\xff\xff\xff\xff",
    "huge bin": b"\xc6\xff\xff\xff\xff",
    "huge ext": b"\xc9\xff\xff\xff\xff\x01",
    "timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "empty": b"",
    "reserved byte": b"\xc1",
    "half a map": b"\x82\xa3crc",
    "not utf-8": b"\x81\xa3\xff\xfe\xfd\x00",
    "a key that is a map": b"\x81\x80\x00",
    "a key that is a number": b"\x81\x05\x00",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("kind", [Type.HELLO, Type.HEARTBEAT])
def test_bombs_are_corrupt_frames_in_bounded_memory(bomb: bytes, kind: Type) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CorruptFrame):
            m.decode(kind, bomb)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()


@given(st.sampled_from(sorted(BY_TYPE)), st.binary(max_size=200))
def test_no_bytes_raise_anything_else(kind: Type, meta: bytes) -> None:
    with contextlib.suppress(CorruptFrame):
        assert m.decode(kind, meta).TYPE is kind


@given(st.text(max_size=2000))
def test_any_text_fits_when_clipped(text: str) -> None:
    clipped = m.clip(text + "\udcff")
    assert len(clipped.encode()) <= m.MAX_TEXT
    assert m.decode(Type.BYE, m.encode(m.Bye(clipped))) == m.Bye(clipped)

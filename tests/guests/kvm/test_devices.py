"""The ports, and the console's input."""

from __future__ import annotations

import pytest

from ckptd.guests.kvm.devices import MAX_INPUT, MAX_LINE, Command, Console, Devices


class Seen:
    def __init__(self, typed: bytes = b"") -> None:
        self.said = b""
        self.commands: list[Command] = []
        self.stored: list[tuple[int, bytes]] = []
        self.console = Console(typed)
        self.devices = Devices(
            self.console, self.say, self.commands.append, lambda gpa, data: self.stored.append((gpa, data))
        )

    def say(self, data: bytes) -> None:
        self.said += data

    def out(self, port: int, value: int, size: int = 4) -> None:
        self.devices.write(port, size, value.to_bytes(size, "little"))


def test_the_transmitter_takes_bytes_and_strings() -> None:
    seen = Seen()
    seen.out(0x3F8, 65, 1)
    seen.devices.write(0x3F8, 1, b"BCD")
    assert seen.said == b"ABCD"


def test_the_receiver_and_the_line_status() -> None:
    seen = Seen(b"xy")
    assert seen.devices.read(0x3FD, 1, 1) == b"\x61"
    assert seen.devices.read(0x3F8, 1, 2) == b"xy"
    assert seen.devices.read(0x3FD, 1, 1) == b"\x60"
    assert seen.devices.read(0x3F8, 1, 1) == b"\0"


def test_commands_and_their_argument() -> None:
    seen = Seen()
    for number in (1, 2, 4, 5, 6, 0):
        seen.out(0x600, number)
    assert seen.commands == [Command.MARK, Command.WAIT, Command.END, Command.FAULT]
    seen.out(0x604, 0xCAFEBABE)
    assert seen.devices.latch == 0xCAFEBABE


def test_fetch_writes_one_whole_line_with_its_length() -> None:
    seen = Seen(b"one\ntwo\nthr")
    seen.out(0x604, 0x9000)
    for _ in range(3):
        seen.out(0x600, Command.FETCH)
    seen.console.typed(b"ee\n")
    seen.out(0x600, Command.FETCH)
    assert seen.stored == [
        (0x9000, b"\4\0\0\0one\n"), (0x9000, b"\4\0\0\0two\n"), (0x9000, b"\0\0\0\0"), (0x9000, b"\6\0\0\0three\n"),
    ]  # fmt: skip


def test_a_line_too_long_comes_in_pieces_rather_than_never() -> None:
    console = Console(b"x" * 300 + b"\n")
    assert [len(console.line()), len(console.line())] == [MAX_LINE, 61]
    assert console.room == MAX_INPUT


@pytest.mark.parametrize("port", [0x60, 0x3F9, 0x600, 0x700])
def test_where_nothing_answers_ones_are_read_and_writes_are_ignored(port: int) -> None:
    seen = Seen()
    assert seen.devices.read(port, 4, 2) == b"\xff" * 8
    seen.out(port, 1, 2)
    assert not seen.said and not seen.commands

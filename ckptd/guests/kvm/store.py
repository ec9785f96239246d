"""What the program `kv` must answer. Pure."""

from __future__ import annotations

import re

from ckptd.guests.kvm.pages import Pages
from ckptd.guests.kvm.spec import KvmSpec

__all__ = ["Store"]

_ID = re.compile(rb". ([0-9a-f]{8})", re.DOTALL)
_SET = re.compile(rb"S [0-9a-f]{8} ([0-9a-f]{8}) ([0-9a-f]{8})\n")
_GET = re.compile(rb"G [0-9a-f]{8} ([0-9a-f]{8})\n")
_ENTRIES = 256  # keys of a page


class Store:
    """What `kv` must answer, request by request. `entries`: key to (value, times set)."""

    def __init__(self, spec: KvmSpec) -> None:
        self.entries: dict[int, tuple[int, int]] = {}
        self._keys = Pages(spec).total * _ENTRIES

    def answer(self, line: bytes) -> bytes:
        """The reply to one line of input, which has its end."""
        named = _ID.match(line)
        if not named:
            return b"! --------\n"
        setting = _SET.fullmatch(line)
        request = setting or _GET.fullmatch(line)
        key = int(request[1], 16) if request else -1
        if not 0 <= key < self._keys:
            return b"! %s\n" % named[1]
        value, times = self.entries.get(key, (0, 0))
        if setting:
            value, times = self.entries[key] = int(setting[2], 16), times + 1
        return b"= %s %08x %08x %08x\n" % (named[1], key, value, times)

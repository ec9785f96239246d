"""The digest chain: each epoch's link depends on every epoch before it.

So a missing, repeated or exchanged epoch shows at once, on the wire as in a directory of journal segments.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

__all__ = ["CHAIN_SIZE", "CHAIN_START", "next_chain"]

CHAIN_SIZE = 16
CHAIN_START = bytes(CHAIN_SIZE)
"""The chain before epoch 1."""


def next_chain(previous: bytes, epoch: int, term: int, digest: bytes, state_crc: int, output_crc: int) -> bytes:
    """blake2b-16 of previous, epoch u64, term u64, digest, and the crc32c of state and output, u32; little-endian."""
    numbers = struct.pack("<QQ16sII", epoch, term, digest, state_crc, output_crc)
    return blake2b(previous + numbers, digest_size=CHAIN_SIZE).digest()

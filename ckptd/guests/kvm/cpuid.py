"""May a guest that has seen one host's CPU go on with another's? By the feature bits of CPUID. Pure."""

from __future__ import annotations

from ckptd.guests.kvm import abi

__all__ = ["lacking"]

# (leaf, subleaf): which of eax, ebx, ecx, edx hold feature bits. Intel SDM volume 2, CPUID; AMD APM volume 3, E.3.
_FEATURES = {(1, 0): (2, 3), (7, 0): (1, 2, 3), (7, 1): (0,), (0xD, 0): (0,), (0xD, 1): (0,), (0x80000001, 0): (2, 3)}
_NAMES = ("eax", "ebx", "ecx", "edx")
_OSXSAVE = 1 << 27  # of leaf 1, ecx: a copy of a control register, no feature


def lacking(wanted: bytes, offered: bytes) -> list[str]:
    """The feature bits of `wanted` (struct kvm_cpuid2) that `offered` lacks, as "leaf 0x7 ebx 0x10000"."""
    want, have = _features(wanted), _features(offered)
    return [
        f"leaf {leaf:#x}{f'.{sub}' if sub else ''} {_NAMES[register]} {missing:#x}"
        for (leaf, sub, register), bits in want.items()
        if (missing := bits & ~have.get((leaf, sub, register), 0))
    ]


def _features(cpuid: bytes) -> dict[tuple[int, int, int], int]:
    found = {}
    count, _ = abi.CPUID_HEAD.unpack_from(cpuid)
    for number in range(count):
        entry = abi.CPUID_ENTRY.unpack_from(cpuid, abi.CPUID_HEAD.size + number * abi.CPUID_ENTRY.size)
        leaf, sub, _, *registers = entry
        for register in _FEATURES.get((leaf, sub), ()):
            bits = registers[register]
            found[leaf, sub, register] = bits & ~_OSXSAVE if (leaf, register) == (1, 2) else bits
    return found

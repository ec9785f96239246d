"""What this machine offers ckptd, and what follows for the choice of a tracker.

A check really tries its thing, in a child of its own (`system.in_child`), so that none can hang, crash or leave
anything behind. Knows no daemon and no configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ckptd.doctor import attach, kernel, kvm, limits, programs
from ckptd.doctor.advice import Advice, Choice, advise
from ckptd.doctor.findings import Check, Finding, unknown
from ckptd.doctor.system import in_child

__all__ = ["GROUPS", "Advice", "Choice", "Finding", "advise", "examine", "try_check"]

GROUPS: Mapping[str, tuple[Check, ...]] = {
    "KVM": kvm.CHECKS,
    "tracking a process": kernel.CHECKS,
    "attaching to QEMU": attach.CHECKS,
    "programs": programs.CHECKS,
    "this machine": limits.CHECKS,
}


def examine(checks: Iterable[Check] | None = None) -> Iterator[Finding]:
    """Try each check, all of them by default; never raises."""
    for check in checks if checks is not None else (one for group in GROUPS.values() for one in group):
        yield try_check(check)


def try_check(check: Check, seconds: float = 20) -> Finding:
    """What a check finds in a child of its own; unknown, with the error's text, if it fails in a way that it does not
    know."""
    try:
        return in_child(check, seconds)
    except Exception as error:
        return unknown(check.__name__, str(error))

"""A small Linux guest for QEMU, built from Debian packages and programs of our own: boots in seconds, answers on TCP.

    port 7    each line gets the next number of one counter that is in the guest's memory, from 1 on
    port 8    `check` verifies the pages of `patterns` (below); `poweroff` switches the guest off
    port 9    with `spin`: each line gets how far a loop has counted
    ttyS0     READY when all of this can be used

What is asked of it stands on the kernel's command line, which `LinuxGuest.arguments` writes:

    ckptd.ip=10.0.2.15/24, ckptd.ip1=..., ckptd.ip2=...    addresses of eth0, eth1 and so on
    ckptd.gateway=10.0.2.2                                 or none
    ckptd.patterns=MIB[,RATE]     MIB of pages that say what they are, checked and written anew, RATE a second (10000)
    ckptd.dirty=RATE,MIB          writes to RATE pages a second, which chance picks out of MIB
    ckptd.spin=1                  a loop that counts as fast as it can
    ckptd.say=N                   N numbered lines a second to ttyS0
    ckptd.shell=1                 a shell on ttyS0
"""

from __future__ import annotations

from ckptd.demo.linux.build import LinuxGuest, build, default_folder
from ckptd.demo.linux.programs import CONTROL_PORT, COUNTER_PORT, PATTERNS_MAGIC, SPIN_PORT

__all__ = [
    "CONTROL_PORT", "COUNTER_PORT", "PATTERNS_MAGIC", "READY", "SPIN_PORT", "LinuxGuest", "build", "default_folder",
]  # fmt: skip

READY = "READY"
"""The line on ttyS0 that says that the guest can be used."""

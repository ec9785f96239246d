"""The keeper of a QEMU that has no xen-save-devices-state, as far as it can see."""

from __future__ import annotations

from ckptd.guests.qemu import surveyor
from ckptd.guests.qemu.guest import QemuGuest
from ckptd.guests.qemu.process import main

__all__ = ["LackingGuest"]


class LackingGuest(QemuGuest):
    module = "tests.guests.qemu.lacking"


if __name__ == "__main__":
    surveyor.COMMANDS = tuple(name for name in surveyor.COMMANDS if name != "xen-save-devices-state")
    main()

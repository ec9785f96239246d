"""A guest in a process of its own, which outlives its daemon: both ends of it, whatever the guest is.

`wire` has the packets, `link` the daemon's end of the connection, `server` the process's end, `guest` and `standby`
what a daemon does with a guest of this sort. Knows no kind of guest.
"""

"""Two daemons and a guest on one machine, made to be killed: what `ckptd demo` shows and the soak test repeats.

Knows the daemons as processes only: their files, their control sockets, their signals and what they left behind.
"""

"""Every figure that the documents claim, measured here: real daemons, real sockets, the limit or the peer in the same
run.
"""

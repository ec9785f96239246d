"""The control socket of a daemon: HTTP and JSON over a unix socket, for the commands and for people with curl."""

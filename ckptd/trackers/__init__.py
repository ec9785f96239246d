"""Trackers: how dirty pages are found. `base` says what a tracker is; each other module is one design."""

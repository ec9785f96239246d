"""Guests: what is protected. `base` says what a guest is and finds its kind; each package beside it is one kind."""

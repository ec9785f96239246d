"""The kvm guest: a small VMM in Python over /dev/kvm, in a process of its own."""

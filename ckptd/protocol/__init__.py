"""The link: bytes to messages, and one state machine for each role. Pure and sans-IO; proto/PROTOCOL.md is the norm."""

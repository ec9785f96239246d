"""The two daemons: asyncio shells around the pure machines. Everything that waits, receives, sends or forks is here."""

"""What happened, in one order: cursors, fan-out to watchers, catching up from the store."""

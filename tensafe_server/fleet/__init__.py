"""The workers: their streams, what they hold, what is sent to them, and how they are started."""

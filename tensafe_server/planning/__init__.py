"""Who goes next: pure functions from the state of queues and workers to assignments."""

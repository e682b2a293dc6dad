"""Runs an environment's `reply` in processes of its own, with a limit of time."""

from tensafe_client.rlvr.scoring.pool import Failure, ScoringPool

__all__ = ["Failure", "ScoringPool"]

"""Processes to kill; the benchmarks use the same."""

from local_cluster import Cluster, Process, wait_accepted

__all__ = ["Cluster", "Process", "wait_accepted"]

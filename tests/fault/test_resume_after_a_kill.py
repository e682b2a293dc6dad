"""Whoever goes on with a run counts what a killed client had sent before."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

from harness.faulty_fleet import FaultyCluster, batch, wait_running
from harness.faulty_worker import GATE

from tensafe_client.cli.train.run_options import attach


def test_a_resumed_training_waits_for_what_is_on_its_way(tmp_path: Path):
    with FaultyCluster(tmp_path) as fleet:
        fleet.start()
        worker = fleet.add_faulty_worker()
        with (
            fleet.client() as killed,
            fleet.client() as resuming,
            concurrent.futures.ThreadPoolExecutor() as pool,
        ):
            run = killed.create_training_client({"model_ref": "any", "seed": 1})
            wait_running(killed, run.forward_backward(batch(GATE)))
            run.optim_step()
            cancelled = run.forward_backward(batch())
            assert cancelled.cancel()
            attaching = pool.submit(attach, resuming, run.run_id)
            concurrent.futures.wait([attaching], timeout=1)
            fleet.open_gate(worker)
            assert attaching.result(30).step == 1

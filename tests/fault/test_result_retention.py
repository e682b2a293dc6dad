"""Results past their retention: the operation is known, what it gave at length is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.cluster import Cluster

from tensafe_client import Datum, PreconditionError, ServiceClient


def test_a_future_that_comes_too_late_is_told_so(tmp_path: Path):
    with Cluster(tmp_path, "--result-retention-s", "1") as cluster:
        cluster.start()
        cluster.add_worker("--backend", "mock")
        cluster.workers[0].wait_ready()
        with ServiceClient(cluster.target, api_key=cluster.new_tenant("t")) as client:
            tc = client.create_training_client({"model_ref": "any"})
            passed = tc.forward_backward([Datum([1, 2, 3], [2, 3, 4])])
            stepped = tc.optim_step()
            assert passed.result(60).logprobs
            assert stepped.result(60).step == 1
            cluster.coordinator.wait_said("pruned the results of 1 operations")
            late = client.future(str(passed.operation_id))
            with pytest.raises(PreconditionError, match="retention") as caught:
                late.result(60)
            assert caught.value.reason == "RESULT_EXPIRED"
            # What is small stays.
            assert client.future(str(stepped.operation_id)).result(60).step == 1
            assert client.operation(str(passed.operation_id)).state == "succeeded"
            assert [item.step for item in tc.metrics()] == [1]

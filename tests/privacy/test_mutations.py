"""Each way in which the engine's privacy is broken on purpose makes a test fail that is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXACT, BOUNDS, TOLD, NOISE = (
    f"tests/privacy/test_{name}.py" for name in ("exactness", "sensitivity", "releases", "noise")
)
CAUGHT_BY = {
    "remove_clipping": f"{BOUNDS}::test_no_contribution_exceeds_the_bound[float32-0.05-0]",
    "clip_each_tensor": f"{BOUNDS}::test_no_contribution_exceeds_the_bound[float32-0.05-0]",
    "noise_each_microbatch": f"{BOUNDS}::test_accumulated_calls_add_up[float32-5.0]",
    "divide_by_actual_count": f"{EXACT}::test_an_update_is_the_sum_over_the_public_batch_size",
    "mean_loss_of_the_batch": f"{EXACT}::test_units_of_one_example[llama-gqa-10000]",
    "skip_the_charge": f"{TOLD}::test_no_update_is_made_without_a_charge[torch]",
    "halve_the_noise": f"{NOISE}::test_its_variance_is_that_of_the_settings",
    "number_masks_by_place": f"{BOUNDS}::"
    "test_a_neighbour_moves_the_sum_by_the_bound_at_most[float32-0.3-None-10000]",
    "number_masks_by_calls": f"{BOUNDS}::"
    "test_a_call_before_moves_the_sum_by_the_bound_at_most[float32]",
    "tell_of_broken_units": f"{BOUNDS}::"
    "test_a_unit_that_is_not_finite_adds_nothing_and_is_no_error[float32-None-10000]",
}

pytestmark = pytest.mark.slow


def run(tests: list[str], mutation: str) -> tuple[int, str]:
    environment = os.environ | {
        "TENSAFE_MUTATION": mutation,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
    }
    command = [sys.executable, "-m", "pytest", "-p", "privacy.mutations", "-q", "-x", *tests]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    return done.returncode, done.stdout


def test_all_pass_as_it_is():
    code, output = run(sorted(set(CAUGHT_BY.values())), "")
    assert code == 0, output


@pytest.mark.parametrize(("mutation", "test"), CAUGHT_BY.items(), ids=CAUGHT_BY)
def test_a_mutation_is_caught(mutation, test):
    code, output = run([test], mutation)
    assert code == 1, output
    assert re.search(r"\b1 failed\b", output), output
    assert "AssertionError" in output or "Failed: DID NOT RAISE" in output, output

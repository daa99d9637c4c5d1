"""Several processes: what one machine's tests cannot see, such as a value that a
process takes from its own memory though another one has the right one."""

import subprocess

import pytest

from tests.processes import run_two


def test_rows_and_steps_over_two_processes():
    """Fails if a value or a gradient is wrong, in any sharding mode and any
    encoding."""
    for output in run_two("process_worker"):
        assert "2 processes, 4 devices: all right" in output


def test_the_time_limit_holds():
    """Fails on processes that outlive a test which failed."""
    with pytest.raises(subprocess.TimeoutExpired):
        run_two("process_worker", limit=0.1)

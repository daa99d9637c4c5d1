"""Several processes: what one machine's tests cannot see, such as a value that a
process takes from its own memory though another one has the right one."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"


def test_rows_and_steps_over_two_processes():
    """Fails if a value or a gradient is wrong, in any sharding mode."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.process_worker", address, str(number)],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        # One that fails ends the other. The limit is for processes that hang.
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            with process:  # Waits for its end, and closes its pipe.
                process.kill()
    for output in outputs:
        assert "2 processes, 4 devices: all right" in output, output

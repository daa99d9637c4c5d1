"""Sets up JAX before any test imports it."""

import gc
import os

# Sharding needs devices. A user's own choice of platform, or count, stands.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = flags.strip()

# Tracing makes many objects: collecting them as often as Python does would take a tenth
# of the time of the tests.
gc.set_threshold(100_000, 50, 50)

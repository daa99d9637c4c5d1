"""Times beside a copy and beside other libraries: `python -m benchmarks`."""

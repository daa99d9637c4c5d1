"""Times beside a copy and beside other frameworks: `python -m benchmarks`."""

"""One file per figure that is quoted somewhere: `python -m benchmarks.NAME --json [FILE]`."""

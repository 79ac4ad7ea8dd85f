"""The benchmarks and their clocks."""

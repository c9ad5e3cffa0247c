"""Benchmarks of the engine: shapes, the machine's bandwidth, the decode step and the prefill."""

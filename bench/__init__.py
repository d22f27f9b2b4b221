"""Benchmarks, ceilings, estimates against measurement, the demo, and the command line."""

"""Measuring: benchmarks, metrics, reports."""

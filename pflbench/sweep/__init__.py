"""Suites and sweeps: many runs."""

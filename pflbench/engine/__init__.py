"""Experiments, the round loop, jobs and executors: how a run is computed."""

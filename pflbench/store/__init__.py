"""Records, checkpoints and states: the files of a run."""

"""One file per method. A file is found by its name; see docs/adding-an-algorithm.md."""

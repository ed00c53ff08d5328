"""One file per method. A method is found by its file's name; see docs/adding-an-algorithm.md."""

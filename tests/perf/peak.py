"""Print this machine's best GFLOP/s in one thread: of a matrix product, and of the CNN's second convolution."""

import time

import torch
import torch.nn.functional as F


def best(work, flops, seconds=1.5):
    work()
    shortest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        work()
        shortest = min(shortest, time.perf_counter() - began)
    return flops / shortest / 1e9


torch.set_num_threads(1)
a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
x = torch.randn(64, 32, 14, 14).to(memory_format=torch.channels_last)
w = torch.randn(64, 32, 5, 5).to(memory_format=torch.channels_last)
with torch.no_grad():
    print(best(lambda: a @ b, 2 * 1024**3), best(lambda: F.conv2d(x, w), 2 * 64 * 64 * 100 * 800))

"""Client sampling: the clients that take part in a round."""

from pflbench.rng import rng
from pflbench.spec import RunSpec


def participants(spec: RunSpec, round: int) -> list[int]:
    """Return the clients that take part in `round` (1, 2, ...), in ascending order."""
    draw = rng(spec.seed_of("sampling"), "sampling", round).permutation(spec.clients)
    return sorted(draw[: spec.joining].tolist())

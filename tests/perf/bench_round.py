"""A round of W, by every method, in turn with the plain loop."""

import facts
import pytest

from pflbench.core import registry


@pytest.mark.parametrize("algo", sorted(registry.algorithms()))
def test_round(algo, federation, rounds, benchmark, against_plain, say):
    benchmark.group = "a round of W"
    known = facts.of(algo)
    settings = {"norm": "batch"} if known.norm else {}
    with rounds(federation, algo=algo, **settings, **known.bench) as run:
        run.step()  # the first includes the start
        found = against_plain(run.step)
        row = run.rows[-1]
    trained = sum(len(c.train) for c in federation.clients)
    passes = {way: row[way] / trained for way in ("forward", "backward")}
    benchmark.extra_info.update(passes)
    spread = f"{found['ratios'][0]:.2f}-{found['ratios'][-1]:.2f}"
    say(
        f"{algo:10} {found['seconds']:6.2f} s a round, {found['ratio']:.2f} ({spread}) times as fast as the plain "
        f"loop's {found['plain_seconds']:.2f} s; passes over the training data: {passes['forward']:.2f} forward, "
        f"{passes['backward']:.2f} backward"
    )
    if found["slower"]:
        pytest.fail(found["slower"])

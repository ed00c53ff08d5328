"""A method whose client 1 does in round 2 what its hyperparameter says. Other processes can import it."""

from pflbench import register
from pflbench.algorithms.fedavg import FedAvg
from pflbench.core import registry
from pflbench.settings import setting


@register("faulty")
class Faulty(FedAvg):
    """FedAvg with a fault."""

    fault: str = setting("", "Python code; if it sets `out`, that is the result")

    def local_update(self, client, received, state):
        if client._key == (2, 1):
            names = {}
            exec(self.fault, names)
            if "out" in names:
                return names["out"]
        return super().local_update(client, received, state)


del registry._registered["faulty"]  # a test that uses it registers it: it is not one of the methods


def once(path, code):
    """Return the fault that runs `code` in the first process that comes to it."""
    return f"from pathlib import Path\np = Path({str(path)!r})\nif not p.exists():\n    p.touch()\n    {code}\n"

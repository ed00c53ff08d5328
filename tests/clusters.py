"""A real Ray cluster whose nodes are on this machine."""

import os
from pathlib import Path

MEMORY = 80 * 2**20


class Cluster:
    """A cluster of two nodes of one core each: the head, and another."""

    def __init__(self):
        from ray.cluster_utils import Cluster as Made

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
        self._made = Made(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": MEMORY})
        self.add()

    @property
    def address(self):
        return self._made.address

    def add(self):
        """Add a node."""
        self._second = self._made.add_node(num_cpus=1, object_store_memory=MEMORY)

    def remove(self):
        """Kill the node that is not the head."""
        self._made.remove_node(self._second, allow_graceful=False)

    def close(self):
        self._made.shutdown()

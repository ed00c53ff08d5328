"""The `partition` command: a table, a picture and the sample numbers, without training."""

import csv
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table

from pflbench.record import check_out
from pflbench.spec import RunSpec

if TYPE_CHECKING:
    from pflbench.datasets.dataset import Dataset
    from pflbench.datasets.partition import Partition

_MOST = 20  # classes that a terminal shows one by one

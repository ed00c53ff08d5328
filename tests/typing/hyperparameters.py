"""mypy finds a misspelt hyperparameter. `tox -e type` checks this file: an error that does not come is an error."""

from pflbench.algorithms.fedbabu import FedBABU
from pflbench.algorithms.fedprox import FedProx

half: float = FedProx(mu=0.5).mu
inherited: int = FedBABU(ft_epochs=2).ft_epochs
FedProx().mi  # type: ignore[attr-defined]  # noqa: B018
FedProx(mo=0.5)  # type: ignore[call-arg]
FedProx(mu="a")  # type: ignore[arg-type]
FedProx().mu = 2.0  # type: ignore[misc]

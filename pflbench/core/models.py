"""The networks. Each has a `body`, whose output is the features, and a `head`, one linear layer."""

import torch
from torch import Tensor, nn

from pflbench.errors import UsageError, unknown
from pflbench.spec import MODELS


class Net(nn.Module):
    """A `head` on a `body`: images [n, channels, height, width] to features [n, d] to logits [n, classes].

    `extra` has the tensors that a method trains together with the network, for its loss (`Client.sgd`).
    """

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.extra: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        out: Tensor = self.head(self.body(x))
        return out


def build_model(name: str, shape: tuple[int, ...], classes: int, *, seed: int = 0, norm: str | None = None) -> Net:
    """Return model `name` for samples of `shape` and `classes` classes, with initial parameters drawn from `seed`.

    Torch's global random state does not change. Raises `UsageError` when the samples do not fit the model.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    if name != "mlp" and len(shape) != 3:
        raise UsageError(f"model {name!r} needs images; the samples have shape {shape}; use --model mlp")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _BUILDERS[name](shape, classes, norm)


def _cnn(shape: tuple[int, ...], classes: int, norm: str | None) -> Net:
    channels, height, width = shape
    sides = [((side - 4) // 2 - 4) // 2 for side in (height, width)]
    if min(sides) < 1:
        raise UsageError(f"model 'cnn' needs images of at least 16x16; these are {height}x{width}; use --model mlp")
    body = nn.Sequential(
        # Pooling comes before ReLU: the same values and gradients, with a quarter of ReLU's work.
        nn.Conv2d(channels, 32, 5),
        *_norm(norm, 32),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 5),
        *_norm(norm, 64),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64 * sides[0] * sides[1], 512),
        nn.ReLU(inplace=True),
    )
    return Net(body, nn.Linear(512, classes))


def _norm(norm: str | None, channels: int) -> list[nn.Module]:
    """Return the normalisation layer of kind `norm`, if any."""
    if norm is None:
        return []
    if norm == "group":
        return [nn.GroupNorm(32, channels)]
    layer = nn.BatchNorm2d(channels)
    layer.num_batches_tracked = None  # an integer, which cannot be averaged; only momentum=None reads it
    return [layer]


def _mlp(shape: tuple[int, ...], classes: int, norm: str | None) -> Net:  # noqa: ARG001
    inputs = 1
    for side in shape:
        inputs *= side
    return Net(nn.Sequential(nn.Flatten(), nn.Linear(inputs, 512), nn.ReLU(inplace=True)), nn.Linear(512, classes))


def _resnet18(shape: tuple[int, ...], classes: int, norm: str | None) -> Net:
    from torchvision.models import resnet18

    body = resnet18(norm_layer=lambda channels: _norm(norm or "batch", channels)[0])
    features = body.fc.in_features
    body.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(body.conv1.weight, mode="fan_out", nonlinearity="relu")
    body.maxpool = nn.Identity()
    body.fc = nn.Identity()
    return Net(body, nn.Linear(features, classes))


_BUILDERS = {"cnn": _cnn, "mlp": _mlp, "resnet18": _resnet18}

"""The networks: shapes, names, initial parameters, and the images they accept."""

import pytest
import torch
from torch import nn

from pflbench import UsageError, build_model
from pflbench.core.models import _BUILDERS
from pflbench.core.params import fingerprint, read
from pflbench.spec import MODELS


def test_every_listed_model_can_be_built() -> None:
    assert _BUILDERS.keys() == MODELS.keys()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 16, 20), (3, 64, 64)])
@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_models_fit_images_of_many_sizes(name: str, shape: tuple[int, ...]) -> None:
    net = build_model(name, shape, 7)
    x = torch.randn(2, *shape)
    assert net.body(x).shape == (2, 512)
    assert net(x).shape == (2, 7)
    torch.testing.assert_close(net(x), net.head(net.body(x)))


def test_the_cnn_has_the_published_layers() -> None:
    sizes = {name: tuple(t.shape) for name, t in read(build_model("cnn", (3, 32, 32), 10)).items()}
    assert sizes == {
        "body.0.weight": (32, 3, 5, 5),
        "body.0.bias": (32,),
        "body.3.weight": (64, 32, 5, 5),
        "body.3.bias": (64,),
        "body.7.weight": (512, 1600),
        "body.7.bias": (512,),
        "head.weight": (10, 512),
        "head.bias": (10,),
    }


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_resnet18_keeps_small_images_large_and_names_body_and_head(norm: str) -> None:
    net = build_model("resnet18", (3, 32, 32), 10, norm=norm)
    seen = []
    net.body.layer1.register_forward_hook(lambda *args: seen.append(args[2].shape))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert seen == [(2, 64, 32, 32)]
    names = set(read(net))
    assert {name for name in names if not name.startswith("body.")} == {"head.weight", "head.bias"}
    assert ("body.bn1.running_mean" in names) == (norm == "batch")


@pytest.mark.parametrize(("norm", "layer"), [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)])
def test_the_cnn_has_normalisation_layers_when_they_are_wanted(norm: str, layer: type[nn.Module]) -> None:
    assert not any(isinstance(m, nn.BatchNorm2d | nn.GroupNorm) for m in build_model("cnn", (3, 32, 32), 10).modules())
    net = build_model("cnn", (3, 32, 32), 10, norm=norm)
    assert [type(m) for m in net.body[:4]] == [nn.Conv2d, layer, nn.MaxPool2d, nn.ReLU]
    assert [m.weight.shape[0] for m in net.modules() if isinstance(m, layer)] == [32, 64]
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_batchnorm_has_no_integer_buffer_that_would_have_to_be_averaged() -> None:
    net = build_model("resnet18", (1, 28, 28), 10)
    assert all(t.is_floating_point() for t in net.state_dict().values())


def test_initial_parameters_follow_from_the_seed_alone_and_leave_torch_alone() -> None:
    state = torch.random.get_rng_state()
    one, two, three = (fingerprint(read(build_model("cnn", (1, 28, 28), 10, seed=s))) for s in (1, 2, 1))
    assert one == three != two
    assert torch.equal(torch.random.get_rng_state(), state)


def test_images_too_small_and_samples_that_are_no_images_are_refused() -> None:
    with pytest.raises(UsageError, match=r"at least 16x16; these are 12x28"):
        build_model("cnn", (1, 12, 28), 10)
    with pytest.raises(UsageError, match=r"shape \(5,\); use --model mlp"):
        build_model("resnet18", (5,), 10)
    with pytest.raises(UsageError, match="did you mean 'cnn'"):
        build_model("cmn", (3, 32, 32), 10)

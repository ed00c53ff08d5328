"""`precision=bf16`: activations in bfloat16, parameters and their sums in float32."""

import facts
import oracle
import pytest
import torch
import toy

import pflbench
from pflbench import UsageError
from pflbench.core import params, registry

METHODS = sorted(registry.algorithms())


def both(algo, **settings):
    return [toy.run(algo, net=toy.net_for(algo).float(), precision=p, **settings) for p in ("fp32", "bf16")]


def leaves(server, clients):
    """The tensors and numbers of all states, by the path of names that leads to each."""
    return dict(params.leaves({"server": server, **clients}))


@pytest.mark.parametrize("algo", METHODS)
def test_bf16_changes_every_methods_result_a_little_and_keeps_float32_parameters(algo):
    fp32, bf16 = (leaves(record.server, record.client_states) for record in both(algo))
    method, setup = registry.algorithm(algo)(), toy.setup(toy.net_for(algo).float())
    first = leaves(method.init_server(setup), {i: method.init_client(setup) for i in range(2)})
    assert fp32.keys() == bf16.keys()
    parameters = [key for key in fp32 if key[-1] in setup.model]
    assert {bf16[key].dtype for key in parameters} == {torch.float32}
    moved = torch.cat([(fp32[key] - first.get(key, setup.model[key[-1]])).flatten() for key in parameters])
    off = torch.cat([(fp32[key] - bf16[key]).flatten() for key in parameters])
    # bfloat16 has 8 bits; BatchNorm over the few features of few samples amplifies what is lost.
    assert 0 < off.norm() < (0.1 if facts.of(algo).norm else 0.02) * moved.norm()


def test_a_forward_pass_rounds_inputs_parameters_and_outputs_to_bfloat16():
    record = both("fedavg", rounds=1)[1]
    model = {name: t.bfloat16() for name, t in record.server["model"].items()}
    loss, n = 0.0, 0
    for _, _, x, y in oracle.arrays():
        hidden = torch.tanh(x.float().bfloat16() @ model["body.0.weight"].T + model["body.0.bias"])
        z = (hidden @ model["head.weight"].T + model["head.bias"]).double()
        loss += float((torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]).sum())
        n += len(y)
    assert record.evaluations[-1]["test_loss"] == pytest.approx(loss / n, rel=2e-3)


@pytest.mark.parametrize("algo", METHODS)
def test_executors_agree_in_bf16(algo):
    net = toy.net_for(algo).float()
    serial = toy.run(algo, net=net, precision="bf16").fingerprints
    others = [toy.run(algo, net=net, precision="bf16", executor="processes", workers=w).fingerprints for w in (1, 2)]
    assert all(f == serial for f in others)


def test_a_network_that_is_not_float32_is_refused():
    with pytest.raises(UsageError, match=r"bf16 needs a float32 network; this one has torch.float64"):
        toy.run("fedavg", precision="bf16")


def test_a_processor_without_bf16_is_said_to_be_slow(monkeypatch):
    for has, told in ((False, 1), (True, 0)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has)
        notices = []
        spec = toy.spec("fedavg", precision="bf16")
        pflbench.run(spec, toy.federation(), toy.net().float(), executor="serial", notice=notices.append)
        assert len(notices) == told

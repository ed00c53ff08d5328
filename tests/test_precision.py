"""`precision=bf16`: activations in bfloat16, parameters and their sums in float32."""

import pytest
import torch

import pflbench
from pflbench import UsageError
from pflbench.core import registry

METHODS = sorted(registry.algorithms())


def both(toy, algo, **settings):
    return [toy.run(algo, net=toy.net_for(algo).float(), precision=p, **settings) for p in ("fp32", "bf16")]


def tensors(record):
    states = [record.server, *record.client_states.values()]
    return {(i, part, name): t for i, s in enumerate(states) for part, ps in s.items() for name, t in ps.items()}


@pytest.mark.parametrize("algo", METHODS)
def test_bf16_changes_every_methods_result_a_little_and_keeps_float32_parameters(toy, algo):
    fp32, bf16 = (tensors(record) for record in both(toy, algo))
    initial = {name: t.float() for name, t in toy.initial(toy.net_for(algo)).items()}
    assert fp32.keys() == bf16.keys()
    assert {t.dtype for key, t in bf16.items() if key[-1] in initial} <= {torch.float32}
    moved = torch.cat([(t - initial[key[-1]]).flatten() for key, t in fp32.items() if key[-1] in initial])
    off = torch.cat([(t - bf16[key]).flatten() for key, t in fp32.items() if key[-1] in initial])
    # bfloat16 has 8 bits; BatchNorm over the few features of few samples amplifies what is lost.
    assert 0 < off.norm() < (0.1 if algo == "fedbn" else 0.02) * moved.norm()


def test_a_forward_pass_rounds_inputs_parameters_and_outputs_to_bfloat16(toy):
    record = both(toy, "fedavg", rounds=1)[1]
    model = {name: t.bfloat16() for name, t in record.server["model"].items()}
    loss, n = 0.0, 0
    for _, _, x, y in toy.arrays():
        hidden = torch.tanh(x.float().bfloat16() @ model["body.0.weight"].T + model["body.0.bias"])
        z = (hidden @ model["head.weight"].T + model["head.bias"]).double()
        loss += float((torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]).sum())
        n += len(y)
    assert record.rounds[-1]["test_loss"] == pytest.approx(loss / n, rel=2e-3)


@pytest.mark.parametrize("algo", METHODS)
def test_executors_agree_in_bf16(toy, algo):
    net = toy.net_for(algo).float()
    serial = toy.run(algo, net=net, precision="bf16").fingerprints
    others = [toy.run(algo, net=net, precision="bf16", executor="processes", workers=w).fingerprints for w in (1, 2)]
    assert all(f == serial for f in others)


def test_a_network_that_is_not_float32_is_refused(toy):
    with pytest.raises(UsageError, match=r"bf16 needs a float32 network; this one has torch.float64"):
        toy.run("fedavg", precision="bf16")


def test_a_processor_without_bf16_is_said_to_be_slow(toy, monkeypatch):
    for has, told in ((False, 1), (True, 0)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has)
        notices = []
        spec = toy.spec("fedavg", precision="bf16")
        pflbench.run(spec, toy.federation(), toy.net().float(), executor="serial", notice=notices.append)
        assert len(notices) == told

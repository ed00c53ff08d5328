"""States in files: reading a state gives the same state that was written."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from pflbench import MethodError
from pflbench.core import params
from pflbench.store import states
from pflbench.store.states import ClientStates, UploadFile, check_state, digest, load_state, plain, save_state

STATES = {
    "empty": {},
    "parts": {"model": {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0)}, "none": {}, "deep": {"er": {}}},
    "numbers": {"rounds": 3, "alpha": 0.1, "least": -(2**70), "far": float("inf"), "near": 5e-324, "minus": -0.0},
    "integers as keys": {"models": {7: {"w": torch.ones(2)}, 0: {"w": torch.zeros(2)}}, 3: 4},
    "1 beside '1'": {1: torch.tensor(1.0), "1": torch.tensor(2.0), "n": {"1": 1, 1: 2}},
    "slashes": {"a": {"b": torch.tensor(1.0)}, "a/b": torch.tensor(2.0), "a/b'": torch.tensor(3.0), "": {"": 1}},
    "a name of the format": {"__metadata__": torch.tensor(1.0), "tree": torch.tensor(2.0)},
    "types": {
        str(t): torch.tensor([0, 1, 1]).to(t)
        for t in (torch.float64, torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool)
    },
}


def same(a, b):
    """Whether two states have the same keys, of the same types and in the same order, and leaves of the same bits."""
    if isinstance(a, Mapping):
        keys = [[(type(key), key) for key in tree] for tree in (a, b)]
        return keys[0] == keys[1] and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return params.tensor_digest(a) == params.tensor_digest(b)
    return type(a) is type(b) and repr(a) == repr(b)


def check_round_trip(state, folder):
    saved = save_state(state, folder, "state.safetensors")
    path = folder / saved.file
    assert same(load_state(path), state)
    assert saved.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == digest(state)
    assert digest(load_state(path)) == digest(state)
    upload = UploadFile.write(state, folder / "upload.safetensors")
    assert same(upload, state)
    assert same(plain(upload), state)
    assert type(plain(upload)) is dict
    assert params.nbytes(upload) == params.nbytes(state)
    assert (folder / "upload.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", STATES)
def test_a_state_comes_back_as_it_was(name, tmp_path):
    check_round_trip(STATES[name], tmp_path)


KEYS = st.integers() | st.integers(0, 3) | st.text(max_size=4) | st.sampled_from(["1", "a/b", "a", "b", "'"])
TYPES = [torch.float32, torch.float64, torch.int64, torch.bool]
TENSORS = st.builds(
    lambda shape, kind: (torch.arange(int(np.prod(shape))) % 5).to(kind).reshape(shape),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(TYPES),
)
LEAVES = TENSORS | st.integers() | st.floats()
TREES = st.recursive(
    st.dictionaries(KEYS, LEAVES, max_size=3),
    lambda inner: st.dictionaries(KEYS, LEAVES | inner, max_size=4),
    max_leaves=12,
)


@given(TREES)
def test_every_state_comes_back_as_it_was(state):
    check_state(state, "the state")
    with tempfile.TemporaryDirectory() as folder:
        check_round_trip(state, Path(folder))


def test_tensors_that_share_memory_are_strided_or_have_gradients_come_back(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    state = {"model": {"a": shared, "b": shared}, "turned": {"c": shared.t()}, "own": nn.Parameter(shared)}
    back = load_state(tmp_path / save_state(state, tmp_path, "s.safetensors").file)
    assert back.keys() == state.keys()
    assert torch.equal(back["model"]["a"], shared)
    assert torch.equal(back["model"]["b"], shared)
    assert torch.equal(back["turned"]["c"], shared.t())
    assert torch.equal(back["own"], shared)
    assert not back["own"].requires_grad


def test_the_states_of_the_first_records_are_read(tmp_path):
    tensors = {"model/body.0.weight": torch.ones(2, 2), "model/head.bias": torch.zeros(2), "h/head.bias": torch.ones(2)}
    save_file(tensors, tmp_path / "s.safetensors", metadata={"parts": json.dumps(["model", "h", "none"])})
    back = load_state(tmp_path / "s.safetensors")
    assert back.keys() == {"model", "h", "none"}
    assert back["none"] == {}
    assert torch.equal(back["model"]["body.0.weight"], torch.ones(2, 2))
    assert torch.equal(back["h"]["head.bias"], torch.ones(2))
    assert back["model"].keys() == {"body.0.weight", "head.bias"}


# Uploads.

CONTENT = {"model": {"a": torch.arange(3.0), "b": torch.ones(2, 2)}, "n": 4, 1: {"x": torch.zeros(2)}, "none": {}}


@pytest.fixture
def read(monkeypatch):
    """The names of the tensors that are read from files."""
    names = []
    safe_open = states.safe_open

    class Counted:
        def __init__(self, *args):
            self.file = safe_open(*args)

        def __enter__(self):
            opened = self.file.__enter__()
            self.metadata, self.keys = opened.metadata, opened.keys
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def get_tensor(self, name):
            names.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(states, "safe_open", Counted)
    return names


def test_an_upload_in_a_file_is_read_tensor_by_tensor_and_only_when_one_is_asked_for(tmp_path, read):
    upload = UploadFile.write(CONTENT, tmp_path / "u.safetensors")
    assert list(upload) == ["model", "n", 1, "none"]
    assert (len(upload), len(upload["model"]), len(upload["none"])) == (4, 2, 0)
    assert "model" in upload
    assert "b" in upload["model"]
    assert "1" not in upload
    assert upload["n"] == 4
    assert upload.get("other") is None
    assert read == []
    assert torch.equal(upload["model"]["b"], CONTENT["model"]["b"])
    assert read == ["model/b"]
    assert torch.equal(upload[1]["x"], CONTENT[1]["x"])
    assert read == ["model/b", "1/x"]
    with pytest.raises(KeyError):
        upload["1"]


def test_an_upload_in_a_file_is_used_like_a_dict(tmp_path):
    upload = UploadFile.write(CONTENT, tmp_path / "u.safetensors")
    model, own = upload["model"], {"b": torch.zeros(1), "c": torch.ones(1)}
    assert same({**model}, CONTENT["model"])
    assert same(dict(model.items()), CONTENT["model"])
    assert same(model | own, CONTENT["model"] | own)
    assert same(own | model, own | CONTENT["model"])
    assert same(params.average([model, model], [1.0, 3.0]), CONTENT["model"])
    assert params.distance(model, CONTENT["model"]) == 0.0
    assert params.fingerprint(upload) == params.fingerprint(CONTENT)


def test_an_upload_that_was_read_stays_though_its_file_is_written_again(tmp_path):
    upload = UploadFile.write(CONTENT, tmp_path / "u.safetensors")
    before = upload["model"]["a"]
    UploadFile.write({"model": {"a": torch.zeros(3)}}, tmp_path / "u.safetensors")
    assert torch.equal(before, CONTENT["model"]["a"])


# Values that are not states.


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"name": "fedavg"}, "the state has a str at 'name'; leaves are tensors, integers and floats"),
        ({"a": {"b": np.zeros(3)}}, "the state has a ndarray at 'a/b'; leaves are tensors, integers and floats"),
        ({"a": {1: np.float32(1)}}, "the state has a float32 at 'a/1'; leaves are tensors, integers and floats"),
        ({"a": np.int64(1)}, "the state has a int64 at 'a'; leaves are tensors, integers and floats"),
        ({"a": None}, "the state has a NoneType at 'a'; leaves are tensors, integers and floats"),
        ({"a": [torch.zeros(1)]}, "the state has a list at 'a'; leaves are tensors, integers and floats"),
        ({"a": 1j}, "the state has a complex at 'a'; leaves are tensors, integers and floats"),
        ({"a": {(0, 1): 1.0}}, "the state has a key at 'a/(0, 1)' that is neither a string nor an integer"),
        ({"a": {None: {}}}, "the state has a key at 'a/None' that is neither a string nor an integer"),
        ({0.5: {}}, "the state has a key at '0.5' that is neither a string nor an integer"),
        (None, "the state is of type NoneType; a state is a dict of tensors and numbers"),
        (torch.zeros(2), "the state is of type Tensor; a state is a dict of tensors and numbers"),
    ],
)
def test_what_is_no_state_is_refused_with_its_place(state, message):
    with pytest.raises(MethodError) as error:
        check_state(state, "the state")
    assert str(error.value) == message


# The clients' states.


def test_the_states_of_clients_are_read_when_they_are_asked_for(tmp_path, read):
    saved = save_state({"model": {"a": torch.ones(2)}, "n": 1}, tmp_path, "000001-000002.safetensors")
    found = ClientStates(3, {"model": {"a": torch.zeros(2)}, "n": 0}, {1: saved}, tmp_path)
    assert list(found) == [0, 1, 2]
    assert len(found) == 3
    assert found.digests() == [digest(found[0]), saved.sha256, digest(found[0])]
    assert read == []
    assert [found[i]["n"] for i in range(3)] == [0, 1, 0]
    assert read == ["model/a"]
    for client in (3, -1):
        with pytest.raises(KeyError):
            found[client]

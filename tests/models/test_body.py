"""hd-body: official pickles become plain arrays, by whatever they were made of; hostile ones run nothing."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import types

import numpy as np
import pytest
from click.testing import CliRunner
from handiffuser import shipped
from handiffuser.errors import CheckpointError
from handiffuser.models.body import commands, read, read_pickle
from handiffuser.models.smplh import SMPLH

BODY = shipped.checkpoint_path() / "body" / "smplh.npz"


def test_the_word_demo_names_the_demo_s_body(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(commands, ["show", "demo"], standalone_mode=False)
    assert result.exit_code == 0 and f"{BODY}: SMPL-H" in result.output and "free (Apache-2.0)" in result.output
    result = CliRunner().invoke(commands, ["show", "./demo"], standalone_mode=False)
    assert "./demo" in str(result.exception) or "demo does not exist" in str(result.exception)


@pytest.fixture(scope="module")
def arrays():
    with np.load(BODY) as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture
def chumpy(monkeypatch):
    """Classes that pickle as chumpy's and scipy's do: by name, with their attributes as state."""
    made = {}
    for module, name in [("chumpy.ch", "Ch"), ("chumpy.reordering", "Select"), ("scipy.sparse.csc", "csc_matrix")]:
        made[name] = type(name, (), {"__module__": module})
        for i in range(module.count(".") + 1):
            above = ".".join(module.split(".")[: i + 1])
            if above == module or above not in sys.modules:
                monkeypatch.setitem(sys.modules, above, types.ModuleType(above))
        setattr(sys.modules[module], name, made[name])

    def new(name, **state):
        one = made[name]()
        one.__dict__.update(state)
        return one

    return new


def official(arrays, chumpy):
    """A pickle's content as the makers' are: chumpy arrays, a sparse regressor, text beside."""
    regressor = arrays["J_regressor"].astype(float)
    rows, columns = np.nonzero(regressor.T)  # by column
    shaped = arrays["shapedirs"]
    return {
        **arrays,
        "v_template": chumpy("Ch", x=arrays["v_template"], _dirty_vars=set()),
        "shapedirs": chumpy(
            "Select", a=chumpy("Ch", x=shaped), idxs=np.arange(shaped.size), preferred_shape=shaped.shape
        ),
        "posedirs": np.asfortranarray(arrays["posedirs"]),
        "J_regressor": chumpy(
            "csc_matrix",
            _shape=regressor.shape,
            data=regressor[columns, rows],
            indices=columns.astype(np.int32),
            indptr=np.searchsorted(rows, np.arange(regressor.shape[1] + 1)).astype(np.int32),
            format="csc",
        ),
        "f": arrays["f"].astype(">u4"),
        "bs_style": "lbs",
    }


@pytest.mark.parametrize("protocol", [pytest.param(0, marks=pytest.mark.slow), 1, 2, 4])
def test_what_official_files_are_made_of(arrays, chumpy, tmp_path, protocol):
    path = tmp_path / "SMPLH_MALE.pkl"
    path.write_bytes(pickle.dumps(official(arrays, chumpy), protocol))
    found = read_pickle(path)
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_allclose(found[name], value, err_msg=name)


def test_convert_and_show_as_a_user_types_them(arrays, chumpy, tmp_path):
    source, out = tmp_path / "SMPLH_MALE.pkl", tmp_path / "male.npz"
    source.write_bytes(pickle.dumps(official(arrays, chumpy), 2))
    result = CliRunner().invoke(commands, ["convert", str(source), str(out)])
    assert result.exit_code == 0 and "SMPL-H, 6890 vertices, 52 joints" in result.output
    SMPLH.load(out)
    assert [path.name for path in tmp_path.iterdir() if path not in (source, out)] == []
    result = CliRunner().invoke(commands, ["show", str(out)])
    assert "v_template" in result.output and "6890 x 3" in result.output


def test_the_demo_s_body_is_free_and_others_are_licensed(arrays, tmp_path):
    """By what is in the file, wherever it is and whatever it is called."""
    copied, larger = tmp_path / "SMPLH_MALE.npz", tmp_path / "smplh_demo.npz"
    np.savez(copied, **arrays)
    np.savez(larger, **{**arrays, "v_template": 1.001 * arrays["v_template"]})
    for path, free in {BODY: True, copied: True, larger: False}.items():
        said = CliRunner().invoke(commands, ["show", str(path)]).output
        assert ("free (Apache-2.0)" in said) == free and ("Keep this file to yourself" in said) != free, (path, said)
        assert shipped.is_demo_body(path) == free
    for name in ("v_template", "shapedirs", "posedirs", "J_regressor", "weights"):
        assert not shipped.is_demo_body({key: value for key, value in arrays.items() if key != name})
    assert not shipped.is_demo_body(tmp_path / "none.npz")


def test_the_refusal_of_a_pickle_names_the_way():
    with pytest.raises(CheckpointError, match=r"hd-body convert SMPLH_MALE\.pkl SMPLH_MALE\.npz"):
        SMPLH.load("SMPLH_MALE.pkl")


def test_hands_are_added_to_a_body_without(arrays, tmp_path):
    plain = {name: value for name, value in arrays.items() if not name.startswith("hands_")}
    np.savez(tmp_path / "amass.npz", **plain)
    for side in ("LEFT", "RIGHT"):
        hand = {"hands_components": np.eye(45), "hands_mean": np.full(45, len(side))}
        (tmp_path / f"MANO_{side}.pkl").write_bytes(pickle.dumps(hand, 2))
    names = ["amass.npz", "out.npz", "--hands", "MANO_LEFT.pkl", "--hands", "MANO_RIGHT.pkl"]
    arguments = [name if name.startswith("--") else str(tmp_path / name) for name in names]
    result = CliRunner().invoke(commands, ["convert", *arguments])
    assert result.exit_code == 0, result.output
    found = read(tmp_path / "out.npz")
    assert (found["hands_meanl"] == 4).all() and (found["hands_meanr"] == 5).all()


class Hostile:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "make",
    [
        lambda mark: Hostile(os.system, f"touch {mark}"),
        lambda mark: Hostile(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: {"v_template": Hostile(os.mkdir, str(mark))},
        lambda mark: Hostile(getattr, "text", "format"),
        lambda mark: Hostile(np.load, str(mark)),
        lambda mark: Hostile(np.zeros, 10**12),
        lambda mark: np.array([Hostile(os.mkdir, str(mark))], object),
        lambda mark: [1, 2, 3],
        lambda mark: {"a": np.array(["text"])},
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickles_run_nothing(tmp_path, make, protocol):
    path, mark = tmp_path / "body.pkl", tmp_path / "mark"
    path.write_bytes(pickle.dumps(make(mark), protocol))
    with pytest.raises(CheckpointError, match="None of its code ran"):
        read_pickle(path)
    assert not mark.exists()


def test_an_array_that_claims_more_than_it_holds(arrays, tmp_path):
    """Its shape alone must not take memory."""
    code = pickle.dumps({"a": np.zeros(3)}, 2).replace(b"K\x03\x85", b"\x8a\x05\x00\x00\x00\x00\x7f\x85")
    (tmp_path / "a.pkl").write_bytes(code)
    with pytest.raises(CheckpointError, match=r"holds 24 bytes|must be a pickle"):
        read_pickle(tmp_path / "a.pkl")


@pytest.mark.parametrize("cut", [0, 1, 10, 1000])
def test_damaged_files_are_one_sentence(arrays, tmp_path, cut):
    whole = pickle.dumps(arrays, 2)
    (tmp_path / "a.pkl").write_bytes(whole[:cut])
    (tmp_path / "a.npz").write_bytes(BODY.read_bytes()[:cut])
    for name in ("a.pkl", "a.npz", "missing.pkl"):
        with pytest.raises(CheckpointError):
            read(tmp_path / name)


@pytest.mark.slow
def test_random_bytes_in_a_pickle_never_escape(arrays, tmp_path):
    random, whole = np.random.default_rng(0), bytearray(pickle.dumps({"a": np.zeros((3, 2)), "b": [1, "x"]}, 2))
    for _ in range(2000):
        code = bytearray(whole)
        for at in random.integers(0, len(code), 3):
            code[at] = random.integers(256)
        (tmp_path / "a.pkl").write_bytes(code)
        with contextlib.suppress(CheckpointError):
            read_pickle(tmp_path / "a.pkl")

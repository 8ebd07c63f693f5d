"""`hd-body`: shows body files, and converts the official pickles of SMPL-H and MANO to safe `.npz` files.

    hd-body convert SMPLH_MALE.pkl smplh_male.npz
    hd-body show smplh_male.npz

A plain unpickler runs any code a file asks for. This one reaches no Python object: a stand-in replaces each name that
such files use (numpy's arrays, scipy's sparse matrices, chumpy's `Ch`) and only keeps its arguments. Any other name
ends the reading. It needs neither scipy nor chumpy, which does not install on a current Python.

The makers of the official bodies license them and forbid passing them on, in any format. The demo's own is free.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..commands import run
from ..errors import CheckpointError
from ..files import written
from ..shipped import body_path, is_demo_body

MAX_FILE_BYTES = 1 << 30  # bytes of a file; the official ones are below 300 MB
LICENCE = "Keep this file to yourself: the licences of SMPL-H and MANO are non-commercial and forbid passing it on."
FREE = "This is the demo's own body, in SMPL-H's format: free (Apache-2.0), and you may pass it on."

# The arrays of every body; the number of joints tells the kinds apart.
NEEDED = ("v_template", "shapedirs", "posedirs", "J_regressor", "kintree_table", "weights", "f")
HANDS = ("hands_componentsl", "hands_componentsr", "hands_meanl", "hands_meanr")
KINDS = {16: "MANO (one hand)", 24: "SMPL", 52: "SMPL-H", 55: "SMPL-X"}


class _Kept:
    """Keeps an object's arguments and state from a pickle."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_pickle(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an official body pickle, without running its code. Raises CheckpointError for another file."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{path} must be at most {MAX_FILE_BYTES >> 20} MiB, as body models are, got {size >> 20} MiB."
        )
    # New classes for every file: a pickle may set attributes on them.
    names = ("dtype", "array", "scalar", "sparse", "chumpy", "text")
    kinds: dict[str, type[_Kept]] = {name: type(name, (_Kept,), {}) for name in names}

    def remade(base: Any, *_: Any) -> Any:  # copy_reg._reconstructor(class, object, None)
        if not isinstance(base, type) or not issubclass(base, _Kept):
            raise pickle.UnpicklingError("an object of an unknown kind")
        return base()

    known: dict[tuple[str, str], Any] = {
        ("copy_reg", "_reconstructor"): remade,
        ("copyreg", "_reconstructor"): remade,
        **{(module, kind.__name__): kind for module in ("__builtin__", "builtins") for kind in (object, set)},
        ("_codecs", "encode"): lambda text, _="latin1": str(text).encode("latin1"),
        ("numpy", "ndarray"): kinds["array"],
        ("numpy", "dtype"): kinds["dtype"],
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        known[module, "_reconstruct"] = lambda *_: kinds["array"]()
        known[module, "scalar"] = kinds["scalar"]

    # The reader in Python, not the one in C: that allocates any size a damaged file states.
    class Reader(pickle._Unpickler):  # type: ignore[name-defined]
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in known:
                return known[module, name]
            if module.startswith("scipy.sparse") and name in ("csc_matrix", "csr_matrix", "coo_matrix"):
                return type(name, (kinds["sparse"],), {})
            if module.startswith("chumpy."):
                return type(name, (kinds["chumpy"],), {})
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    try:
        value = Reader(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        if not isinstance(value, dict):
            raise pickle.UnpicklingError("it holds no dictionary")
        return _arrays(value, kinds)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises many kinds
        raise CheckpointError(
            f"{path} must be a pickle of an official SMPL-H or MANO body, or an .npz ({error}). None of its code ran. "
            "Get the file from its makers' page again."
        ) from None


def _arrays(value: dict[Any, Any], kinds: dict[str, type[_Kept]]) -> dict[str, np.ndarray]:
    """Plain arrays of a body's entries, without those that are not numbers (names, settings)."""
    out: dict[str, np.ndarray] = {}
    for name, entry in value.items():
        array = _array(entry, kinds)
        if isinstance(name, str) and array is not None:
            out[name] = array
    return out


def _array(entry: Any, kinds: dict[str, type[_Kept]], depth: int = 0) -> np.ndarray | None:
    if depth > 8:
        raise ValueError("it is nested too deeply")
    if isinstance(entry, (bool, int, float)):
        return np.array(entry)
    if isinstance(entry, kinds["array"]):
        return _plain(entry.state, kinds)
    if isinstance(entry, kinds["scalar"]):
        kind, data = entry.arguments
        return np.frombuffer(_bytes(data), _dtype(kind, kinds), 1)[0]
    if isinstance(entry, kinds["sparse"]):
        return _dense(type(entry).__name__, entry.state, kinds)
    if isinstance(entry, kinds["chumpy"]):
        state: dict[str, Any] = entry.state if isinstance(entry.state, dict) else {}
        if "x" in state:  # Ch: a leaf with its value
            return _array(state["x"], kinds, depth + 1)
        if {"a", "idxs"} <= state.keys():  # Select: elements of another one
            source, index = (_array(state[name], kinds, depth + 1) for name in ("a", "idxs"))
            if source is None or index is None:
                raise ValueError(f"chumpy's {type(entry).__name__} lacks its source")
            shape = state.get("preferred_shape") or index.shape
            return source.ravel()[index.astype(np.int64).ravel()].reshape(tuple(int(n) for n in shape))
        raise ValueError(f"body models do not use chumpy's {type(entry).__name__}")
    return None


def _bytes(data: Any) -> bytes:
    return data if isinstance(data, bytes) else str(data).encode("latin1")


def _dtype(kept: Any, kinds: dict[str, type[_Kept]]) -> np.dtype:
    if not isinstance(kept, kinds["dtype"]):
        raise ValueError("an array has no type")
    name, state = str(kept.arguments[0]), kept.state or (3, "<")
    order = _bytes(state[1]).decode() if len(state) > 1 else "<"
    if name[:1] not in "fiub" or not name[1:].isdigit():
        raise ValueError(f"an array must hold numbers, got type {name[:20]!r}")
    return np.dtype(("" if order in "|=" else order) + name)


def _plain(state: Any, kinds: dict[str, type[_Kept]]) -> np.ndarray:
    _, shape, kind, fortran, data = state
    dtype, shape = _dtype(kind, kinds), tuple(int(n) for n in shape)
    data = _bytes(data)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {list(shape)} holds {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").copy()


def _dense(name: str, state: Any, kinds: dict[str, type[_Kept]]) -> np.ndarray:
    """scipy's csc_matrix, csr_matrix or coo_matrix in full."""
    parts = {key.lstrip("_"): entry for key, entry in state.items()}
    rows, columns = (int(n) for n in parts["shape"])
    if rows < 0 or columns < 0 or rows * columns > MAX_FILE_BYTES // 8:
        raise ValueError(f"a sparse matrix is {rows} x {columns}")
    entries = ("data", "row", "col") if name == "coo_matrix" else ("data", "indices", "indptr")
    found = [array for key in entries if (array := _array(parts[key], kinds)) is not None and array.ndim == 1]
    if len(found) < 3:
        raise ValueError("a sparse matrix lacks its entries")
    data, first, second = found
    out = np.zeros((rows, columns))
    if name == "coo_matrix":
        at: tuple[Any, Any] = (first, second)
    else:
        lines = np.repeat(np.arange(len(second) - 1), np.diff(second))
        at = (first, lines) if name == "csc_matrix" else (lines, first)
    if any(len(index) != len(data) or (len(index) and index.min() < 0) for index in at):
        raise ValueError("a sparse matrix' entries do not fit")
    np.add.at(out, at, data)
    return out


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz`. Raises CheckpointError for one that holds pickled objects or is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if archive[name].dtype.kind in "fiub"}
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as an .npz of plain arrays: {error}.") from None


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a body file, by its ending."""
    if not path.exists():
        raise CheckpointError(f"The body model {path} does not exist.")
    return read_npz(path) if path.suffix == ".npz" else read_pickle(path)


def kind_of(arrays: dict[str, np.ndarray]) -> str:
    """ "SMPL-H", "MANO (one hand)", ... Raises CheckpointError for other arrays."""
    missing = [name for name in NEEDED if name not in arrays]
    if missing:
        raise CheckpointError(f"A body model must have {', '.join(NEEDED)}; this file lacks {', '.join(missing)}.")
    regressor = arrays["J_regressor"]
    joints = regressor.shape[0] if regressor.ndim == 2 else 0
    if joints not in KINDS:
        raise CheckpointError(f"A body model must have {', '.join(map(str, KINDS))} joints, got {joints}.")
    return KINDS[joints]


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a whole `.npz`, or leaves the old one."""
    with written(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="handiffuser", prog_name="hd-body")
def commands() -> None:
    """Shows body files, and converts the official pickles of SMPL-H and MANO to safe .npz files."""


def _body(_: click.Context, __: click.Parameter, name: str) -> Path:
    """The file that a user names; the demo's own for the word demo."""
    return body_path() if name == "demo" else Path(name)


@commands.command()
@click.argument("source", callback=_body)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--hands",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Give it twice, MANO_LEFT then MANO_RIGHT: for SMPL-H files without hands_*, such as AMASS's.",
)
def convert(source: Path, out: Path, hands: tuple[Path, ...]) -> int:
    """Converts SOURCE (.pkl or .npz) to OUT (.npz). Runs no code of a pickle."""
    if out.suffix != ".npz":
        raise CheckpointError(f"{out} must end in .npz.")
    if len(hands) not in (0, 2):
        raise CheckpointError("Give --hands twice: the left hand's file, then the right one's.")
    arrays = read(source)
    kind = kind_of(arrays)
    for path, side in zip(hands, "lr", strict=False):
        hand = read(path)
        for name in ("hands_components", "hands_mean"):
            if kind != "SMPL-H" or name not in hand:
                raise CheckpointError(f"--hands must be two MANO files for an SMPL-H body, got {path} for {source}.")
            arrays[name + side] = hand[name]
    write(out, arrays)
    describe(out, arrays)
    return 0


@commands.command()
@click.argument("file", callback=_body)
def show(file: Path) -> int:
    """Prints the kind of body in FILE and its arrays. The word demo names the demo's own."""
    describe(file, read(file))
    return 0


def describe(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Prints a body's kind, arrays and licence; its content identifies the demo's own."""
    kind = kind_of(arrays)
    click.echo(f"{path}: {kind}, {len(arrays['v_template'])} vertices, {arrays['J_regressor'].shape[0]} joints")
    for name, array in sorted(arrays.items()):
        click.echo(f"  {name:20} {array.dtype.name:8} {' x '.join(map(str, array.shape)) or 'one number'}")
    if kind == "SMPL-H" and any(name not in arrays for name in HANDS):
        click.echo("It lacks MANO's hands_*, which smplx needs and hd-export does not: see hd-body convert --hands.")
    click.echo(FREE if is_demo_body(arrays) else LICENCE)


def main() -> None:
    run("hd-body", commands)


if __name__ == "__main__":
    main()

"""Anything that a file from outside may say: it is taken, or refused in one sentence; nothing else happens.

    python tests/properties.py KIND CASES SEED FOLDER      # prints {"cases": ..., "refused": ...}

A process of its own, because its memory is limited: what eats all of it takes other processes down. See KINDS.
"""

from __future__ import annotations

import io
import json
import resource
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from handiffuser import Request, shipped
from handiffuser.contract import MANIFEST, Manifest, _own_digest
from handiffuser.errors import HanDiffuserError, RequestError
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

MEMORY = 4 << 30  # bytes of address space
SECONDS = 5000  # milliseconds, rather: of one case
LONGEST = 1500  # characters of a sentence

numbers = st.one_of(
    st.integers(-3, 2000), st.integers(), st.sampled_from([0, -1, 2**31, 2**63, 10**18, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([1e-320, 1e308, -0.0]),
)  # fmt: skip
words = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["ddim", "fp16", "fp64", "../..", "a" * 5000, "\0", "\ud800", "B", "G", "true", "1e400", ""]),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, words)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(words, inner, max_size=5)),
    max_leaves=12,
)


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def dumped(value: Any) -> bytes:
    """As JSON, also what JSON has not: NaN, broken Unicode."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def changed(draw: Any, whole: Any) -> Any:
    """A value with one to three places of it replaced, removed, or added to."""
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        at, key, place = None, None, value
        for _ in range(draw(st.integers(1, 6))):
            if isinstance(place, dict) and place:
                at, key = place, draw(st.sampled_from(sorted(place)))
            elif isinstance(place, list) and place:
                at, key = place, draw(st.integers(0, len(place) - 1))
            else:
                break
            place = at[key]
        if at is None:
            return draw(values)
        what = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if what == "remove":
            del at[key]
        elif what == "add" and isinstance(at, dict):
            at[draw(words)] = draw(values)
        else:
            at[key] = draw(values)
    return value


class Counted:
    """How many cases, and how many were refused."""

    def __init__(self) -> None:
        self.cases = self.refused = 0

    def __call__(self, act: Callable[[], Any]) -> Any:
        """What `act` gives, or None when it was refused in one sentence. Anything else that happens is a failure."""
        self.cases += 1
        try:
            return act()
        except HanDiffuserError as error:
            self.refused += 1
            sentence = str(error)
            assert sentence.strip() and len(sentence) < LONGEST, sentence
            assert "Traceback" not in sentence and "\n" not in sentence.strip(), sentence
            return None


def request_lines(check: Counted, folder: Path) -> Any:
    from handiffuser.runtime.requests import RequestFile, Resolver

    manifest = Manifest.load(shipped.bundle_path(), verify=False)
    good = {"prompt": "a fist", "seed": 3, "steps": 4, "solver": "ddim", "guidance": 1.5, "guidance_interval": [0, 0.5]}
    line = st.one_of(
        changed(good).map(dumped), values.map(dumped), st.binary(max_size=80),
        st.integers(1, 20000).map(nested), st.sampled_from([b'{"prompt": "a", "prompt": "b"}', b"{", b"\xff\xfe"]),
    )  # fmt: skip

    @given(st.lists(line, min_size=1, max_size=4))
    def property(bad: list[bytes]) -> None:
        bad = [text.replace(b"\n", b" ").replace(b"\r", b" ") for text in bad]
        lines = [dumped({"prompt": "first"}), *bad, dumped({"prompt": "last"})]
        path = folder / "lines.jsonl"
        content = b"\n".join(lines) + b"\n"
        path.write_bytes(content)
        file = check(lambda: RequestFile(path))
        if file is None:
            assert 4 * content[:4096].count(0) > len(content[:4096]), "one bad line must not refuse the whole file"
            return
        resolver, prompts = Resolver(manifest.defaults, bundle="b", seed=0, images=1, check=lambda request: None), []
        for _, request in file:
            if isinstance(request, RequestError):
                check(lambda error=request: (_ for _ in ()).throw(error))
                continue
            assert isinstance(request, Request)
            made = check(lambda request=request: list(resolver.each(request)))
            prompts += [one.prompt for one in made or []]
        assert prompts[0] == "first" and prompts[-1] == "last"

    return property


def hands_files(check: Counted, folder: Path) -> Any:
    from handiffuser.hands import SHAPES, Hands, load_hands

    def archive(arrays: dict[str, np.ndarray]) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    whole = {name: np.zeros(shape, np.float32) for name, (shape, _) in SHAPES.items()} | {"camera": np.ones(3)}
    plain = archive(whole)
    shapes = st.lists(st.integers(0, 70), max_size=3).map(tuple)
    dtypes = st.sampled_from(["float32", "float16", "int64", "uint8", "bool", "complex64", "U3", "float64"])

    @st.composite
    def others(draw: Any) -> bytes:
        arrays = dict(whole)
        for name in draw(st.lists(st.sampled_from(sorted(whole)), min_size=1, max_size=3)):
            if draw(st.booleans()):
                arrays[name] = np.full(whole[name].shape, draw(st.floats(width=32)), "float32")
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    arrays[name] = np.zeros(draw(shapes)).astype(draw(dtypes))
        return archive(arrays)

    @st.composite
    def flipped(draw: Any) -> bytes:
        content = bytearray(plain)
        for at in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
            content[at] = draw(st.integers(0, 255))
        return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)

    def bomb(size: int) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            for name in whole:
                file.writestr(f"{name}.npy", b"\0" * size)
        return buffer.getvalue()

    bombs = st.sampled_from([bomb(10), bomb(1 << 22)])

    @given(st.one_of(others(), flipped(), st.binary(max_size=200), bombs))
    def property(content: bytes) -> None:
        path = folder / "any.hands.npz"
        path.write_bytes(content)
        hands = check(lambda: load_hands(path))
        if hands is not None:
            assert isinstance(hands, Hands) and np.isfinite(hands.params).all() and hands.params.shape[-1] == 330

    return property


def manifests(check: Counted, folder: Path) -> Any:
    from handiffuser.engines import cli

    bundle = folder / "bundle"
    shutil.copytree(shipped.bundle_path(), bundle)
    whole = json.loads((bundle / MANIFEST).read_text())

    @given(st.one_of(changed(whole), values), st.booleans())
    def property(value: Any, signed: bool) -> None:
        if isinstance(value, dict) and signed:  # a future writer's mistake, or somebody's hand
            try:
                value["sha256"] = _own_digest(value)
            except (ValueError, TypeError):
                return
        (bundle / MANIFEST).write_bytes(dumped(value))
        manifest = check(lambda: Manifest.load(bundle, verify=False))
        if manifest is not None:
            assert manifest.latent_size[1] * 64 >= manifest.image_size[0] / 64 and min(manifest.params_std) > 0
            check(lambda: cli.list_plans.callback(str(bundle)))

    return property


def plan_records(check: Counted, folder: Path) -> Any:
    from handiffuser.engines import cli
    from handiffuser.engines.plans import PlanStore

    bundle = folder / "bundle"
    shutil.copytree(shipped.bundle_path(), bundle)
    store = PlanStore(bundle)
    parts = dict.fromkeys(("name", "sizes", "graph", "precision", "backend", "version", "target", "options"), "x")
    plan = store.add({**parts, "name": "unet", "sizes": "B=1,G=2", "tf32": "off"}, b"plan", {"types": {"HALF": 3}}, 1.0)
    record = plan.path.with_suffix(".json")
    whole = json.loads(record.read_text())

    @given(
        st.one_of(
            changed(whole).map(dumped), values.map(dumped), st.binary(max_size=60), st.integers(1, 20000).map(nested)
        )
    )
    def property(content: bytes) -> None:
        record.write_bytes(content)
        check(lambda: list(PlanStore(bundle)))
        strays = check(lambda: PlanStore(bundle).strays())
        assert strays is not None and all(len(why) < LONGEST and "Traceback" not in why for why in strays.values())
        check.refused += bool(strays)  # passed over, and said by `hd-engines verify`
        check(lambda: cli.list_plans.callback(str(bundle)))
        check(lambda: cli.prune.callback(str(bundle), everything=False, dry_run=True))

    return property


def checkpoints(check: Counted, folder: Path) -> Any:
    from handiffuser.models.layout import read_layout

    checkpoint = folder / "checkpoint"
    shutil.copytree(shipped.checkpoint_path(), checkpoint)
    files = [path for path in sorted(checkpoint.rglob("*.json")) if path.name != "tokenizer.json"]
    kept = {path: path.read_bytes() for path in files}

    @st.composite
    def one(draw: Any) -> tuple[Path, bytes]:
        path = draw(st.sampled_from(files))
        content = st.one_of(
            changed(json.loads(kept[path])).map(dumped), values.map(dumped), st.binary(max_size=60),
            st.integers(1, 20000).map(nested),
        )  # fmt: skip
        return path, draw(content)

    @given(one())
    def property(found: tuple[Path, bytes]) -> None:
        path, content = found
        path.write_bytes(content)
        try:
            layout = check(lambda: read_layout(checkpoint))
            if layout is not None:
                assert layout.image_size is None or all(1 <= side <= 16384 for side in layout.image_size)
        finally:
            path.write_bytes(kept[path])

    return property


KINDS = {
    "request lines": request_lines,
    "hands files": hands_files,
    "manifests": manifests,
    "plan records": plan_records,
    "checkpoints": checkpoints,
}


def main() -> None:
    kind, cases, number, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.setrecursionlimit(1000)
    check = Counted()
    property = KINDS[kind](check, folder)
    silent = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
    ]
    run = settings(max_examples=cases, deadline=SECONDS, database=None, suppress_health_check=silent,
                   phases=[Phase.generate, Phase.shrink], print_blob=True)  # fmt: skip
    seed(number)(run(property))()
    print("\n" + json.dumps({"cases": check.cases, "refused": check.refused}))


if __name__ == "__main__":
    main()

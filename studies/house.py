"""What the house looks like: lines by room, who imports whom, circles, long files and functions, and stumbling English.

    python studies/house.py

`tests/test_house.py` asserts the same, so that a room cannot reach upwards again without a test that says so.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "handiffuser"
# Room -> rooms that it may import, as docs and design have it. Every room may import `core`.
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "models": set(),
    "detection": set(),
    "data": {"models", "detection"},
    "demo": {"data", "models"},
    "training": {"models", "data"},
    "engines": set(),
    "runtime": {"engines"},
    "calibration": {"engines", "runtime"},
    "export": {"models", "calibration", "engines"},
    "repair": {"runtime", "engines", "detection"},
    "serving": {"runtime", "engines", "detection", "repair"},
    "evaluation": {"runtime", "engines", "data", "models", "detection"},
    "benchmarks": {
        *("runtime", "engines", "serving", "evaluation", "calibration", "export", "models", "training", "detection")
    },
}
FILE_LINES, FUNCTION_LINES = 500, 80
# What makes a reader go back to the beginning of a sentence.
PATTERNS = {
    "is no": r"\bis no [a-z]",
    "are none": r"\bare none\b",
    "nobody": r"\bnobody\b",
    "whoever": r"\bwhoever\b",
    "anew": r"\banew\b",
    "lest": r"\blest\b",
    "of which, of whom": r"\bof (?:which|whom)\b",
}
LONG_SENTENCE = 25  # words
READ = (".py", ".md", ".js", ".html", ".css", ".toml", ".yaml", ".yml", ".sh")
SELF = {"house.py", "test_house.py"}  # they name the patterns


def modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for room in MAY_IMPORT:
        for path in sorted((ROOT / room).glob("*.py")):
            parts = [PACKAGE, *([] if room == "core" else [room]), *([] if path.stem == "__init__" else [path.stem])]
            found[".".join(parts)] = path
    return found


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "core"


@cache
def imports(module: str, path: Path) -> list[tuple[str, bool]]:
    """What a module imports by full name, and whether it does so when it is loaded."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module or "") if part)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        found += [(name, node in tree.body) for name in names]
    return found


def graph(lazy: bool = True) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports. lazy: those that functions import, too."""
    known = modules()
    return {
        module: {name for name, top in imports(module, path) if name in known and name != module and (top or lazy)}
        for module, path in known.items()
    }


def upward() -> set[tuple[str, str]]:
    """Imports from a room into one that it may not know: (module, what it imports).

    A command (`cli.py`) puts rooms together: it may import any of them, inside the function that needs it.
    """
    loaded = graph(lazy=False)
    return {
        (module, name)
        for module, names in graph().items()
        for name in (loaded[module] if module.endswith(".cli") else names)
        if room_of(name) not in {room_of(module), "core"} | MAY_IMPORT[room_of(module)]
    }


def circles(lazy: bool = True) -> list[list[str]]:
    """Modules that import each other, by Tarjan's algorithm. Packages' own files count as modules."""
    edges = graph(lazy)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for name in sorted(edges[module]):
            if name not in index:
                visit(name)
                low[module] = min(low[module], low[name])
            elif name in stack:
                low[module] = min(low[module], index[name])
        if low[module] == index[module]:
            at = stack.index(module)
            circle, stack[at:] = stack[at:], []
            if len(circle) > 1:
                found.append(sorted(circle))

    for module in edges:
        if module not in index:
            visit(module)
    return found


def lines() -> dict[str, int]:
    """Lines of Python by room."""
    counts: Counter[str] = Counter()
    for module, path in modules().items():
        counts[room_of(module)] += len(path.read_text(encoding="utf-8").splitlines())
    return dict(counts)


def long_files() -> list[tuple[str, int]]:
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules().values()}
    return sorted((str(path.relative_to(ROOT)), n) for path, n in sizes.items() if n > FILE_LINES)


def long_functions() -> list[tuple[str, int]]:
    found = []
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > FUNCTION_LINES:
                    found.append((f"{path.relative_to(ROOT)}:{node.name}", length))
    return sorted(found)


def texts() -> Iterator[Path]:
    """Files that a person reads."""
    rooms = [*MAY_IMPORT, "tests", "docs", "studies", "docker", "examples", "integrations"]
    for path in [*ROOT.glob("*"), *(path for room in rooms for path in (ROOT / room).rglob("*"))]:
        inside = path.relative_to(ROOT).parts
        if path.is_file() and path.suffix in READ and path.name not in SELF and "results" not in inside:
            yield path


def stumbles() -> dict[str, int]:
    """How often each pattern stands in what a person reads, and how many sentences of the pages are too long."""
    counts = dict.fromkeys(PATTERNS, 0)
    for path in texts():
        text = path.read_text(encoding="utf-8")
        for name, pattern in PATTERNS.items():
            counts[name] += len(re.findall(pattern, text, re.IGNORECASE))
    counts[f"sentences over {LONG_SENTENCE} words"] = sum(len(found) for found in long_sentences().values())
    return counts


def long_sentences() -> dict[str, list[str]]:
    """Page -> its sentences of more than LONG_SENTENCE words. Tables do not count, and inline code is one word."""
    found = defaultdict(list)
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = re.sub(r"```.*?```", "\n\n", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        text = re.sub(r"`[^`]+`", "code", text)
        text = re.sub(r"^\s*(\||#|<).*$", "", text, flags=re.MULTILINE)
        for paragraph in re.split(r"\n\s*\n|\n\s*[-*] |\n\s*\d+\. ", text):
            for sentence in re.split(r"(?<=[.!?:;])\s+", " ".join(paragraph.split())):
                if len(sentence.split()) > LONG_SENTENCE:
                    found[page.name].append(sentence)
    return dict(found)


def main() -> None:
    counts = lines()
    for room, count in counts.items():
        print(f"{room:12} {count:6}")
    print(f"{'all':12} {sum(counts.values()):6}\n")
    print("circles:", *circles() or ["none"], sep="\n  ")
    print("upward imports:", *sorted(f"{a} -> {b}" for a, b in upward()) or ["none"], sep="\n  ")
    print("long files:", *long_files() or ["none"], sep="\n  ")
    print("long functions:", *long_functions() or ["none"], sep="\n  ")
    for name, count in stumbles().items():
        print(f"{name:28} {count}")


if __name__ == "__main__":
    main()

"""`hd-bench` as a user types it: tables and one line of JSON, a page that stands alone, one sentence for bad input."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import instead_of_exporting, invoke, listen

QUICK = ("--device", "cpu", "--threads", "1", "--steps", "1", "--repeats", "2", "--no-first-picture")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def document_of(result: subprocess.CompletedProcess[str]) -> dict:
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def done(tiny_bundle, tmp_path_factory):
    """One run with all options but --peers and --serve: the result and its folder."""
    folder = tmp_path_factory.mktemp("bench")
    files = ("--report", folder / "page.html", "--output", folder / "bench.json")
    options = ("--batch-sizes", "1,2", "--soak", 6, "--load", "--requests", 3, "--utilisation", 2, "--cpu-clock")
    result = invoke("benchmarks.cli", tiny_bundle, *QUICK, *options, *files)
    assert result.returncode == 0, result.stderr
    return result, folder


def test_the_last_line_is_the_document(done):
    result, folder = done
    document = document_of(result)
    assert document == json.loads((folder / "bench.json").read_text())
    assert [(run["batch"], run["steps"], len(run["samples"])) for run in document["runs"]] == [(1, 1, 2), (2, 1, 2)]
    for run in document["runs"]:
        assert sum(run["stages"].values()) + run["host"] == pytest.approx(run["total"])
        assert run["flops"]["flops"] > 0
    assert document["soak"]["lost"] == 0 and document["soak"]["unique"] == 6
    load = document["load"]
    assert [row["name"] for row in load["rows"]] == ["in-flight", "static", "static, padded"]
    assert load["arrival_rate"] == pytest.approx(2 * load["capacity"])
    for shown in ("CPU", "Ceilings", "batch x steps", "decoder", "in-flight", "Soak"):
        assert shown in result.stdout
    assert "{" not in "".join(result.stdout.splitlines()[:-1])


def test_the_page_needs_nothing_from_elsewhere(done):
    text = (done[1] / "page.html").read_text()
    assert text.count("<svg") == 5  # latency, throughput, stages, load, soak
    # XML namespaces are not addresses that a browser loads.
    assert not re.search(r"""(?:src|href|url\(|@import)\s*=?\s*["'(]?\s*https?:""", text)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
        "http://creativecommons.org/ns#",
        "http://purl.org/dc/elements/1.1/",
    }
    assert "<script" not in text and "<link" not in text


@pytest.mark.slow
def test_the_page_opens_in_a_browser(done):
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium on the PATH")
    page, picture = done[1] / "page.html", done[1] / "page.png"
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--screenshot={picture}")
    profile = f"--user-data-dir={done[1] / 'profile'}"
    result = subprocess.run([browser, *flags, profile, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert picture.stat().st_size > 5000
    result = subprocess.run(
        [browser, *flags[:-1], profile, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "Latency: every sample" not in result.stderr and result.stdout.count("<svg") == 5


@pytest.mark.slow
def test_a_fresh_process_makes_the_first_picture(tiny_bundle):
    result = invoke("benchmarks.cli", tiny_bundle, *QUICK[:-1], "--batch-sizes", "1")
    assert result.returncode == 0, result.stderr
    first = document_of(result)["first_picture"]
    assert len(first["samples"]) == 3 and first["cpu"] > 0 and first["peak_mb"] > 20
    assert "First picture" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "Name what to measure"),
        (("demo", "--random", "tiny"), 2, "Name what to measure"),
        (("nowhere",), 1, "nowhere does not exist. `hd-export CHECKPOINT OUT` makes a bundle"),
        (("demo", "--batch-sizes", "0"), 2, "must be whole numbers from 1 to 1024"),
        (("demo", "--batch-sizes", "1,two"), 2, "must be whole numbers from 1 to 1024"),
        (("demo", "--steps", "100000"), 2, "must be whole numbers from 1 to 1000"),
        (("demo", "--requests", "100000000"), 2, "1000000"),
        (
            ("demo", "--report", "missing/page.html"),
            1,
            "--report must be a file that can be written, got missing/page.html",
        ),
        (("demo", "--output", "/"), 1, "--output must be a file that can be written, got /"),
        (("demo", "--cpu-clock"), 1, "Add --threads 1"),
        (("engines", "--peers"), 2, "--checkpoint FOLDER"),
        (("demo", "--solver", "magic"), 2, "'magic' is not one of"),
    ],
)
def test_bad_input_is_one_sentence(arguments, code, sentence, tmp_path):
    result = invoke("benchmarks.cli", *arguments, cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert sentence in " ".join(result.stderr.split()) and "Traceback" not in result.stderr
    assert result.stdout == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "module", "extra"), [("--report=r.html", "matplotlib", "bench"), ("--peers", "torch", "export")]
)
def test_a_missing_extra_is_named_before_anything_runs(option, module, extra, tmp_path):
    hide = (
        "import sys, importlib.abc\n"
        "from importlib import util\n"
        "find = util.find_spec\n"
        f"util.find_spec = lambda name, *rest: None if name == {module!r} else find(name, *rest)\n"
        f"sys.argv = ['hd-bench', 'demo', {option!r}]\n"
        "from handiffuser.benchmarks.cli import main\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", hide], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert f'needs {module}. Install it: pip install "handiffuser[{extra}]".' in result.stderr


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(toy_bundle, tmp_path):
    command = [sys.executable, "-m", "handiffuser.benchmarks.cli", toy_bundle, *QUICK[:-3], "--repeats", "10000"]
    with subprocess.Popen(
        [*command, "--batch-sizes", "1,2", "--output", str(tmp_path / "bench.json"), "--no-first-picture"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen,
    ) as process:  # fmt: skip
        # The card is printed before the first sample; a few samples later it is stopped.
        assert process.stdout is not None
        while "Ceilings" not in process.stdout.readline():
            assert process.poll() is None
        wait_for_samples(process)
        process.send_signal(signal.SIGINT)
        try:
            out, errors = process.communicate(timeout=120)
        finally:
            process.kill()  # leaving this block waits for it
    assert process.returncode == 130, errors
    assert "Interrupted. The results so far follow." in errors and "Traceback" not in errors
    document = json.loads(out.splitlines()[-1])
    assert document["interrupted"] and len(document["runs"]) == 1
    assert 0 < len(document["runs"][0]["samples"]) < 10000 and document["runs"][0]["latency"]["p50"] > 0
    assert "batch x steps" in out and json.loads((tmp_path / "bench.json").read_text()) == document


def wait_for_samples(process: subprocess.Popen[str]) -> None:
    """Until it has used some CPU seconds more: loading is over then, and samples are being taken."""

    def seconds() -> float:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / 100

    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc")
    start = seconds()
    while seconds() < start + 2:
        assert process.poll() is None
        time.sleep(0.2)


@pytest.mark.slow
def test_a_random_bundle_is_made_and_found_again(tiny_bundle, tmp_path):
    options = ("--random", "tiny", "--workdir", tmp_path / "work", *QUICK, "--batch-sizes", "1")
    with instead_of_exporting(tiny_bundle):
        result = invoke("benchmarks.cli", *options)
    assert result.returncode == 0, result.stderr
    assert document_of(result)["settings"]["engines"] == "random tiny"
    assert (tmp_path / "work" / "tiny-bundle" / "manifest.json").exists()
    again = invoke("benchmarks.cli", *options)
    assert again.returncode == 0 and "tiny bundle in" in again.stderr and "is used." in again.stderr

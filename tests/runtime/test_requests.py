"""Requests: what is refused and why, files of prompts, seeds and ids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from handiffuser import Request, RequestError
from handiffuser.runtime import requests as R
from handiffuser.runtime.requests import Refused, RequestFile, Resolver, default_id, picture_key

DEFAULTS = {
    "steps": 12,
    "solver": "ddim",
    "guidance": 2.0,
    "hand_steps": 10,
    "hand_solver": "ddim",
    "hand_guidance": 1.0,
}


def resolve(requests, defaults, **settings):
    return R.resolve(requests, Resolver(defaults, **settings))


def read_requests(path, **shared) -> tuple[dict[int, Request], list[Refused]]:
    lines = list(RequestFile(path, **shared))
    requests = {number: line for number, line in lines if isinstance(line, Request)}
    return requests, [Refused(number, str(line)) for number, line in lines if isinstance(line, RequestError)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": " \t\u2003"}, "empty"),
        ({"prompt": 5}, "prompt must be text .*got 5"),
        ({"prompt": "\ud83d"}, "Unicode"),
        ({"prompt": None}, "prompt must be text .*got None"),
        ({"prompt": "a", "negative_prompt": []}, "negative_prompt must be text"),
        ({"prompt": "a", "steps": 0}, "1 to 1000"),
        ({"prompt": "a", "steps": 10_000}, "1 to 1000"),
        ({"prompt": "a", "steps": 5.5}, "whole number"),
        ({"prompt": "a", "steps": True}, "whole number"),
        ({"prompt": "a", "steps": "12"}, "'12'"),
        ({"prompt": "a", "hand_steps": -1}, "hand_steps"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "guidance": float("nan")}, "0 to 100"),
        ({"prompt": "a", "guidance": float("inf")}, "0 to 100"),
        ({"prompt": "a", "guidance": -1}, "0 to 100"),
        ({"prompt": "a", "guidance_interval": [0.5, 0.5]}, "rise"),
        ({"prompt": "a", "guidance_interval": [0, 2]}, "rise"),
        ({"prompt": "a", "guidance_interval": 0.5}, "two numbers"),
        ({"prompt": "a", "guidance_interval": [0, 10**400]}, "guidance_interval"),
        ({"prompt": "a", "guidance": 10**400}, "guidance"),
        ({"prompt": "a", "seed": 10**5000}, "seed"),
        ({"prompt": "a", "steps": 10**5000}, "1 to 1000"),
        ({"prompt": "a", "solver": ["ddim"]}, "ddim"),
        ({"prompt": "a", "hand_solver": {}}, "ddim"),
        ({"prompt": "a", "hands": "a\0b"}, "hands.npz"),
        ({"prompt": "a" * 100_001}, "100,000"),
        ({"prompt": "a", "guidance_interval": ["0", "1"]}, "two numbers"),
        ({"prompt": "a", "noise_offset": -0.1}, "noise_offset"),
        ({"prompt": "a", "noise_offset": float("nan")}, "0 to 1"),
        ({"prompt": "a", "solver": "magic"}, "ddim"),
        ({"prompt": "a", "hand_solver": 3}, "ddim"),
        ({"prompt": "a", "hands": {}}, "hands must hold arrays, got none"),
        ({"prompt": "a", "hands": ""}, "hands.npz"),
    ],
)
def test_what_cannot_be_run_is_refused(values, words):
    with pytest.raises(RequestError, match=words):
        Request(**values)


NO_IDS = ["a/b", "../a", "/etc/passwd", "a\\b", ".hidden", "..", "C:x", "con", "NUL.txt", "com1", "é", "fist.HANDS"]


@pytest.mark.parametrize("name", [*NO_IDS, "", "a b", "a\n", "x" * 101, 7, ["a"]])
def test_ids_that_are_no_plain_names(name):
    with pytest.raises(RequestError, match="id"):
        Request("a fist", id=name)


@pytest.mark.parametrize("name", ["a", "fist-01", "A.b_c", "x" * 100, "conference", "hands"])
def test_ids_that_are(name):
    assert Request("a fist", id=name).id == name


def test_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa fist\r\n\r\n  two hands  \n✌️\n".encode() + b"\xff\xfe\n# no comment\n")
    requests, refused = read_requests(path, steps=3)
    assert {line: r.prompt for line, r in requests.items()} == {1: "a fist", 3: "two hands", 4: "✌️", 6: "# no comment"}
    assert all(request.steps == 3 for request in requests.values())
    assert [line for line, _ in refused] == [5] and "UTF-8" in refused[0].sentence


def test_jsonl_file(tmp_path):
    path = tmp_path / "prompts.JSONL"
    path.write_text(
        "\n".join(
            [
                '{"prompt": "a fist", "seed": 3, "steps": 4, "solver": "euler", "guidance": 1, "id": "one"}',
                '{"prompt": "a fist", "negative_prompt": "blur", "hands": "sub/x.hands.npz", "steps": null}',
                '{"prompt": "a fist"',
                '["a fist"]',
                '{"seed": 3}',
                '{"prompt": "a fist", "step": 3}',
                '{"prompt": "a fist", "steps": 0}',
                '{"prompt": "a fist", "id": "../../x"}',
                '{"prompt": ""}',
                '{"prompt": "\\ud83d"}',
                "[" * 100_000,
                "",
                '{"prompt": "last"}',
            ]
        )
    )
    requests, refused = read_requests(path, steps=9)
    assert requests[1] == Request("a fist", "one", 3, 4, "euler", 1.0)
    assert requests[2].hands == str(tmp_path / "sub/x.hands.npz") and requests[2].steps == 9
    assert list(requests) == [1, 2, 13]
    assert [line for line, _ in refused] == list(range(3, 12))
    sentences = dict(refused)
    for line, words in {
        3: "not JSON",
        4: "must be an object",
        5: 'must have a "prompt"',
        6: "'step' is unknown",
        8: "path",
    }.items():
        assert words in sentences[line]


def test_one_bad_line_leaves_the_others(tmp_path):
    path = tmp_path / "prompts.jsonl"
    bad = [
        '{"prompt": null}',
        '{"prompt": "a", "solver": ["ddim"]}',
        '{"prompt": "a", "hand_solver": {}}',
        '{"prompt": "a", "guidance_interval": [0, %s]}' % ("9" * 400),
        '{"prompt": "a", "guidance_interval": [0, 1e400]}',
        '{"prompt": "a", "guidance": NaN}',
        '{"prompt": "a", "seed": %s}' % ("9" * 5000),
        '{"prompt": {"a": ' + "[" * 50_000,
        '{"prompt": "' + "a" * (R.MAX_LINE + 1) + '"}',
        '{"prompt": "a", "hands": "x\\u0000"}',
    ]
    path.write_text("\n".join(['{"prompt": "first"}', *bad, '{"prompt": "last"}']))
    requests, refused = read_requests(path)
    assert [request.prompt for request in requests.values()] == ["first", "last"] and len(refused) == len(bad)
    assert len(RequestFile(path)) == len(bad) + 2
    assert all(len(sentence) < 300 and sentence.endswith(".") for _, sentence in refused)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_says_how_a_file_is_encoded(tmp_path, encoding):
    path = tmp_path / "prompts.txt"
    path.write_text("a fist\nкулак ✊\n", encoding=encoding)
    requests, refused = read_requests(path)
    assert [request.prompt for request in requests.values()] == ["a fist", "кулак ✊"] and not refused


@pytest.mark.parametrize("content", ["a fist\ntwo hands".encode("utf-16-le"), b"\xff\xfea", b"\xff\xfe\0\xd8a\0"])
def test_what_is_no_text_is_refused_whole(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(RequestError, match="Save it as UTF-8"):
        RequestFile(path)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".NDJSON"])
def test_json_lines_by_either_name(tmp_path, suffix, ending):
    path = tmp_path / f"p{suffix}"
    path.write_bytes(ending.join(('{"prompt": "a fist"}', '{"prompt": "two hands"}')).encode())
    assert [request.prompt for _, request in RequestFile(path)] == ["a fist", "two hands"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.json", '["a fist"]', r"must be \.txt .* got .*p\.json\. Convert it to \.jsonl: jq -c"),
        ("p.csv", "prompt,seed\na fist,1\n", "Save its column of prompts as .txt"),
        ("p.tsv", "prompt\tseed\na fist\t1\n", "Save its column of prompts as .txt"),
        ("p.yaml", "- a fist\n", "Save its prompts as .txt"),
        ("p.txt.gz", "x", "Unpack it first"),
        ("p.txt", '\n[\n"a fist"]', r"first line begins with \["),
        ("p.jsonl", '[{"prompt": "a fist"}]', r"first line begins with \["),
        ("p", '["a fist"]', r"first line begins with \["),
        ("p.txt", '{"prompt": "a fist"}\n', "Rename it to .jsonl"),
        ("p.jsonl", '{\n "prompt": "a fist"\n}', "Put the object on one line"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_other_kinds_of_file_are_refused_not_painted(tmp_path, name, content, words, encoding):
    (tmp_path / name).write_text(content, encoding=encoding)
    with pytest.raises(RequestError, match=words):
        RequestFile(tmp_path / name)


def test_prompts_in_braces_are_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("{red|blue} background, a fist\n")
    assert [request.prompt for _, request in RequestFile(tmp_path / "p.txt")] == ["{red|blue} background, a fist"]


def test_numbers_from_numpy():
    request = Request("a", seed=np.int64(3), guidance=np.float32(1.5), steps=np.int32(4))
    assert request == Request("a", seed=3, guidance=1.5, steps=4) and type(request.seed) is int


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_a_file_that_cannot_be_read(tmp_path, name):
    with pytest.raises(RequestError, match="cannot be read"):
        RequestFile(tmp_path / name)


def test_resolve_fills_in_defaults_and_seeds():
    (one,), refused = resolve([Request("a fist", steps=3)], DEFAULTS)
    assert (one.steps, one.solver, one.seed, one.guidance) == (3, "ddim", 0, 2.0) and not refused
    assert one.id is not None and one.id.startswith("a-fist-0-")


def test_a_repeated_prompt_takes_the_next_seed():
    resolved, refused = resolve([Request("a"), Request("b"), Request("a"), Request("a", steps=3)], DEFAULTS, seed=7)
    assert [(r.prompt, r.seed) for r in resolved] == [("a", 7), ("b", 7), ("a", 8), ("a", 7)] and not refused
    assert len({r.id for r in resolved}) == 4


def test_images_per_prompt():
    resolved, refused = resolve([Request("a"), Request("a"), Request("b", id="x", seed=5)], DEFAULTS, images=2)
    assert [r.seed for r in resolved] == [0, 1, 2, 3, 5, 6] and not refused
    assert [r.id for r in resolved[4:]] == ["x-5", "x-6"]


def test_the_second_of_two_ids_is_refused():
    resolved, refused = resolve([Request("a", id="Fist"), Request("b"), Request("c", id="fist")], DEFAULTS)
    assert [r.prompt for r in resolved] == ["a", "b"]
    assert [line for line, _ in refused] == [3] and "id must be unique" in refused[0].sentence


def test_the_very_same_request_is_refused():
    resolved, refused = resolve([Request("a", seed=1), Request("a", seed=1)], DEFAULTS)
    assert len(resolved) == 1 and "another seed" in refused[0].sentence


def test_the_id_tells_every_other_picture_apart(tmp_path):
    (one,), _ = resolve([Request("a fist")], DEFAULTS, bundle="x")
    same, _ = resolve([Request("a fist", steps=12, guidance=2)], DEFAULTS, bundle="x")
    assert same[0].id == one.id
    hands = tmp_path / "a.npz"
    hands.write_bytes(b"1")
    changes = [{"steps": 3}, {"seed": 1}, {"guidance": 3.0}, {"negative_prompt": "b"}, {"prompt": "A fist"}]
    changes += [{"hand_steps": 1}, {"hand_guidance": 0.0}, {"solver": "euler"}, {"hands": str(hands)}]
    ids = {default_id(replace(one, **change), "x") for change in changes} | {default_id(one, "y")}
    assert len(ids) == len(changes) + 1 and one.id not in ids
    before = picture_key(replace(one, hands=str(hands)))
    hands.write_bytes(b"2")
    assert picture_key(replace(one, hands=str(hands))) != before


def test_slugs():
    for prompt, start in {"✌️": "picture-0-", "A Fist, blue!": "a-fist-blue-0-", "x" * 500: "x" * 40 + "-0-"}.items():
        (one,), _ = resolve([Request(prompt)], DEFAULTS)
        assert one.id is not None and one.id.startswith(start)


def test_check_refuses_one_and_lets_the_rest_go_on():
    def check(request: Request) -> None:
        if request.solver == "plms":
            raise RequestError("No plms here.")

    resolved, refused = resolve([Request("a", solver="plms"), Request("b")], DEFAULTS, check=check)
    assert [r.prompt for r in resolved] == ["b"] and refused == [(1, "No plms here.")]

"""The nodes of ComfyUI, alone and in ComfyUI itself.

ComfyUI is not on PyPI. These tests start it where HANDIFFUSER_COMFYUI names a checkout, and skip elsewhere:

    HANDIFFUSER_COMFYUI=~/ComfyUI HANDIFFUSER_COMFYUI_PYTHON=~/ComfyUI/.venv/bin/python python -m pytest -m slow \
        tests/integrations

HANDIFFUSER_COMFYUI_PYTHON is a Python with ComfyUI's requirements and this package; by default, the one of the tests.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from adaptable import adaptable, write
from handiffuser import DetectionError, EngineError, Failure, HanDiffuser, Request, RequestError
from handiffuser.detection.convention import Convention
from handiffuser.detection.detect import Found
from PIL import Image

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
WORKFLOWS = sorted(FOLDER.glob("example_workflows/*.json"))
COMFYUI = os.environ.get("HANDIFFUSER_COMFYUI")
torch = pytest.importorskip("torch")


def load(name, path, **arguments):
    spec = util.spec_from_file_location(name, path, **arguments)
    module = util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package():
    """As ComfyUI imports it: the folder's name is the user's choice."""
    return load("custom_node", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])


@pytest.fixture(scope="module")
def nodes(package):
    return sys.modules["custom_node.nodes"]


@pytest.fixture(scope="module")
def engines(nodes, toy_bundle):
    (engines,) = nodes.LoadEngines().load(f" {toy_bundle} ", "onnxruntime", "cpu", 2)
    with engines:
        yield engines


def test_pictures_are_those_of_generate(nodes, engines):
    image, mask, hands = nodes.Paint().paint(engines, "a fist", 5, 3, steps=3, guidance=-1.0, solver=nodes.OWN)
    expected = engines.generate("a fist", seed=5, steps=3, images_per_prompt=3)
    assert image.shape == (3, 32, 32, 3) and image.dtype == torch.float32 and mask.shape == (3, 32, 32)
    for got, one, want in zip(image, hands, expected, strict=True):
        assert np.array_equal((got.numpy() * 255).round().astype(np.uint8), want.image)
        assert np.array_equal(one["params"], want.hands["params"])


def test_hands_are_made_edited_and_painted(nodes, engines):
    hands, skeleton = nodes.HandsOfPrompt().make(engines, "a fist", 5, 3, hand_steps=3, hand_solver=nodes.OWN)
    assert len(hands) == 3 and skeleton.shape == (3, 512, 512, 3) and 0 <= skeleton.min() < skeleton.max() <= 1
    edited, _ = nodes.EditHands().edit(hands, "fist", "as it is", True, False)
    assert not np.allclose(edited[0]["right_hand_pose"], hands[0]["right_hand_pose"])
    same, _ = nodes.EditHands().edit(hands, "as it is", "as it is", False, False)
    assert all(one is other for one, other in zip(same, hands, strict=True))
    _, _, painted = nodes.Paint().paint(engines, "a fist", 5, 1, hands=edited, steps=2)
    assert len(painted) == 3  # a picture for each of the hands
    for one, other in zip(painted, edited, strict=True):
        assert np.abs(one["right_hand_pose"] - other["right_hand_pose"]).max() < 1e-3
    assert len(nodes.Paint().paint(engines, "a fist", 5, 2, hands=edited[:1], steps=2)[2]) == 2
    with pytest.raises(RequestError, match="count must be 1 or 3, the number of hands, got 2"):
        nodes.Paint().paint(engines, "a fist", 5, 2, hands=edited)


def test_an_image_is_painted_again_where_the_mask_is_white(nodes, engines):
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.random((2, 32, 32, 3), np.float32))
    mask = torch.zeros(1, 16, 16)  # of another size, as ComfyUI's own nodes give it
    mask[:, :8] = 1
    pictures, _, _ = nodes.Paint().paint(engines, "a fist", 5, 1, image=image, mask=mask, denoise=0.7, steps=4)
    sent = (image[1].numpy() * 255).round().astype(np.uint8)
    white = np.asarray(Image.fromarray((mask[0].numpy() * 255).astype(np.uint8)).resize((32, 32), 2))
    (want,) = engines.generate("a fist", seed=6, steps=4, image=sent, mask=white, strength=0.7)
    assert len(pictures) == 2 and np.array_equal((pictures[1].numpy() * 255).round().astype(np.uint8), want.image)
    whole, _, _ = nodes.Paint().paint(engines, "a fist", 5, 1, image=image[:1], steps=4)
    assert not torch.equal(whole[0], pictures[0])
    with pytest.raises(RequestError, match="mask must come with an image"):
        nodes.Paint().paint(engines, "a fist", mask=mask)
    with pytest.raises(RequestError, match="count must be 1 or 2, the number of image, got 3"):
        nodes.Paint().paint(engines, "a fist", 5, 3, image=image)


def test_pictures_have_the_size_of_the_widgets(nodes, engines, monkeypatch):
    image, _, _ = nodes.Paint().paint(engines, "a fist", 5, width=32, height=32, steps=2)
    assert image.shape == (1, 32, 32, 3), "the bundle's own size, by name"
    with pytest.raises(RequestError, match="size must be 32x32 for this bundle, got 64x32"):
        nodes.Paint().paint(engines, "a fist", 5, width=64)
    asked = []
    monkeypatch.setattr(nodes, "prepared", lambda engines, request, *_: asked.append(request.size) or [])
    monkeypatch.setattr(nodes, "run", lambda *_: engines.generate("a fist", steps=1))
    for sides in ({"width": 512, "height": 768}, {"width": 48}, {"height": 48}, {}):
        nodes.Paint().paint(engines, "a fist", **sides)
    assert asked == ["512x768", "48x32", "32x48", None]


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """ComfyUI's folder of LoRAs, with a stand-in for its module."""
    folder = tmp_path / "loras"
    (folder / "sub").mkdir(parents=True)
    write(folder / "style.safetensors", "conv_in")
    write(folder / "sub" / "light.safetensors", "to_k", 2.0)
    names = ["style.safetensors", "sub/light.safetensors", "old.pt", "a link that leads nowhere.safetensors"]
    module = SimpleNamespace(
        get_filename_list=lambda kind: names if kind == "loras" else [],
        get_full_path=lambda kind, name: str(folder / name) if (folder / name).is_file() else None,
    )
    monkeypatch.setitem(sys.modules, "folder_paths", module)
    return folder


def test_adapters_are_chosen_chained_and_loaded(nodes, toy_bundle, tmp_path, loras):
    bundle = adaptable(toy_bundle, tmp_path / "bundle")
    (shown, _) = nodes.LoadLora.INPUT_TYPES()["required"]["lora_name"]
    assert shown == ["style.safetensors", "sub/light.safetensors"], "never a pickle"
    (one,) = nodes.LoadLora().choose("style.safetensors", 0.5)
    (both,) = nodes.LoadLora().choose("sub/light.safetensors", -1.0, one)
    assert both == [f"{loras / 'style.safetensors'}:0.5", f"{loras / 'sub' / 'light.safetensors'}:-1.0"]
    with pytest.raises(RequestError, match=r"lora_name must be a .safetensors file of models/loras, got 'lost'"):
        nodes.LoadLora().choose("lost", 1.0)
    painted = []
    for lora in (None, one, both):
        (loaded,) = nodes.LoadEngines().load(str(bundle), "onnxruntime", "cpu", 2, lora=lora)
        with loaded:
            painted.append((nodes.Paint().paint(loaded, "a fist", 5, steps=2)[0] * 255).round().to(torch.uint8)[0])
    with HanDiffuser.load(bundle, "cpu") as plain:
        for got, lora in zip(painted, (None, tuple(one), tuple(both)), strict=True):
            (want,) = plain.generate("a fist", seed=5, steps=2, lora=lora)
            assert np.array_equal(got.numpy(), want.image)
    assert len({one.numpy().tobytes() for one in painted}) == 3


class Blind:
    """A detector that finds the hands that it is told of in a whole picture, and none in a crop of it."""

    name, settings, convention = "Blind", {}, Convention.true(0.004)
    found: tuple[Found, ...] = ()

    def __call__(self, image):
        return list(self.found) if image.shape[:2] == (128, 200) else []

    once = __call__

    def sureness(self, found, residual, degrees):
        return 0.9

    def close(self):
        pass


@pytest.mark.slow
def test_hands_of_an_image_are_found_and_repaired(nodes, monkeypatch):
    """With the demo's body, and a detector that knows the truth."""
    pytest.importorskip("cv2")
    from handiffuser.detection import hands as detection
    from handiffuser.repair import pictures as library
    from handiffuser.repair.pictures import repair_hands

    for module in (detection, library):
        monkeypatch.setattr(module, "MediaPipe", Blind)
    (engines,) = nodes.LoadEngines().load("demo", "onnxruntime", "cpu", 4)
    with engines:
        painted, _, hands = nodes.Paint().paint(engines, "an open right hand, blue background", 3, steps=2)
        image = torch.zeros(1, 128, 200, 3) + 0.3
        image[:, :, :128] = painted
        with pytest.raises(DetectionError, match="found no hand in the picture"):
            nodes.HandsOfImage().find(engines, image, "in this image")
        points = hands[0]["joints_2d"][1] * (0.64, 1)
        monkeypatch.setattr(Blind, "found", (Found("right", 0.9, points),))
        found, drawing = nodes.HandsOfImage().find(engines, image, "in this image")
        assert drawing.shape == (1, 256, 400, 3) and np.abs(found[0]["joints_2d"][1] - points).max() < 0.03
        near, _ = nodes.HandsOfImage().find(engines, image, "for a new picture")
        assert np.ptp(near[0]["joints_2d"][1][:, 0]) > np.ptp(points[:, 0])  # in a picture of another shape
        out, mask = nodes.RepairHands().repair(engines, image, 4, "fist", steps=2)
        assert out.shape == image.shape and 0 < mask.mean() < 0.6
        assert torch.equal(out[mask == 0], (image[mask == 0] * 255).round() / 255)
        picture = (image[0].numpy() * 255).round().astype(np.uint8)
        want = repair_hands(engines, picture, gesture="fist", seed=4, steps=2).image
        assert np.array_equal((out[0].numpy() * 255).round().astype(np.uint8), want)
        edited, _ = nodes.EditHands().edit(found, "as it is", "fist", False, False)
        given, _ = nodes.RepairHands().repair(engines, image, 4, hands=edited, steps=2)
        assert not torch.equal(given, image) and not torch.equal(given, out)
        left, mask = nodes.RepairHands().repair(engines, image, 4, "fist", "left", steps=2)
        assert mask.any() and not torch.equal(left, out), "of a single hand it says the side"
        same, mask = nodes.RepairHands().repair(engines, image, 4, steps=2)
        assert not mask.any() and torch.equal(same, (image * 255).round() / 255), "the detector looks again"


def test_nodes_use_the_public_face_alone():
    lines = [line.strip() for path in FOLDER.glob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    rooms = {line.split()[1] for line in lines if line.startswith(("from handiffuser", "import handiffuser"))}
    assert rooms == {"handiffuser", "handiffuser.editing"}


def test_a_mask_covers_the_hands_that_are_seen(nodes):
    x, y = np.meshgrid([0.4, 0.45, 0.5, 0.55, 0.6], [0.3, 0.4, 0.5, 0.6])
    joints = np.concatenate([[[0.5, 0.9]], np.stack([x, y[::-1]], -1).transpose(1, 0, 2).reshape(20, 2)])
    hands = {"joints_2d": np.stack([joints - [0.4, 0], joints]), "visibility": np.array([0.0, 1.0])}
    mask = nodes.as_mask([hands], 100, 80).numpy()[0]
    assert mask.shape == (100, 80) and set(np.unique(mask)) == {0, 1}
    assert mask[:, :12].sum() == 0 and 0.05 < mask.mean() < 0.5  # nothing of the left hand, which is not there
    assert all(mask[min(99, round(v * 100)), round(u * 80)] == 1 for u, v in joints)
    hands["joints_2d"][1, 3] = np.nan
    assert nodes.as_mask([hands], 100, 80).sum() == 0


def test_refusals_are_sentences(nodes, engines, monkeypatch):
    with pytest.raises(RequestError, match="solver must be one of"):
        nodes.Paint().paint(engines, "a fist", solver="magic")
    monkeypatch.setattr(engines, "run", lambda all, on_event: (Failure(one.id, one, "It gave NaN.") for one in all))
    with pytest.raises(EngineError, match="It gave NaN"):
        nodes.Paint().paint(engines, "a fist")


class StoppedError(Exception):
    pass


def test_the_progress_bar_and_the_stop_button(nodes, engines, monkeypatch):
    """Stand-ins for ComfyUI's modules: after a stop the engines paint again."""
    seen = []

    class Watch(nodes.Watch):
        def __init__(self, steps):
            self.done, self.bar, self.management, self.steps = 0, self, self, steps

        def update_absolute(self, done):
            seen.append(done / self.steps)

        def processing_interrupted(self):
            return len(seen) >= 3

        def throw_exception_if_processing_interrupted(self):
            if self.processing_interrupted():
                raise StoppedError

    monkeypatch.setattr(nodes, "Watch", Watch)
    with pytest.raises(StoppedError):
        nodes.Paint().paint(engines, "a fist", 5, 4, steps=20)
    assert seen == sorted(seen) and 0 < seen[-1] < 0.2
    monkeypatch.undo()
    image, _, _ = nodes.Paint().paint(engines, "a fist", 5, 1, steps=3)
    (want,) = engines.generate("a fist", seed=5, steps=3)
    assert np.array_equal((image[0].numpy() * 255).round().astype(np.uint8), want.image)


def inputs_of(info, node):
    """A node's inputs by name: True for those with a widget of their own."""
    both = {**info[node]["input"].get("required", {}), **info[node]["input"].get("optional", {})}
    return {
        name: (isinstance(kind[0], list) or kind[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"), kind)
        for name, kind in both.items()
    }


def as_prompt(workflow, info):
    """A saved workflow as the page sends it to ComfyUI."""
    source = {number: [str(node), slot] for number, node, slot, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        values, given = iter(node["widgets_values"]), {}
        for name, (widget, kind) in inputs_of(info, node["type"]).items():
            if widget:
                given[name] = next(values)
                if len(kind) > 1 and kind[1].get("control_after_generate"):
                    assert next(values) in ("fixed", "increment", "decrement", "randomize")
        assert next(values, None) is None, f"{node['type']} has fewer widgets than the workflow"
        given |= {one["name"]: source[one["link"]] for one in node["inputs"] if one["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": given}
    return prompt


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_fit_the_nodes(package, path, loras):
    """Each has the inputs and outputs that its nodes have now, and values that they take."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] not in package.NODE_CLASS_MAPPINGS:
            assert node["type"] in ("SaveImage", "PreviewImage", "MaskToImage")  # ComfyUI's own
            continue
        one = package.NODE_CLASS_MAPPINGS[node["type"]]
        given = as_prompt({**workflow, "nodes": [node]}, {node["type"]: {"input": one.INPUT_TYPES()}})
        for name, (widget, kind) in inputs_of({"x": {"input": one.INPUT_TYPES()}}, "x").items():
            value = given[str(node["id"])]["inputs"].get(name)
            if isinstance(kind[0], list):
                assert value in kind[0]
            elif kind[0] in ("INT", "FLOAT"):
                assert kind[1]["min"] <= value <= kind[1]["max"]
            elif not widget:
                assert name in [slot["name"] for slot in node["inputs"]]
        assert [slot["name"] for slot in node["outputs"]] == list(one.RETURN_NAMES)


def adapter_of_the_demo(path):
    """An adapter of rank 1 that changes the demo's pictures."""
    from handiffuser.shipped import bundle_path
    from handiffuser.weights import WeightMap
    from safetensors.numpy import save_file

    shapes = WeightMap.load(bundle_path()).shapes
    name = next(name for name in shapes if name.endswith("to_q.weight") and "unet" in name)
    rows, columns = shapes[name]
    stem, rng = name.removesuffix(".weight"), np.random.default_rng(0)
    arrays = {f"{stem}.lora_A.weight": (1, columns), f"{stem}.lora_B.weight": (rows, 1)}
    save_file({key: rng.standard_normal(shape).astype(np.float32) for key, shape in arrays.items()}, path)


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory):
    """ComfyUI with a link to the nodes. Gives its URL and the folder of its pictures."""
    import httpx

    if not COMFYUI:
        pytest.skip("HANDIFFUSER_COMFYUI names no checkout of ComfyUI")
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "handiffuser").symlink_to(FOLDER)
    (base / "models" / "loras").mkdir(parents=True)
    adapter_of_the_demo(base / "models" / "loras" / "style.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = os.environ.get("HANDIFFUSER_COMFYUI_PYTHON", sys.executable)
    command = [python, "main.py", "--cpu", "--port", str(port), "--base-directory", str(base), "--disable-api-nodes"]
    command += ["--database-url", f"sqlite:///{base}/comfyui.db"]
    url = f"http://127.0.0.1:{port}"
    with open(base / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=COMFYUI, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 300
            while time.monotonic() < end:
                try:
                    httpx.get(f"{url}/object_info/HanDiffuserPaint", timeout=5).raise_for_status()
                    break
                except httpx.HTTPError:
                    assert process.poll() is None, (base / "log").read_text()[-3000:]
                    time.sleep(1)
            yield url, base
        finally:
            process.kill()
            process.wait()


def finished(url, prompt):
    """Sends a prompt and waits. Returns its entry in ComfyUI's history."""
    import httpx

    answer = httpx.post(f"{url}/prompt", json={"prompt": prompt}, timeout=60)
    assert answer.status_code == 200 and not answer.json()["node_errors"], answer.text
    id, end = answer.json()["prompt_id"], time.monotonic() + 300
    while time.monotonic() < end:
        if entry := httpx.get(f"{url}/history/{id}", timeout=60).json().get(id):
            return entry
        time.sleep(0.2)
    raise AssertionError("ComfyUI did not finish")


@pytest.mark.slow
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_comfyui_runs_the_workflows(comfyui, nodes, path):
    """Pictures equal those of the same steps in Python, to one level of 255."""
    import httpx
    from handiffuser import find_hands, repair_hands, save_hands
    from handiffuser.editing import edit, mirrored

    if path.stem in ("hands_of_an_image", "repair_hands"):
        pytest.importorskip("mediapipe")
    url, base = comfyui
    output = base / "output"
    prompt = as_prompt(json.loads(path.read_text(encoding="utf-8")), httpx.get(f"{url}/object_info", timeout=60).json())
    entry = finished(url, prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    (saved,) = [one for node in entry["outputs"].values() for one in node["images"] if one["type"] == "output"]
    picture = np.asarray(Image.open(output / saved["filename"]))
    paints = [node["inputs"] for node in prompt.values() if node["class_type"] == "HanDiffuserPaint"]
    with HanDiffuser.load("demo", device="cpu", threads=1) as pipeline:
        file = output / "hands.npz"
        (first,) = pipeline.generate(paints[0]["prompt"], seed=3)
        want = first.image
        if path.stem == "edit_hands":
            (request,), _ = pipeline.prepare([Request("an open right hand, red background")], 3)
            (made,) = pipeline.hands([request])
            save_hands(file, edit(made, gesture=("right", "victory")))
            want = pipeline.generate(paints[0]["prompt"], seed=3, hands=str(file))[0].image
        elif path.stem == "paint_again_mirrored":
            save_hands(file, mirrored(first.hands))
            want = pipeline.generate(paints[1]["prompt"], seed=3, hands=str(file))[0].image
        elif path.stem == "hands_of_an_image":
            (told,) = find_hands(pipeline, [first.image])
            save_hands(file, told.arrays)
            want = pipeline.generate(paints[1]["prompt"], seed=8, hands=str(file))[0].image
        elif path.stem == "paint_with_a_lora":
            lora = f"{base / 'models/loras/style.safetensors'}:0.8"
            want = pipeline.generate(paints[0]["prompt"], seed=3, lora=lora)[0].image
            assert np.abs(want.astype(int) - first.image).max() > 1
        elif path.stem == "repair_hands":
            want = repair_hands(pipeline, first.image, gesture="fist", seed=4).image
        elif path.stem == "paint_over_an_image":
            mask = (nodes.as_mask([first.hands], *want.shape[:2])[0].numpy() * 255).astype(np.uint8)
            over = {"image": first.image, "mask": mask, "strength": 0.9}
            want = pipeline.generate(paints[1]["prompt"], seed=8, **over)[0].image
    assert np.abs(picture.astype(int) - want).max() <= 1


@pytest.mark.slow
def test_comfyui_stops_and_says_what_is_wrong(comfyui):
    import httpx

    url, _ = comfyui
    engines = {"class_type": "HanDiffuserLoad",
               "inputs": {"engines": "demo", "backend": "auto", "device": "auto", "batch_size": 8}}  # fmt: skip
    paint = {"engines": ["1", 0], "prompt": "a fist", "seed": 1, "count": 64, "steps": 200, "guidance": 3.0}
    nodes = {
        "1": engines,
        "2": {"class_type": "HanDiffuserPaint", "inputs": paint},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }
    id = httpx.post(f"{url}/prompt", json={"prompt": nodes}).json()["prompt_id"]
    end = time.monotonic() + 60
    while not httpx.get(f"{url}/queue").json()["queue_running"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    time.sleep(3)
    httpx.post(f"{url}/interrupt", json={})
    while not (entry := httpx.get(f"{url}/history/{id}").json().get(id)):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"]), entry["status"]
    nodes["2"]["inputs"] |= {"count": 1, "steps": 2}
    assert finished(url, nodes)["status"]["status_str"] == "success"  # the same engines paint on
    nodes["1"]["inputs"] = {**engines["inputs"], "engines": "/nowhere"}
    entry = finished(url, nodes)
    assert entry["status"]["status_str"] == "error" and "/nowhere does not exist" in json.dumps(entry["status"])

"""hd-serve with a bundle of two people: hands are a list, one object a person, in requests and answers."""

from __future__ import annotations

import numpy as np
import pytest
from handiffuser.contract import Manifest
from handiffuser.editing import edit
from handiffuser.serving.fields import HandsField, arrays_of, as_json
from handiffuser.serving.triton import config
from served import serving


@pytest.fixture(scope="module")
def pair(pair_bundle, tmp_path_factory):
    with serving(pair_bundle, tmp_path_factory.mktemp("served")) as one:
        yield one


def arrays(hands):
    return arrays_of([HandsField.model_validate(one) for one in hands])


def test_hands_are_a_list_of_people(pair):
    made = pair.client.post("/v1/hands", json={"prompt": "two people", "seed": 3}).json()["data"][0]["hands"]
    assert isinstance(made, list) and len(made) == 2 and np.shape(made[1]["joints_2d"]) == (2, 21, 2)
    for one in made:
        one.pop("vertices", None), one.pop("params", None)
    assert as_json(arrays(made)) == made
    body = {"prompt": "two people", "seed": 3, "num_inference_steps": 2, "return_hands": True}
    painted = pair.client.post("/v1/images/generations", json={**body, "hands": made}).json()["data"][0]
    np.testing.assert_allclose(painted["hands"][1]["left_hand_pose"], made[1]["left_hand_pose"], atol=1e-5)
    alone = pair.client.post("/v1/images/generations", json={**body, "hands": made[0]}).json()["data"][0]["hands"]
    assert np.abs(alone[1]["body_pose"]).max() < 1e-5, "the other one is absent"
    by_id = pair.client.post("/v1/images/generations", json={**body, "hands": painted["hands_id"]})
    assert by_id.status_code == 200, by_id.text


def test_an_edit_changes_one_person(pair):
    made = pair.client.post("/v1/hands", json={"prompt": "two people", "seed": 3}).json()["data"][0]["hands"]
    for one in made:
        one.pop("vertices", None), one.pop("params", None)
    change = {"gesture": {"hand": "left", "name": "fist"}, "person": 1}
    edited = pair.client.post("/v1/hands/edit", json={"hands": made, **change}).json()["hands"]
    assert edited[0] == made[0] and edited[1] != made[1]
    assert edited == as_json(edit(arrays(made), gesture=("left", "fist"), person=1))
    for hands, words, param in (
        (made[:1], "person must be a whole number from 0 to 0 for these hands, got 1.", "person"),
        ([], "hands must have at least 1 item", "hands"),
        ([made[0], {**made[1], "betas": [1.0]}], "hands.1.betas must have at least 10 items", "hands.1.betas"),
        ([made[0], "fist"], "hands.1 must be an object, got 'fist'.", "hands.1"),
        (3, "hands must be an object, got 3.", "hands"),
    ):
        refused = pair.client.post("/v1/hands/edit", json={"hands": hands, **change})
        assert refused.status_code == 400 and words in refused.json()["error"]["message"], refused.text
        assert refused.json()["error"]["param"] == param, refused.text


def test_more_people_than_the_bundle_knows_are_refused(pair, served):
    made = pair.client.post("/v1/hands", json={"prompt": "two people", "seed": 3}).json()["data"][0]["hands"]
    for one in made:
        one.pop("vertices", None), one.pop("params", None)
        one["placement"][0][0] = 1.0
    for server, hands, most in ((served, made, "1 person"), (pair, [*made, made[0]], "2 people")):
        refused = server.client.post("/v1/images/generations", json={"prompt": "a", "hands": hands})
        assert refused.status_code == 400, refused.text
        said = refused.json()["error"]
        assert f"hands must show at most {most} with this bundle, got {len(hands)}" in said["message"], said
        assert said["param"] == "hands"


def test_triton_says_the_shapes(pair_bundle, toy_bundle):
    pair, toy = (config(Manifest.load(folder)) for folder in (pair_bundle, toy_bundle))
    assert "dims: [2, 2, 21, 2]" in pair and "dims: [2, 2] }" in pair
    assert "dims: [2, 21, 2]" in toy and "[2, 2, 21, 2]" not in toy

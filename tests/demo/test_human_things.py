"""Things in hands: closed meshes, grasps that touch and pass through nothing, pictures and captions with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from handiffuser.demo import grasps as solver
from handiffuser.demo import human_scenes
from handiffuser.demo.contacts import surface_distance
from handiffuser.demo.human import human_body, load_human
from handiffuser.demo.human_holding import bend, places_of
from handiffuser.demo.human_poses import HANGING, LEFT, RIGHT, Figure
from handiffuser.demo.human_prompts import Someone, Spec, says, write_caption
from handiffuser.demo.human_render import Camera, Held, Lamp, Person, render
from handiffuser.demo.human_scenes import draw, in_picture, labels_of, sample_scene, seen_shares
from handiffuser.demo.human_words import THING_WORDS
from handiffuser.demo.things import PARTS, SIZES, THINGS, grasps, sample_thing, thing_mesh

EVERY = [(thing, number) for thing in THINGS for number in range(len(SIZES[thing]))]
GREY = torch.full((2, 2, 3), 0.5)


pytestmark = pytest.mark.usefixtures("coarse_skin")


@pytest.mark.parametrize("thing", THINGS)
def test_meshes_are_closed_and_wound_outwards(thing):
    for size in SIZES[thing]:
        mesh = thing_mesh(thing, size)
        a, b, c = mesh.vertices[mesh.faces].transpose(1, 0, 2)
        area = np.cross(b - a, c - a)
        assert np.abs(area.sum(0)).max() < 5e-4  # m²: closed but for the ends of the handle, which lie in the wall
        assert (a * area).sum() > 0  # its volume
        assert set(mesh.part.tolist()) == set(range(len(PARTS[thing])))
        assert np.abs(mesh.vertices).max() < 0.25


def check_grasp(thing: str, number: int) -> None:
    row = grasps(thing)[number]
    names = ("fingers", "thumb", "roll", "turn", "place")
    wide, deep = solver.measure(thing, number, {name: getattr(row, name) for name in names})
    assert wide <= 2 and deep <= 2, (thing, number, wide, deep)


@pytest.mark.parametrize("thing", ["ball"])
def test_fingers_touch_what_they_hold_and_do_not_enter_it(thing):
    check_grasp(thing, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("thing", "number"), EVERY)
def test_every_grasp_touches_and_enters_nothing(thing, number):
    check_grasp(thing, number)


def test_depth_in_a_thing_is_measured():
    mesh = thing_mesh("ball", (0.033,))
    points = np.array([(0, 0, 0.030), (0, 0.036, 0), (0.0, 0.0, 0.10)])
    assert abs(solver.inside_thing(points, mesh) - 0.003) < 3e-4
    assert solver.inside_thing(points[1:], mesh) == 0
    near = solver.distance("ball", (0.033,), torch.from_numpy(points))
    assert torch.allclose(near, torch.tensor([-0.003, 0.003, 0.067], dtype=near.dtype))


@pytest.mark.parametrize("thing", ["phone", "cup"])
def test_the_solvers_distance_is_that_of_the_mesh(thing):
    size = SIZES[thing][0]
    mesh = thing_mesh(thing, size)
    low, high = mesh.vertices.min(0) - 0.02, mesh.vertices.max(0) + 0.02
    points = np.random.default_rng(0).uniform(low, high, (60, 3))
    ours = solver.distance(thing, size, torch.from_numpy(points)).numpy()
    true = surface_distance(points, *(mesh.vertices[mesh.faces[:, i]] for i in range(3)))
    outside = ours > 0.001
    assert outside.sum() > 20 and np.abs(ours - true)[outside].max() < 0.012
    assert np.median(np.abs(ours - true)[outside]) < 0.0015


@pytest.mark.parametrize("side", [LEFT, RIGHT])
def test_a_thing_moves_with_its_hand(side):
    where = []
    for yaw in (0.0, 40.0):
        figure = Figure(np.zeros(10), np.random.default_rng(0))
        figure.stand(yaw)
        figure.place(side, HANGING, vary=False)
        grasp = grasps("ball")[0]
        figure.rotations[22 + 15 * side : 37 + 15 * side] = grasp.hand(side)
        ball = places_of(figure, side, grasp, thing_mesh("ball", grasp.size).vertices)
        hand = figure.vertices()[0][human_scenes.hand_ids(side)]
        far = torch.cdist(torch.from_numpy(hand).double(), torch.from_numpy(ball)).min()
        where.append(float(far))
    assert max(where) < 0.004 and abs(where[0] - where[1]) < 1e-4


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(np.random.default_rng((5, i)), kind="things") for i in range(8)]


def test_scenes_show_the_thing_that_they_name(scenes):
    for scene in scenes:
        (one,), (held,), (pose,) = scene.spec.people, scene.things, scene.poses
        side = ("left", "right").index(one.side)
        shares, of_things = seen_shares([pose.vertices], scene.camera, scene.things)
        assert one.thing in THINGS and of_things[0] >= 0.3 and shares[0, side] >= 0.3 and scene.present[0, side]
        assert bend(pose.rotations[20 + side]) <= 75.01 and labels_of(scene.spec)["thing"] == one.thing
        centre = in_picture(held.vertices.mean(0), scene.camera)
        assert one.thing in ("stick", "pen") or ((centre > 0) & (centre < 1)).all()
        rng = np.random.default_rng(0)
        texts = {write_caption(scene.spec, rng) for _ in range(60)}
        assert len(texts) > 25 and all(says(scene.spec, text) for text in texts)
        assert all(
            any(word in text.lower() for word in (*THING_WORDS[one.thing], "hand", "portrait")) for text in texts
        )


def test_scenes_with_things_repeat_and_others_stay(scenes):
    again = sample_scene(np.random.default_rng((5, 2)), kind="things")
    assert again.spec == scenes[2].spec and (again.things[0].vertices == scenes[2].things[0].vertices).all()
    assert (draw(again, 48) == draw(scenes[2], 48)).all()
    assert not sample_scene(np.random.default_rng((5, 2))).things


def test_things_are_drawn_before_and_behind_people():
    person, mesh = Person(human_body().v_template.numpy()), thing_mesh("ball", (0.033,))
    chest = load_human().joints[9]
    red = replace(sample_thing("ball", np.random.default_rng(0)), colours=((0.9, 0.02, 0.02),) * 2)

    def count(depth: float) -> int:
        held = Held(mesh, mesh.vertices + chest + (0, 0, depth), red)
        picture = render([person], Camera(4, 0, -chest[1]), Lamp(), GREY, 64, things=[held]).numpy().astype(int)
        return int(((picture[..., 0] > 90) & (picture[..., 1:].max(-1) < 60)).sum())

    assert count(0.4) > 20 and count(-0.4) == 0


def test_every_thing_is_drawn_in_many_looks():
    for thing in THINGS:
        looks = {sample_thing(thing, np.random.default_rng(i)).colours for i in range(12)}
        assert len(looks) >= 5
        look, mesh = sample_thing(thing, np.random.default_rng(0)), thing_mesh(thing, SIZES[thing][0])
        assert len(look.colours) == len(look.gloss) == len(PARTS[thing])
        far = Person(np.zeros((len(load_human().template), 3), np.float32) + np.float32([0, -9, 0]))
        look = replace(look, colours=((0.9, 0.02, 0.02),) * len(look.colours))
        camera = Camera(1.0 / float(np.abs(mesh.vertices).max()), 0, 0)
        picture = render([far], camera, Lamp(), GREY, 48, things=[Held(mesh, mesh.vertices, look)]).numpy().astype(int)
        assert ((picture[..., 0] - picture[..., 1]) > 25).sum() > 20, thing


PROMPTS = {
    "a hand holding a cup": Spec((Someone("holding", "left", thing="cup"),), "close-up", "room"),
    "a man with a phone": Spec((Someone("holding", "right", person="man", thing="phone"),), "bust", "street"),
    "a woman holding a red book": Spec(
        (Someone("holding", "left", person="woman", thing="book", tint="red"),), "half body", "office"
    ),
    "a person with a cup of coffee in their right hand": Spec(
        (Someone("holding", "right", thing="cup"),), "bust", "beach"
    ),
    "holding a pen": Spec((Someone("holding", "right", thing="pen"),), "close-up", "office"),
    "a ball in a hand": Spec((Someone("holding", "left", thing="ball"),), "close-up", "garden"),
    "holding a stick": Spec((Someone("holding", "left", thing="stick"),), "close-up", "garden"),
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_with_things_can_be_written(prompt):
    spec = PROMPTS[prompt]
    assert says(spec, prompt)
    one = spec.people[0]
    other = THINGS[(THINGS.index(one.thing) + 1) % len(THINGS)]
    assert not says(replace(spec, people=(replace(one, thing=other),)), prompt)
    assert not says(replace(spec, people=(replace(one, thing="", gesture="fist"),)), prompt)

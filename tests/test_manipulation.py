"""benchmark/suites/manipulation.py: the stock shapes are the untouched task, and the others change shapes alone."""

import copy
import csv
import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, ROWS, folder_in, load

sys.path[:0] = [str(ROOT / "benchmark" / "suites"), str(ROOT / "benchmark")]
import common
import manipulation
import pixels

STUDS = [f"stud_{row}{column}" for row in range(2) for column in range(4)]


@pytest.fixture(autouse=True, scope="module")
def renderer():
    """torch's compiler first, as in a run: after Mesa its import crashes."""
    importlib.import_module("torch._inductor")
    pixels.own_frames(str(ROOT / "algos" / "sac_sam_reset.py"))


def make(split, task="reach_duplo", seed=1, repeat=2, **frames):
    args = SimpleNamespace(env_id=task, seed=seed, num_envs=1, action_repeat=repeat)
    return pixels.make_envs(manipulation.SUITE, args, split, **frames)


def model_of(shape, task="reach_duplo"):
    """The compiled model of a task's first episode, as a copy; nothing is drawn."""
    env = manipulation.Jaco(task, manipulation.SHAPES[shape], seed=1)
    env.reset()
    model = copy.copy(env.env.physics.model.ptr)
    env.close()
    return model


@pytest.fixture(scope="module")
def stock():
    return model_of("shape_train")


def named(model, kind):
    """{name: number} of a model's geoms, meshes, ..."""
    return {getattr(model, kind)(number).name: number for number in range(getattr(model, f"n{kind}"))}


@pytest.mark.parametrize("task", [pytest.param("reach_duplo", marks=pytest.mark.slow), "reach_site"])
def test_the_stock_shapes_are_the_untouched_task(task):
    from dm_control import manipulation as untouched

    (seed,) = np.random.SeedSequence((1, 1, 0)).generate_state(1).tolist()
    plain = untouched.load(f"{task}_vision", seed=seed)
    low, high = plain.action_spec().minimum, plain.action_spec().maximum
    pictures = [plain.reset().observation["front_close"][0]] * 3
    envs, rng = make("shape_train", task), np.random.default_rng(0)
    assert envs.single_action_space.shape == (9,)
    obs, _ = envs.reset()
    for _ in range(2):
        assert np.array_equal(obs[0], np.concatenate(pictures[-3:], axis=2).transpose(2, 0, 1))
        actions = rng.uniform(-1, 1, (1, 9)).astype(np.float32)
        moments = [plain.step(low + (actions[0].astype(float) + 1) / 2 * (high - low)) for _ in range(2)]
        pictures.append(moments[1].observation["front_close"][0])
        obs, reward, *_ = envs.step(actions)
        assert reward[0] == pytest.approx(moments[0].reward + moments[1].reward, rel=1e-5, abs=0)
    assert np.array_equal(obs[0], np.concatenate(pictures[-3:], axis=2).transpose(2, 0, 1))
    envs.close()
    plain.close()


@pytest.mark.slow
def test_gray_frames_are_those_of_the_script_that_has_them():
    from dm_control import manipulation as untouched

    (seed,) = np.random.SeedSequence((1, 1, 0)).generate_state(1).tolist()
    plain = untouched.load("reach_site_features", seed=seed)
    own = load("sac_sam_reset").ControlEnvs([plain], 2, camera="front_close")
    ours = make("test", "reach_site", size=64, gray=True)
    assert ours.single_observation_space == own.single_observation_space
    assert ours.single_action_space == own.single_action_space
    assert np.array_equal(ours.reset()[0], own.reset()[0])
    for action in np.random.default_rng(0).uniform(-1, 1, (4, 1, 9)).astype(np.float32):
        for one, other in zip(ours.step(action)[:4], own.step(action)[:4], strict=True):
            assert np.array_equal(one, other)
    ours.close()
    own.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sac_sam_reset", "drqv2_pieg"])
def test_a_script_with_its_own_network_is_trained_and_tested(name, tmp_path):
    flags = [*ROWS[name]["flags"].split()[2:], "--runs-dir", str(tmp_path)]
    flags += ["--env-id", "reach-site", "--action-repeat", "25", "--total-timesteps", "27", "--eval-every", "0"]
    pixels.main(manipulation.SUITE, [name, *flags])
    folder = folder_in(tmp_path)
    pixels.main(manipulation.SUITE, ["test", str(folder), "--variants", "shape_large", "--episodes", "1"])
    (row,) = csv.DictReader((folder / "manipulation.csv").open())
    assert (row["step"], row["variant"], row["episodes"]) == ("27", "shape_large", "1")
    assert 0 <= float(row["return"]) <= 250


@pytest.mark.parametrize("name", ["sac_sam_reset", "drqv2_pieg"])
def test_a_script_gets_frames_of_the_kind_it_has(name):
    script = load(name)
    own = script.make_envs(script.Args(env_id="cartpole-swingup", action_repeat=2), "train")
    make_envs, _ = pixels.seams(manipulation.SUITE, common.load_script(script.__file__))
    ours = make_envs(script.Args(env_id="reach-site", action_repeat=2), "train")
    assert ours.single_observation_space == own.single_observation_space
    ours.close()
    own.close()


@pytest.mark.parametrize("shape", ["shape_small", "shape_large", "shape_long"])
def test_shapes_are_scaled_and_nothing_else_is(shape, stock):
    model = model_of(shape)
    arm, hand, brick = (np.broadcast_to(factor, 3) for factor in manipulation.SHAPES[shape])
    meshes = named(stock, "mesh")
    assert named(model, "mesh") == meshes and len(meshes) == 9
    for name, mesh in meshes.items():
        first, count = stock.mesh_vertadr[mesh], stock.mesh_vertnum[mesh]
        factor = hand if "jaco_hand" in name else arm
        vertices, before = model.mesh_vert[first : first + count], stock.mesh_vert[first : first + count]
        assert np.abs(vertices - before * factor).max() < 1e-6, name
    for name in ("body_pos", "body_quat", "jnt_range", "jnt_pos", "dof_armature", "actuator_ctrlrange"):
        assert np.array_equal(getattr(model, name), getattr(stock, name)), name
    assert np.array_equal(model.actuator_gainprm, stock.actuator_gainprm)
    bodies = named(stock, "body")
    links = [body for name, body in bodies.items() if name.startswith("jaco_arm")]
    assert len(links) > 9 and np.allclose(model.body_mass[links], stock.body_mass[links], rtol=1e-6)
    assert not np.allclose(model.body_inertia[links], stock.body_inertia[links], rtol=0.05)
    body = bodies["duplo2x4/"]
    assert model.body_mass[body] / stock.body_mass[body] == pytest.approx(brick.prod(), rel=0.1)  # but for the studs


@pytest.mark.parametrize("shape", ["shape_small", "shape_large", "shape_long"])
def test_the_whole_brick_is_scaled_but_its_studs_radius(shape, stock):
    model, factor = model_of(shape), np.broadcast_to(manipulation.SHAPES[shape][2], 3)
    geoms = {name: geom for name, geom in named(stock, "geom").items() if name.startswith("duplo2x4/")}
    assert len(geoms) == 41 and named(model, "geom") == named(stock, "geom")
    for name, geom in geoms.items():
        assert np.allclose(model.geom_pos[geom], stock.geom_pos[geom] * factor, rtol=1e-9), name
        size = stock.geom_size[geom] * factor  # [half lengths] of a box
        if any(part in name for part in ("stud", "tube")):
            size = stock.geom_size[geom] * factor[[0, 2, 2]]  # radius and half a height
        if name.removeprefix("duplo2x4/") in STUDS:
            size[0] = stock.geom_size[geom][0]
        assert np.allclose(model.geom_size[geom], size, rtol=1e-9), name
    for name, site in named(stock, "site").items():
        moved = factor if name.startswith("duplo2x4/") else 1
        scaled = factor if name == "duplo2x4/bounding_box" else 1
        assert np.allclose(model.site_pos[site], stock.site_pos[site] * moved, rtol=1e-9), name
        assert np.allclose(model.site_size[site], stock.site_size[site] * scaled, rtol=1e-9), name


def test_a_shape_stays_at_each_reset(stock):
    env = manipulation.Jaco("reach_duplo", manipulation.SHAPES["shape_large"], seed=1)
    for _ in range(3):
        env.reset()
        assert np.abs(env.env.physics.model.mesh_vert - 1.2 * stock.mesh_vert).max() < 1e-6
    env.close()


@pytest.mark.parametrize("task", ["reach_duplo", "reach_site"])
@pytest.mark.parametrize(
    "shape, begins",
    [((1.25, 1, 1), False), (((1.3, 1, 1.3), 1, 1), True), (((1.5, 1, 1.5), 1, 1), False), ((1.2, 1.5, 2), True)],
)
def test_how_far_a_shape_can_go(shape, begins, task):
    from dm_control.composer import EpisodeInitializationError

    env = manipulation.Jaco(task, shape, seed=1)
    env.env._max_reset_attempts = 2  # each with hundreds of poses
    if begins:
        env.reset()
    else:
        with pytest.raises(EpisodeInitializationError):
            env.reset()
    env.close()


def test_a_task_without_a_brick_is_deformed_too():
    model, plain = (model_of(shape, "reach_site") for shape in ("shape_large", "shape_train"))
    assert np.abs(model.mesh_vert - 1.2 * plain.mesh_vert).max() < 1e-6
    assert np.array_equal(model.site_size, plain.site_size)


def first(split, seed=1):
    """The first picture of an episode."""
    envs = make(split, seed=seed)
    obs, _ = envs.reset()
    envs.close()
    assert all(np.array_equal(obs[0, :3], obs[0, n : n + 3]) for n in (3, 6))
    return obs[0, :3]


def test_a_shape_is_seen_and_begins_where_test_does():
    test = first("test")
    assert np.array_equal(test, first("shape_train"))
    assert (test != first("shape_large")).any(0).mean() > 0.01, "share of the pixels"


@pytest.mark.slow
def test_the_first_picture_follows_from_the_seed_and_shows_the_shape():
    pictures = {name: first(name) for name in ("train", "test", *manipulation.SHAPES)}
    assert np.array_equal(pictures["test"], first("test"))
    assert np.array_equal(pictures["test"], pictures["shape_train"]), "a shape begins where test does"
    pictures = {name: picture for name, picture in pictures.items() if name != "test"} | {"seed": first("test", seed=2)}
    different = [(a != b).any(0).mean() for a in pictures.values() for b in pictures.values() if a is not b]
    assert min(different) > 0.01, "share of the pixels"


@pytest.mark.parametrize("steps, ended", [pytest.param(249, False, marks=pytest.mark.slow), (250, True)])
def test_an_episode_is_cut_after_250_control_steps(steps, ended):
    envs = make("shape_large", repeat=steps)
    envs.reset()
    _, _, terminated, truncated, _ = envs.step(np.zeros((1, 9), np.float32))
    assert (bool(terminated[0]), bool(truncated[0])) == (False, ended)
    envs.close()


def test_a_reset_whose_poses_all_fail_is_tried_again():
    from dm_control.composer import EpisodeInitializationError

    env = manipulation.Jaco("reach_site", manipulation.SHAPES["shape_train"], seed=1)
    task, failures = env.env.task, [9]
    begin = task.initialize_episode

    def fails_at_first(physics, random_state):
        if failures[0]:
            failures[0] -= 1
            raise EpisodeInitializationError("links touch")
        begin(physics, random_state)

    task.initialize_episode = fails_at_first
    env.reset()
    assert failures == [0]
    failures[0] = 10
    with pytest.raises(EpisodeInitializationError):
        env.reset()
    env.close()


@pytest.mark.parametrize(
    "split, task, said",
    [
        ("shape_huge", "reach_duplo", "no shape 'shape_huge', there are: shape_train shape_small"),
        ("train", "walker_walk", "--env-id walker_walk: no such task; there are reach-duplo reach-site"),
    ],
)
def test_what_is_not_there_is_one_line(split, task, said, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        make(split, task)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error

"""benchmark/suites/drawerworld.py: Meta-World's dynamics, another table, and 1 for an episode that succeeds."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

sys.path[:0] = [str(ROOT / "benchmark" / "suites"), str(ROOT / "benchmark")]
import drawerworld
import pixels

needs_metaworld = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None,
    reason="Meta-World is not installed: make drawerworld",
)


@pytest.fixture(autouse=True, scope="module")
def renderer():
    """torch's compiler first, as in a run: after Mesa its import crashes."""
    importlib.import_module("torch._inductor")
    pixels.own_frames(str(ROOT / "algos" / "sac_sam_reset.py"))


@pytest.fixture(autouse=True)
def blanket(tmp_path_factory, monkeypatch):
    """A woven picture of its own in place of the one that users fetch."""
    folder = tmp_path_factory.mktemp("textures")
    rows, columns = np.mgrid[:150, :150]
    weave = np.where((rows // 5 + columns // 5) % 2, 200, 90) + np.random.default_rng(0).integers(0, 40, (150, 150))
    colours = weave[..., None] * np.array([1.0, 0.6, 0.5])
    Image.fromarray(colours.astype(np.uint8)).save(folder / "blanket.png")
    monkeypatch.setenv("DRAWERWORLD_TEXTURES", str(folder))
    return folder / "blanket.png"


def make(split, task="drawer_close", seed=1, num_envs=1, repeat=2, **frames):
    args = SimpleNamespace(env_id=task, seed=seed, num_envs=num_envs, action_repeat=repeat)
    return pixels.make_envs(drawerworld.SUITE, args, split, **frames)


def first_picture(split, **about):
    envs = make(split, **about)
    obs, _ = envs.reset()
    envs.close()
    assert all(np.array_equal(obs[0, :3], obs[0, n : n + 3]) for n in (3, 6))
    return obs[0, :3]


# ---- The table ----
def scene_with(texture, folder):
    """Meta-World's drawer scene whose XML names another file, in a copy of its folder."""
    import mujoco

    (package,) = importlib.util.find_spec("metaworld").submodule_search_locations
    assets, copy = Path(package) / "assets", folder / "assets"
    copy.mkdir()
    (copy / "objects").symlink_to(assets / "objects")
    for part in ("scene", "sawyer_xyz", "textures"):
        shutil.copytree(assets / part, copy / part)
    if texture == "blanket":
        shutil.copy(Path(os.environ["DRAWERWORLD_TEXTURES"]) / "blanket.png", copy / "textures")
    scene = copy / "scene" / "basic_scene.xml"
    assert scene.read_text().count("wood2.png") == 1
    scene.write_text(scene.read_text().replace("wood2.png", f"{texture}.png"))
    return mujoco.MjModel.from_xml_path(str(copy / "sawyer_xyz" / "sawyer_drawer.xml"))


@needs_metaworld
@pytest.mark.parametrize(
    "texture", ["wood", *(pytest.param(name, marks=pytest.mark.slow) for name in ("metal", "marble", "blanket"))]
)
def test_a_table_is_that_of_a_scene_that_names_its_file(texture, tmp_path):
    import mujoco

    envs, model = make(texture), scene_with(texture, tmp_path)
    envs.reset()
    (drawer,) = envs.envs
    seen = drawer.frame().copy()
    model.body_pos[:] = drawer.env.model.body_pos  # where the drawer stands
    model.site_pos[:] = drawer.env.model.site_pos
    for name in ("tex_data", "geom_pos", "mesh_vert", "body_mass", "jnt_range", "actuator_gainprm"):
        assert np.array_equal(getattr(model, name), getattr(drawer.env.model, name)), name
    camera = mujoco.MjvCamera()
    camera.type, camera.lookat[:] = mujoco.mjtCamera.mjCAMERA_FREE, (0, 0.6, 0)
    camera.azimuth, camera.elevation, camera.distance = 180, -90, 0.96  # as in VAI's suite
    renderer = mujoco.Renderer(model, 84, 84)
    renderer.update_scene(drawer.env.data, camera)
    assert np.array_equal(renderer.render(), seen)
    renderer.close()
    envs.close()


def table_of(model):
    """The picture on the first face of the table's cube. -> [height, width, 3]."""
    table = model.tex("T_table")
    first, width = table.adr[0], table.width[0]
    return model.tex_data[first : first + width * width * 3].reshape(width, width, 3)


@needs_metaworld
def test_grid_is_the_checker_of_dm_control_s_floor_and_black_is_black():
    import mujoco

    donor = mujoco.MjModel.from_xml_string(
        '<mujoco><asset><texture name="T_table" type="2d" builtin="checker" rgb1=".1 .2 .3" rgb2=".2 .3 .4"'
        ' width="300" height="300" mark="edge" markrgb=".2 .3 .4"/></asset></mujoco>'
    )
    grid = table_of(drawerworld.sawyer("drawer-close", "grid").model)
    assert grid.shape == (300, 300, 3) and len(np.unique(grid.reshape(-1, 3), axis=0)) == 2
    assert np.array_equal(grid, table_of(donor))
    assert not table_of(drawerworld.sawyer("drawer-close", "black").model).any()


@needs_metaworld
@pytest.mark.slow
def test_a_texture_changes_the_table_and_nothing_else():
    import mujoco

    grid = make("grid", repeat=5)
    grid.reset()
    (drawer,) = grid.envs
    with mujoco.Renderer(drawer.env.model, 84, 84) as renderer:
        renderer.enable_segmentation_rendering()
        renderer.update_scene(drawer.env.data, drawer.camera)
        geoms = renderer.render()[..., 0]
    wood = np.flatnonzero(drawer.env.model.geom_matid == drawer.env.model.material("table_wood").id)
    table = np.isin(geoms, wood)  # [84, 84]
    assert 0.2 < table.mean() < 0.9
    inside, outside = (
        np.array([mask[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].all() for r, c in np.ndindex(84, 84)])
        for mask in (table, ~table)
    )  # away from edges, which are smoothed
    pictures = {name: first_picture(name).reshape(3, -1) for name in drawerworld.TEXTURES}
    for name, picture in pictures.items():
        for other in pictures.keys() - {name}:
            changed = (picture != pictures[other]).any(0)
            assert changed[inside].mean() > 0.9, (name, other)
            assert changed[outside].mean() < 0.02, "what shows through gaps between the meshes"
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 1, 4)).astype(np.float32)
    states = []
    for name in ("grid", "wood"):
        envs = make(name, repeat=5)
        envs.reset()
        envs.envs[0].training = True  # Meta-World's rewards
        outcome = [envs.step(action)[1:4] for action in actions]
        states.append((outcome, envs.envs[0].env.data.qpos.copy()))
        envs.close()
    assert np.array_equal(states[0][1], states[1][1]) and np.array_equal(*(state[0] for state in states))
    grid.close()


@needs_metaworld
def test_frames_of_another_size_in_gray():
    envs = make("wood", size=64, gray=True)
    obs, _ = envs.reset()
    assert obs.shape[1:] == envs.single_observation_space.shape == (3, 64, 64)
    gray = np.dot(envs.envs[0].frame(), [0.299, 0.587, 0.114]).astype(np.uint8)
    assert np.array_equal(obs[0], [gray] * 3)
    envs.close()


# ---- Meta-World on this MuJoCo ----
@needs_metaworld
def test_it_is_the_pinned_one():
    pin = f"metaworld=={importlib.metadata.version('metaworld')}"
    assert pin in (ROOT / "benchmark" / "suites" / "requirements-drawerworld.txt").read_text().splitlines()


@needs_metaworld
def test_a_weld_has_a_number_that_meta_world_has_no_room_for():
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    with pytest.raises(ValueError, match=r"from shape \(11,\) into shape \(12,\)"):
        ALL_V3_ENVIRONMENTS["drawer-close-v3"]()
    env = drawerworld.sawyer("drawer-close", "grid")
    before = mujoco.MjModel.from_xml_path(env.fullpath)
    welds = before.eq_type == mujoco.mjtEq.mjEQ_WELD
    assert welds.any() and np.array_equal(env.model.eq_data[~welds], before.eq_data[~welds])
    assert (env.model.eq_data[welds, :11] == (0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5)).all()
    assert np.array_equal(env.model.eq_data[welds, 11:], before.eq_data[welds, 11:])


# ---- Episodes ----
class Blind(drawerworld.Drawer if importlib.util.find_spec("metaworld") else object):
    """A drawer that draws nothing, where only its dynamics count."""

    def frame(self):
        return np.zeros((self.size, self.size, 3), np.uint8)


@pytest.fixture
def blind(monkeypatch):
    monkeypatch.setattr(drawerworld, "Drawer", Blind)


def policy_of(task):
    """Meta-World's own policy, which reads the state."""
    from metaworld import policies

    return policies.SawyerDrawerCloseV3Policy() if task == "drawer_close" else policies.SawyerDrawerOpenV3Policy()


@needs_metaworld
@pytest.mark.parametrize("task", ["drawer_close", "drawer_open"])
@pytest.mark.parametrize("split", ["train", "wood"])
def test_meta_world_s_own_policy_succeeds(task, split, blind):
    policy = policy_of(task)
    envs = make(split, task, repeat=1)
    envs.reset()
    (drawer,) = envs.envs
    for _ in range(4):  # episodes
        rewards, steps, done = [], 0, False
        while not done:
            action = np.clip(policy.get_action(drawer.env._get_obs()), -1, 1).astype(np.float32)
            _, reward, terminated, truncated, _ = envs.step(action[None])
            rewards.append(float(reward[0]))
            done = terminated[0] or truncated[0]
            steps += 1
        if split == "train":  # no success cuts it short, and it ends as one
            assert steps == 200 and truncated[0] and not terminated[0] and 8 < rewards[-1] <= 10
        else:
            assert steps < 200 and terminated[0] and not truncated[0]
            assert rewards == [0.0] * (steps - 1) + [1.0]
    envs.close()


@needs_metaworld
@pytest.mark.parametrize("task, bound", [("drawer_close", 0.065), ("drawer_open", 0.03)])
def test_success_is_a_handle_that_is_near_its_place(task, bound, blind):
    drawer, distances, terminated = Blind(task.replace("_", "-"), "grid", 1, training=False), [], False
    drawer.reset()
    policy = policy_of(task)
    while not terminated:
        action = np.clip(policy.get_action(drawer.env._get_obs()), -1, 1)
        _, terminated, _ = drawer.step(action)
        distances.append(np.linalg.norm(drawer.env._get_pos_objects() - drawer.env._target_pos))
    assert min(distances[:-1]) > bound >= distances[-1]
    drawer.close()


@needs_metaworld
@pytest.mark.parametrize("split", ["train", "grid"])
def test_standing_still_is_no_success_and_is_cut_after_200_control_steps(split, blind):
    envs = make(split)
    envs.reset()
    outcomes = [envs.step(np.zeros((1, 4), np.float32))[1:4] for _ in range(100)]
    rewards, terminated, truncated = (np.array(part)[:, 0] for part in zip(*outcomes, strict=True))
    assert not terminated.any() and truncated.tolist() == [False] * 99 + [True] and not rewards.any()
    envs.close()


@needs_metaworld
def test_training_has_meta_world_s_rewards(blind):
    envs, twin = make("train", "drawer_open"), make("train", "drawer_open").envs[0].env
    envs.reset()
    twin.reset()
    for action in np.random.default_rng(0).uniform(-1, 1, (5, 1, 4)).astype(np.float32):
        _, reward, *_ = envs.step(action)
        expected = sum(twin.step(action[0].astype(float))[1] for _ in range(2))
        assert reward[0] == pytest.approx(expected) and reward[0] > 0
    envs.close()


@needs_metaworld
@pytest.mark.slow
def test_the_drawer_stands_elsewhere_each_episode_and_the_seed_says_where(blind):
    def places(split, **about):
        envs, found = make(split, **about), []
        for _ in range(3):
            envs.reset()
            found += [drawer.env.model.body("drawer").pos.tolist() for drawer in envs.envs]
        envs.close()
        return found

    test = places("test", num_envs=2)
    assert len({tuple(place) for place in test}) == 6
    assert all(abs(x) <= 0.1 and (y, z) == (0.9, 0) for x, y, z in test)
    assert places("wood", num_envs=2) == places("blanket", num_envs=2) == test
    assert places("train") != places("test") and places("test", seed=2) != places("test")


@needs_metaworld
@pytest.mark.parametrize("task", ["drawer_close", pytest.param("drawer_open", marks=pytest.mark.slow)])
def test_the_first_picture_follows_from_the_seed(task):
    picture = first_picture("test", task=task)
    assert np.array_equal(picture, first_picture("grid", task=task))
    assert (picture != first_picture("test", task=task, seed=2)).any() and picture.std() > 10


@needs_metaworld
@pytest.mark.slow
def test_environments_beside_each_other_draw_their_own():
    together, alone = make("grid"), first_picture("wood")
    together.reset()
    beside = make("wood")
    beside.reset()
    shown = [envs.step(np.zeros((1, 4), np.float32))[0][0, -3:] for envs in (together, beside, together)]
    assert np.array_equal(beside.obs[0, :3], alone) and (shown[0] != shown[1]).mean() > 0.2
    assert np.abs(shown[0].astype(int) - shown[2]).mean() < 5
    together.close()
    assert np.array_equal(beside.reset()[0].shape, (1, 9, 84, 84))
    beside.close()


# ---- What is missing ----
def one_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_without_meta_world_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(drawerworld.importlib.util, "find_spec", lambda _: None)
    for call in (lambda: make("train"), lambda: pixels.main(drawerworld.SUITE, ["sac_sam_reset"])):
        with pytest.raises(SystemExit, match=r"^2$"):
            call()
        assert "Meta-World: pip install --no-deps -r benchmark/suites/requirements-drawerworld.txt" in one_line(capsys)


@pytest.mark.parametrize("name", ["blanket", "fabric", "tartan"])
def test_a_texture_that_is_not_there_is_named_with_its_folder(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drawerworld.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setenv("DRAWERWORLD_TEXTURES", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^2$"):
        drawerworld.check(["grid", name])
    error = one_line(capsys)
    assert f"{tmp_path / name}.png is not there" in error and "sparse-checkout set src/env/drawerworld" in error


def test_a_texture_that_is_no_picture_is_named(blanket, monkeypatch, capsys):
    monkeypatch.setattr(drawerworld.importlib.util, "find_spec", lambda _: object())
    drawerworld.check(["blanket", "black"])
    blanket.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(SystemExit, match=r"^2$"):
        drawerworld.check(["blanket"])
    assert "blanket.png is no PNG picture; a pointer of git-lfs" in one_line(capsys)


@pytest.mark.parametrize(
    "target, broken, code, warned",
    [
        ("drawerworld", "pip", 2, False),
        ("drawerworld", "nothing", 0, False),
        ("test-all", "pip", 0, True),
        ("test-all", "pytest", 2, False),
        ("test-all", "nothing", 0, False),
    ],
)
def test_make_test_stops_where_anything_fails_but_getting_meta_world(target, broken, code, warned, tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("python", "ruff"):  # they do nothing, and one of them fails
        (tmp_path / ".venv" / "bin" / name).write_text(f'#!/bin/sh\ntest "$2" != {broken}\n')
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    (tmp_path / ".venv" / "installed").touch()
    done = subprocess.run(["make", "MISSING=", "SLURM=true", target], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("the tests of benchmark/suites/drawerworld.py are skipped" in done.stderr) == warned

"""DrawerWorld: a Sawyer arm learns to move a drawer on a plain table and is tested on wood, metal and a blanket.

Paper: PIE-G, table 2; VAI, arXiv:2104.02921, whose suite it is. Deviations: Meta-World's version 3 (theirs: 1), so
drawer, arm, rewards and the bounds of success are others; frames of 84 pixels, the right way up; where the drawer
stands is drawn anew each episode, not from fifty places. "success" is the share of episodes that met Meta-World's
bound at some step, of 200. To be reported as "DrawerWorld-style".

    make drawerworld    # or pip install --no-deps -r benchmark/requirements-drawerworld.txt: Meta-World
    python benchmark/drawerworld.py drqv2_pieg                             # trains on drawer_close, the plain table
    python benchmark/drawerworld.py drqv2_pieg --env-id drawer_open --seed 2            # any flag of the script
    python benchmark/drawerworld.py drqv2_pieg --resume runs/<folder>
    python benchmark/drawerworld.py test runs/<folder> --variants grid wood metal       # 100 episodes of each
    DRAWERWORLD_TEXTURES=<folder> python benchmark/drawerworld.py test runs/<folder>    # blanket.png too
    python benchmark/drawerworld.py look textures.png --variants grid wood metal        # what it sees

wood, metal and marble come with Meta-World, grid and black are made here; any other name is a .png file of that folder.
"""

import importlib.util
import os
import sys
from pathlib import Path

import suites

TASKS = {"drawer": "close open"}
VARIANTS = ("grid", "wood", "metal", "blanket")
SCORE = "success"
SHIPPED = ("wood", "metal", "marble")  # the same files as VAI's. Easy to miss: assets/scene/textures has others
VAI = "src/env/drawerworld/metaworld/envs/assets_v1/textures"
GET = "git clone --depth 1 --filter=blob:none --sparse https://github.com/TonyLianLong/VAI-ReinforcementLearning vai"
GET += f" && git -C vai sparse-checkout set {VAI} && export DRAWERWORLD_TEXTURES=vai/{VAI}"


def make_envs(args, split, restart=0, size=84, gray=False):
    """args.num_envs copies of the task, as suites.Stacks, drawn by (args.seed, whether it is training, restart).

    split: "train" and "test" have the plain table, "wood" and the others their own, with the seeds of "test". In
    training rewards are Meta-World's; otherwise success ends an episode with a reward of 1, and all others are 0.
    """
    task, texture = suites.task_of(args, sys.modules[__name__]), "grid" if split in ("train", "test") else split
    check([texture])
    seeds = suites.seeds_of(args, split, restart)
    drawers = [Drawer(task, texture, seed, split != "train", size) for seed in seeds]
    return suites.Stacks(drawers, args.action_repeat, gray)


class Drawer:
    """One drawer task on some table, for suites.Stacks. An episode takes 200 control steps, or fewer if `tested`."""

    def __init__(self, task, texture, seed, tested, size=84):
        import mujoco

        self.env, self.tested, self.size = sawyer(task, texture), tested, size
        self.env._set_task_called = True  # a task of Meta-World is but a place, which is drawn at each reset here
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True
        self.env.seed(seed)
        self.renderer, self.camera = mujoco.Renderer(self.env.model, size, size), mujoco.MjvCamera()
        self.camera.azimuth, self.camera.elevation, self.camera.distance = 180, -90, 0.96  # Reference code: from above
        self.camera.lookat[:] = 0, 0.6, 0
        self.low, self.high = self.env.action_space.low, self.env.action_space.high

    def reset(self):
        self.env.reset()
        self.steps = 0

    def step(self, action):
        _, reward, _, _, info = self.env.step(action)
        self.steps += 1
        done = self.tested and info["success"] > 0
        return float(done) if self.tested else float(reward), done, self.steps == 200 and not done

    def frame(self):
        self.renderer.update_scene(self.env.data, self.camera)
        return self.renderer.render()

    def close(self):
        self.renderer.close()
        self.env.close()


def sawyer(task, texture):
    """Meta-World's environment of a task, compiled with another table."""
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    class Sawyer(ALL_V3_ENVIRONMENTS[f"{task.replace('_', '-')}-v3"]):
        def _initialize_simulation(self):
            spec = mujoco.MjSpec.from_file(self.fullpath)
            paint(spec.texture("T_table"), texture)
            model = spec.compile()
            return model, mujoco.MjData(model)

        def reset_mocap_welds(self):
            """Easy to miss: here a weld has a twelfth number, which theirs leaves no room for; it stays."""
            welds = self.model.eq_type == mujoco.mjtEq.mjEQ_WELD
            self.model.eq_data[welds, :11] = 0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5

    return Sawyer()


def paint(table, texture):
    """Gives the table's texture another picture, on each of its cube's faces."""
    import mujoco

    if texture not in ("grid", "black"):
        table.file = str(picture_of(texture).absolute())
        return
    table.file, table.width, table.height = "", 300, 300
    table.builtin = mujoco.mjtBuiltin.mjBUILTIN_CHECKER if texture == "grid" else mujoco.mjtBuiltin.mjBUILTIN_FLAT
    table.rgb1, table.rgb2 = ((0.1, 0.2, 0.3), (0.2, 0.3, 0.4)) if texture == "grid" else ((0, 0, 0), (0, 0, 0))
    if texture == "grid":
        table.mark, table.markrgb = mujoco.mjtMark.mjMARK_EDGE, (0.2, 0.3, 0.4)


def picture_of(texture):
    """The .png file of a texture."""
    if texture in SHIPPED:
        (package,) = importlib.util.find_spec("metaworld").submodule_search_locations
        return Path(package) / "assets" / "textures" / f"{texture}.png"
    return Path(os.environ.get("DRAWERWORLD_TEXTURES", ".")) / f"{texture}.png"


def check(variants):
    if importlib.util.find_spec("metaworld") is None:
        suites.fail("DrawerWorld needs Meta-World: pip install --no-deps -r benchmark/requirements-drawerworld.txt")
    for path in (picture_of(name) for name in variants if name not in ("grid", "black")):
        if not path.is_file():
            suites.fail(f"{path} is not there; blanket and fabric are had by: {GET}")
        if path.read_bytes()[:4] != b"\x89PNG":
            suites.fail(f"{path} is no PNG picture; a pointer of git-lfs, perhaps, or a download cut short")


if __name__ == "__main__":
    suites.main(sys.modules[__name__], sys.argv[1:])

"""DrawerWorld: a Sawyer arm learns to move a drawer on a plain table, and is tested on other tables.

Paper: PIE-G, table 2; VAI, arXiv:2104.02921, whose suite it is. Deviations: Meta-World's version 3, theirs is
1, so drawer, arm, rewards and the bounds of success differ; frames of 84 pixels, the right way up; each
episode draws a new place for the drawer, not one of fifty. "success": the share of episodes that met
Meta-World's bound at one of 200 steps. To be reported as "DrawerWorld-style".

    make drawerworld                  # Meta-World, from benchmark/suites/requirements-drawerworld.txt
    python benchmark/suites/drawerworld.py drqv2_pieg                # trains on drawer-close, plain table
    python benchmark/suites/drawerworld.py drqv2_pieg --env-id drawer-open --seed 2    # the script's flags
    python benchmark/suites/drawerworld.py algos/mine.py      # your copy of drqv2_pieg or sac_sam_reset
    python benchmark/suites/drawerworld.py drqv2_pieg --resume runs/<folder>
    python benchmark/suites/drawerworld.py test runs/<folder> --variants grid wood metal  # 100 episodes each
    DRAWERWORLD_TEXTURES=<folder> python benchmark/suites/drawerworld.py test runs/<folder>   # blanket too
    python benchmark/suites/drawerworld.py look textures.png --variants grid wood metal   # what it sees

wood, metal and marble come with Meta-World, grid and black are made here; any other name is a .png file of
that folder.
"""

import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import pixels

TEXTURES = ("grid", "wood", "metal", "blanket")  # the first is trained on
SHIPPED = (
    "wood",
    "metal",
    "marble",
)  # with Meta-World in assets/textures, the same files as VAI's; assets/scene/textures has others
VAI = "src/env/drawerworld/metaworld/envs/assets_v1/textures"
GET = "git clone --depth 1 --filter=blob:none --sparse https://github.com/TonyLianLong/VAI-ReinforcementLearning vai"
GET += f" && git -C vai sparse-checkout set {VAI} && export DRAWERWORLD_TEXTURES=vai/{VAI}"


class Drawer:
    """One drawer task on some table, for pixels.Stacks. An episode takes 200 control steps.

    In training the rewards are Meta-World's. Else success ends the episode with a reward of 1, and all
    other rewards are 0.
    """

    def __init__(self, task, texture, seed, training, size=84):
        import mujoco

        self.env, self.training, self.size = sawyer(task, texture), training, size
        self.env._set_task_called = True  # Meta-World's "task" is a place, and here each reset draws one
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True
        self.env.seed(seed)
        self.renderer, self.camera = mujoco.Renderer(self.env.model, size, size), mujoco.MjvCamera()
        # Reference code: from above.
        self.camera.azimuth, self.camera.elevation, self.camera.distance = 180, -90, 0.96
        self.camera.lookat[:] = 0, 0.6, 0
        self.low, self.high = self.env.action_space.low, self.env.action_space.high

    def reset(self):
        self.env.reset()
        self.steps = 0

    def step(self, action):
        _, reward, _, _, info = self.env.step(action)
        self.steps += 1
        if self.training:
            return float(reward), False, self.steps == 200
        done = info["success"] > 0
        return float(done), done, self.steps == 200 and not done

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

    class Sawyer(ALL_V3_ENVIRONMENTS[f"{task}-v3"]):
        def _initialize_simulation(self):
            spec = mujoco.MjSpec.from_file(self.fullpath)
            paint(spec.texture("T_table"), texture)
            model = spec.compile()
            return model, mujoco.MjData(model)

        def reset_mocap_welds(self):
            """As Meta-World's, for a MuJoCo whose welds have a twelfth number, which stays as it is."""
            welds = self.model.eq_type == mujoco.mjtEq.mjEQ_WELD
            self.model.eq_data[welds, :11] = 0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5

    return Sawyer()


def paint(table, texture):
    """Gives the table's texture another picture, on each face of its cube."""
    import mujoco

    if texture not in ("grid", "black"):
        table.file = str(picture_of(texture).absolute())
        return
    table.file, table.width, table.height = "", 300, 300
    if texture == "black":
        table.builtin = mujoco.mjtBuiltin.mjBUILTIN_FLAT
        table.rgb1, table.rgb2 = (0, 0, 0), (0, 0, 0)
        return
    table.builtin, table.mark = mujoco.mjtBuiltin.mjBUILTIN_CHECKER, mujoco.mjtMark.mjMARK_EDGE
    table.rgb1, table.rgb2, table.markrgb = (0.1, 0.2, 0.3), (0.2, 0.3, 0.4), (0.2, 0.3, 0.4)


def picture_of(texture):
    """The .png file of a texture."""
    if texture in SHIPPED:
        (package,) = importlib.util.find_spec("metaworld").submodule_search_locations
        return Path(package) / "assets" / "textures" / f"{texture}.png"
    return Path(os.environ.get("DRAWERWORLD_TEXTURES", ".")) / f"{texture}.png"


def make(task, variant, seed, size, training):
    return Drawer(task, variant, seed, training, size)


def check(variants):
    if importlib.util.find_spec("metaworld") is None:
        requirements = "benchmark/suites/requirements-drawerworld.txt"
        common.fail(f"DrawerWorld needs Meta-World: pip install --no-deps -r {requirements}")
    for name in variants:
        if name in ("grid", "black"):
            continue
        path = picture_of(name)
        if not path.is_file():
            common.fail(f"{path} is not there; get blanket and fabric by: {GET}")
        if path.read_bytes()[:4] != b"\x89PNG":
            common.fail(f"{path} is no PNG picture; a pointer of git-lfs, perhaps, or a download cut short")


TASKS = ("drawer-close", "drawer-open")
SUITE = pixels.Suite("drawerworld", __doc__, TASKS, TEXTURES, "success", make, check)


def seams(script, about):
    """What common.load_run gives a run of this suite: make_envs, make_agent."""
    return pixels.seams(SUITE, script)


if __name__ == "__main__":
    common.run(pixels.main, SUITE, sys.argv[1:])

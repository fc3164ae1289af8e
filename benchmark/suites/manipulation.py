"""Deformed shapes: a Jaco arm learns to reach, and is tested with arm, hand and brick of other shapes.

Paper: PIE-G, figures 3 and 4a, on dm_control's manipulation tasks. Deviation: the paper shows what was
deformed but not by how much, so SHAPES is ours. "return": the sum of rewards over 250 control steps.

    python benchmark/suites/manipulation.py drqv2_pieg                # trains on reach-duplo, stock shapes
    python benchmark/suites/manipulation.py drqv2_pieg --env-id reach-site --seed 2    # the script's flags
    python benchmark/suites/manipulation.py algos/mine.py      # your copy of drqv2_pieg or sac_sam_reset
    python benchmark/suites/manipulation.py drqv2_pieg --resume runs/<folder>
    python benchmark/suites/manipulation.py test runs/<folder>        # 100 episodes of each shape
    python benchmark/suites/manipulation.py test runs/<folder> --variants shape_train shape_large
    python benchmark/suites/manipulation.py look shapes.png           # what it sees
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import pixels

# Factors of the meshes of arm and hand and of the brick, for each axis or all.
# An arm of 1.25 or more touches itself in every pose, and no episode can begin.
SHAPES = {
    "shape_train": (1, 1, 1),
    "shape_small": (0.8, 0.8, 0.75),
    "shape_large": (1.2, 1.2, 1.5),
    "shape_long": (1.2, 1.3, (1, 1, 2)),
}


class Jaco:
    """One task with some shape, for pixels.Stacks. An episode takes 250 control steps of 0.04 s."""

    def __init__(self, task, shape, seed, size=84):
        from dm_control import manipulation

        self.size = size
        self.env = manipulation.load(f"{task}_features", seed=seed)  # draws no pictures by itself
        self.env._max_reset_attempts = 10  # instead of 1: a long run meets poses whose links touch
        deform(self.env.task, *shape)
        self.low, self.high = self.env.action_spec().minimum, self.env.action_spec().maximum

    def reset(self):
        self.env.reset()

    def step(self, action):
        moment = self.env.step(action)
        failed = moment.last() and moment.discount == 0
        return moment.reward, failed, moment.last() and not failed

    def frame(self):
        """A copy: the renderer's own array is upside down, and the next picture overwrites it."""
        picture = self.env.physics.render(self.size, self.size, camera_id="front_close")
        return np.ascontiguousarray(picture)

    def close(self):
        self.env.close()


def deform(task, arm, hand, brick):
    """Scales the meshes of a task's arm and hand and its brick, if it has one, before a reset compiles them.

    Joints, the links' offsets and what the actuators do stay as they are; a brick's mass follows its
    volume. Each reset draws the radius of the brick's studs anew, so the studs keep it.
    """
    for part, factor in ((task.arm, arm), (task.hand, hand)):
        # The hand is attached to the arm, and must not be scaled twice.
        for mesh in part.mjcf_model.find_all("mesh", exclude_attachments=True):
            mesh.scale = np.broadcast_to(factor, 3)
    if task._prop is None:
        return
    model, factor = task._prop.mjcf_model, np.broadcast_to(np.asarray(brick, float), 3)
    for geom in model.find_all("geom"):
        scale(geom, factor, "pos", "size")
    for default in model.find_all("default"):
        scale(default.geom, factor, "pos", "size")
    for site in model.find_all("site"):
        if site.name == "bounding_box":
            scale(site, factor, "pos", "size")
        elif site.name != "target_site":  # it says how near is near enough
            scale(site, factor, "pos")


def scale(element, factor, *names):
    """Multiplies attributes of an element by each axis' factor. A cylinder has a radius and half a height."""
    for name in names:
        value = getattr(element, name)
        if value is not None:
            axes = [0, 2] if len(value) == 2 else range(len(value))
            setattr(element, name, value * factor[list(axes)])


def make(task, variant, seed, size, training):
    return Jaco(task.replace("-", "_"), SHAPES[variant], seed, size)


def check(variants):
    for name in variants:
        if name not in SHAPES:
            common.fail(f"no shape {name!r}, there are: {' '.join(SHAPES)}")


TASKS = ("reach-duplo", "reach-site")
SUITE = pixels.Suite("manipulation", __doc__, TASKS, tuple(SHAPES), "return", make, check)


def seams(script, about):
    """What common.load_run gives a run of this suite: make_envs, make_agent."""
    return pixels.seams(SUITE, script)


if __name__ == "__main__":
    common.run(pixels.main, SUITE, sys.argv[1:])

"""Deformed shapes: a Jaco arm learns to reach, and is tested with an arm, a hand and a brick of other shapes.

Paper: PIE-G, figures 3 and 4a, on dm_control's manipulation tasks. Deviation: the paper shows what was deformed but
not by how much, so SHAPES is ours. "return" is the sum of rewards over 250 control steps.

    python benchmark/manipulation.py drqv2_pieg                            # trains on reach_duplo, the stock shapes
    python benchmark/manipulation.py drqv2_pieg --env-id reach_site --seed 2            # any flag of the script
    python benchmark/manipulation.py drqv2_pieg --resume runs/<folder>
    python benchmark/manipulation.py test runs/<folder>                    # 100 episodes of each shape
    python benchmark/manipulation.py test runs/<folder> --variants shape_train shape_large --episodes 10
    python benchmark/manipulation.py look shapes.png                       # what it sees
"""

import sys

import numpy as np
import suites

TASKS = {"reach": "duplo site"}
# Factors of the meshes of arm and hand and of the brick, for each axis or all. Easy to miss: an arm of 1.25 or more
# touches itself in every pose, and no episode can begin.
SHAPES = {
    "shape_train": (1, 1, 1),
    "shape_small": (0.8, 0.8, 0.75),
    "shape_large": (1.2, 1.2, 1.5),
    "shape_long": (1.2, 1.3, (1, 1, 2)),
}
VARIANTS = tuple(SHAPES)
SCORE = "return"


def make_envs(args, split, restart=0, size=84, gray=False):
    """args.num_envs copies of the task, as suites.Stacks, drawn by (args.seed, whether it is training, restart).

    split: "train" and "test" have the stock shapes, "shape_large" and the others their own, with the seeds of "test".
    """
    task, name = suites.task_of(args, sys.modules[__name__]), "shape_train" if split in ("train", "test") else split
    check([name])
    seeds = suites.seeds_of(args, split, restart)
    return suites.Stacks([Jaco(task, SHAPES[name], seed, size) for seed in seeds], args.action_repeat, gray)


class Jaco:
    """One manipulation task with some shape, for suites.Stacks. An episode takes 250 control steps of 0.04 s."""

    def __init__(self, task, shape, seed, size=84):
        from dm_control import manipulation

        self.size = size
        self.env = manipulation.load(f"{task}_features", seed=seed)  # its pictures are drawn below, once a stack
        self.env._max_reset_attempts = 10  # of 1: a long run meets poses whose links touch
        deform(self.env.task, *shape)
        self.low, self.high = self.env.action_spec().minimum, self.env.action_spec().maximum

    def reset(self):
        self.env.reset()

    def step(self, action):
        moment = self.env.step(action)
        return moment.reward, moment.last() and moment.discount == 0, moment.last() and moment.discount != 0

    def frame(self):
        """Easy to miss: the renderer's own array is upside down and changes with the next picture."""
        return np.ascontiguousarray(self.env.physics.render(self.size, self.size, camera_id="front_close"))

    def close(self):
        self.env.close()


def deform(task, arm, hand, brick):
    """Scales the meshes of a task's arm and hand and its brick, if it has one; the model is compiled at each reset.

    Joints, the links' offsets and what the actuators do stay as they are; a brick's mass follows its volume. Easy to
    miss: each reset draws the radius of the brick's studs anew, so they keep it.
    """
    for part, factor in ((task.arm, arm), (task.hand, hand)):
        for mesh in part.mjcf_model.find_all("mesh", exclude_attachments=True):  # or the hand is scaled twice
            mesh.scale = np.broadcast_to(factor, 3)
    if task._prop:
        model, factor = task._prop.mjcf_model, np.broadcast_to(np.asarray(brick, float), 3)
        for geom in (*model.find_all("geom"), *(default.geom for default in model.find_all("default"))):
            scale(geom, factor, "pos", "size")
        for site in model.find_all("site"):
            if site.name != "target_site":  # how near is near enough
                scale(site, factor, "pos", *(["size"] if site.name == "bounding_box" else []))


def scale(element, factor, *names):
    """Multiplies what an element of a model says of itself. A cylinder's two sizes are its radius and its height."""
    for name in names:
        if (value := getattr(element, name)) is not None:
            setattr(element, name, value * factor[[0, 2] if len(value) == 2 else slice(len(value))])


def check(variants):
    for name in variants:
        if name not in SHAPES:
            suites.fail(f"no shape {name!r}, there are: {' '.join(SHAPES)}")


if __name__ == "__main__":
    suites.main(sys.modules[__name__], sys.argv[1:])

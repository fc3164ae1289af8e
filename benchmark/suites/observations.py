"""Wrappers of ablations.py, which change what an agent sees of Procgen, uint8 [N, 3, 64, 64].

Paper: Lee et al. 2020, Network Randomization, which compares with these. Reference code: its repository.
"""

import numpy as np


def make_envs(script, wrapper, args, split, start=None):
    """The script's environments, wrapped.

    Only training says at which step it starts, so only training is augmented; evaluation is not, but for
    what is to be seen everywhere.
    """
    if start is not None:
        return wrapper(script.make_envs(args, split, start), args, start)
    envs = script.make_envs(args, split)
    return wrapper(envs, args, 0) if wrapper.everywhere else envs


class Wrapper:
    """Environments that show `change(obs)`, with the velocity box as it was where one is painted."""

    everywhere = False  # also where an agent is evaluated

    def __init__(self, envs, args, start):
        self.envs, self.args, self.boxed = envs, args, args.plain_look or args.paint_vel_info
        # 20200: apart from the environments' own streams.
        self.rng = np.random.default_rng((args.seed, start, 20200))

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def reset(self):
        obs, info = self.envs.reset()
        return self.show(obs), info

    def step(self, actions):
        obs, *outcome = self.envs.step(actions)
        return self.show(obs), *outcome

    def show(self, obs):
        shown = self.change(obs)
        if self.boxed:
            shown[:, :, :13, :26] = obs[:, :, :13, :26]
        return shown


class Gray(Wrapper):
    """Grayscale observations, in evaluation too.

    Reference code: coinrunenv.py:218, the channels' mean, rounded down. Deviation: three equal channels, not
    one, so that the network stays as it is.
    """

    everywhere = True

    def change(self, obs):
        gray = obs.sum(1, keepdims=True, dtype=np.uint16) // 3
        return np.repeat(gray, 3, axis=1).astype(np.uint8)


class Cutout(Wrapper):
    """Up to five rectangles of random colour over each frame.

    Reference code: coinrun.cpp:1647-1669, drawn anew for each frame. Deviation: edges on whole pixels, theirs
    are smoothed.
    """

    def change(self, obs):
        obs, size = obs.copy(), (len(obs), 5)
        counts = self.rng.integers(0, 6, len(obs))
        starts = 64 * self.rng.random((*size, 2))  # anywhere; what reaches over the frame's edge is cut off
        ends = starts + 64 * (0.1 + 0.25 * self.rng.random((*size, 2)))
        corners = np.rint(np.concatenate([starts, ends], axis=2)).astype(int)
        colours = self.rng.integers(0, 255, (*size, 3, 1, 1), dtype=np.uint8)  # theirs never reach 255
        for n, k in np.argwhere(np.arange(5) < counts[:, None]):
            top, left, bottom, right = corners[n, k]
            obs[n, :, top:bottom, left:right] = colours[n, k]
        return obs


class Inversion(Wrapper):
    """Each environment's colours are inverted, or not, with equal chances, for as long as it lives.

    Reference code: coinrunenv.py:164, 224-237. Deviation: drawn again where exact checkpoints begin new
    environments.
    """

    def __init__(self, envs, args, start):
        super().__init__(envs, args, start)
        self.inverted = self.rng.random(args.num_envs) < 0.5

    def change(self, obs):
        return np.where(self.inverted[:, None, None, None], 255 - obs, obs)


class Jitter(Wrapper):
    """Brightness, contrast and saturation drawn anew each iteration.

    Reference code: policies.py:150-188, ppo2.py:309. One draw for all environments and the T steps of an
    iteration. Their brightness moves by half a grey level of 255 at most, which is next to nothing.
    Deviations: rounded to uint8; the observation after the last step, with which the next iteration begins,
    has that iteration's colours for the bootstrapped value too.
    """

    steps = 0

    def change(self, obs):
        if self.steps % self.args.num_steps == 0:
            self.drawn = self.rng.uniform((-0.5, 0.5, 0.5), (0.5, 1.5, 1.5)).astype(np.float32)
        self.steps += 1
        return jitter(obs, *self.drawn, self.boxed)


def jitter(obs, brightness, contrast, saturation, boxed):
    """uint8 [N, 3, H, W] -> the same. Contrast is about each channel's mean, where the box counts as black."""
    x = (obs.astype(np.float32) + brightness).clip(0, 255)
    x[:, :, :13, :26] *= not boxed
    mean = x.mean((2, 3), keepdims=True)
    x = ((x - mean) * contrast + mean).clip(0, 255)
    value = x.max(1, keepdims=True)  # of HSV, which stays, like the hue; the saturation is at most 1
    purest = value / (value - x.min(1, keepdims=True)).clip(1e-6)
    return np.rint(value - (value - x) * np.minimum(saturation, purest)).astype(np.uint8)

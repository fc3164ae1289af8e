"""A script with one thing changed from outside, through train's two factories: the baselines that papers compare with.

    python benchmark/ablations.py                                             # what there is
    python benchmark/ablations.py ppo_netrand cutout --plain-look --seed 2    # script, ablation, the script's flags
    python benchmark/ablations.py ppo_netrand cutout --plain-look --netrand   # the paper's method on top
    python benchmark/ablations.py ppo_netrand cutout --plain-look --seed 2 --resume runs/<folder>

Resume and evaluate with the same command too: the script alone knows nothing of the ablation, the run's name tells it.
"""

import importlib.util
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn


# ---- Observations of Procgen, uint8 [N, 3, 64, 64] ----
class Wrapper:
    """Environments that show `change(obs)`, with the velocity box as it was where one is painted."""

    everywhere = False  # also where an agent is evaluated

    def __init__(self, envs, args, restart):
        self.envs, self.args, self.boxed = envs, args, args.plain_look or args.paint_vel_info
        self.rng = np.random.default_rng((args.seed, restart, 20200))  # apart from the environments' own streams

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


def make_envs(script, wrapper, args, split, restart=None):
    """The script's environments, wrapped. Easy to miss: only training names a restart, so only it is augmented."""
    envs = script.make_envs(args, split, restart or 0)
    return envs if restart is None and not wrapper.everywhere else wrapper(envs, args, restart or 0)


class Gray(Wrapper):
    """Grayscale observations, in evaluation too.

    Reference code: coinrunenv.py:218, the channels' mean, rounded down. Deviation: three equal channels, not one, so
    that the network stays as it is.
    """

    everywhere = True

    def change(self, obs):
        return np.repeat(obs.sum(1, keepdims=True, dtype=np.uint16) // 3, 3, axis=1).astype(np.uint8)


class Cutout(Wrapper):
    """Up to five rectangles of random colour over each frame.

    Reference code: coinrun.cpp:1647-1669, drawn anew for each frame. Deviation: edges on whole pixels, theirs are
    smoothed.
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

    Reference code: coinrunenv.py:164, 224-237. Deviation: drawn again where exact checkpoints begin new environments.
    """

    def __init__(self, envs, args, restart):
        super().__init__(envs, args, restart)
        self.inverted = self.rng.random(args.num_envs) < 0.5

    def change(self, obs):
        return np.where(self.inverted[:, None, None, None], 255 - obs, obs)


class Jitter(Wrapper):
    """Brightness, contrast and saturation drawn anew each iteration.

    Reference code: policies.py:150-188, ppo2.py:309. One draw for all environments and the T steps of an iteration.
    Easy to miss: their brightness moves by half a grey level of 255 at most, which is next to nothing.
    Deviations: rounded to uint8; the observation after the last step, which the next iteration begins with, has that
    one's colours for the bootstrapped value too.
    """

    steps = 0

    def change(self, obs):
        if self.steps % self.args.num_steps == 0:
            self.drawn = self.rng.uniform((-0.5, 0.5, 0.5), (0.5, 1.5, 1.5)).astype(np.float32)
        self.steps += 1
        return jitter(obs, *self.drawn, self.boxed)


def jitter(obs, brightness, contrast, saturation, boxed):
    """uint8 [N, 3, H, W] -> the same. The contrast is about each channel's mean, for which the box counts as black."""
    x = (obs.astype(np.float32) + brightness).clip(0, 255)
    x[:, :, :13, :26] *= not boxed
    mean = x.mean((2, 3), keepdims=True)
    x = ((x - mean) * contrast + mean).clip(0, 255)
    value = x.max(1, keepdims=True)  # of HSV, which stays, like the hue; the saturation is at most 1
    purest = value / (value - x.min(1, keepdims=True)).clip(1e-6)
    return np.rint(value - (value - x) * np.minimum(saturation, purest)).astype(np.uint8)


# ---- Networks ----
def after_convolutions(module, make_layer):
    """Puts make_layer(convolution) behind each convolution of a module."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            setattr(module, name, nn.Sequential(child, make_layer(child)))
        else:
            after_convolutions(child, make_layer)


class Mask(nn.Module):
    """Multiplies all images by one mask [C, H, W], in training mode. Its shape is that of the first images it sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", None)

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones_like(x[0])
        return x * self.mask if self.training else x

    def draw(self):
        kept = torch.rand(self.mask.shape) >= 0.1  # from torch's own stream on the CPU, which checkpoints hold
        self.mask.copy_(kept / 0.9)


def dropout(script):
    """A tenth of what each convolution puts out is dropped, one mask for all images of an iteration.

    Reference code: policies.py:19-38, ppo2.py:349. Deviation: off in evaluation; theirs plays on with one fresh mask,
    since masks are not saved.
    """

    class Agent(script.Agent):
        def __init__(self, envs, args):
            super().__init__(envs, args)
            after_convolutions(self.encoder, lambda _: Mask())
            self.register_buffer("learned", torch.tensor(True))  # whether it has learned since the masks were drawn
            super().features(torch.zeros(1, *envs.single_observation_space.shape, dtype=torch.uint8))

        # Easy to miss: one function for acting and learning, or the ratios would be wrong. The first call that acts
        # after one that learned begins an iteration. `update` learns by features and heads, all else calls forward.
        def forward(self, obs, kernel=None):
            if self.training and self.learned:
                for mask in (module for module in self.modules() if isinstance(module, Mask)):
                    mask.draw()
                self.learned.fill_(False)
            return self.heads(super().features(obs, kernel))

        def features(self, obs, kernel=None):
            self.learned.fill_(True)
            return super().features(obs, kernel)

    return Agent


def batch_norm(script):
    """Batch normalisation behind each convolution, always with the batch's own statistics.

    Reference code: policies.py:44-45, TensorFlow's epsilon. Easy to miss: an agent acts on N images and learns from a
    minibatch, on a CPU from slices of CPU_BATCH images: the statistics are of these, and the ratios do not begin at 1.
    """

    def make_agent(envs, args):
        agent = script.Agent(envs, args)
        about = {"eps": 1e-3, "track_running_stats": False}
        after_convolutions(agent.encoder, lambda convolution: nn.BatchNorm2d(convolution.out_channels, **about))
        return agent

    return make_agent


def l2(script):
    """A loss of 1e-4 times half the sum of the squared weights, without the biases.

    Reference code: ppo2.py:91-105, before the gradient's norm is clipped.
    """

    def make_agent(envs, args):
        agent = script.Agent(envs, args)
        for name, weight in agent.named_parameters():
            if not name.endswith("bias"):
                weight.register_hook(partial(add_decay, weight))
        return agent

    return make_agent


def add_decay(weight, gradient):
    """Easy to miss: once a minibatch, in the first of its passes, which finds no gradient yet."""
    return gradient + 1e-4 * weight.detach() if weight.grad is None else gradient


# ---- What there is, and the command line ----
# {script: {name: (which factory, what makes it, flags)}}. The network randomization paper's baselines are PPO plus one
# thing; a captured call cannot branch, so agents that do go without.
ABLATIONS = {
    "ppo_netrand": {
        "gray": ("make_envs", Gray, ["--no-netrand"]),
        "cutout": ("make_envs", Cutout, ["--no-netrand"]),
        "inversion": ("make_envs", Inversion, ["--no-netrand"]),
        "jitter": ("make_envs", Jitter, ["--no-netrand"]),
        "dropout": ("make_agent", dropout, ["--no-netrand", "--no-cuda-graphs"]),
        "batch_norm": ("make_agent", batch_norm, ["--no-netrand"]),
        "l2": ("make_agent", l2, ["--no-netrand", "--no-cuda-graphs"]),
    },
}


def main(argv):
    if not argv or {"-h", "--help"} & set(argv[:2]):
        print("python benchmark/ablations.py SCRIPT ABLATION [FLAGS OF THE SCRIPT]")
        for name, rows in ABLATIONS.items():
            print(*(f"  {name} {key:12}{row[1].__doc__.splitlines()[0]}" for key, row in rows.items()), sep="\n")
        return
    name, ablation = [*argv, ""][:2]
    if name not in ABLATIONS:
        fail(f"no ablations of {name!r}, there are some of: {' '.join(ABLATIONS)}")
    if ablation not in ABLATIONS[name]:
        fail(f"no ablation {ablation!r} of {name}, there are: {' '.join(ABLATIONS[name])}")
    seam, changed, flags = ABLATIONS[name][ablation]
    script = load_script(name)
    seams = {"make_envs": script.make_envs, "make_agent": script.Agent}
    seams[seam] = partial(make_envs, script, changed) if seam == "make_envs" else changed(script)
    script.main(["--exp-name", f"{name}_{ablation}", *flags, *argv[2:]], **seams)


def load_script(name):
    """A script of algos/ as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / "algos" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # as in the scripts
    try:
        main(sys.argv[1:])
    except OSError as error:
        sys.exit(f"error: {error}; what was saved before is whole")

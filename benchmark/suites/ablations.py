"""A script with one thing changed from outside, through train's two factories: the baselines that papers compare with.

    python benchmark/ablations.py                                             # what there is
    python benchmark/ablations.py ppo_netrand cutout --plain-look --seed 2    # script, ablation, the script's flags
    python benchmark/ablations.py ppo_netrand cutout --plain-look --netrand   # the paper's method on top
    python benchmark/ablations.py ppo_netrand cutout --plain-look --seed 2 --resume runs/<folder>
    python benchmark/ablations.py layer-norm drq_sam_reset --env-id pong      # either order, either dash
    python benchmark/ablations.py mdpo frozen --encoder runs/<folder>         # new heads on a trained encoder

Resume and evaluate with the same command too: the script alone knows nothing of the ablation, the run's name tells it.
"""

import importlib.util
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro


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
def changing(change):
    """Makes an ablation of change(script, agent, args, ...), which changes an agent of the script in place."""

    @wraps(change)
    def ablation(script, **options):
        def make_agent(envs, args):
            agent = script.Agent(envs, args)
            change(script, agent, args, **options)
            return agent.to(memory_format=torch.channels_last)  # as the scripts' own

        return make_agent

    return ablation


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


@changing
def batch_norm(script, agent, args):
    """Batch normalisation behind each convolution, always with the batch's own statistics.

    Reference code: policies.py:44-45, TensorFlow's epsilon. Easy to miss: an agent acts on N images and learns from a
    minibatch, on a CPU from slices of CPU_BATCH images: the statistics are of these, and the ratios do not begin at 1.
    """
    about = {"eps": 1e-3, "track_running_stats": False}
    after_convolutions(agent.encoder, lambda convolution: nn.BatchNorm2d(convolution.out_channels, **about))


@changing
def l2(script, agent, args, amount=1e-4, spared="bias"):
    """A loss of 1e-4, or the number in its name, times half the sum of the squared weights.

    Reference code: of PPO ppo2.py:91-105, without the biases and before the gradient's norm is clipped; of the others
    Adam's weight decay, which is the same gradient. Deviations: it is clipped with the rest (drq_sam_reset.py), SAM,
    where it is on, climbs it too, and the temperature is spared (sac_sam_reset.py).
    """
    for name, weight in agent.named_parameters():
        if not name.endswith(spared):
            weight.register_hook(partial(add_decay, weight, amount))


def add_decay(weight, amount, gradient):
    """Easy to miss: once a minibatch, in the first of its passes, which finds no gradient yet.

    In the scripts with SAM no pass finds one, so there is nothing that a captured call could miss.
    """
    return gradient + amount * weight.detach() if weight.grad is None else gradient


# ---- Networks of the plasticity paper ----
def relus(module):
    """(sequence, index) of each ReLU; the layer that it follows is the one before it there."""
    sequences = [child for child in module.modules() if isinstance(child, nn.Sequential)]
    return [(layers, i) for layers in sequences for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel. [B, C, H, W] -> the same."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def normalise(module, hold=lambda norm: norm):
    """Puts layer normalisation in front of each ReLU, directly behind the layer that the ReLU follows."""
    for layers, i in relus(module):
        kind = ChannelNorm if isinstance(layers[i - 1], nn.Conv2d) else nn.LayerNorm
        layers[i] = nn.Sequential(hold(kind(len(layers[i - 1].weight), eps=1e-6)), layers[i])


class Lent(nn.Module):
    """Applies a layer that belongs to another module."""

    def __init__(self, layer, owner):
        super().__init__()
        owner.append(layer)
        self.layer = [layer]  # Easy to miss: in a list, so that it is no part of this module, but is copied with it.

    def forward(self, x):
        return self.layer[0](x)


@changing
def rainbow_layer_norm(script, agent, args):
    """Layer normalisation behind each convolution, over a pixel's channels, and each hidden layer.

    Paper: 5.1, directly behind the layer. Reference code: nature.py:24-35, rainbow_policy.py:74-86, and a reset leaves
    the scales and shifts as they are, so those of the head lie outside it (and outside --sam-scope head).
    Deviation: --shrink-perturb moves those of the backbone.
    """
    agent.norms = nn.ModuleList()
    normalise(agent.backbone)
    normalise(agent.head, lambda norm: Lent(norm, agent.norms))


@changing
def sac_layer_norm(script, agent, args):
    """Layer normalisation behind each convolution, over a pixel's channels, and each hidden layer.

    Paper: 5.1, directly behind the layer. Easy to miss: a reset draws all of the heads anew, scales and shifts too.
    """
    normalise(agent)


class CReLU(nn.ReLU):
    """The positive and the negative part. [B, C, ...] -> [B, 2C, ...]. Paper: arXiv:1603.05201."""

    def forward(self, x):
        return super().forward(torch.cat([x, -x], dim=1))


def halve_for_crelu(script, module, args):
    """CReLUs for ReLUs, each behind a layer of half the width, so that what follows stays as wide as it is."""
    for layers, i in relus(module):
        n_out, n_in, *kernel = layers[i - 1].weight.shape
        if kernel:
            half = nn.Conv2d(n_in, n_out // 2, kernel, layers[i - 1].stride)
        else:
            half = script.NoisyLinear(n_in, n_out // 2, args.noisy_std)
        layers[i - 1], layers[i] = half, CReLU()


@changing
def rainbow_crelu(script, agent, args):
    """Concatenated ReLUs behind layers of half the width.

    Paper: 7.3, all ReLUs. Reference code: nature.py:60-68, rainbow_policy.py:114-125, of two variants the one of
    its scripts. Easy to miss: half of what is behind a CReLU is zero, so charts/active_* say nothing.
    """
    halve_for_crelu(script, agent, args)


def double_for_crelu(script, agent):
    """CReLUs for the ReLUs of the three heads, and layers of twice the inputs behind them."""
    for head in (agent.critic.q1, agent.critic.q2, agent.actor.head):
        for layers, i in relus(head):
            n_out, n_in = layers[i + 1].weight.shape
            layers[i], layers[i + 1] = CReLU(), script.orthogonal(nn.Linear(2 * n_in, n_out), 2**0.5)
    mean, log_std = agent.actor.head[-1].weight.data.chunk(2)  # as in the script's Actor
    nn.init.orthogonal_(mean, 2**0.5)
    nn.init.orthogonal_(log_std, 1.0)


@changing
def sac_crelu(script, agent, args):
    """Concatenated ReLUs in the heads, in front of layers of twice the inputs.

    Reference code: dmc networks/common.py, MLP. Deviation: by the paper's text (7.4) the encoder has them too.
    """
    double_for_crelu(script, agent)


@changing
def rainbow_plastic(script, agent, args):
    """The paper's later version: normalised backbone, CReLU head, SAM on the backbone, reset.

    Reference code: scripts/NeurIPS2023/drq_plastic_rr2.sh and configs/agent/drq.yaml:24. At replay ratios 4 and 8
    with --shrink-perturb 0.6.
    """
    normalise(agent.backbone)
    halve_for_crelu(script, agent.head, args)


@changing
def sac_plastic(script, agent, args):
    """The paper's later version: normalised encoder, CReLU heads, SAM on the critic, reset.

    Reference code: dmc drq/networks.py and configs/drq.py:9-11. Deviations: SAM is for all of the critic, theirs takes
    the second gradient for the encoder and the first for the rest; frames are gray, theirs have colour.
    """
    normalise(agent.encoder)
    double_for_crelu(script, agent)


SWA_STEPS, SWA_EVERY = 40_000, 100  # how many of the last updates are averaged over, and every which of them


def swa(script):
    """Evaluates the mean of the weights in the last 40,000 updates (stochastic weight averaging).

    Paper: 9.1, of the online network; the period was lost in its text, 100 updates are our choice. Before the mean
    begins, evaluations are of the target network as ever.
    """

    class Agent(script.Agent):
        def __init__(self, envs, args):
            super().__init__(envs, args)
            self.average = Average(weights_of(self), 1 + args.sam)
            self.updates = args.replay_ratio * (args.total_timesteps - args.learning_starts + 1)

        # Easy to miss: the online network's passes with gradients are those of learning, one, or SAM's two, an update.
        def forward(self, pixels):
            if self.training and torch.is_grad_enabled():
                self.average.see(self, self.updates)
            if self.training or not self.average.count:
                return super().forward(pixels)
            with holding(self, self.average.mean):
                return super().forward(pixels)

    return Agent


class Average(nn.Module):
    """The mean of an agent's weights [K] after some of its updates. A copied agent looks at the one of its original."""

    def __init__(self, weights, passes_an_update):
        super().__init__()
        self.passes_an_update = passes_an_update
        self.register_buffer("mean", torch.zeros_like(weights))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("passes", torch.tensor(0))

    def __deepcopy__(self, memo):
        return self

    def see(self, agent, updates):
        """Before each pass of learning. updates: of the whole run.

        A run that is made longer by fewer than SWA_STEPS updates keeps what it has averaged, else it begins again.
        """
        done, within = divmod(self.passes.item(), self.passes_an_update)
        self.passes += 1
        if within or done % SWA_EVERY:
            return
        if done <= max(updates - SWA_STEPS, 0):
            self.count.zero_()
            return
        self.count += 1
        self.mean.lerp_(weights_of(agent), 1 / self.count.item())


def weights_of(agent):
    """All parameters [K]."""
    return torch.cat([param.detach().flatten() for param in agent.parameters()])


@contextmanager
def holding(agent, weights):
    """In this context the agent's parameters are these [K]."""
    saved = [param.data for param in agent.parameters()]
    nn.utils.vector_to_parameters(weights, agent.parameters())
    try:
        yield
    finally:
        for param, before in zip(agent.parameters(), saved, strict=True):
            param.data = before


# ---- Networks of the mutual distillation paper ----
def widen(script, agent, depths, hidden):
    """An IMPALA encoder of these depths and hidden width, with heads to it."""
    num_actions, channels = agent.actor.out_features, agent.encoder[0].conv.in_channels
    blocks = [script.ImpalaBlock(*sizes) for sizes in pairwise((channels, *depths))]
    dense = nn.Linear(64 * depths[-1], hidden)
    agent.encoder = nn.Sequential(*blocks, nn.Flatten(), nn.ReLU(), dense, nn.ReLU())
    agent.actor = script.orthogonal(nn.Linear(hidden, num_actions), gain=0.01)
    agent.critic = script.orthogonal(nn.Linear(hidden, 1), gain=1.0)


@changing
def doubled(script, agent, args):
    """PPO with twice the width, batch and steps.

    Paper: figure 6, which does not say what of the model is doubled.
    """
    widen(script, agent, (32, 64, 64), 512)


@changing
def doubled_equal(script, agent, args):
    """PPO with about as many weights as two agents, and twice the batch and steps.

    Paper: figure 6, the other reading: widths times the root of 2.
    """
    widen(script, agent, (23, 45, 45), 362)


@dataclass
class Frozen:
    encoder: str = ""  # run folder or checkpoint of mdpo.py
    encoder_agent: int = 1  # which of its agents


@changing
def frozen(script, agent, args, encoder=None):
    """PPO that trains new heads on a frozen encoder: --encoder RUN [--encoder-agent 2].

    Paper: figure 5. Game and levels are those of that run, of which agent 1 is taken. A run that is resumed or
    evaluated has the encoder in its own checkpoint and does without the flag.
    """
    if encoder:
        try:
            agent.encoder.load_state_dict(encoder)
        except RuntimeError:
            fail("--encoder: the network of that run is of another shape")
    agent.encoder.requires_grad_(False)


def read_encoder(script, argv):
    """-> what `frozen` is given, the flags of the run, the rest of argv."""
    given, argv = tyro.cli(Frozen, args=argv, return_unknown_args=True, add_help=False)
    if not given.encoder:
        if not any(flag.startswith(("--resume", "--evaluate", "-h", "--help")) for flag in argv):
            fail("frozen: needs --encoder, a run folder or checkpoint of mdpo.py")
        return {}, [], argv
    state = script.load_checkpoint(given.encoder)
    if f"player{given.encoder_agent}" not in state:
        fail(f"--encoder-agent {given.encoder_agent}: there is no such agent in {given.encoder}")
    weights = state[f"player{given.encoder_agent}"]["agent"]
    encoder = {name.removeprefix("encoder."): w for name, w in weights.items() if name.startswith("encoder.")}
    names = ("env_id", "distribution_mode", "num_levels", "start_level")
    return {"encoder": encoder}, [f"--{name.replace('_', '-')}={state['args'][name]}" for name in names], argv


# ---- What there is, and the command line ----
# {script: {name: (which factory, what makes it, flags)}}. The papers' baselines are the plain algorithm plus one thing;
# a captured call cannot branch, so agents that do go without.
PPO, BASE = ["--no-netrand"], ["--no-sam", "--reset-every", "0"]
DOUBLED = ["--num-agents", "1", "--num-envs", "128", "--total-timesteps", "100000000"]
AMOUNTS = ("1e-3", "1e-4", "1e-5")  # Paper: 7.3, the best of them
ABLATIONS = {
    "ppo_netrand": {
        "gray": ("make_envs", Gray, PPO),
        "cutout": ("make_envs", Cutout, PPO),
        "inversion": ("make_envs", Inversion, PPO),
        "jitter": ("make_envs", Jitter, PPO),
        "dropout": ("make_agent", dropout, [*PPO, "--no-cuda-graphs"]),
        "batch_norm": ("make_agent", batch_norm, PPO),
        "l2": ("make_agent", l2, [*PPO, "--no-cuda-graphs"]),
    },
    "drq_sam_reset": {
        "layer_norm": ("make_agent", rainbow_layer_norm, BASE),
        "crelu": ("make_agent", rainbow_crelu, BASE),
        **{f"l2_{x}": ("make_agent", partial(l2, amount=float(x), spared=()), BASE) for x in AMOUNTS},
        "swa": ("make_agent", swa, [*BASE, "--no-cuda-graphs"]),
        "plastic": ("make_agent", rainbow_plastic, ["--sam-scope", "backbone", "--learning-rate", "1.414e-4"]),
    },
    "sac_sam_reset": {
        "layer_norm": ("make_agent", sac_layer_norm, BASE),
        "crelu": ("make_agent", sac_crelu, BASE),
        **{f"l2_{x}": ("make_agent", partial(l2, amount=float(x), spared="log_alpha"), BASE) for x in AMOUNTS},
        "plastic": ("make_agent", sac_plastic, ["--sam-on", "critic", "--learning-rate", "1e-4"]),
    },
    "mdpo": {
        "doubled": ("make_agent", doubled, DOUBLED),
        "doubled_equal": ("make_agent", doubled_equal, DOUBLED),
        "frozen": ("make_agent", frozen, ["--num-agents", "1"]),
    },
}


def main(argv):
    if not argv or {"-h", "--help"} & set(argv[:2]):
        print("python benchmark/ablations.py SCRIPT ABLATION [FLAGS OF THE SCRIPT]")
        for name, rows in ABLATIONS.items():
            for key, (_, changed, _) in rows.items():
                print(f"  {f'{name} {key}':26}{getattr(changed, 'func', changed).__doc__.splitlines()[0]}")
        print("  drqv2_pieg needs none: SVEA is algos/drqv2_pieg.py --encoder drqv2, with the overlay as by default")
        return
    name, ablation = (word.replace("-", "_") for word in [*argv, ""][:2])
    if ablation in ABLATIONS:
        name, ablation = ablation, name
    if name not in ABLATIONS:
        fail(f"no ablations of {name!r}, there are some of: {' '.join(ABLATIONS)}")
    names = {key.replace("-", "_"): key for key in ABLATIONS[name]}
    if ablation not in names:
        fail(f"no ablation {ablation!r} of {name}, there are: {' '.join(ABLATIONS[name])}")
    seam, changed, flags = ABLATIONS[name][names[ablation]]
    script, argv = load_script(name), argv[2:]
    if changed is frozen:
        options, more, argv = read_encoder(script, argv)
        changed, flags = partial(frozen, **options), [*flags, *more]
    seams = {"make_envs": script.make_envs, "make_agent": script.Agent}
    seams[seam] = partial(make_envs, script, changed) if seam == "make_envs" else changed(script)
    script.main(["--exp-name", f"{name}_{names[ablation]}", *flags, *argv], **seams)


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

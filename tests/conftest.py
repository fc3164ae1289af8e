"""What the tests share: the scripts as modules, tiny arguments for each, and environments that follow a script."""

import dataclasses
import importlib.util
import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other crawl where cores are shared

import gymnasium as gym
import numpy as np
import pytest
import submitit  # noqa: F401  It closes the handlers of loggers that are there, and what pytest captures with absl's.
import torch
import torch.nn as nn

ROOT = Path(__file__).parent.parent
TIMES = ("charts/SPS", "charts/eval_seconds", "charts/hours")  # keys of metrics.csv that no two runs share
SCRIPTS = ["drq_sam_reset", "drqv2_pieg", "mdpo", "ppo_netrand", "sac_sam_reset"]

# A row per script. args: arguments under which `train` runs on scripted environments in about a second (two iterations,
# an evaluation after each, an exact checkpoint after the first). flags: the same order of size on the real environment.
ROWS = {
    "mdpo": {
        "args": {"total_timesteps": 32, "num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2}
        | {"exact_every": 16, "eval_every": 16, "eval_episodes": 4, "final_eval_episodes": 4, "cuda": False},
        "flags": "--env-id bossfight --distribution-mode easy --total-timesteps 64 --num-envs 4 --num-steps 8"
        " --num-minibatches 2 --update-epochs 1 --exact-every 32 --eval-every 32 --eval-episodes 2"
        " --final-eval-episodes 4 --no-cuda",
    },
    "ppo_netrand": {
        "args": {"total_timesteps": 32, "num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2}
        | {"exact_every": 16, "eval_every": 16, "eval_episodes": 4, "final_eval_episodes": 4, "mc_samples": 2}
        | {"cuda": False},
        "flags": "--env-id bossfight --distribution-mode easy --plain-look --total-timesteps 64 --num-envs 4"
        " --num-steps 8 --num-minibatches 2 --update-epochs 1"
        " --exact-every 32 --eval-every 32 --eval-episodes 2 --final-eval-episodes 4 --mc-samples 2 --no-cuda",
    },
    # Exact checkpoints wait for a game's end: scripted games take three steps and end when an exact checkpoint is due;
    # of real ones, the second ends a little after learning starts. Beta is one, or a run's length would show in it.
    # Evaluated agents act at random half of the time: untrained ones may stand still until a game's time limit.
    "drq_sam_reset": {
        "args": {"total_timesteps": 36, "learning_starts": 8, "batch_size": 4, "n_step": 3, "n_atoms": 11}
        | {"prioritized_replay_beta": 1.0, "reset_every": 10, "shrink_perturb": 0.8}
        | {"exact_every": 18, "eval_every": 18, "eval_episodes": 4, "final_eval_episodes": 4, "cuda": False},
        "flags": "--env-id road_runner --total-timesteps 520 --learning-starts 505 --batch-size 4 --reset-every 9"
        " --prioritized-replay-beta 1 --exact-every 100 --eval-every 260 --eval-episodes 2 --final-eval-episodes 2"
        " --eval-epsilon 0.5 --no-cuda",
    },
    # Of the real task an episode is 20 steps of 50 frames, and rendering is what takes the time.
    "sac_sam_reset": {
        "args": {"total_timesteps": 36, "learning_starts": 8, "batch_size": 4, "buffer_size": 20, "reset_every": 10}
        | {"action_repeat": 2, "sam_rho": 0.05, "exact_every": 18, "eval_every": 18, "eval_episodes": 4}
        | {"final_eval_episodes": 4, "cuda": False},
        "flags": "--env-id cartpole-swingup --total-timesteps 50 --action-repeat 50 --sam-rho 0.05 --learning-starts 25"
        " --batch-size 4 --buffer-size 30 --reset-every 10 --exact-every 20 --eval-every 25 --eval-episodes 2"
        " --final-eval-episodes 2 --no-cuda",
    },
    "drqv2_pieg": {
        "args": {"total_timesteps": 36, "learning_starts": 8, "batch_size": 4, "buffer_size": 20, "n_step": 2}
        | {"action_repeat": 2, "noise_steps": 20, "feature_dim": 8, "hidden_dim": 16, "projection_dim": 32}
        | {"encoder_weights": "random", "overlay_pictures": 8, "exact_every": 18, "eval_every": 18}
        | {"eval_episodes": 4, "final_eval_episodes": 4, "cuda": False},
        "flags": "--env-id cartpole-swingup --total-timesteps 50 --action-repeat 50 --learning-starts 25 --batch-size 4"
        " --buffer-size 30 --n-step 2 --noise-steps 40 --feature-dim 8 --hidden-dim 16 --projection-dim 32"
        " --encoder-weights random --overlay-pictures 8 --exact-every 20 --eval-every 25 --eval-episodes 2"
        " --final-eval-episodes 2 --no-cuda",
    },
}


def load(name):
    """A script as a module, imported once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "algos" / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def tiny_args(name, runs_dir, **changes):
    """The script's Args with its row's values, `changes` on top."""
    return load(name).Args(**ROWS[name]["args"] | {"runs_dir": str(runs_dir)} | changes)


class ScriptedEnvs:
    """Images that depend on (seed, split, start, environment, time); environment n's episodes take n % 2 + 3 steps.

    The reward is 1 for the action that is the step's number modulo the number of actions, else 0; so returns depend on
    what the agent does, and nothing else is random. Odd environments end by truncation, even ones by termination.
    Where actions are vectors (a script with --action-repeat), the sign of the first number stands for the action.
    """

    def __init__(self, args, split, start=0, obs_shape=None, num_actions=15):
        self.num_envs = args.num_envs * getattr(args, "num_agents", 1)
        obs_shape = obs_shape or obs_shape_of(type(args).__module__)
        self.single_observation_space = gym.spaces.Box(0, 255, obs_shape, np.uint8)
        self.single_action_space = gym.spaces.Discrete(num_actions)
        self.vectors = hasattr(args, "action_repeat")
        if self.vectors:
            self.single_action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.rng = np.random.default_rng((args.seed, len(split), start))
        self.time, self.returns = np.zeros(self.num_envs, dtype=int), np.zeros(self.num_envs)

    def observe(self):
        return self.rng.integers(0, 256, (self.num_envs, *self.single_observation_space.shape), dtype=np.uint8)

    def reset(self):
        return self.observe(), {}

    def step(self, actions):
        actions, count = (actions[:, 0] > 0, 2) if self.vectors else (actions, self.single_action_space.n)
        reward = (actions == self.time % count).astype(np.float32)
        self.time += 1
        self.returns += reward
        odd = np.arange(self.num_envs) % 2 == 1
        done = self.time == odd + 3
        episodes = [(int(n), float(self.returns[n]), int(self.time[n])) for n in np.flatnonzero(done)]
        self.time[done], self.returns[done] = 0, 0
        obs = self.observe()
        return obs, reward, done & ~odd, done & odd, {"final_obs": obs, "episodes": episodes}

    def close(self):
        pass


class TinyAgent(nn.Module):
    """The smallest network with the interface of the PPO scripts' Agents, for tests of everything around it."""

    def __init__(self, envs, args):
        super().__init__()
        self.body = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 16), nn.ReLU())
        self.actor = nn.Linear(16, int(envs.single_action_space.n))
        self.critic = nn.Linear(16, 1)

    def features(self, obs, kernel=None):
        pixels = obs.float() / 255
        return self.body(pixels if kernel is None else nn.functional.conv2d(pixels, kernel, padding=1))

    def heads(self, hidden):
        return self.actor(hidden), self.critic(hidden).squeeze(-1)

    def forward(self, obs, kernel=None):
        return self.heads(self.features(obs, kernel))


class TinyRainbow(nn.Module):
    """The smallest network with the interface of the Agent of drq_sam_reset.py."""

    def __init__(self, envs, args):
        super().__init__()
        script, num_actions = load("drq_sam_reset"), int(envs.single_action_space.n)
        self.backbone = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        layer = script.NoisyLinear(16, num_actions * args.n_atoms, args.noisy_std)
        self.head = nn.Sequential(layer, nn.Unflatten(1, (num_actions, args.n_atoms)))
        self.register_buffer("support", torch.linspace(args.v_min, args.v_max, args.n_atoms))

    def forward(self, pixels):
        return self.head(self.backbone(pixels)).log_softmax(-1)

    def values(self, log_probs):
        return (log_probs.exp() * self.support).sum(-1)


class TinySac(nn.Module):
    """The smallest network with the interface of the Agent of sac_sam_reset.py."""

    def __init__(self, envs, args):
        super().__init__()
        script, num_actions = load("sac_sam_reset"), envs.single_action_space.shape[0]
        self.encoder = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 16), nn.ReLU())
        self.critic, self.actor = script.Critic(16, num_actions), script.Actor(16, num_actions)
        self.log_alpha = nn.Parameter(torch.tensor(args.initial_alpha).log())


class TinyPieg(nn.Module):
    """The smallest network with the interface of the Agent of drqv2_pieg.py, batch normalisation among it."""

    def __init__(self, envs, args):
        super().__init__()
        script, num_actions = load("drqv2_pieg"), envs.single_action_space.shape[0]
        self.encoder = TinyEncoder()
        self.critic, self.actor = script.Critic(16, num_actions, args), script.Actor(16, num_actions, args)


class TinyEncoder(nn.Module):
    """Views of [B, 9, H, W] -> [V B, 16], each normalised by its own statistics."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(144, 16)
        self.norm = nn.BatchNorm2d(9, affine=False)

    def forward(self, *views):
        pixels = [self.norm(view.to(self.project.weight.dtype) / 255) for view in views]
        return self.project(nn.functional.adaptive_avg_pool2d(torch.cat(pixels), 4).flatten(1)).relu()


# The smallest network of a script, where its own is slow; and what is seen, where that is not Procgen's.
AGENTS = {"mdpo": TinyAgent, "ppo_netrand": TinyAgent, "drq_sam_reset": TinyRainbow, "sac_sam_reset": TinySac}
AGENTS["drqv2_pieg"] = TinyPieg
OBS_SHAPES = {"drq_sam_reset": (4, 84, 84), "drqv2_pieg": (9, 84, 84)}


def obs_shape_of(name):
    return OBS_SHAPES.get(name, (3, 64, 64))


def make_agent_of(script):
    return AGENTS.get(script.__name__, script.Agent)


def weights(agents):
    """All parameters and buffers of an agent, or of some, in one vector."""
    agents = agents if isinstance(agents, list) else [agents]
    return torch.cat([value.flatten().double() for agent in agents for value in agent.state_dict().values()])


def folder_in(runs_dir):
    """The one run folder there is."""
    (folder,) = (path.parent for path in Path(runs_dir).glob("*/args.json"))
    return folder


def leaves(state, name=""):
    """("a.0.b", value) of each value in nested dicts, lists and tuples."""
    if isinstance(state, list | tuple):
        state = dict(enumerate(state))
    if isinstance(state, dict):
        for key, value in state.items():
            yield from leaves(value, f"{name}.{key}".strip("."))
    else:
        yield name, state


def state_of(folder):
    """{name: value} of all that a run's checkpoint holds, but for how long its log is and it took."""
    state = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    return {name: value for name, value in leaves(state) if name not in ("metrics_bytes", "hours")}


def same(one, two):
    """Whether two values, or two states of `state_of`, are equal bit for bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[name], two[name]) for name in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    return one == two


def metrics_of(folder):
    """The lines of metrics.csv, without what no two runs share."""
    lines = (Path(folder) / "metrics.csv").read_text().splitlines()
    return [line for line in lines if not any(key in line for key in TIMES)]


def ready_rows(replay):
    """The rows of a replay that can be sampled, the oldest first. int64 [rows]."""
    return replay.ready[np.arange(replay.first_ready, replay.past_ready) % replay.capacity]


def assert_resumes_exactly(tmp_path, go, tiny, make_envs, exact_step):
    """A run killed in its 39th step goes on from its last checkpoint to all that an uninterrupted one ends with.

    go(args, make_envs) trains with the arguments of tiny(runs_dir, **changes); that checkpoint is of exact_step.
    """

    class Killed(make_envs):
        steps = 0

        def __init__(self, args, split, start=0):
            super().__init__(args, split, start)
            self.training = split == "train"

        def step(self, actions):
            Killed.steps += self.training
            assert Killed.steps < 39
            return super().step(actions)

    go(tiny(tmp_path / "whole"), make_envs)
    with pytest.raises(AssertionError):
        go(tiny(tmp_path / "half", save_minutes=0), Killed)
    whole, half = folder_in(tmp_path / "whole"), folder_in(tmp_path / "half")
    assert state_of(half)["step"] == exact_step
    go(tiny(tmp_path, save_minutes=0, resume=str(half)), make_envs)
    assert same(state_of(whole), state_of(half))
    assert metrics_of(whole) == metrics_of(half)
    assert (whole / "replay.bin").read_bytes() == (half / "replay.bin").read_bytes()


def replace(args, **changes):
    return dataclasses.replace(args, **changes)


@pytest.fixture(autouse=True, scope="session")
def envpool():
    """Imported with the libraries of Procgen: it looks for them once, and a script of another suite does not."""
    load("mdpo").import_envpool()


# Tests of all scripts that are fast for some of them only: {test: the scripts for which it is slow}.
SLOW = {
    "test_interrupted_and_resumed_equals_uninterrupted": ("drqv2_pieg", "drq_sam_reset", "ppo_netrand"),
    "test_an_error_in_a_program_of_its_own": ("drqv2_pieg", "drq_sam_reset", "ppo_netrand", "sac_sam_reset"),
    "test_captured_training_is_eager_training": ("drqv2_pieg", "drq_sam_reset"),
    "test_a_captured_run_resumes_exactly": ("drqv2_pieg", "drq_sam_reset"),
    "test_kill_at_each_step_of_a_save": ("sac_sam_reset",),
    "test_full_disk_at_each_step_of_a_save": ("sac_sam_reset",),
    "test_update_and_act_read_nothing_back": ("drq_sam_reset",),
    "test_interrupted_before_training": ("drqv2_pieg", "drq_sam_reset", "ppo_netrand", "sac_sam_reset"),
}


def pytest_collection_modifyitems(items):
    for item in items:
        name, _, script = item.name.partition("[")
        if script.rstrip("]") in SLOW.get(name, ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script in turn, as a module."""
    return load(request.param)


@pytest.fixture(autouse=True)
def signals():
    """`train` takes over some signals; each test gives them back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)

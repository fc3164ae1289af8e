# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "dm_control==1.0.50", "gymnasium==1.4.0", "mujoco==3.17.0", "numpy==2.4.6",
#     "opencv-python-headless==5.0.0.93", "tensorboard==2.21.0", "torch==2.14.0", "torchvision==0.29.0",
#     "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""PIE-G on DeepMind Control: DrQ-v2 that sees through the first layers of a ResNet, as ImageNet left them.
A projection learns to read their features. The critic learns from each frame as it is and from the same frame
under another picture. DMC-GB's looks, in which an agent is judged, are inside (`make_dmc`).

Paper: Yuan et al. 2022, Pre-Trained Image Encoder for Generalizable Visual Reinforcement Learning (PIE-G).
Checked against github.com/gemcollector/PIE-G (3588cf8), github.com/facebookresearch/drqv2 (c0c650b), and for the looks
github.com/nicklashansen/dmcontrol-generalization-benchmark (ff9c0aa).
Deviations: crops to overlay come from 10,000 pictures that are held in memory, and without --overlay-dir from textures
made here; the unfinished episode is learned from too; an episode's last observation takes a row of the replay; the
pretrained running statistics start as they are (the authors' constructor moves them by a tenth towards noise);
evaluations during training use the frames' own statistics, as the authors' last one does; humanoids and dogs have
the other tasks' learning rate and widths; seeds are ours; environments start afresh every --exact-every steps.

    python algos/drqv2_pieg.py --overlay-dir data/places365/data_256_standard   # the paper: 1M frames, 500k steps
    python algos/drqv2_pieg.py --env-id cheetah-run                             # with textures in place of Places365
    python algos/drqv2_pieg.py --encoder drqv2 --strong-augmentation none       # its baseline, DrQ-v2
    python algos/drqv2_pieg.py --encoder-weights random                         # without a network
    python algos/drqv2_pieg.py --resume runs/<folder>                           # continue a run
"""

# ---- 1. Imports ----
import copy
import ctypes
import fcntl
import hashlib
import io
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cache, partial
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

# Before torch is imported. glibc returns freed memory to the kernel; getting it back takes up to half the time.
# M_MMAP_THRESHOLD (-3) and M_TRIM_THRESHOLD (-1) make it keep the memory; an old glibc refuses the first.
if sys.platform == "linux" and ctypes.CDLL(None).mallopt(-3, 2**30):
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
if "__file__" not in globals():  # pasted into a notebook
    raise RuntimeError("save this text as a .py file and import that: each run keeps a copy of its script")

import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torchvision
import tyro
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---- 2. Arguments ----
Mode = Literal["color_easy", "color_hard", "video_easy", "video_hard"]  # of DMC-GB, besides "train"


@dataclass
class Args:
    # The method. Paper: section 2 and appendix; 0 stands for the task's own value.
    env_id: str = "walker-walk"  # the task; unknown names print the valid ones
    total_timesteps: int = 0  # steps of --action-repeat frames (0: the paper's 1M frames)
    action_repeat: int = 0  # frames per step (0: the task's)
    encoder: Literal["resnet18", "resnet34", "resnet50", "drqv2"] = "resnet18"  # frozen; drqv2: small, learns
    encoder_weights: str = "imagenet"  # imagenet, another name of torchvision's, a file of its weights, or random
    encoder_layer: int = 2  # last of the ResNet's four layers that is used
    projection_dim: int = 1024  # width of the projection that learns to read the frozen features
    frame_differences: bool = True  # features of the newer frames and their changes; off: of all frames
    batch_norm: Literal["adapting", "fixed"] = "adapting"  # by the batch's statistics, or the pretrained ones
    strong_augmentation: Literal["overlay", "conv", "none"] = "overlay"  # the critic's second view of a frame
    overlay_dir: str = "textures"  # folder with pictures (paper: Places365), or textures, made here
    overlay_pictures: int = 0  # how many are held, to crop from (0: 10,000, which take 2 GB, or 1,000 textures; ours)

    # DrQ-v2. Reference code, where the paper is silent: cfgs/piegconfig.yaml and cfgs/task.
    num_envs: int = 1  # N, parallel environments; training has one
    learning_starts: int = 2_000  # random steps before the first update
    update_every: int = 2  # steps per update
    buffer_size: int = 0  # observations in the replay; new ones overwrite the oldest (0: the task's)
    batch_size: int = 0  # B, transitions per update (0: the task's)
    n_step: int = 0  # n, rewards before the bootstrap (0: the task's)
    learning_rate: float = 1e-4  # Adam
    adam_eps: float = 1e-8  # Adam's epsilon
    gamma: float = 0.99  # discount
    tau: float = 0.01  # share of the online network that flows into the target network at each update
    noise_start: float = 1.0  # sigma, standard deviation of the noise on actions, at first
    noise_end: float = 0.1  # sigma at last
    noise_steps: int = 0  # steps in which sigma falls, in a straight line (0: the task's)
    noise_clip: float = 0.3  # c, the most noise on an action in an update
    feature_dim: int = 0  # width of what critic and actor see (0: 256, or 50 with DrQ-v2's encoder)
    hidden_dim: int = 1024  # width of their layers

    # Evaluation on episodes with seeds of their own.
    eval_every: int = 5_000  # steps between evaluations (0: never)
    eval_episodes: int = 10  # episodes per evaluation and look
    final_eval_episodes: int = 0  # the same for the last evaluation (0: 100, or fewer in a short run)
    eval_seed: int = 42  # draws the evaluated episodes, the same ones each time
    eval_modes: tuple[Mode, ...] = ()  # looks of DMC-GB to evaluate besides the one trained on
    eval_batch_norm: Literal["frames", "running"] = "frames"  # when evaluated: the frames', or training's
    dmcgb_dir: str = "data/dmcgb"  # DMC-GB's colours and clips, which `make dmcgb` fetches

    # The run.
    seed: int = 1  # same seed, machine, packages and number of threads: same weights, bit for bit
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    runs_dir: str = "runs"  # where run folders are made
    resume: str | None = None  # run folder to continue
    exact_every: int = 50_000  # steps between bit-for-bit checkpoints and fresh environments (0: never)
    save_minutes: float = 5.0  # minutes between the checkpoints in between (0: none)
    cuda: bool = True  # use a GPU if there is one
    cuda_required: bool = False  # refuse to run without a GPU
    cuda_graphs: bool = True  # on a GPU: record acting and learning once and replay them
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # bf16: encoder alone; auto: tf32 on GPU, fp32 on CPU
    torch_deterministic: bool = True  # only kernels that repeat bit for bit
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "holdout"  # project for --track
    wandb_entity: str | None = None  # team for --track

    def __post_init__(self):
        self.eval_modes = tuple(self.eval_modes)  # args.json has a list


# ---- 3. Environments ----
# dm_control's suite without lqr, which has no time limit and no bounds of actions.
TASKS = """
    acrobot-swingup acrobot-swingup_sparse ball_in_cup-catch cartpole-balance cartpole-balance_sparse cartpole-swingup
    cartpole-swingup_sparse cartpole-two_poles cartpole-three_poles cheetah-run dog-stand dog-walk dog-trot dog-run
    dog-fetch finger-spin finger-turn_easy finger-turn_hard fish-upright fish-swim hopper-stand hopper-hop
    humanoid-stand humanoid-walk humanoid-run humanoid-run_pure_state humanoid_CMU-stand humanoid_CMU-walk
    humanoid_CMU-run manipulator-bring_ball manipulator-bring_peg manipulator-insert_ball manipulator-insert_peg
    pendulum-swingup point_mass-easy point_mass-hard quadruped-walk quadruped-run quadruped-escape quadruped-fetch
    reacher-easy reacher-hard stacker-stack_2 stacker-stack_4 swimmer-swimmer6 swimmer-swimmer15 walker-stand
    walker-walk walker-run
"""
# Tasks whose noise falls in 100,000 steps. Reference code: cfgs/task.
EASY = "ball_in_cup-catch cartpole-balance cartpole-balance_sparse cartpole-swingup finger-spin hopper-stand"
EASY += " pendulum-swingup walker-stand walker-walk"
FRAMES = 1_001_000  # frames of a run. Reference code: pieg_train.sh
# DMC-GB's names of colours: (element, name, attribute) in MuJoCo's XML; the key of its clips, and their number.
COLOURS = {
    "skybox_rgb": ("texture", "skybox", "rgb1"),
    "skybox_rgb2": ("texture", "skybox", "rgb2"),
    "skybox_markrgb": ("texture", "skybox", "markrgb"),
    "grid_rgb1": ("texture", "grid", "rgb1"),
    "grid_rgb2": ("texture", "grid", "rgb2"),
    "grid_markrgb": ("texture", "grid", "markrgb"),
    "self_rgb": ("material", "self", "rgba"),
}
GREEN, CLIPS = (0.2, 0.8, 0.2), {"video_easy": 10, "video_hard": 100}


def task_of(env_id):
    """finger-turn_hard, also for finger_turn_hard and finger-turn-hard. Errors: ValueError."""
    tasks = TASKS.split()
    names = {task.lower().replace("-", "_"): task for task in tasks}
    name = env_id.lower().replace("-", "_")
    if name not in names:
        raise ValueError(f"{env_id}: no such task; there are {' '.join(tasks)}")
    return names[name]


@cache
def import_suite():
    """dm_control's suite with a renderer that works here: what MUJOCO_GL says, or the first that does.

    MuJoCo reads MUJOCO_GL when it is imported.
    """
    probe = "import mujoco as m; c = m.GLContext(8, 8); c.make_current()"
    probe += "; m.MjrContext(m.MjModel.from_xml_string('<mujoco/>'), 100); c.free()"
    names = ["glfw"] if sys.platform == "darwin" else ["egl", "osmesa"]
    if os.environ.get("MUJOCO_GL"):
        names = [os.environ["MUJOCO_GL"].lower()]
    reasons = []
    for name in names:
        about = {"env": {**os.environ, "MUJOCO_GL": name}, "capture_output": True, "text": True}
        probed = subprocess.run([sys.executable, "-c", probe], **about)
        if probed.returncode == 0:
            os.environ["MUJOCO_GL"] = name
            from dm_control import suite

            # cheetah sets a deprecated attribute, and says so in 200 characters for each environment.
            logging.getLogger("absl").addFilter(lambda record: "settotalmass" not in record.getMessage())
            return suite
        reasons.append(f"MUJOCO_GL={name}: {probed.stderr.strip().splitlines()[-1]}")
    fail(f"MuJoCo cannot render here: {'; '.join(reasons)} (on Debian: apt-get install libegl1 libgl1-mesa-dri)")


def make_envs(args, split, start=0):
    """N environments seeded by (args.seed, split, start). "test" differs from "train" by its seeds alone; a mode of
    DMC-GB has the seeds of "test" and a look of its own.

    reset() -> obs uint8 [N, 9, 84, 84], the last three frames in RGB, or the first frame three times; info.
    step(actions float32 [N, A] in -1..1) -> obs, reward float64, terminated bool, truncated bool, all [N], info.
    The reward is the sum over args.action_repeat frames; the time limit truncates.
    The step that ends an episode returns the next episode's first observation, in a new array.
    info["final_obs"][n]: the last observation of an episode that ended with the step.
    info["episodes"]: (environment, return, length) of the episodes that ended with the step.
    """
    mode = "train" if split == "test" else split
    entropy = (args.seed, int(split != "train"), start)
    makers = []
    for seed in np.random.SeedSequence(entropy).generate_state(args.num_envs).tolist():
        makers.append(partial(make_dmc, args.env_id, mode, seed, args.dmcgb_dir, args.action_repeat))
    return CountedEnvs(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


class CountedEnvs(gym.vector.SyncVectorEnv):
    """Gymnasium's vector environment with info["episodes"]."""

    def reset(self, **options):
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)
        return super().reset(**options)

    def step(self, actions):
        obs, reward, terminated, truncated, info = super().step(actions)
        self.returns, self.lengths = self.returns + reward, self.lengths + 1
        ended = np.flatnonzero(terminated | truncated)
        info["episodes"] = [(int(n), float(self.returns[n]), int(self.lengths[n])) for n in ended]
        self.returns[ended], self.lengths[ended] = 0, 0
        return obs, reward, terminated, truncated, info


def make_dmc(env_id, mode="train", seed=0, dmcgb_dir=None, action_repeat=2):
    """A task as a gymnasium.Env, in "train" or a mode of DMC-GB: the same physics in another look.

    Observations: uint8 [9, 84, 84], three frames in RGB, the oldest first. Actions: float32 in -1..1.
    reset(seed=...) restarts the streams of task, colours and clips; a plain reset() goes on with them.
    Errors: ValueError of the task's name, those of `dmcgb_data`.
    """
    looks = dmcgb_data(dmcgb_dir or Args.dmcgb_dir, mode) if mode != "train" else []
    domain, task = task_of(env_id).split("-")
    env = import_suite().load(domain, task, task_kwargs={"random": seed})
    camera = 2 if domain == "quadruped" else 0
    return ControlEnv(env, mode, looks, seed, action_repeat, camera)


class ControlEnv(gym.Env):
    """dm_control's environment with stacked frames, repeated actions and looks: colours, or paths of clips."""

    def __init__(self, env, mode, looks, seed, repeat, camera):
        spec = env.action_spec()
        self.env, self.mode, self.looks, self.repeat, self.camera = env, mode, looks, repeat, camera
        self.low, self.high = spec.minimum, spec.maximum
        self.observation_space = gym.spaces.Box(0, 255, (9, 84, 84), np.uint8)
        self.action_space = gym.spaces.Box(-1, 1, spec.shape, np.float32)
        self.colour_rng, self.clip = np.random.RandomState(seed), 0
        if mode in CLIPS:
            hidden = ("skybox", "grid") if mode == "video_hard" else "skybox"
            recolour(env.physics, {key: GREEN for key in COLOURS if key.startswith(hidden)})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.task.random.seed(seed)
            self.colour_rng, self.clip = np.random.RandomState(seed), 0
        # Reference code: DMC-GB's wrappers.py. Clips come in turn, the second first; colours are drawn.
        if self.mode in CLIPS:
            self.clip = (self.clip + 1) % len(self.looks)
            self.background = frames_of(self.looks[self.clip])
        elif self.looks:
            recolour(self.env.physics, self.looks[self.colour_rng.randint(len(self.looks))])
        self.env.reset()
        self.obs = np.tile(self.frame(), (3, 1, 1))
        return self.obs, {}

    def step(self, action):
        action = self.low + (action.astype(np.float64) + 1) / 2 * (self.high - self.low)
        reward = 0.0
        for _ in range(self.repeat):
            moment = self.env.step(action)
            reward += moment.reward
            if moment.last():
                break
        self.obs = np.concatenate([self.obs[3:], self.frame()])
        failed = moment.last() and moment.discount == 0
        return self.obs, float(reward), failed, moment.last() and not failed, {}

    def frame(self):
        """uint8 [3, 84, 84]. The green parts show a frame of the clip, one per step."""
        picture = np.ascontiguousarray(self.env.physics.render(84, 84, camera_id=self.camera))
        if self.mode in CLIPS:
            green = is_green(picture)
            picture[green] = next(self.background)[green]
        return picture.transpose(2, 0, 1)

    def close(self):
        self.env.physics.free()  # env.close() keeps the renderer's memory


def recolour(physics, colours):
    """Sets {key of COLOURS: three numbers in 0..1}; what is not named gets its own colour back."""
    import mujoco

    scene = '<mujoco><include file="./common/skybox.xml"/><include file="./common/materials.xml"/></mujoco>'
    spec = mujoco.MjSpec.from_string(scene, import_suite().common.ASSETS)
    for key, rgb in colours.items():
        element, name, attribute = COLOURS[key]
        part = spec.texture(name) if element == "texture" else spec.material(name)
        getattr(part, attribute)[:3] = rgb
    donor, model, context = spec.compile(), physics.model.ptr, physics.contexts
    for name in ("skybox", "grid"):
        texture = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_TEXTURE, name)
        if texture >= 0:  # the task has it
            model.texture(name).data[:] = donor.texture(name).data
            with context.gl.make_current() as gl:  # or the picture stays as it was
                gl.call(mujoco.mjr_uploadTexture, model, context.mujoco.ptr, texture)
    if mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_MATERIAL, "self") >= 0:
        model.material("self").rgba = donor.material("self").rgba


def is_green(picture):
    """Through which pixels a clip is seen. uint8 [H, W, 3] -> bool [H, W]. Reference code: colorsys."""
    # Careful: float64 and this order, or colours on a threshold fall to its other side.
    channels = picture.transpose(2, 0, 1) / 255  # [3, H, W]
    high, low = channels.max(0), channels.min(0)
    red, green, blue = (high - channels) / np.where(high > low, high - low, 1)  # distance from the highest
    hue = np.where(green == 0, 2 + red - blue, 4 + green - red) / 6 * 360  # where red is not the highest
    saturation = (high - low) / np.where(high > 0, high, 1) * 255
    return (red > 0) & (hue >= 100) & (hue <= 185) & (saturation >= 80) & (high * 255 >= 70)


def frames_of(clip):
    """The frames of a clip, over and over, uint8 [84, 84, 3]. Errors: OSError if it has none any more."""
    while True:
        video = cv2.VideoCapture(str(clip))
        shown, frame = video.read()
        if not shown:
            raise OSError(f"{clip} cannot be read any more")
        while shown:
            yield resized(frame)[..., ::-1]
            shown, frame = video.read()


def resized(pixels, size=84):
    """Bilinear interpolation, fractions cut off as in the reference code. uint8 [H, W, 3] -> [size, size, 3]."""
    for _ in range(2):  # rows, then columns
        last = len(pixels) - 1
        places = ((np.arange(size) + 0.5) * len(pixels) / size - 0.5).clip(0, last)
        first = places.astype(np.int64)  # each place lies between pixels first and first + 1
        share = (places - first).astype(np.float32)[:, None, None]
        before = pixels[first].astype(np.float32)
        after = pixels[np.minimum(first + 1, last)]
        pixels = (before + share * (after - before)).swapaxes(0, 1)
    return pixels.astype(np.uint8)


def dmcgb_data(folder, mode):
    """A mode's colours, a list of {key of COLOURS: three numbers}, or the paths of the clips that are there.

    Errors: FileNotFoundError, ValueError or RuntimeError that say which file is wrong and where to get it.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode {mode}: train {' '.join(get_args(Mode))}")
    names = [f"{mode}.json", f"{mode}.pt"]
    if mode in CLIPS:
        names = [f"{mode}/video{number}.mp4" for number in range(CLIPS[mode])]
    found = [Path(folder, name) for name in names if Path(folder, name).is_file()]
    if not found:
        about = f"DMC-GB's data for {mode} is not in {folder} ({names[0]} to {names[-1]}): `make dmcgb` fetches it"
        about += " from github.com/nicklashansen/dmcontrol-generalization-benchmark (src/env/data); then --dmcgb-dir"
        raise FileNotFoundError(about)
    if mode in CLIPS:
        for path in found:
            if not cv2.VideoCapture(str(path)).read()[0]:
                raise RuntimeError(f"{path} has no frames: a git-lfs pointer or a cut-off download?")
        return found
    if found[0].suffix == ".json":
        sets = json.loads(found[0].read_text())
    else:  # as in the authors' repository, arrays that an old numpy pickled
        rebuild = np.empty(0).__reduce__()[0]
        safe = [rebuild, (rebuild, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, np.dtypes.Float64DType]
        with torch.serialization.safe_globals(safe):
            sets = torch.load(found[0], weights_only=True)
    needed = {"skybox_rgb", "grid_rgb1", "grid_rgb2", "self_rgb"}
    if len(sets) < 100 or not all(needed <= colours.keys() for colours in sets):
        raise ValueError(f"{found[0]} does not hold 100 sets of {', '.join(sorted(needed))}")
    return sets


# ---- 4. Networks ----
class Agent(nn.Module):
    """Encoder, critic and actor: 63,441,920 + 2,902,786 + 1,581,830 parameters that learn, with 6 actions."""

    def __init__(self, envs, args):
        super().__init__()
        obs_shape, num_actions = envs.single_observation_space.shape, envs.single_action_space.shape[0]
        encoder = SmallEncoder if args.encoder == "drqv2" else FrozenEncoder
        self.encoder = encoder(obs_shape, args)
        self.critic = Critic(self.encoder.n_out, num_actions, args)
        self.actor = Actor(self.encoder.n_out, num_actions, args)
        self.to(memory_format=torch.channels_last)  # the faster layout of convolutions on a CPU


class FrozenEncoder(nn.Module):
    """The first layers of a ResNet, which stay as they are, and a projection that learns. Reference code: pieg.py.

    V views, each [B, 3 T, H, W] in 0..255 -> float32 [V B, D]. If batch normalisation adapts, each view is
    normalised by its own statistics in train mode, and moves the running ones.
    """

    def __init__(self, obs_shape, args):
        super().__init__()
        self.args, self.n_out, resnet = args, args.projection_dim, load_resnet(args)
        layers = [resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4][: args.encoder_layer]
        self.resnet = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool, *layers)
        self.resnet.requires_grad_(False).eval()
        n_in = self.features(torch.zeros(1, *obs_shape)).shape[1]  # 61,952 of layer 2
        self.project = nn.Sequential(orthogonal(nn.Linear(n_in, self.n_out), 1.0), nn.LayerNorm(self.n_out))
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.resnet.train(mode and self.args.batch_norm == "adapting")
        return self

    def forward(self, *views):
        with torch.autocast(views[0].device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            return self.project(torch.cat([self.features(view) for view in views])).float()

    @torch.no_grad()
    def features(self, images):
        """[B, 3 T, H, W] -> [B, 2 (T - 1) C h w], each frame encoded by itself."""
        frames = images.unflatten(1, (-1, 3))  # [B, T, 3, H, W]
        maps = self.resnet(to_pixels(frames.flatten(0, 1)).sub_(0.5))  # [B T, C, h, w]
        return fuse_frames(maps.unflatten(0, frames.shape[:2]), self.args.frame_differences)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose statistics are put together from those of three frames each.

    Careful: in channels_last on a CPU torch sums a batch in one float32, and loses four of seven digits.
    """

    def forward(self, x):
        if not self.training or x.is_cuda or x.dtype != torch.float32:
            return super().forward(x)
        moments = [torch.batch_norm_update_stats(stack, None, None, 0.0) for stack in x.unflatten(0, (-1, 3))]
        means = torch.stack([mean for mean, _ in moments])  # [B, C]
        variances = torch.stack([variance for _, variance in moments])  # [B, C]
        mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        if self.track_running_stats:
            count = x.numel() // x.shape[1]
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)


class SmallEncoder(nn.Sequential):
    """DrQ-v2's own encoder, which learns. V views [B, 9, 84, 84] in 0..255 -> float32 [V B, 39200]."""

    def __init__(self, obs_shape, args):
        layers = []
        for n_in, stride in ((obs_shape[0], 2), (32, 1), (32, 1), (32, 1)):
            layers.append(orthogonal(nn.Conv2d(n_in, 32, 3, stride=stride), 2**0.5))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers, nn.Flatten())
        self.bf16 = args.precision == "bf16"
        self.n_out = super().forward(torch.zeros(1, *obs_shape)).shape[1]

    def forward(self, *views):
        with torch.autocast(views[0].device.type, torch.bfloat16, enabled=self.bf16):
            return super().forward(to_pixels(torch.cat(views)).sub_(0.5)).float()


def load_resnet(args):
    """torchvision's network with the weights of --encoder-weights."""
    resnet, name = torchvision.models.get_model(args.encoder, norm_layer=BatchNorm), args.encoder_weights
    if name == "random":
        return resnet
    known = dict(torchvision.models.get_model_weights(args.encoder).__members__)
    known["imagenet"] = known["IMAGENET1K_V1"]
    try:
        if name in known:
            weights = known[name].get_state_dict(check_hash=True)
        else:
            weights = torch.load(name, "cpu", weights_only=True)
        resnet.load_state_dict(weights)
    except Exception as error:  # of the network, the disk, the pickle or the shapes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        others = f"a file of torchvision's {args.encoder}, `imagenet` or `random`"
        fail(f"--encoder-weights {name}: {reason}; give {others}")
    return resnet


class Critic(nn.Module):
    """Two estimates of the return, on one projection of their own. [B, n_in], [B, A] -> [2, B]."""

    def __init__(self, n_in, num_actions, args):
        super().__init__()
        self.project = projection(n_in, args.feature_dim)
        self.q1 = mlp(args.feature_dim + num_actions, args.hidden_dim, 1)
        self.q2 = mlp(args.feature_dim + num_actions, args.hidden_dim, 1)

    def forward(self, hidden, actions):
        inputs = torch.cat([self.project(hidden), actions], dim=1)
        return torch.stack([self.q1(inputs), self.q2(inputs)]).squeeze(-1)


class Actor(nn.Module):
    """The action without noise. [B, n_in] -> [B, A] in -1..1."""

    def __init__(self, n_in, num_actions, args):
        super().__init__()
        self.project = projection(n_in, args.feature_dim)
        self.head = mlp(args.feature_dim, args.hidden_dim, num_actions)

    def forward(self, hidden):
        return self.head(self.project(hidden)).tanh()


def projection(n_in, n_out):
    """[B, n_in] -> [B, n_out] in -1..1. Reference code: utils.py, gain 1 in every linear layer."""
    return nn.Sequential(orthogonal(nn.Linear(n_in, n_out), 1.0), nn.LayerNorm(n_out), nn.Tanh())


def mlp(n_in, n_hidden, n_out):
    first = orthogonal(nn.Linear(n_in, n_hidden), 1.0)
    second = orthogonal(nn.Linear(n_hidden, n_hidden), 1.0)
    last = orthogonal(nn.Linear(n_hidden, n_out), 1.0)
    return nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), last)


def orthogonal(layer, gain):
    """The layer with orthogonal weights and no bias."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def to_pixels(obs):
    """uint8 [B, C, H, W] -> float32 [B, C, H, W] in 0..1, in the layout of the convolutions."""
    return obs.contiguous(memory_format=torch.channels_last).float() / 255  # moves bytes, not floats


@torch.no_grad()
def act(agent, obs, noise=None):
    """Actions in -1..1. uint8 [B, 9, 84, 84], noise [B, A] to explore -> dict of [B, A]."""
    actions = agent.actor(agent.encoder(obs))
    return {"actions": actions if noise is None else add_noise(actions, noise)}


# ---- 5. The method ----
def fuse_frames(maps, differences=True):
    """Features of frames 2..T, then what each changed; or of all frames. [B, T, C, h, w] -> [B, F].

    Paper: 2.1, after Shang et al. 2021 (Flare). Reference code: pieg.py:113-119.
    """
    if differences:
        maps = torch.cat([maps[:, 1:], maps[:, 1:] - maps[:, :-1]], dim=1)
    return maps.flatten(1)


def random_overlay(images, pictures):
    """Half of each frame and half of a picture. [B, 3 T, H, W], [B, 3, H, W] -> as images. Paper: 2.2."""
    frames = images.unflatten(1, (-1, 3)).float()
    return ((frames + pictures[:, None]) / 2).flatten(1, 2)


def crop_pictures(pictures, crops, size):
    """The crops of `draw_crops`, resized as PIL does it. uint8 [P, 3, S, S], int64 [B, 6] -> [B, 3, size, size].

    Reference code: utils.py, which reads, crops and mirrors pictures anew for each update.
    """
    number, top, left, height, width, mirrored = crops.unbind(1)
    rows = crop_weights(top, height, size, pictures.shape[2])
    columns = crop_weights(left, width, size, pictures.shape[3])
    columns = torch.where(mirrored[:, None, None] == 1, columns.flip(1), columns)
    return rows[:, None] @ pictures[number].float() @ columns[:, None].mT


def crop_weights(first, length, size, total):
    """What each of the `total` pixels of a line adds to each of the `size` pixels of its crop.

    int64 [B], [B] -> [B, size, total]. Bilinear with antialiasing: triangles, cut off at the ends of the crop.
    """
    first, length = first[:, None, None], length[:, None, None]
    pixels = torch.arange(total, device=first.device) + 0.5
    scale = length / size
    centres = first + scale * (torch.arange(size, device=first.device)[:, None] + 0.5)  # [B, size, 1]
    weights = (1 - (pixels - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixels > first) & (pixels < first + length))
    return weights / weights.sum(2, keepdim=True)


def random_convolution(images, kernels):
    """Each image under a kernel of its own. [B, 3 T, H, W], [B, 3, 3, 3, 3] -> as images, in 0..255.

    Reference code: DMC-GB's augmentations.py repeats the border and ends with a sigmoid.
    """
    batch, (height, width) = len(images), images.shape[2:]
    frames = images.unflatten(1, (-1, 3)).transpose(0, 1).reshape(-1, 3 * batch, height, width).float() / 255
    frames = nn.functional.pad(frames, (1, 1, 1, 1), mode="replicate")
    seen = nn.functional.conv2d(frames, kernels.flatten(0, 1), groups=batch).sigmoid() * 255  # [T, 3 B, H, W]
    return seen.unflatten(1, (batch, 3)).transpose(0, 1).flatten(1, 2)


def add_noise(actions, noise):
    """Noisy actions within -1..1. [B, A], [B, A] -> [B, A]. Careful: the bounds do not stop the gradient."""
    noisy = actions + noise
    return noisy.clamp(-1 + 1e-6, 1 - 1e-6).detach() + (noisy - noisy.detach())


def noise_scale(step, args):
    """sigma at a step of the run: it falls in a straight line and then stays. Paper: DrQ-v2, 3.1."""
    share = min(step / args.noise_steps, 1.0)
    return args.noise_start + share * (args.noise_end - args.noise_start)


def random_shift(images, offsets, pad):
    """Moves each image by offsets - pad pixels and repeats its border. [B, C, H, W], int64 [B, 2] -> as images.

    Paper: DrQ, arXiv:2004.13649: pad by repeating the border, then crop at (row, column) = offsets in 0..2 pad.
    """
    batch, channels, height, width = images.shape
    rows = (torch.arange(height, device=images.device) + offsets[:, :1] - pad).clamp(0, height - 1)  # [B, H]
    columns = (torch.arange(width, device=images.device) + offsets[:, 1:] - pad).clamp(0, width - 1)  # [B, W]
    index = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view_as(images)


# ---- 6. Losses, targets, replay ----
PAD = 4  # an image is shifted by at most so many pixels
PICTURE = 256  # height and width of what is cropped, as in Places365's small version
BLOCK = 8192  # rows of the replay that are on their way between device and disk at once


def load_pictures(args, seed):
    """What crops are drawn from: uint8 [P, 3, 256, 256], chosen by the seed. Other sizes are scaled to this one."""
    if args.overlay_dir == "textures":
        print("overlay: textures that are made here; the paper's pictures are Places365", flush=True)
        rng, parts = torch.Generator().manual_seed(seed), []
        for first in range(0, args.overlay_pictures, 100):
            parts.append(make_textures(min(100, args.overlay_pictures - first), PICTURE, rng))
        return torch.cat(parts)
    kinds = (".jpg", ".jpeg", ".png")
    found = sorted(str(path) for path in Path(args.overlay_dir).rglob("*") if path.suffix.lower() in kinds)
    if not found:
        fail(f"--overlay-dir {args.overlay_dir}: no {' '.join(kinds)} in it; pictures, or `textures`")
    chosen = np.random.default_rng(seed).permutation(found)[: args.overlay_pictures]
    print(f"overlay: crops of {len(chosen)} of {len(found)} pictures in {args.overlay_dir}", flush=True)
    pictures = torch.empty(len(chosen), 3, PICTURE, PICTURE, dtype=torch.uint8)
    for number, path in enumerate(chosen):
        picture = None
        with suppress(cv2.error):  # too large
            picture = cv2.imread(path)  # [H, W, 3], blue comes first
        if picture is None:
            fail(f"--overlay-dir: {path} cannot be read as a picture")
        picture = cv2.resize(picture, (PICTURE, PICTURE), interpolation=cv2.INTER_AREA)
        pictures[number] = torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1)
    return pictures


def draw_crops(count, pictures, rng):
    """Crops as torchvision's RandomResizedCrop and RandomHorizontalFlip draw them: 8 to 100 % of a picture, 3:4 to 4:3.

    uint8 [P, 3, S, S] -> int64 [count, 6]: the picture's number, top, left, height and width, and 1 for a mirrored one.
    """
    size = pictures.shape[2]
    number = torch.randint(len(pictures), (count,), generator=rng)
    area, ratio = torch.rand(2, 10, count, generator=rng)  # ten tries
    area = size**2 * (0.08 + 0.92 * area)
    ratio = (4 / 3) ** (2 * ratio - 1)
    height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (height <= size) & (width <= size)
    first = fits.int().argmax(0, keepdim=True)  # the first try that fits, or the first one, cut off
    height, width = height.gather(0, first)[0].clamp(max=size), width.gather(0, first)[0].clamp(max=size)
    top, left, mirrored = torch.rand(3, count, generator=rng)
    top, left = (top * (size - height + 1)).floor(), (left * (size - width + 1)).floor()
    return torch.stack([number, top, left, height, width, mirrored < 0.5], dim=1).long()


def make_textures(count, size, rng):
    """Patches with edges, soft blobs, 1/f noise, as in nature. -> uint8 [count, 3, size, size]."""
    axis = torch.fft.fftfreq(size).square()
    frequency = (axis[:, None] + axis).sqrt().clamp(min=1 / size)

    def noise(channels, slope):
        """Its amplitude falls as 1 / frequency^slope; each picture has mean 0 and deviation 1."""
        white = torch.randn(count, channels, size, size, generator=rng)
        field = torch.fft.ifft2(torch.fft.fft2(white) / frequency**slope).real
        std, mean = torch.std_mean(field, dim=(2, 3), keepdim=True)
        return (field - mean) / std

    colours = torch.rand(3, count, 3, 1, 1, generator=rng)
    ground, patch, blob = torch.lerp(colours.mean(2, keepdim=True), colours, 0.6)  # half gray, as outdoors
    pictures = torch.where(noise(1, 2.0) > 0.3, patch, ground)
    pictures = torch.lerp(pictures, blob, (4 * noise(1, 3.0) - 4).sigmoid())
    pictures = pictures + 0.12 * noise(1, 1.0) + 0.04 * noise(3, 1.0)
    return (pictures.clamp(0, 1) * 255).byte()


class Replay:
    """The newest transitions of a run, on the training device. Frames are kept once.

    Row i: the newest frame of observation i, the row where its episode began, the action, its reward, whether
    the episode failed with it. An episode's last observation has a row too, whose action means nothing. Row
    `size` is the observation under way. Row i lies at i modulo the capacity, and in the file at i.
    A row can be sampled once its episode has n rows from it on. Reference code: replay_buffer.py.
    """

    def __init__(self, capacity, obs_shape, num_actions, args, device, path):
        self.args, self.device, self.path, self.frames_per_stack = args, device, path, obs_shape[0] // 3
        fields = [("frames", np.uint8, (3, *obs_shape[1:])), ("starts", np.int64), ("rewards", np.float32)]
        fields += [("actions", np.float32, (num_actions,)), ("dones", bool)]
        self.row = np.dtype(fields)  # as in the file at `path`
        self.rows = {}
        for name in self.row.names:
            self.rows[name] = torch.from_numpy(np.zeros(capacity, self.row[name])).to(device)
        self.capacity, self.ready = capacity, np.zeros(capacity, np.int64)
        self.first_ready = self.past_ready = 0  # between them, modulo the capacity: rows to sample, the oldest first
        self.size = self.start = 0  # start: where this episode began
        self.saved = 0  # rows in the file, without the one under way

    def begin(self, frame):
        """The first observation of an episode. An interrupted one ends here as if by a time limit."""
        if self.start < self.size:
            self.size += 1
        self.start = self.size
        self.observe(frame)

    def observe(self, frame):
        self.rows["frames"][self.size % self.capacity] = torch.as_tensor(frame)
        self.rows["starts"][self.size % self.capacity].fill_(self.start)
        oldest = self.size - self.capacity + self.frames_per_stack  # the stacks of older rows have lost a frame
        while self.first_ready < self.past_ready and self.ready[self.first_ready % self.capacity] < oldest:
            self.first_ready += 1

    def add(self, action, reward, done, next_frame):
        """A transition, and the frame after it: of the same episode, also if it ends there."""
        place = self.size % self.capacity
        self.rows["actions"][place] = torch.as_tensor(action)
        self.rows["rewards"][place].fill_(reward)  # a kernel; an assignment would wait for a copy to the GPU
        self.rows["dones"][place].fill_(done)
        self.size += 1
        if self.size - self.args.n_step >= self.start:
            self.ready[self.past_ready % self.capacity] = self.size - self.args.n_step
            self.past_ready += 1
        self.observe(next_frame)

    def sample(self, uniform):
        """Rows of transitions, all equally likely. float64 [B] in 0..1, on the CPU -> int64 [B]."""
        count = self.past_ready - self.first_ready
        if count == 0:
            fail(f"--n-step {self.args.n_step}: no episode was that long so far")
        places = self.first_ready + (uniform.numpy() * count).astype(np.int64)
        return torch.from_numpy(self.ready[places % self.capacity])

    def gather(self, index):
        """Stacks, actions, n-step returns, bootstrap factors of rows. int64 [B] -> dict of [B, ...]."""
        n_step, gamma, capacity = self.args.n_step, self.args.gamma, self.capacity
        both = torch.cat([index, index + n_step])
        stacks = both[:, None] + torch.arange(1 - self.frames_per_stack, 1, device=self.device)  # [2B, T]
        starts = self.rows["starts"][both % capacity]
        stacks = torch.maximum(stacks, starts[:, None])  # the first frame of an episode is repeated
        obs, next_obs = self.rows["frames"][stacks % capacity].flatten(1, 2).chunk(2)
        steps = torch.arange(n_step, device=self.device)
        window = (index[:, None] + steps) % capacity  # [B, n]
        returns = (self.rows["rewards"][window] * gamma**steps).sum(1)
        bootstrap = gamma**n_step * ~self.rows["dones"][window].any(1)  # a failure is the last row
        batch = {"obs": obs, "next_obs": next_obs, "actions": self.rows["actions"][index % capacity]}
        return {**batch, "returns": returns, "bootstrap": bootstrap}

    def state_dict(self):
        """Appends the new rows to the file and flushes them to disk; returns all the rest."""
        first = max(self.saved, self.size + 1 - self.capacity)  # rows lost before a save leave a hole
        places = torch.arange(first, self.size + 1, device=self.device) % self.capacity
        if not self.rows["rewards"][places].isfinite().all():
            sys.exit(f"error: a reward is not finite at step {self.size} or before; {self.path} is as it was")
        self.path.touch()
        with open(self.path, "r+b") as file:
            # The row that was under way at the last save is always in the file: its checkpoint needs it.
            file.truncate((self.saved + 1) * self.row.itemsize)  # what follows belongs to no checkpoint
            file.seek(first * self.row.itemsize)
            for block in places.split(BLOCK):
                rows = np.empty(len(block), self.row)
                for name, values in self.rows.items():
                    rows[name] = values[block].cpu()
                file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        self.saved = self.size
        return {"size": self.size, "start": self.start}

    def load_state_dict(self, state):
        """Takes the state and reads its newest rows back from the file, with the one under way."""
        self.size, self.start = state["size"], state["start"]
        if not self.path.is_file() or self.path.stat().st_size < (self.size + 1) * self.row.itemsize:
            fail(f"{self.path} does not hold the {self.size + 1} rows of the checkpoint")
        stored = np.memmap(self.path, self.row, "r", shape=self.size + 1)
        numbers = np.arange(max(self.size + 1 - self.capacity, 0), self.size + 1)
        for first in range(0, len(numbers), BLOCK):
            block = numbers[first : first + BLOCK]
            for name, values in self.rows.items():
                part = torch.from_numpy(stored[name][block]).to(self.device)
                values[torch.from_numpy(block % self.capacity)] = part
        starts = stored["starts"][numbers]
        n_step = self.args.n_step
        ready = numbers[:-n_step][starts[:-n_step] == starts[n_step:]]  # same episode n rows on
        ready = ready[ready >= self.size - self.capacity + self.frames_per_stack]  # as `observe` has it
        self.ready[: len(ready)] = ready
        self.first_ready, self.past_ready = 0, len(ready)
        self.saved = self.size


# ---- 7. Update ----
def update(agent, target, optimizer, replay, pictures, draws, args):
    """One gradient step of critic and encoder, one of the actor, and the target's -> dict of detached [].

    draws: rows [B] of the replay, offsets [2, B, 2] of observations and next ones, and for the actions in both
    normal [2, B, A]; strong, crops [B, 6] or kernels [B, 3, 3, 3, 3]; sigma []. Reference code: the order in which
    batch normalisation sees plain, augmented and next observations.
    """
    batch, size = replay.gather(draws["rows"]), len(draws["rows"])
    obs = random_shift(batch["obs"], draws["offsets"][0], PAD)
    next_obs = random_shift(batch["next_obs"], draws["offsets"][1], PAD)
    noise = (draws["sigma"] * draws["normal"]).clamp(-args.noise_clip, args.noise_clip)  # [2, B, A]
    views = [obs]
    if args.strong_augmentation == "overlay":
        views.append(random_overlay(obs, crop_pictures(pictures, draws["strong"], obs.shape[2])))
    elif args.strong_augmentation == "conv":
        views.append(random_convolution(obs, draws["strong"]))
    hidden = agent.encoder(*views)  # [V B, D]
    with torch.no_grad():  # Careful: both views have the targets of plain next observations
        next_hidden = agent.encoder(next_obs)
        next_q = target(next_hidden, add_noise(agent.actor(next_hidden), noise[1]))  # [2, B]
        targets = batch["returns"] + batch["bootstrap"] * next_q.amin(0)

    def descend(name, loss, params):
        optimizer.zero_grad()  # Adam leaves what has no gradient as it is, moments included
        loss.backward(inputs=params)
        parts[f"{name}_loss"] = loss.detach()
        parts[f"{name}_grad_norm"] = nn.utils.get_total_norm([param.grad for param in params])
        optimizer.step()

    parts = {}
    q = agent.critic(hidden, batch["actions"].repeat(len(views), 1))  # [2, V B]
    learned = [param for param in agent.encoder.parameters() if param.requires_grad]
    loss = (q - targets.repeat(len(views))).square().sum(0).mean()
    descend("qf", loss, [*learned, *agent.critic.parameters()])
    parts["qf1_values"], parts["qf2_values"] = q.detach().mean(1)
    # Careful: features from before the step, of plain observations; the critic is the new one.
    hidden = hidden[:size].detach()
    q = agent.critic(hidden, add_noise(agent.actor(hidden), noise[0]))
    descend("actor", -q.amin(0).mean(), list(agent.actor.parameters()))
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(agent.critic.parameters()), args.tau)
    return parts


class Captured:
    """A function of tensors -> {name: tensor}. If `on`: three plain calls, then one CUDA graph, in the memory `pool`.

    Graphs can share a pool, because nothing that one leaves in it is read after another's replay.
    """

    def __init__(self, function, on, pool=None):
        self.function, self.on, self.pool, self.calls, self.graph = function, on, pool, 0, None
        self.stream = torch.cuda.Stream() if on else None

    def __call__(self, *inputs):
        if not self.on:
            return self.function(*inputs)
        self.calls += 1
        if self.calls <= 3:  # torch wants a few calls on another stream before it records
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.graph is None:
            self.inputs, self.graph = [value.clone() for value in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.pool):
                self.outputs = self.function(*self.inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            if own.shape != given.shape:
                raise ValueError(f"recorded with {own.shape}, called with {given.shape}")
            own.copy_(given)
        self.graph.replay()
        return {name: value.clone() for name, value in self.outputs.items()}  # a replay overwrites the outputs


# ---- 8. Training and evaluation ----
def train(args, make_envs=make_envs, make_agent=Agent):
    """Trains to args.total_timesteps and returns the agent. Pass your own factories to change suite or network."""
    args, device = set_up_torch(check(args))
    run = Run(args)
    before = run.state["about"]["args"]["overlay_dir"] if args.resume else args.overlay_dir
    if (before == "textures") != (args.overlay_dir == "textures"):  # pictures may lie elsewhere now
        fail(f"--overlay-dir is {before} in that run: pictures and textures cannot be exchanged")
    envs = make_envs(args, "train", run.step)
    obs_shape, num_actions = envs.single_observation_space.shape, envs.single_action_space.shape[0]
    seeds = np.random.SeedSequence(args.seed).generate_state(7).tolist()
    torch.manual_seed(seeds[0])
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds[2:]]
    explore_rng, sample_rng, noise_rng, augment_rng, strong_rng = rngs
    loaded = replace(args, encoder_weights="random") if args.resume else args  # the checkpoint has the weights
    agent = make_agent(envs, loaded).to(device)
    target = copy.deepcopy(agent.critic).requires_grad_(False)
    learned = [param for param in agent.parameters() if param.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=args.learning_rate, eps=args.adam_eps, fused=True)
    pictures = torch.empty(1, device=device)
    if args.strong_augmentation == "overlay":
        pictures = load_pictures(args, seeds[1]).to(device)
    replay = Replay(rows_needed(args), obs_shape, num_actions, args, device, run.folder / "replay.bin")
    parts = {"agent": agent, "target": target, "optimizer": optimizer, "replay": replay}
    parts.update(explore_rng=explore_rng, sample_rng=sample_rng, noise_rng=noise_rng, augment_rng=augment_rng)
    run.restore({**parts, "strong_rng": strong_rng, "torch_rng": torch.default_generator})
    graphs = args.cuda_graphs and device.type == "cuda"
    optimizer.param_groups[0]["capturable"] = graphs  # the checkpoint's may be of another device

    def draw():
        """The random numbers of an update, each kind from its own stream."""
        size = args.batch_size
        rows = replay.sample(torch.rand(size, dtype=torch.float64, generator=sample_rng))
        offsets = torch.randint(2 * PAD + 1, (2, size, 2), generator=augment_rng)
        normal = torch.randn(2, size, num_actions, generator=noise_rng)
        strong = torch.zeros(size)
        if args.strong_augmentation == "overlay":
            strong = draw_crops(size, pictures, strong_rng)
        elif args.strong_augmentation == "conv":
            strong = torch.randn(size, 3, 3, 3, 3, generator=strong_rng)
        draws = (rows, offsets, normal, strong, torch.tensor(noise_scale(run.step, args)))
        return [values.to(device, non_blocking=True) for values in draws]

    def learn(rows, offsets, normal, strong, sigma):
        draws = {"rows": rows, "offsets": offsets, "normal": normal, "strong": strong, "sigma": sigma}
        return update(agent, target, optimizer, replay, pictures, draws, args)

    learner, policy = Captured(learn, graphs), Captured(partial(act, agent), graphs)
    obs, _ = envs.reset()
    replay.begin(obs[0, -3:])
    rewards, losses, seconds = [], [], 0.0  # since the last log line
    with run:
        while True:
            last = run.step >= args.total_timesteps
            if run.evaluation_due():  # at the top, so that an interrupted one is made after a resume
                start = time.monotonic()
                episodes = final_episodes(args) if last else args.eval_episodes
                run.say(f"evaluating, {episodes} episodes per look")
                run.log(compare([agent], replace(args, eval_episodes=episodes), make_envs, run.tick))
                run.log({"charts/eval_episodes": episodes, "charts/eval_seconds": time.monotonic() - start})
                run.log({"charts/hours": run.hours()})
                run.evaluated = run.step
            if last:
                break

            # Act.
            start = time.monotonic()
            if run.step < args.learning_starts:
                actions = torch.rand(1, num_actions, generator=explore_rng) * 2 - 1
            else:
                noise = noise_scale(run.step, args) * torch.randn(1, num_actions, generator=explore_rng)
                agent.eval()  # acting goes by the running statistics, learning by the batch's
                actions = policy(torch.as_tensor(obs).to(device), noise.to(device))["actions"]
                agent.train()
            actions = actions.cpu().numpy()

            # Learn. Reference code: before the environment steps.
            if run.step >= args.learning_starts and run.step % args.update_every == 0:
                losses.append(learner(*draw()))

            # Step.
            obs, reward, terminated, truncated, info = envs.step(actions)
            ended = bool(terminated[0] | truncated[0])
            next_obs = info["final_obs"][0] if ended else obs[0]
            replay.add(actions[0], float(reward[0]), bool(terminated[0]), next_obs[-3:])
            if ended:
                replay.begin(obs[0, -3:])
            rewards.append(float(reward[0]))
            run.step += 1
            seconds += time.monotonic() - start  # without evaluating and saving

            # Log and save.
            for _, episode_return, length in info["episodes"]:
                run.log({"charts/episodic_return": episode_return, "charts/episodic_length": length})
            exact = ended and run.passed(args.exact_every, run.exact_step)
            if exact or run.step % 1000 == 0 or run.step >= args.total_timesteps:
                run.log({"charts/reward": sum(rewards) / len(rewards), "charts/frames": args.action_repeat * run.step})
                run.log({"charts/SPS": len(rewards) / seconds})
                if losses:
                    for key, value in default_collate(losses).items():
                        run.log({f"losses/{key}": value.mean().item()})
                rewards, losses, seconds = [], [], 0.0
            run.tick(1)
            if exact:  # in every run, or a resumed one would differ
                envs.close()
                envs = make_envs(args, "train", run.step)
                obs, _ = envs.reset()
                replay.begin(obs[0, -3:])
                run.save(exact=True)
            elif run.save_due():
                run.save()
        run.save()
    envs.close()
    return agent


def rows_needed(args):
    """Rows of the replay. The last observation of an episode takes one too; episodes have 20 steps or more."""
    return min(args.buffer_size, args.total_timesteps + args.total_timesteps // 20 + 1000)


def final_episodes(args):
    """Episodes of the last evaluation. By default fewer in a run so short that they would take longer than it."""
    return args.final_eval_episodes or min(100, max(10, args.total_timesteps // 500))


def evaluate(agent, args, make_envs, split, tick=lambda: None):
    """Returns [args.eval_episodes] of greedy episodes of `split`, drawn by args.eval_seed.

    Reference code: reseval.py, where batch normalisation goes by the frames of the observation (--eval-batch-norm
    running: as in training). Touches no random stream of training, and no running statistics.
    """
    envs = make_envs(replace(args, seed=args.eval_seed, num_envs=1), split)
    device, returns = next(agent.parameters()).device, []
    bar = tqdm(total=args.eval_episodes, desc=f"evaluation, {split}", leave=False, disable=None)
    agent.eval()
    normalise_by_own(agent, args)
    obs, _ = envs.reset()
    while len(returns) < args.eval_episodes:
        actions = act(agent, torch.as_tensor(obs).to(device))["actions"]
        obs, _, _, _, info = envs.step(actions.cpu().numpy())
        for _, episode_return, _ in info["episodes"]:
            returns.append(episode_return)
            bar.update()
        tick()
    bar.close()
    envs.close()
    normalise_by_own(agent, args, False)
    agent.train()
    return np.array(returns)


def normalise_by_own(agent, args, on=True):
    """Whether adapting batch normalisation goes by its own input in eval mode. Running statistics stay. Paper: 3.3."""
    on = on and args.batch_norm == "adapting" and args.eval_batch_norm == "frames"
    for layer in agent.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.training, layer.track_running_stats = on, not on


def compare(agents, args, make_envs, tick=lambda: None):
    """{key: number} to log: the agent's mean return, in the look that it was trained on and in DMC-GB's."""
    scalars = {}
    for split in ("test", *args.eval_modes):
        scalars[f"eval/{split}_return"] = float(evaluate(agents[0], args, make_envs, split, tick).mean())
    return scalars


# ---- 9. Checkpoints, logs, command line ----
class Run:
    """A run: its step, its folder, the `parts` that its checkpoints hold, its log and its progress bar.

    Environments cannot be saved. They start afresh after a resume, and in every run at multiples of
    --exact-every. A run resumed from such a point repeats the uninterrupted one bit for bit.
    """

    def __init__(self, args):
        self.args, self.handlers, self.stop = args, {}, 0
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.folder = Path(args.resume or Path(args.runs_dir) / name)
        self.about = describe(args)
        self.state = {"step": 0, "evaluated": 0, "exact_step": 0, "exact": True, "metrics_bytes": 0}
        if args.resume:
            self.state = load_checkpoint(self.folder)
            before, now = self.state["about"], self.about
            for name, value in now["args"].items():
                if value != before["args"][name]:
                    now["sessions"][0]["changed"][name] = value
                    if not name.startswith(MAY_CHANGE):
                        fail(f"--{name.replace('_', '-')} is {before['args'][name]} in that run and stays so")
            self.about = {**before, "args": now["args"], "sessions": before["sessions"] + now["sessions"]}
        self.step = self.state["step"]  # steps of each agent
        self.evaluated = self.state["evaluated"]  # step of the last evaluation
        self.exact_step = self.state["exact_step"]  # step at which environments started afresh
        self.exact = self.state["exact"]  # nothing was played or learned since then
        self.earlier, self.began = self.state.get("hours", 0.0), time.monotonic()  # earlier: hours of other sessions
        if self.step >= args.total_timesteps and not self.evaluation_due():
            fail(f"{self.folder} is finished at step {self.step}: raise --total-timesteps")

    def restore(self, parts):
        """Takes what checkpoints hold; if the run is resumed, gives these parts their state back."""
        self.parts = parts
        self.about["parameters"] = 0  # that learn
        for optimizer in [part for part in parts.values() if isinstance(part, torch.optim.Optimizer)]:
            for group in optimizer.param_groups:
                self.about["parameters"] += sum(param.numel() for param in group["params"] if param.requires_grad)
        if self.args.resume:
            for name, part in parts.items():
                load = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
                try:
                    load(self.state[name])
                except (RuntimeError, ValueError, KeyError) as error:  # a changed network, or a changed task
                    reason, _, _ = str(error).partition("\n")
                    fail(f"{self.folder} is not of this script as it is now, but of its copy there: {name}: {reason}")
            before, now = self.about["sessions"][-2:]
            other = [key for key in ("hardware", "python", "packages", "script") if before[key] != now[key]]
            how = "bit for bit" if self.exact and not other else "continued, in fresh environments"
            changed = f" (changed: {', '.join(other)})" if other else ""
            print(f"step {self.step}: {how}{changed}", flush=True)

    def __enter__(self):
        """Opens the files. From here on, a signal ends the run at its next tick, with a checkpoint."""
        if self.args.track:
            import wandb

            about = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity}
            about.update(id=self.folder.name, name=self.folder.name, config=asdict(self.args))
            try:
                self.wandb = wandb.init(**about, resume="allow", sync_tensorboard=True)
            except Exception as error:  # no account, no network, a name it refuses
                reason, _, _ = str(error).partition("\n")
                fail(f"--track: {reason}")
        try:
            self.folder.mkdir(parents=True, exist_ok=bool(self.args.resume))
            self.metrics = open(self.folder / "metrics.csv", "a", buffering=1)
        except OSError as error:
            fail(f"{self.folder} cannot be written: {error.strerror}")
        try:
            fcntl.flock(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{self.folder} cannot be written: another process is running it")
        except OSError as error:
            print(f"warning: a second process on this run would not be noticed: {error.strerror}", flush=True)
        if self.args.resume:  # what was logged after the checkpoint is done again
            self.metrics.truncate(self.state["metrics_bytes"])
        else:
            self.metrics.write("step,key,value\n")
        write_whole(self.folder / Path(__file__).name, Path(__file__).read_bytes())
        write_whole(self.folder / "args.json", json.dumps(self.about, indent=1).encode())
        self.state = None  # it holds all weights once more
        self.events = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        print(self.folder, flush=True)
        self.saved_at = time.monotonic()
        self.bar = tqdm(initial=self.step, total=self.args.total_timesteps, unit_scale=True, disable=None)
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # SIGUSR1: Slurm's time is nearly over
                self.handlers[number] = signal.signal(number, self.on_signal)

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for part in (self.bar, self.metrics, self.events):
            part.close()
        if self.args.track:
            self.wandb.finish()

    def on_signal(self, number, _):
        """The run saves and ends at its next tick; a second signal ends it at once."""
        self.stop = number
        signal.signal(number, self.handlers[number])

    def tick(self, steps=0):
        """Counts steps played or learned from. The state is whole here, so here a signal ends the run."""
        self.exact = self.exact and steps == 0
        self.bar.update(steps)
        if self.stop:
            self.save()
            name = signal.Signals(self.stop).name
            print(f"stopped by {name}; continue with --resume {self.folder}", flush=True)
            sys.exit(128 + self.stop)

    def log(self, values):
        """Writes {key: number} to metrics.csv and TensorBoard. One that is not finite ends the program."""
        for key, value in values.items():
            if not np.isfinite(value):
                self.fail(f"{key} is {value}")
            self.metrics.write(f"{self.step},{key},{value}\n")
            self.events.add_scalar(key, value, self.step)
            if key in ("charts/episodic_return", "eval/test_return"):
                self.say(f"{key} {value:.2f}")

    def say(self, text):
        self.bar.clear()
        print(f"step {self.step}: {text}", flush=True)

    def fail(self, what):
        sys.exit(f"error: {what} at step {self.step}; what was saved in {self.folder} is from before")

    def passed(self, every, last):
        """Whether a multiple of `every` (0: never) was passed since the step `last`."""
        return every > 0 and self.step // every > last // every

    def hours(self):
        """Of all sessions, with evaluations."""
        return self.earlier + (time.monotonic() - self.began) / 3600

    def evaluation_due(self):
        every, last = self.args.eval_every, self.step >= self.args.total_timesteps
        return self.passed(every, self.evaluated) or (last and every > 0 and self.step > self.evaluated)

    def save_due(self):
        late = time.monotonic() > self.saved_at + 60 * self.args.save_minutes
        return (late and self.args.save_minutes > 0) or self.step >= self.args.total_timesteps

    def save(self, exact=False):
        """Writes checkpoint.pt. exact: environments have just started afresh."""
        if exact:
            self.exact, self.exact_step = True, self.step
        state = {"script": Path(__file__).stem, "step": self.step, "evaluated": self.evaluated}
        state.update(exact=self.exact, exact_step=self.exact_step, hours=self.hours())
        for name, part in self.parts.items():
            save = part.get_state if isinstance(part, torch.Generator) else part.state_dict
            state[name] = save()
            for value in tree_leaves(state[name]):
                number = isinstance(value, torch.Tensor | float)
                if number and not torch.as_tensor(value).isfinite().all():
                    self.fail(f"{name} is not finite")
        os.fsync(self.metrics.fileno())
        state["metrics_bytes"] = os.path.getsize(self.metrics.name)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(self.folder / "checkpoint.pt", buffer.getbuffer())
        self.saved_at = time.monotonic()


def write_whole(path, data):
    """Writes a file whole or not at all: beside its place, flushed to disk, then renamed."""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_checkpoint(folder):
    """The state in a run's checkpoint.pt; "about" is what its args.json says."""
    try:
        state = torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True)
        state["about"] = json.loads((Path(folder) / "args.json").read_text())
        if os.path.getsize(Path(folder) / "metrics.csv") < state["metrics_bytes"]:
            raise ValueError("metrics.csv has lost lines since the checkpoint")
        if state["script"] != Path(__file__).stem:
            raise ValueError(f"it is a run of {state['script']}.py")
    except Exception as error:
        fail(f"{folder} is no run that can be read: {str(error).splitlines()[0]}")
    return state


def load_agents(args, state, make_envs=make_envs, make_agent=Agent):
    """The agent of a checkpoint in a list, for `evaluate` and `act`."""
    args, device = set_up_torch(args)
    envs = make_envs(replace(args, num_envs=1), "test")
    agent = make_agent(envs, replace(args, encoder_weights="random")).to(device)
    agent.load_state_dict(state["agent"])
    envs.close()
    return [agent]


def describe(args):
    """What args.json says: all that it takes to make the run again, with a session for each start."""
    script = Path(__file__).resolve()
    git = f"git -C '{script.parent}' describe --always --dirty --abbrev=40 --exclude '*' 2>&1"
    said = subprocess.getoutput(git)
    if "dubious ownership" in said:
        print(f"warning: git does not trust the owner of {script.parent}, so no commit is recorded", flush=True)
    commit = re.search(r"(?m)^[0-9a-f]{40}(-dirty)?$", said)
    cpu = "{ lscpu | sed -n 's/^Model name: *//p' | grep . || sysctl -n machdep.cpu.brand_string; } 2>/dev/null"
    gpu = torch.cuda.get_device_name() if args.cuda and torch.cuda.is_available() else None
    hardware = {"gpu": gpu, "cpu": subprocess.getoutput(cpu), "cores": os.cpu_count()}
    hardware["torch_threads"] = torch.get_num_threads()
    command = sys.argv
    if "ipykernel" in sys.modules or hasattr(sys, "ps1"):  # called from a notebook or a prompt
        command = [script.name, repr(args)]
    about = {"command": command, "commit": commit[0] if commit else "", "hardware": hardware}
    about["script"] = hashlib.sha256(script.read_bytes()).hexdigest()
    about["python"] = platform.python_version()
    about["packages"] = {package.name: package.version for package in distributions()}
    session = {**about, "changed": {}}  # changed: the arguments that a resume changed
    return {**about, "args": json.loads(json.dumps(asdict(args))), "sessions": [session]}


def set_up_torch(args):
    """The arguments with a definite precision, and the device; sets torch's global switches."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.precision == "auto":
        args = replace(args, precision="tf32" if device.type == "cuda" else "fp32")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    print(f"{args.precision} on {name}", flush=True)
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"  # convolutions
    torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
    return args, device


# Arguments that a resumed run may change begin with these: nothing that is learned depends on them.
MAY_CHANGE = ("resume", "total_timesteps", "eval_every", "eval_episodes", "eval_seed", "final_eval_", "save_")
MAY_CHANGE += ("runs_dir", "cuda", "track", "wandb_")
MAY_CHANGE += ("eval_modes", "dmcgb_dir", "overlay_dir")
POSITIVE = ("eval_episodes", "num_envs", "batch_size", "n_step", "update_every", "noise_steps")
POSITIVE += ("encoder_layer", "projection_dim", "feature_dim", "hidden_dim", "overlay_pictures")
LARGEST = {"gamma": 1, "tau": 1, "num_envs": 1, "encoder_layer": 4}


def check(args):
    """The arguments in one spelling, with the task's values for zeros. Ends the program with one line if one of them
    makes no sense or data is missing. Reference code: cfgs/task and cfgs/piegconfig.yaml.
    """
    try:
        task = task_of(args.env_id)
    except ValueError as error:
        fail(f"--env-id {error}")
    domain = task.split("-")[0]
    noise = 2_000_000 if domain in ("dog", "humanoid", "humanoid_CMU") else 500_000
    own = {"action_repeat": 2, "noise_steps": 100_000 if task in EASY.split() else noise}
    own["feature_dim"] = 50 if args.encoder == "drqv2" else 256  # 50 is DrQ-v2's
    own["batch_size"], own["n_step"] = (512, 1) if domain == "walker" else (256, 3)
    own["buffer_size"] = 100_000 if task == "quadruped-run" else 1_000_000
    own["total_timesteps"] = FRAMES // abs(args.action_repeat or 2)
    own["overlay_pictures"] = 1_000 if args.overlay_dir == "textures" else 10_000
    for name in own:
        own[name] = getattr(args, name) or own[name]
    args = replace(args, env_id=task, **own)
    smallest = {**dict.fromkeys(POSITIVE, 1), "learning_starts": args.n_step, "buffer_size": 2 * args.n_step + 4}
    for name, value in vars(args).items():
        low, high = smallest.get(name, 0), LARGEST.get(name, sys.maxsize)
        if isinstance(value, int | float) and not low <= value <= high:
            most = f" to {high}" if high < sys.maxsize or value > high else ""
            fail(f"--{name.replace('_', '-')} {value}: from {low}{most}")
    for mode in args.eval_modes:
        try:
            looks = dmcgb_data(args.dmcgb_dir, mode)
        except Exception as error:  # of the disk, a pickle, JSON or what they hold
            fail(f"--eval-modes {mode}: {str(error).splitlines()[0]}")
        if mode in CLIPS and len(looks) < CLIPS[mode]:
            print(f"warning: {len(looks)} of the {CLIPS[mode]} clips of {mode} are there: no figure to publish")
    reads_pictures = args.strong_augmentation == "overlay" and args.overlay_dir != "textures"
    if reads_pictures and not Path(args.overlay_dir).is_dir():
        fail(f"--overlay-dir {args.overlay_dir}: no such folder; one with pictures, or `textures`")
    size, folder = 3 * 84 * 84 * args.total_timesteps, args.runs_dir if Path(args.runs_dir).exists() else "."
    if size > shutil.disk_usage(folder).free and not args.resume:
        fail(f"--total-timesteps: {size >> 20} MB of replay do not fit on the disk")
    if "/" in args.exp_name or not args.exp_name.isprintable():
        fail(f"--exp-name {args.exp_name!r}: is part of a folder's name, so no slash and no line break")
    if args.track and set(args.exp_name) & set(":;,#?'"):
        fail(f"--exp-name {args.exp_name}: is part of a W&B id, which cannot contain any of : ; , # ? '")
    if args.cuda_required and not torch.cuda.is_available():
        fail("--cuda-required: torch finds no GPU here")
    if args.track and not getattr(find_spec("wandb"), "origin", None):  # a mere folder called wandb has none
        fail("--track: pip install wandb")
    return args


def fail(message):
    """Ends the program as a wrong flag does: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main(flags=None, make_envs=make_envs, make_agent=Agent):
    """The command line, or `flags` in its place. A resumed run begins with its last arguments."""
    args = tyro.cli(Args, args=flags)
    if args.resume:
        saved = load_checkpoint(args.resume)["about"]["args"]
        if saved.keys() != vars(args).keys():
            fail(f"{args.resume} is a run of another version of {Path(__file__).name}")
        args = tyro.cli(Args, args=flags, default=Args(**saved))
    try:
        return train(args, make_envs, make_agent)
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason, _, _ = str(error).partition("\n")
        fail(f"out of memory: {reason}")


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # TensorBoard's thread fails on a full disk too
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}; what was saved before is whole")
    except KeyboardInterrupt:  # before training, or a second one
        sys.exit("stopped at once; what was saved before is whole")

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "dm_control==1.0.50", "gymnasium==1.4.0", "mujoco==3.17.0", "numpy==2.4.6", "opencv-python-headless==5.0.0.93",
#     "tensorboard==2.21.0", "torch==2.14.0", "torchvision==0.29.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""PIE-G on DeepMind Control, judged on scenes it never saw: DrQ-v2 that sees through the first layers of a ResNet, as
ImageNet left them. A projection learns to read their features; the critic learns from each frame as it is and from the
same frame under another picture. DMC-GB's five looks of the suite are inside (`make_dmc`).

Paper: Yuan et al. 2022, Pre-Trained Image Encoder for Generalizable Visual Reinforcement Learning (PIE-G).
Checked against github.com/gemcollector/PIE-G (3588cf8), github.com/facebookresearch/drqv2 (c0c650b), and for the looks
github.com/nicklashansen/dmcontrol-generalization-benchmark (ff9c0aa).
Deviations: pictures to overlay are drawn and cropped once, not for each update, and without --overlay-dir they are
made up here; the episode under way is learned from too, and an episode's last observation takes a row of the replay;
the pretrained running statistics start as they are (the authors' constructor moves them by a tenth towards noise);
evaluations during training go by the frames' own statistics, as the authors' last one does; humanoids and dogs have
the other tasks' learning rate and widths; seeds are our own.

    python algos/drqv2_pieg.py --env-id walker-walk                            # the paper: 1M frames, 500k steps
    python algos/drqv2_pieg.py --env-id walker-walk --encoder drqv2 --strong-augmentation none    # its baseline, DrQ-v2
    python algos/drqv2_pieg.py --env-id walker-walk --encoder-weights random   # without a network
    python algos/drqv2_pieg.py --resume runs/<folder>                          # go on where a run stopped
    python algos/drqv2_pieg.py --evaluate runs/<folder> --eval-modes color_hard video_easy video_hard
"""

# ---- 1. Imports ----
import copy
import ctypes
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Literal, get_args
from xml.etree import ElementTree

# Easy to miss: before torch is imported. glibc gives large blocks back to the kernel after each operation and faults
# them in again, up to half of a run on a CPU; with these M_TRIM_THRESHOLD (-1) and M_MMAP_THRESHOLD (-3) it keeps them.
if sys.platform == "linux":
    libc = ctypes.CDLL(None)
    if libc.mallopt(-3, 2**30):  # an old glibc refuses it, and then the other one alone would do harm
        libc.mallopt(-1, 2**31 - 1)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to repeat a result bit for bit

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torchvision
import tyro
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2 as transforms
from tqdm import tqdm

# ---- 2. Arguments ----
Mode = Literal["color_easy", "color_hard", "video_easy", "video_hard"]  # of DMC-GB, besides "train"


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # second part of the run folder's name
    seed: int = 1  # one seed, one run (same machine, packages and number of threads)
    torch_deterministic: bool = True  # only kernels that repeat bit for bit
    cuda: bool = True  # use a GPU if there is one
    cuda_required: bool = False  # refuse to run without a GPU
    cuda_graphs: bool = True  # on a GPU: record acting and learning once and replay them
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # of the encoder (auto: tf32 on a GPU, else fp32)
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "holdout"  # project for --track
    wandb_entity: str | None = None  # team for --track
    runs_dir: str = "runs"  # where run folders are made
    save_minutes: float = 5.0  # minutes between safety checkpoints (0: never)
    exact_every: int = 50_000  # steps between bit-for-bit checkpoints, where environments start afresh (0: never)
    resume: str | None = None  # run folder or checkpoint to go on from
    evaluate: str | None = None  # run folder or checkpoint to evaluate, without training
    eval_every: int = 5_000  # steps between evaluations (0: never)
    eval_episodes: int = 10  # episodes an evaluation, agent and set of levels
    final_eval_episodes: int = 100  # episodes of the last evaluation
    eval_seed: int = 42  # draws the evaluated levels, the same ones each time
    eval_modes: tuple[Mode, ...] = ()  # looks of DMC-GB to evaluate besides the one trained on
    eval_batch_norm: Literal["frames", "running"] = "frames"  # when evaluated, if adapting: the frames', or training's
    dmcgb_dir: str = "data/dmcgb"  # DMC-GB's colours and clips, which `make dmcgb` fetches

    env_id: str = "walker-walk"  # the game (or its EnvPool id) or task; a wrong one is told the right ones
    action_repeat: int = 0  # frames a step (0: the task's)
    total_timesteps: int = 0  # steps an agent (PPO: rounded up to whole rollouts; DMC, 0: the paper's)
    # Paper: the method.
    encoder: Literal["resnet18", "resnet34", "resnet50", "drqv2"] = "resnet18"  # frozen; drqv2: small, and it learns
    encoder_weights: str = "imagenet"  # imagenet (V1), another name of torchvision's, a file of its weights, or random
    encoder_layer: int = 2  # last of the ResNet's four layers that is used
    projection_dim: int = 1024  # width of the projection that learns to read the frozen features
    frame_differences: bool = True  # features of the newer frames and their changes; off: of all frames
    batch_norm: Literal["adapting", "fixed"] = "adapting"  # statistics in updates: the batch's, or the pretrained ones
    strong_augmentation: Literal["overlay", "conv", "none"] = "overlay"  # what the critic sees a frame through as well
    overlay_dir: str = "textures"  # folder with pictures (the paper's: Places365), or textures, which are made here
    overlay_pictures: int = 10_000  # pictures that are overlaid, drawn from that folder; how many is ours
    # Paper: DrQ-v2. Reference code, where it is silent: cfgs/piegconfig.yaml and cfgs/task.
    num_envs: int = 1  # N, parallel environments an agent
    learning_starts: int = 2_000  # random steps before the first update
    update_every: int = 2  # steps an update
    buffer_size: int = 0  # observations that the replay holds; then the oldest ones go (DrQ-v2: 0, the task's)
    batch_size: int = 0  # B, transitions an update (DrQ-v2: 0, the task's)
    n_step: int = 0  # n, rewards before the bootstrap (DrQ-v2: 0, the task's)
    gamma: float = 0.99  # discount
    noise_start: float = 1.0  # sigma, standard deviation of the noise on actions, at first
    noise_end: float = 0.1  # at last
    noise_steps: int = 0  # steps in which it falls, in a straight line (0: the task's)
    noise_clip: float = 0.3  # c, the most noise on an action in an update
    feature_dim: int = 0  # width of what critic and actor see (0: 256, or 50 with DrQ-v2's encoder)
    hidden_dim: int = 1024  # width of their layers
    tau: float = 0.01  # share of the online network that flows into the target network at each update
    learning_rate: float = 1e-4  # Adam
    adam_eps: float = 1e-8  # Adam's epsilon


# ---- 3. Environments ----
# The tasks of dm_control's suite, but for lqr, which has no time limit and whose actions have no bounds.
SUITE = {
    "acrobot": "swingup swingup_sparse",
    "ball_in_cup": "catch",
    "cartpole": "balance balance_sparse swingup swingup_sparse two_poles three_poles",
    "cheetah": "run",
    "dog": "stand walk trot run fetch",
    "finger": "spin turn_easy turn_hard",
    "fish": "upright swim",
    "hopper": "stand hop",
    "humanoid": "stand walk run run_pure_state",
    "humanoid_CMU": "stand walk run",
    "manipulator": "bring_ball bring_peg insert_ball insert_peg",
    "pendulum": "swingup",
    "point_mass": "easy hard",
    "quadruped": "walk run escape fetch",
    "reacher": "easy hard",
    "stacker": "stack_2 stack_4",
    "swimmer": "swimmer6 swimmer15",
    "walker": "stand walk run",
}
# Tasks whose noise falls in 100,000 steps. Reference code: cfgs/task.
EASY = "ball_in_cup-catch cartpole-balance cartpole-balance_sparse cartpole-swingup finger-spin hopper-stand"
EASY += " pendulum-swingup walker-stand walker-walk"
# Modified from sac_sam_reset.py: the paper's length. Reference code: pieg_train.sh.
FRAMES = 1_001_000
# The key of DMC-GB's video modes, and where in MuJoCo's XML its colours are: (element, name, attribute).
GREEN = (0.2, 0.8, 0.2)
COLOURS = {
    "skybox_rgb": ("texture", "skybox", "rgb1"),
    "skybox_rgb2": ("texture", "skybox", "rgb2"),
    "skybox_markrgb": ("texture", "skybox", "markrgb"),
    "grid_rgb1": ("texture", "grid", "rgb1"),
    "grid_rgb2": ("texture", "grid", "rgb2"),
    "grid_markrgb": ("texture", "grid", "markrgb"),
    "self_rgb": ("material", "self", "rgba"),
}
CLIPS = {"video_easy": 10, "video_hard": 100}


def task_of(env_id):
    """("finger", "turn_hard") from finger-turn_hard, finger_turn_hard or finger-turn-hard. Errors: ValueError."""
    tasks = {(domain, task) for domain, line in SUITE.items() for task in line.split()}
    names = {f"{domain}_{task}".lower(): (domain, task) for domain, task in sorted(tasks)}
    name = env_id.lower().replace("-", "_")
    if name not in names:
        nearest = "-".join(names[difflib.get_close_matches(name, names, n=1, cutoff=0)[0]])
        raise ValueError(f"{env_id}: no such task, {nearest} is nearest of {' '.join(map('-'.join, names.values()))}")
    return names[name]


# Modified from sac_sam_reset.py: the settings of other papers.
def definite(args):
    """The arguments with the task's own values where they are 0, and its name in one spelling.

    Reference code: cfgs/task and cfgs/piegconfig.yaml; the width of 50 is DrQ-v2's.
    """
    try:
        domain, task = task_of(args.env_id)
    except ValueError as error:
        fail(f"--env-id {error}")
    name = f"{domain}-{task}"
    noise = 2_000_000 if domain in ("dog", "humanoid", "humanoid_CMU") else 500_000
    noise = 100_000 if name in EASY.split() else noise
    own = {"action_repeat": 2, "noise_steps": noise, "feature_dim": 50 if args.encoder == "drqv2" else 256}
    own |= {"batch_size": 512, "n_step": 1} if domain == "walker" else {"batch_size": 256, "n_step": 3}
    own["buffer_size"] = 100_000 if name == "quadruped-run" else 1_000_000
    own["total_timesteps"] = FRAMES // (args.action_repeat or 2)
    own = {key: getattr(args, key) or value for key, value in own.items()}
    return dataclasses.replace(args, env_id=name, **own)


@cache
def import_suite():
    """dm_control's suite, with a renderer that works here. Easy to miss: it cannot be changed after the import."""
    probe = "import mujoco as m; c = m.GLContext(8, 8); c.make_current()"
    probe += "; m.MjrContext(m.MjModel.from_xml_string('<mujoco/>'), 100); c.free()"
    wanted = os.environ.get("MUJOCO_GL")
    for name in (wanted,) if wanted else ("egl", "osmesa"):
        environment = os.environ | {"MUJOCO_GL": name}
        if subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = name
            from dm_control import suite

            return suite
    if wanted:
        fail(f"MUJOCO_GL={wanted} cannot render here; without it, egl and osmesa are tried")
    fail("nothing to render with; on Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri")


def make_envs(args, split, restart=0):
    """args.num_envs copies of the task, drawn by (args.seed, split, restart); "test" differs by its seeds alone, and a
    split named as a mode of DMC-GB has the seeds of "test" in that mode's look.

    reset() -> obs uint8 [N, 9, 84, 84], the last three frames in RGB, the oldest first, the first one repeated; info.
    step(actions float32 [N, A] in -1..1) -> obs, reward [N], summed over args.action_repeat frames, terminated bool
    [N], truncated bool [N] (by the time limit), info.
    An episode's end is followed by the next episode in the same step: obs is then the new one's first observation, and
    info["final_obs"][n] the last one of the old.
    """
    mode = "train" if split in ("train", "test") else split
    seeds = np.random.SeedSequence((args.seed, int(split != "train"), restart)).generate_state(args.num_envs).tolist()
    make = [partial(make_dmc, args.env_id, mode, seed, args.dmcgb_dir, args.action_repeat) for seed in seeds]
    return gym.vector.SyncVectorEnv(make, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def make_dmc(env_id, mode="train", seed=0, dmcgb_dir=None, action_repeat=2, frame_stack=3, size=84):
    """A task of the suite as a gymnasium.Env, in "train" or a mode of DMC-GB: the same physics in another look.

    Observations: uint8 [3 frame_stack, size, size], frames in RGB, the oldest first. Actions: float32 in -1..1.
    reset(seed=...) restarts the streams of task, colours and clips; a plain reset() goes on with them.
    Errors: ValueError of the task's name; those of `dmcgb_data`. With nothing to render with, the program ends.
    """
    looks = dmcgb_data(dmcgb_dir or Args.dmcgb_dir, mode) if mode != "train" else []
    domain, task = task_of(env_id)
    env, camera = import_suite().load(domain, task, task_kwargs={"random": seed}), 2 * (domain == "quadruped")
    return ControlEnv(env, mode, looks, seed, action_repeat, frame_stack, size, camera)


class ControlEnv(gym.Env):
    """dm_control's environment with stacks of frames, repeated actions and looks: colours or paths of clips.

    Reference code: DMC-GB's wrappers.py: a colour is drawn for each episode; clips come in turn, the second one first.
    """

    def __init__(self, env, mode, looks, seed, repeat, frames, size, camera):
        spec = env.action_spec()
        self.env, self.mode, self.looks, self.repeat, self.size, self.camera = env, mode, looks, repeat, size, camera
        self.low, self.high, self.frames = spec.minimum, spec.maximum, deque(maxlen=frames)
        self.observation_space = gym.spaces.Box(0, 255, (3 * frames, size, size), np.uint8)
        self.action_space = gym.spaces.Box(-1, 1, spec.shape, np.float32)
        if mode in CLIPS:
            hidden = ("skybox", "grid") if mode == "video_hard" else ("skybox",)
            recolour(env.physics, {key: GREEN for key in COLOURS if key.split("_")[0] in hidden})
        self.restart(seed)

    def restart(self, seed):
        self.env.task.random.seed(seed)
        self.colour_rng, self.clip = np.random.RandomState(seed), 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.restart(seed)
        if self.mode in CLIPS:
            self.clip = (self.clip + 1) % len(self.looks)
            self.background = frames_of(self.looks[self.clip], self.size)
        elif self.looks:
            recolour(self.env.physics, self.looks[self.colour_rng.randint(len(self.looks))])
        self.env.reset()
        self.frames.extend([self.frame()] * self.frames.maxlen)
        return np.concatenate(self.frames), {}

    def step(self, action):
        # Easy to miss: not all bounds are -1 and 1.
        action, reward = self.low + (action.astype(np.float64) + 1) / 2 * (self.high - self.low), 0.0
        for _ in range(self.repeat):
            moment = self.env.step(action)
            reward += moment.reward
            if moment.last():
                break
        self.frames.append(self.frame())
        failed = moment.last() and moment.discount == 0
        return np.concatenate(self.frames), float(reward), failed, moment.last() and not failed, {}

    def frame(self):
        """uint8 [3, size, size]. Easy to miss: the key comes before the stack, and a step has one frame of a clip."""
        picture = np.ascontiguousarray(self.env.physics.render(self.size, self.size, camera_id=self.camera))
        if self.mode in CLIPS:
            green = is_green(picture)
            picture[green] = next(self.background)[green]
        return picture.transpose(2, 0, 1)

    def close(self):
        self.env.physics.free()  # env.close() keeps the renderer's memory


def recolour(physics, colours):
    """Gives a task's sky, grid and body {key of COLOURS: three numbers in 0..1}; what is not named gets its own back.

    What the suite's XML makes of them is compiled apart and copied by name: as if the task were loaded with them.
    """
    import mujoco
    from dm_control.suite import common

    assets = dict(common.ASSETS)  # Easy to miss: the dictionary is everyone's in this process
    for path in ("./common/skybox.xml", "./common/materials.xml"):
        root = ElementTree.fromstring(assets[path])
        for key, rgb in colours.items():
            element, name, attribute = COLOURS[key]
            for found in root.iterfind(f".//{element}[@name='{name}']"):
                found.set(attribute, " ".join(str(float(x)) for x in (*rgb, *[1] * (attribute == "rgba"))))
        assets[path] = ElementTree.tostring(root)
    includes = "".join(f'<include file="./common/{name}.xml"/>' for name in ("skybox", "materials"))
    scene = f'<mujoco>{includes}<worldbody><geom size="1"/></worldbody></mujoco>'
    donor = mujoco.MjModel.from_xml_string(scene, assets)
    model, context = physics.model.ptr, physics.contexts
    texture, material = mujoco.mjtObj.mjOBJ_TEXTURE, mujoco.mjtObj.mjOBJ_MATERIAL
    for name in ("skybox", "grid"):
        here, there = mujoco.mj_name2id(model, texture, name), mujoco.mj_name2id(donor, texture, name)
        if here >= 0:
            texels(model, here)[:] = texels(donor, there)
            with context.gl.make_current() as gl:  # Easy to miss: without it the picture stays as it was
                gl.call(mujoco.mjr_uploadTexture, model, context.mujoco.ptr, here)
    here, there = mujoco.mj_name2id(model, material, "self"), mujoco.mj_name2id(donor, material, "self")
    if here >= 0:
        model.mat_rgba[here] = donor.mat_rgba[there]


def texels(model, texture):
    """A texture's bytes in a model, [height, width, channels], as a view."""
    shape = model.tex_height[texture], model.tex_width[texture], model.tex_nchannel[texture]
    return model.tex_data[model.tex_adr[texture] :][: np.prod(shape)].reshape(shape)


def is_green(picture):
    """Which pixels a clip is seen through. uint8 [H, W, 3] -> bool [H, W].

    Reference code: colorsys, hue from 100 to 185 degrees, saturation from 80 and value from 70 of 255.
    Easy to miss: in float64 and in this order, or colours on a threshold fall to its other side.
    """
    channels = picture.transpose(2, 0, 1) / 255  # [3, H, W]
    high, low = channels.max(0), channels.min(0)
    red, green, blue = (high - channels) / np.where(high > low, high - low, 1)  # how far each is from the highest
    hue = np.where(green == 0, 2 + red - blue, 4 + green - red) / 6  # where red is not the highest
    saturation = (high - low) / np.where(high > 0, high, 1)
    inside = (hue * 360 >= 100) & (hue * 360 <= 185) & (saturation * 255 >= 80) & (high * 255 >= 70)
    return inside & (red > 0)


def frames_of(clip, size):
    """The frames of a clip, over and over, uint8 [size, size, 3]. Errors: OSError if it has none any more."""
    import cv2

    shown = True
    while shown:
        video, shown = cv2.VideoCapture(str(clip)), False
        while (read := video.read())[0]:
            shown = True
            yield resized(read[1], size)[..., ::-1]
    raise OSError(f"{clip} cannot be read any more")


def resized(frame, size):
    """A frame by bilinear interpolation. uint8 [H, W, 3] -> [size, size, 3]. Reference code: fractions are cut off."""
    (top, bottom, down), (left, right, across) = (neighbours(length, size) for length in frame.shape[:2])
    rows = frame[top].astype(np.float32)  # [size, W, 3]
    rows += down[:, None, None] * (frame[bottom] - rows)
    pixels = rows[:, left]
    pixels += across[:, None] * (rows[:, right] - pixels)
    return pixels.astype(np.uint8)


@cache
def neighbours(length, size):
    """Between which two of `length` pixels each of `size` lies, and how far along. -> int64, int64, float32 [size]."""
    places = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
    first = places.astype(np.int64)
    return first, np.minimum(first + 1, length - 1), (places - first).astype(np.float32)


def dmcgb_data(folder, mode):
    """A mode's colours, a list of {key of COLOURS: three numbers}, or the paths of its clips that are there, in order.

    Errors: FileNotFoundError, ValueError or RuntimeError that say which file is wrong and where to get it.
    """
    import cv2

    folder = Path(folder)
    if mode not in get_args(Mode):
        raise ValueError(f"mode {mode}: train {' '.join(get_args(Mode))}")
    if mode in CLIPS:
        expected = [folder / mode / f"video{number}.mp4" for number in range(CLIPS[mode])]
    else:
        expected = [folder / f"{mode}.json", folder / f"{mode}.pt"]
    found = [path for path in expected if path.is_file()]
    if not found:
        names = f"{expected[0].relative_to(folder)} to {expected[-1].relative_to(folder)}"
        how = "`make dmcgb` fetches it from github.com/nicklashansen/dmcontrol-generalization-benchmark (src/env/data)"
        raise FileNotFoundError(f"DMC-GB's data for {mode} is not in {folder} ({names}): {how}; then --dmcgb-dir")
    if mode in CLIPS:
        for path in found:
            if not cv2.VideoCapture(str(path)).read()[0]:
                size = path.stat().st_size
                raise RuntimeError(f"{path} has no frames: a git-lfs pointer or a cut-off download? ({size} bytes)")
        return found
    if found[0].suffix == ".json":
        sets = json.loads(found[0].read_text())
    else:  # as in the authors' repository, arrays that an old numpy pickled
        rebuild = np.empty(0).__reduce__()[0]
        safe = [rebuild, (rebuild, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, np.dtypes.Float64DType]
        with torch.serialization.safe_globals(safe):
            sets = torch.load(found[0], weights_only=True)
    for number, colours in enumerate(sets):
        if missing := {"skybox_rgb", "grid_rgb1", "grid_rgb2", "self_rgb"} - colours.keys():
            raise ValueError(f"{found[0]}: set {number} has no {' '.join(sorted(missing))}")
    if len(sets) < 100:
        raise ValueError(f"{found[0]}: {len(sets)} sets of colours, and not 100")
    return sets


# ---- 4. Networks ----
class Agent(nn.Module):
    """Encoder, critic and actor: 63,441,920 + 2,902,786 + 1,581,830 parameters that learn, with 6 actions."""

    def __init__(self, envs, args):
        super().__init__()
        obs_shape, num_actions = envs.single_observation_space.shape, envs.single_action_space.shape[0]
        self.encoder = (SmallEncoder if args.encoder == "drqv2" else FrozenEncoder)(obs_shape, args)
        self.critic = Critic(self.encoder.n_out, num_actions, args)
        self.actor = Actor(self.encoder.n_out, num_actions, args)
        self.to(memory_format=torch.channels_last)  # the faster layout of convolutions on a CPU


class FrozenEncoder(nn.Module):
    """The first layers of a ResNet, which stay as they are, and a projection that learns.

    V views, each [B, 3 T, H, W] in 0..255 -> float32 [V B, D]. In train mode (of --batch-norm adapting) each view is
    normalised by its own statistics, and moves the running ones in its turn. Reference code: pieg.py.
    """

    def __init__(self, obs_shape, args):
        super().__init__()
        self.args, self.n_out, resnet = args, args.projection_dim, load_resnet(args)
        layers = [f"layer{number}" for number in range(1, args.encoder_layer + 1)]
        self.resnet = nn.Sequential(*(getattr(resnet, name) for name in ("conv1", "bn1", "relu", "maxpool", *layers)))
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
    """Batch normalisation of stacks of three frames, by statistics of all of them that are put together from a stack's.

    Easy to miss: in channels_last on a CPU torch adds up a whole batch in one float32, and loses four of seven digits.
    """

    def forward(self, x):
        if not self.training or x.is_cuda or x.dtype != torch.float32:
            return super().forward(x)
        moments = [torch.batch_norm_update_stats(stack, None, None, 0.0) for stack in x.unflatten(0, (-1, 3))]
        means, variances = (torch.stack(parts) for parts in zip(*moments, strict=True))  # [B, C]
        mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        if self.track_running_stats:
            count = x.numel() // x.shape[1]
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)


class SmallEncoder(nn.Sequential):
    """DrQ-v2's own encoder, which learns. V views, each [B, 9, 84, 84] in 0..255 -> float32 [V B, 39200]."""

    def __init__(self, obs_shape, args):
        layers, sizes = [], [(obs_shape[0], 2), (32, 1), (32, 1), (32, 1)]
        for n_in, stride in sizes:
            layers += orthogonal(nn.Conv2d(n_in, 32, 3, stride=stride), 2**0.5), nn.ReLU(inplace=True)
        super().__init__(*layers, nn.Flatten())
        self.bf16 = args.precision == "bf16"
        self.n_out = super().forward(torch.zeros(1, *obs_shape)).shape[1]

    def forward(self, *views):
        with torch.autocast(views[0].device.type, torch.bfloat16, enabled=self.bf16):
            return super().forward(to_pixels(torch.cat(views)).sub_(0.5)).float()


def load_resnet(args):
    """torchvision's network with the weights of --encoder-weights."""
    resnet = torchvision.models.get_model(args.encoder, weights=None, norm_layer=BatchNorm)
    name = args.encoder_weights
    if name == "random":
        return resnet
    known = torchvision.models.get_model_weights(args.encoder).__members__
    known = dict(known) | {"imagenet": known["IMAGENET1K_V1"]}
    try:
        download = partial(known[name].get_state_dict, check_hash=True) if name in known else None
        resnet.load_state_dict(download() if download else torch.load(name, "cpu", weights_only=True))
    except Exception as error:  # of the network, the disk, the pickle or the shapes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        fail(f"--encoder-weights {name}: {reason}; give a file of torchvision's {args.encoder}, `imagenet` or `random`")
    return resnet


# Modified from sac_sam_reset.py: other widths.
class Critic(nn.Module):
    """Two estimates of the return, on one projection of their own. [B, n_in], [B, A] -> [2, B]."""

    def __init__(self, n_in, num_actions, args):
        super().__init__()
        self.project = projection(n_in, args.feature_dim)
        self.q1, self.q2 = (mlp(args.feature_dim + num_actions, args.hidden_dim, 1) for _ in range(2))

    def forward(self, hidden, actions):
        inputs = torch.cat([self.project(hidden), actions], dim=1)
        return torch.stack([self.q1(inputs), self.q2(inputs)]).squeeze(-1)


# Modified from sac_sam_reset.py: an action, to which noise is added.
class Actor(nn.Module):
    """The action without noise. [B, n_in] -> [B, A] in -1..1."""

    def __init__(self, n_in, num_actions, args):
        super().__init__()
        self.project = projection(n_in, args.feature_dim)
        self.head = mlp(args.feature_dim, args.hidden_dim, num_actions)

    def forward(self, hidden):
        return self.head(self.project(hidden)).tanh()


# Modified from sac_sam_reset.py: as DrQ-v2 has it. Reference code: utils.py, gain 1 in every linear layer.
def projection(n_in, n_out):
    """[B, n_in] -> [B, n_out] in -1..1."""
    return nn.Sequential(orthogonal(nn.Linear(n_in, n_out), 1.0), nn.LayerNorm(n_out), nn.Tanh())


# Modified from sac_sam_reset.py: other widths and gains.
def mlp(n_in, n_hidden, n_out):
    sizes = ((n_in, n_hidden), (n_hidden, n_hidden), (n_hidden, n_out))
    first, second, last = (orthogonal(nn.Linear(*size), 1.0) for size in sizes)
    return nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), last)


def orthogonal(layer, gain):
    """The layer with orthogonal weights and no bias."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def to_pixels(obs):
    """uint8 [B, C, H, W] -> float32 [B, C, H, W] in 0..1, in the layout of the convolutions."""
    return obs.contiguous(memory_format=torch.channels_last).float() / 255  # Easy to miss: bytes are moved, not floats


# Modified from sac_sam_reset.py: noise of the size that is due is given.
@torch.no_grad()
def act(agent, obs, exploration=None):
    """Actions in -1..1, greedy ones if there is no exploration. uint8 [B, 9, 84, 84], [B, A] -> ([B, A],)."""
    actions = agent.actor(agent.encoder(obs))
    return (actions if exploration is None else add_noise(actions, exploration),)


# ---- 5. The method ----
def fuse_frames(maps, differences=True):
    """Features of T frames as one vector: those of frames 2..T, then what each changed. [B, T, C, h, w] -> [B, F].

    Paper: 2.1, after Shang et al. 2021 (Flare). Reference code: pieg.py:113-119. Without differences: all T frames.
    """
    if differences:
        maps = torch.cat([maps[:, 1:], maps[:, 1:] - maps[:, :-1]], dim=1)
    return maps.flatten(1)


def random_overlay(images, pictures):
    """Half of each image and half of a picture, the same in all its frames. [B, 3 T, H, W], [B, 3, H, W] -> as images.

    Paper: 2.2, after SVEA. Easy to miss: of images that are shifted already.
    """
    frames = images.unflatten(1, (-1, 3)).float()
    return ((frames + pictures[:, None]) / 2).flatten(1, 2)


def random_convolution(images, kernels):
    """Each image under its own 3 x 3 kernel, the same in all its frames. [B, 3 T, H, W], [B, 3, 3, 3, 3] -> 0..255.

    Reference code: DMC-GB's augmentations.py, its border repeated, a sigmoid behind.
    """
    batch, (height, width) = len(images), images.shape[2:]
    frames = images.unflatten(1, (-1, 3)).transpose(0, 1).reshape(-1, 3 * batch, height, width).float() / 255
    frames = nn.functional.pad(frames, (1, 1, 1, 1), mode="replicate")
    seen = nn.functional.conv2d(frames, kernels.flatten(0, 1), groups=batch).sigmoid() * 255  # [T, 3 B, H, W]
    return seen.unflatten(1, (batch, 3)).transpose(0, 1).flatten(1, 2)


def add_noise(actions, noise):
    """Noisy actions within -1..1. [B, A], [B, A] -> [B, A]. Easy to miss: a bound does not stop the gradient."""
    noisy = actions + noise
    return noisy.clamp(-1 + 1e-6, 1 - 1e-6).detach() + (noisy - noisy.detach())


def noise_scale(step, args):
    """sigma at a step of the run, which falls in a straight line and then stays. Paper: DrQ-v2, 3.1."""
    return args.noise_start + min(step / args.noise_steps, 1.0) * (args.noise_end - args.noise_start)


@torch.no_grad()
def soft_update(targets, params, tau):
    """target + tau (param - target) of each two tensors, in place."""
    torch._foreach_lerp_(targets, params, tau)


# Modified from drq_sam_reset.py: three bytes a pixel, which no whole number has.
def random_shift(images, offsets, pad):
    """Each image moved by offsets - pad pixels, its border repeated. [B, C, H, W], int64 [B, 2] -> as images.

    Paper: DrQ, arXiv:2004.13649: pad by repeating the border, then crop at (row, column) = offsets in 0..2 pad.
    """
    batch, channels, height, width = images.shape
    rows = (torch.arange(height, device=images.device) + offsets[:, :1] - pad).clamp(0, height - 1)  # [B, H]
    columns = (torch.arange(width, device=images.device) + offsets[:, 1:] - pad).clamp(0, width - 1)  # [B, W]
    index = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view_as(images)


# ---- 6. Losses, targets, replay ----
PAD = 4  # pixels that an image is shifted by at most


def load_pictures(args, size, seed):
    """What is overlaid: uint8 [P, 3, size, size], the same for each run of a seed. Reference code: utils.py's crops."""
    if args.overlay_dir == "textures":
        print("overlay: textures that are made here; the paper's pictures are Places365 (--overlay-dir)", flush=True)
        rng, chunk = torch.Generator().manual_seed(seed), 500
        sizes = [min(chunk, args.overlay_pictures - first) for first in range(0, args.overlay_pictures, chunk)]
        return torch.cat([make_textures(count, size, rng) for count in sizes])
    import cv2

    kinds = (".jpg", ".jpeg", ".png")
    found = (os.path.join(folder, name) for folder, _, names in os.walk(args.overlay_dir) for name in names)
    paths = sorted(path for path in found if path.lower().endswith(kinds))
    if not paths:
        fail(f"--overlay-dir {args.overlay_dir}: no {' '.join(kinds)} in it; a folder with pictures, or `textures`")
    order = np.random.default_rng(seed).permutation(len(paths))
    paths = [paths[order[number % len(paths)]] for number in range(args.overlay_pictures)]
    crop = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()])
    used = f"{len(paths)} crops of {len(set(paths))} of {len(order)} pictures"
    print(f"overlay: {used} in {args.overlay_dir}", flush=True)
    pictures = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, path in enumerate(paths):
            picture = cv2.imread(path)  # [H, W, 3], blue comes first
            if picture is None:
                fail(f"--overlay-dir: {path} cannot be read as a picture")
            pictures[number] = crop(torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1))
    return pictures


def make_textures(count, size, rng):
    """Like natural pictures: patches with edges, soft blobs, 1/f noise. -> uint8 [count, 3, size, size]."""
    axis = torch.fft.fftfreq(size).square()
    frequency = (axis[:, None] + axis).sqrt().clamp(min=1 / size)

    def noise(channels, slope):
        """Of an amplitude that falls as 1 / frequency^slope; mean 0 and standard deviation 1 in each picture."""
        white = torch.randn(count, channels, size, size, generator=rng)
        field = torch.fft.ifft2(torch.fft.fft2(white) / frequency**slope).real
        std, mean = torch.std_mean(field, dim=(2, 3), keepdim=True)
        return (field - mean) / std

    colours = torch.rand(3, count, 3, 1, 1, generator=rng)
    ground, patch, blob = torch.lerp(colours.mean(2, keepdim=True), colours, 0.6)  # half-way to gray, as outdoors
    pictures = torch.where(noise(1, 2.0) > 0.3, patch, ground)
    pictures = torch.lerp(pictures, blob, (4 * noise(1, 3.0) - 4).sigmoid())
    pictures = pictures + 0.12 * noise(1, 1.0) + 0.04 * noise(3, 1.0)
    return (pictures.clamp(0, 1) * 255).byte()


# Modified from sac_sam_reset.py: frames in colours, and returns of n steps.
class Replay:
    """The newest transitions of a run, on the training device. Frames are kept once; stacks are built at sampling.

    Row i: the newest frame of observation i, the row where its episode began, the action, its reward, whether the
    episode failed with it. An episode's last observation has a row too, whose action means nothing; row `size` is the
    observation under way. Row i lies at i modulo the capacity, and in the file at i.
    A row can be sampled once the n rows from it on are there, all of its episode. Reference code: replay_buffer.py.
    """

    def __init__(self, capacity, obs_shape, num_actions, args, device):
        self.args, self.device, self.frames_a_stack = args, device, obs_shape[0] // 3
        fields = [("frames", np.uint8, (3, *obs_shape[1:])), ("starts", np.int64), ("rewards", np.float32)]
        self.row = np.dtype([*fields, ("actions", np.float32, (num_actions,)), ("dones", bool)])  # as in the file
        empty = {name: np.zeros(capacity, self.row[name]) for name in self.row.names}
        self.rows = {name: torch.from_numpy(values).to(device) for name, values in empty.items()}
        self.whole = np.zeros(capacity, bool)  # rows that can be sampled; known without asking the device
        self.size = self.start = self.saved = 0  # saved: rows on disk

    def begin(self, frame):
        """The first observation of an episode. The one under way ends as if at a time limit, unless it just began."""
        self.size += self.start < self.size
        self.start = self.size
        self.observe(frame)

    def observe(self, frame):
        lost = np.arange(self.size, self.size + self.frames_a_stack)  # itself, and stacks with the frame it replaces
        self.whole[lost % len(self.whole)] = False
        self.rows["frames"][self.size % len(self.whole)] = torch.as_tensor(frame)
        self.rows["starts"][self.size % len(self.whole)] = self.start

    def add(self, action, reward, done, next_frame):
        """A transition, and the frame after it, of the same episode even if it ends there."""
        for name, value in (("actions", torch.as_tensor(action)), ("rewards", reward), ("dones", done)):
            self.rows[name][self.size % len(self.whole)] = value
        self.size += 1
        if self.size - self.args.n_step >= self.start:
            self.whole[(self.size - self.args.n_step) % len(self.whole)] = True
        self.observe(next_frame)

    def sample(self, uniform):
        """Rows of transitions, each as likely. float64 [B] on the CPU -> int64 [B]."""
        places = np.flatnonzero(self.whole)
        if len(places) == 0:
            fail(f"--n-step {self.args.n_step}: no episode was that long so far")
        places = places[(uniform.numpy() * len(places)).astype(np.int64)]
        return torch.from_numpy(self.size - (self.size - places) % len(self.whole))

    def gather(self, rows):
        """Stacks, actions, n-step returns and bootstrap factors of some rows. int64 [B] -> dict of [B, ...]."""
        n_step, gamma, size = self.args.n_step, self.args.gamma, len(self.whole)
        both = torch.cat([rows, rows + n_step])
        stacks = both[:, None] + torch.arange(1 - self.frames_a_stack, 1, device=self.device)  # [2B, T]
        stacks = torch.maximum(stacks, self.rows["starts"][both % size][:, None])  # the first frame is repeated
        obs, next_obs = self.rows["frames"][stacks % size].flatten(1, 2).chunk(2)
        steps = torch.arange(n_step, device=self.device)
        window = (rows[:, None] + steps) % size  # [B, n]
        returns = (self.rows["rewards"][window] * gamma**steps).sum(1)
        bootstrap = gamma**n_step * ~self.rows["dones"][window].any(1)  # an end is the window's last row, if any
        batch = {"obs": obs, "next_obs": next_obs, "actions": self.rows["actions"][rows % size]}
        return batch | {"returns": returns, "bootstrap": bootstrap}

    def state_dict(self):
        """All but the rows, which `save` writes."""
        return {"size": self.size, "start": self.start}

    def load_state_dict(self, state):
        self.size, self.start = state["size"], state["start"]

    def save(self, path):
        """Appends the new rows to a file, flushed to disk. Easy to miss: before the checkpoint that counts them."""
        first = max(self.saved, self.size + 1 - len(self.whole))  # what was lost between two saves is a hole
        rows = np.empty(self.size + 1 - first, self.row)
        places = torch.arange(first, self.size + 1, device=self.device) % len(self.whole)
        for name, values in self.rows.items():
            rows[name] = values[places].cpu()
        path.touch()
        with open(path, "r+b") as file:
            file.truncate((self.saved + 1) * self.row.itemsize)  # what lies behind is of no checkpoint
            file.seek(first * self.row.itemsize)
            file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        self.saved = self.size  # Easy to miss: the row under way is written again, in place, with the same frame.

    def load(self, path):
        """Reads the newest rows back, and the one under way."""
        if not path.is_file() or path.stat().st_size < (self.size + 1) * self.row.itemsize:
            fail(f"{path} is not there or shorter than the {self.size} rows of the checkpoint")
        first, n_step = max(self.size + 1 - len(self.whole), 0), self.args.n_step
        rows = np.memmap(path, self.row, "r", shape=self.size + 1)[first:]
        places = np.arange(first, self.size + 1) % len(self.whole)
        for name, values in self.rows.items():
            values[torch.from_numpy(places)] = torch.from_numpy(np.ascontiguousarray(rows[name])).to(self.device)
        same = rows["starts"][:-n_step] == rows["starts"][n_step:]  # n rows on, the episode is the same
        same[: max(self.size + self.frames_a_stack - len(self.whole) - first, 0)] = False  # as `observe` has it
        self.whole[places[: len(same)]] = same
        self.saved = self.size


# ---- 7. Update ----
# Modified from sac_sam_reset.py: what the strong augmentation draws, and the noise's scale.
DRAWS = ("rows", "offsets", "normal", "strong", "sigma")  # what an update is given besides its networks and replay


def update(agent, target, optimizer, replay, pictures, draws, args):
    """One gradient step of critic and encoder, one of the actor, and the target's -> dict of detached [].

    draws: rows [B] of the replay, offsets [2, B, 2] of observations and next ones, normal [2, B, A], the noise of the
    actions in the same order, strong, numbers of pictures [B] or kernels [B, 3, 3, 3, 3], sigma []. Reference code: the
    order, in which batch normalisation sees plain, augmented and next observations.
    """
    batch, size = replay.gather(draws["rows"]), len(draws["rows"])
    obs, next_obs = (random_shift(batch[key], draws["offsets"][i], PAD) for i, key in enumerate(("obs", "next_obs")))
    noise = (draws["sigma"] * draws["normal"]).clamp(-args.noise_clip, args.noise_clip)  # [2, B, A]
    views = [obs]
    if args.strong_augmentation == "overlay":
        views.append(random_overlay(obs, pictures[draws["strong"]]))
    elif args.strong_augmentation == "conv":
        views.append(random_convolution(obs, draws["strong"]))
    hidden = agent.encoder(*views)  # [V B, D]
    with torch.no_grad():  # Easy to miss: targets of plain next observations, for both views
        next_hidden = agent.encoder(next_obs)
        next_q = target(next_hidden, add_noise(agent.actor(next_hidden), noise[1]))  # [2, B]
        targets = batch["returns"] + batch["bootstrap"] * next_q.amin(0)

    def descend(name, loss, params):
        optimizer.zero_grad()  # Easy to miss: Adam leaves what has no gradient as it is, moments included.
        loss.backward(inputs=params)
        parts[f"{name}_loss"] = loss.detach()
        parts[f"{name}_grad_norm"] = nn.utils.get_total_norm([param.grad for param in params])
        optimizer.step()

    parts = {}
    q = agent.critic(hidden, batch["actions"].repeat(len(views), 1))  # [2, V B]
    learned = [param for param in agent.encoder.parameters() if param.requires_grad]
    descend("qf", (q - targets.repeat(len(views))).square().sum(0).mean(), [*learned, *agent.critic.parameters()])
    parts["qf1_values"], parts["qf2_values"] = q.detach().mean(1)
    # Easy to miss: features from before the step, of plain observations; the critic is the new one.
    hidden = hidden[:size].detach()
    q = agent.critic(hidden, add_noise(agent.actor(hidden), noise[0]))
    descend("actor", -q.amin(0).mean(), list(agent.actor.parameters()))
    soft_update(list(target.parameters()), list(agent.critic.parameters()), args.tau)
    return parts


class Captured:
    """A function of tensors as one CUDA graph: recorded at its first call, replayed on later inputs of those shapes.

    It returns a tuple or a dict of tensors. `parts` have a state_dict, whose tensors it changes in place; what the
    calls that warm up do to them is undone. Where it is not `on`, the function is called as it is.
    """

    def __init__(self, function, on, parts=()):
        self.function, self.on, self.parts, self.graph = function, on, parts, None

    def __call__(self, *inputs):
        if not self.on:
            return self.function(*inputs)
        if self.graph is None:
            self.record(inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        copies = [value.clone() for _, value in leaves(self.outputs)]  # Easy to miss: each replay writes over them.
        return dict(zip(self.outputs, copies, strict=True)) if isinstance(self.outputs, dict) else tuple(copies)

    def record(self, inputs):
        self.inputs = [value.clone() for value in inputs]
        before = {name: value.clone() for name, value in self.tensors()}
        rng_state, stream = torch.cuda.get_rng_state(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Adam's, that it was made for a capture and runs without one
            for _ in range(3):
                self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        for name, value in self.tensors():
            value.copy_(before[name]) if name in before else value.zero_()  # Adam's state is made as zeros
        torch.cuda.set_rng_state(rng_state)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.function(*self.inputs)

    def tensors(self):
        """(name, tensor) of all that the parts hold."""
        states = leaves([part.state_dict() for part in self.parts])
        return [(name, value) for name, value in states if isinstance(value, torch.Tensor)]


# ---- 8. Training ----
def train(args, make_envs=make_envs, make_agent=Agent):
    """Trains to args.total_timesteps and returns the agent. The factories are the seams for suites and networks."""
    check(args)
    args, device = set_up_torch(definite(args))
    state = load_checkpoint(args.resume) if args.resume else {"step": 0, "restarts": 0, "exact_step": 0, "exact": True}
    step, restarts, exact_step = state["step"], state["restarts"] + (not state["exact"]), state["exact_step"]
    if state.get("done") and step >= args.total_timesteps:
        fail(f"{args.resume} is at step {step} already: raise --total-timesteps, or --evaluate it")
    init_seed, picture_seed, *seeds = np.random.SeedSequence(args.seed).generate_state(7).tolist()
    torch.manual_seed(init_seed)
    explore_rng, sample_rng, noise_rng, augment_rng, strong_rng = (torch.Generator().manual_seed(x) for x in seeds)
    envs = make_envs(args, "train", restarts)
    num_actions, obs_shape = envs.single_action_space.shape[0], envs.single_observation_space.shape
    agent = make_agent(envs, dataclasses.replace(args, encoder_weights="random") if args.resume else args).to(device)
    target = copy.deepcopy(agent.critic).requires_grad_(False)
    learned = [param for param in agent.parameters() if param.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=args.learning_rate, eps=args.adam_eps, fused=True)
    overlay = args.strong_augmentation == "overlay"
    pictures = load_pictures(args, obs_shape[1], picture_seed).to(device) if overlay else torch.empty(1, device=device)
    replay = Replay(rows_needed(args), obs_shape, num_actions, args, device)
    print(f"replay: {sum(values.nbytes for values in replay.rows.values()) >> 20} MB", flush=True)
    parts = {"agent": agent, "target": target, "optimizer": optimizer, "replay": replay, "explore_rng": explore_rng}
    parts |= {"sample_rng": sample_rng, "noise_rng": noise_rng, "augment_rng": augment_rng, "strong_rng": strong_rng}
    parts["torch_rng"] = torch.default_generator
    if args.resume:
        restore(parts, state)
        replay.load(checkpoint_path(args.resume).parent / "replay.bin")
        print(f"step {step}: " + ("bit for bit" if state["exact"] else "continued, in fresh environments"))
    graphs = args.cuda_graphs and device.type == "cuda"
    optimizer.param_groups[0]["capturable"] = graphs  # Easy to miss: a checkpoint's is another device's.

    def draw():
        """The random numbers of an update, each kind from its own stream."""
        size = args.batch_size
        draws = {"rows": replay.sample(torch.rand(size, dtype=torch.float64, generator=sample_rng))}
        draws["offsets"] = torch.randint(2 * PAD + 1, (2, size, 2), generator=augment_rng)
        draws["normal"] = torch.randn(2, size, num_actions, generator=noise_rng)
        if args.strong_augmentation == "conv":
            draws["strong"] = torch.randn(size, 3, 3, 3, 3, generator=strong_rng)
        else:
            draws["strong"] = torch.randint(len(pictures), (size,), generator=strong_rng)
        draws["sigma"] = torch.tensor(noise_scale(step, args))
        return [draws[name].to(device, non_blocking=True) for name in DRAWS]

    def learn(*draws):
        return update(agent, target, optimizer, replay, pictures, dict(zip(DRAWS, draws, strict=True)), args)

    learner = Captured(learn, graphs, [agent, target, optimizer])
    policy = Captured(partial(act, agent), graphs)
    run = Run(args, device, state, done=step, goal=args.total_timesteps)
    obs, _ = envs.reset()
    replay.begin(obs[0, -3:])
    episode_return, episode_length, rewards, scalars, seconds, counted = 0.0, 0, 0.0, [], 0.0, step

    def save(exact=False, done=False):
        if not np.isfinite(rewards):
            sys.exit(f"error: a reward is not finite at step {step}; what {run.folder} holds was left as it was")
        replay.save(run.folder / "replay.bin")
        about = {"step": step, "restarts": restarts, "exact_step": exact_step, "exact": exact, "done": done}
        run.save(about | capture(parts))

    exact = state["exact"]
    del state  # it holds all weights once more
    while step < args.total_timesteps:
        # Act.
        start = time.monotonic()
        if step < args.learning_starts:
            actions = torch.rand(1, num_actions, generator=explore_rng) * 2 - 1
        else:
            exploration = noise_scale(step, args) * torch.randn(1, num_actions, generator=explore_rng)
            agent.eval()  # Easy to miss: acting goes by the running statistics, learning by the batch's
            (actions,) = policy(torch.as_tensor(obs).to(device), exploration.to(device))
            agent.train()
        actions = actions.cpu().numpy()

        # Learn. Reference code: before the environment steps.
        if step >= args.learning_starts and step % args.update_every == 0:
            scalars.append(learner(*draw()))

        # Step.
        obs, reward, terminated, truncated, info = envs.step(actions)
        ended = bool(terminated[0] | truncated[0])
        next_obs = info["final_obs"][0] if ended else obs[0]
        replay.add(actions[0], float(reward[0]), bool(terminated[0]), next_obs[-3:])
        if ended:
            replay.begin(obs[0, -3:])
        episode_return, episode_length = episode_return + float(reward[0]), episode_length + 1
        rewards += float(reward[0])
        step += 1
        seconds += time.monotonic() - start  # without evaluating and saving

        # Log, evaluate, save.
        exact = ended and crossed(step, args.exact_every, step - exact_step)
        if exact or step % 1000 == 0 or step == args.total_timesteps:
            run.log(step, {"charts/reward": rewards / (step - counted)})
            if scalars:
                losses = {key: torch.stack([row[key] for row in scalars]).mean().item() for key in scalars[0]}
                run.log(step, {f"losses/{key}": value for key, value in losses.items()})
            run.log(step, {"charts/SPS": (step - counted) / seconds, "charts/frames": args.action_repeat * step})
            rewards, scalars, seconds, counted = 0.0, [], 0.0, step
        if ended:
            run.log(step, {"charts/episodic_return": episode_return, "charts/episodic_length": episode_length})
            episode_return, episode_length = 0.0, 0
        if crossed(step, args.eval_every, 1) and step < args.total_timesteps:
            table = compare(agent, args, make_envs, args.eval_episodes, lambda: run.tick(save))
            run.log(step, eval_scalars(table))
        if exact:
            restarts, exact_step = restarts + 1, step  # Easy to miss: in every run, interrupted or not.
            envs.close()
            envs = make_envs(args, "train", restarts)
            obs, _ = envs.reset()
            replay.begin(obs[0, -3:])
        run.tick(save, 1)
        if exact or run.save_due() or step >= args.total_timesteps:  # Easy to miss: before the long last evaluation.
            save(exact)

    envs.close()
    if args.eval_every > 0:
        table = compare(agent, args, make_envs, args.final_eval_episodes, lambda: run.tick(save))
        run.log(step, eval_scalars(table))
        report(table, step, run.folder)
    save(exact, done=True)
    run.close()
    return agent


def rows_needed(args):
    """Of the replay. Easy to miss: an episode's last observation has a row too, of episodes of 20 steps or more."""
    return min(args.buffer_size, args.total_timesteps + args.total_timesteps // 20 + 1000)


def crossed(step, every, batch_size):
    """Whether the last batch crossed a multiple of `every` (0: never)."""
    return every > 0 and step // every > (step - batch_size) // every


# ---- 9. Evaluation, checkpoints and logs ----
def evaluate(agent, args, make_envs, split, episodes, tick=lambda: None):
    """Returns [episodes] of greedy episodes of `split`, drawn by args.eval_seed, the same ones each time.

    Reference code: reseval.py, where batch normalisation goes by the frames of the observation (--eval-batch-norm
    running: as it does while training). Touches no stream of training, and no running statistics.
    """
    envs = make_envs(dataclasses.replace(args, seed=args.eval_seed, num_envs=1), split)
    device, finished, total = next(agent.parameters()).device, [], 0.0
    agent.eval()
    normalise_by_own(agent, args)
    obs, _ = envs.reset()
    while len(finished) < episodes:
        (actions,) = act(agent, torch.as_tensor(obs).to(device))
        obs, reward, terminated, truncated, _ = envs.step(actions.cpu().numpy())
        total += float(reward[0])
        if terminated[0] or truncated[0]:
            finished.append(total)
            total = 0.0
        tick()
    envs.close()
    normalise_by_own(agent, args, False)
    agent.train()
    return np.array(finished)


def normalise_by_own(agent, args, on=True):
    """Whether batch normalisation that adapts goes by what it is given, in eval mode. Running statistics stay.

    Paper: 3.3. --eval-batch-norm running: it does not.
    """
    on = on and args.batch_norm == "adapting" and args.eval_batch_norm == "frames"
    for layer in agent.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.training, layer.track_running_stats = on, not on


# Modified from mdpo.py: one agent, in the look that it was trained on and in those of DMC-GB.
def compare(agent, args, make_envs, episodes, tick=lambda: None):
    """The agent's returns: a list of rows, one for each look. clips: how many there were of those DMC-GB has."""
    table = []
    for split in ("test", *args.eval_modes):
        returns = evaluate(agent, args, make_envs, split, episodes, tick)
        row = {"split": split, "episodes": episodes, "mean": float(returns.mean()), "std": float(returns.std())}
        clips = len(dmcgb_data(args.dmcgb_dir, split)) if split in CLIPS else 0
        table.append(row | {"median": float(np.median(returns)), "clips": clips})
    return table


# Modified from mdpo.py: one agent.
def eval_scalars(table):
    """What is logged of a table of `compare`."""
    return {f"eval/{row['split']}_return": row["mean"] for row in table}


def report(table, step, folder):
    """Prints a table of `compare` and saves it as evaluation.csv."""
    rows = [["step", *table[0]], *([step, *row.values()] for row in table)]
    text = "\n".join(",".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row) for row in rows)
    (folder / "evaluation.csv").write_text(text + "\n")
    print(text.replace(",", "\t"))


class Run:
    """A run's folder (arguments, source, metrics, events, checkpoints), its progress bar, and the wish to stop."""

    def __init__(self, args, device, state, done, goal):
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.folder = checkpoint_path(args.resume).parent if args.resume else Path(args.runs_dir) / name
        try:
            self.folder.mkdir(parents=True, exist_ok=bool(args.resume))
            self.metrics = open(self.folder / "metrics.csv", "a", buffering=1)
        except OSError as error:
            fail(f"{self.folder} cannot be written: {error.strerror}")
        if not args.resume:
            (self.folder / "args.json").write_text(json.dumps(describe(args, device), indent=1))
            shutil.copy(__file__, self.folder)
        if args.track:
            import wandb

            about = {
                "project": args.wandb_project_name,
                "entity": args.wandb_entity,
                "config": dataclasses.asdict(args),
            }
            wandb.init(**about, id=self.folder.name, name=self.folder.name, resume="allow", sync_tensorboard=True)
        if args.resume and checkpoint_path(args.resume).name != "checkpoint.pt":
            save_checkpoint(self.folder / "checkpoint.pt", state)  # what it held lies on the way that is given up here
        size = min(state.get("metrics_bytes", 0), os.path.getsize(self.metrics.name))
        self.metrics.truncate(size)  # what was logged after the checkpoint is done again
        if size == 0:
            self.metrics.write("step,key,value\n")
        self.events = SummaryWriter(str(self.folder), purge_step=state["step"] + 1)
        self.args, self.last_save, self.last_line, self.stop_signal = args, time.monotonic(), time.monotonic(), 0
        self.on_signals(self.stop)
        self.terminal = sys.stderr.isatty()
        about = {"unit": "step", "unit_scale": True, "smoothing": 0, "dynamic_ncols": True}
        self.bar = tqdm(initial=done, total=goal, file=None if self.terminal else open(os.devnull, "w"), **about)

    def on_signals(self, handler):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # SIGUSR1: Slurm's warning before its time limit
            signal.signal(number, handler)

    def stop(self, number, _):
        """Signal handler: the run stops at its next tick; a second signal ends the program at once."""
        self.stop_signal = number
        self.on_signals(signal.SIG_DFL)

    def tick(self, save, steps=0):
        """Moves the bar. The state is whole here: if a signal came, it is saved and the program ends."""
        self.bar.update(min(steps, self.bar.total - self.bar.n))
        if not self.terminal and time.monotonic() > self.last_line + 30:
            print(self.bar, flush=True)
            self.last_line = time.monotonic()
        if self.stop_signal:
            save()
            self.close()
            print(f"stopped by {signal.Signals(self.stop_signal).name}; go on with --resume {self.folder}")
            sys.exit(128 + self.stop_signal)

    def log(self, step, values):
        """Writes {key: number} to metrics.csv and TensorBoard; one that is not finite ends the program with code 1."""
        for key, value in values.items():
            if not np.isfinite(value):
                self.close()
                sys.exit(f"error: {key} is {value} at step {step}; nothing of it was saved in {self.folder}")
            self.metrics.write(f"{step},{key},{value}\n")
            self.events.add_scalar(key, value, step)
        if "charts/episodic_return" in values:
            self.bar.set_postfix_str(f"return {values['charts/episodic_return']:.2f}", refresh=False)

    def save_due(self):
        return self.args.save_minutes > 0 and time.monotonic() - self.last_save > 60 * self.args.save_minutes

    def save(self, state):
        """The newest checkpoint, and the newest exact one if it is that too."""
        self.last_save = time.monotonic()
        os.fsync(self.metrics.fileno())
        state |= {"script": Path(__file__).stem, "args": dataclasses.asdict(self.args)}
        state["metrics_bytes"] = os.path.getsize(self.metrics.name)
        for name in ("exact.pt", "checkpoint.pt") if state["exact"] else ("checkpoint.pt",):
            save_checkpoint(self.folder / name, state)

    def close(self):
        for part in (self.bar, self.metrics, self.events):
            part.close()


def describe(args, device):
    """What args.json says of a run: all that it takes to run it again."""

    def shell(command):
        return subprocess.run(command, shell=True, cwd=here, capture_output=True, text=True).stdout.strip()

    here = Path(__file__).resolve().parent
    hardware = {"gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None, "cores": os.cpu_count()}
    hardware |= {"cpu": shell("lscpu | sed -n 's/^Model name: *//p'"), "torch_threads": torch.get_num_threads()}
    packages = {package.name: package.version for package in importlib.metadata.distributions()}
    commit = shell("git describe --always --dirty --abbrev=40 --exclude '*'")
    return {"command": sys.argv, "args": dataclasses.asdict(args), "commit": commit, "hardware": hardware} | {
        "python": platform.python_version(),
        "packages": packages,
    }


def capture(parts):
    """{name: state} of generators and of whatever has a state_dict."""
    return {name: part.get_state() if hasattr(part, "get_state") else part.state_dict() for name, part in parts.items()}


def restore(parts, state):
    for name, part in parts.items():
        (part.set_state if hasattr(part, "set_state") else part.load_state_dict)(state[name])


def leaves(state, name=""):
    """("a.0.b", value) of each value in nested dicts, lists and tuples."""
    if isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, f"{name}.{key}".strip("."))
    else:
        yield name, state


def not_finite(state):
    """Name of the first number that is not finite in nested dicts and lists of tensors, or None."""
    numbers = ((name, torch.as_tensor(x)) for name, x in leaves(state) if isinstance(x, torch.Tensor | float))
    return next((name for name, x in numbers if not x.isfinite().all()), None)


def save_checkpoint(path, state):
    """Whole or not at all: written beside, flushed to disk, renamed. Numbers that are not finite are never saved."""
    if name := not_finite(state):
        sys.exit(f"error: {name} is not finite at step {state['step']}; {path} was left as it was")
    buffer, beside = io.BytesIO(), path.with_suffix(".tmp")
    torch.save(state, buffer)
    try:
        with open(beside, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        beside.unlink(missing_ok=True)
        left = "the one that is there is whole" if path.exists() else "there is none yet"
        sys.exit(f"error: {path} could not be saved at step {state['step']}: {error.strerror}; {left}")


def checkpoint_path(path):
    return Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)


def load_checkpoint(path):
    path = checkpoint_path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        fail(f"{path} cannot be read as a checkpoint: {getattr(error, 'strerror', None) or type(error).__name__}")
    if not isinstance(state, dict) or state.get("script") != Path(__file__).stem or "args" not in state:
        fail(f"{path} is not a checkpoint of {Path(__file__).name}")
    return state


# Modified from ppo_netrand.py: where a checkpoint has it, the frozen weights too.
def load_agent(args, state, make_envs=make_envs, make_agent=Agent):
    """The agent of a checkpoint, for `compare` or `act`."""
    args, device = set_up_torch(args)
    envs = make_envs(dataclasses.replace(args, num_envs=1), "test")
    agent = make_agent(envs, dataclasses.replace(args, encoder_weights="random")).to(device)
    agent.load_state_dict(state["agent"])
    envs.close()
    return agent


def set_up_torch(args):
    """(arguments with a definite --precision, device), and torch's global switches set to them."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if args.cuda and gpu else "cpu")
    if args.cuda_required and device.type != "cuda":
        fail("--cuda-required: torch finds no GPU here")
    if args.precision == "auto":
        args = dataclasses.replace(args, precision="tf32" if device.type == "cuda" else "fp32")
    print(f"{args.precision} on {torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'}", flush=True)
    torch.backends.cudnn.conv.fp32_precision = "tf32" if args.precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory that was not written
    return args, device


def check(args):
    """Arguments out of range and data that is missing, before anything is made or written."""
    args = definite(args)
    positive = ("eval_episodes", "final_eval_episodes", "num_envs", "batch_size", "n_step", "update_every")
    positive += ("noise_steps", "encoder_layer", "projection_dim", "feature_dim", "hidden_dim", "overlay_pictures")
    least = dict.fromkeys(positive, 1) | {"learning_starts": args.n_step, "buffer_size": 2 * args.n_step + 4}
    most = dict.fromkeys(("gamma", "tau", "num_envs"), 1) | {"encoder_layer": 4}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, sys.maxsize)
        if isinstance(value, int | float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value}: from {low} to {high}")
    if "/" in args.exp_name:
        fail(f"--exp-name {args.exp_name}: is part of a folder's name and cannot hold a slash")
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track: pip install wandb")
    for mode in args.eval_modes:
        try:
            looks = dmcgb_data(args.dmcgb_dir, mode)
        except Exception as error:  # of the disk, a pickle, JSON or what they hold
            fail(f"--eval-modes {mode}: {str(error).splitlines()[0]}")
        if mode in CLIPS and len(looks) < CLIPS[mode]:
            there = f"{len(looks)} of the {CLIPS[mode]} clips of {mode}"
            print(f"warning: {there} are there: no figure to publish", flush=True)
    if args.evaluate:
        return
    overlay = args.strong_augmentation == "overlay"
    if overlay and args.overlay_dir != "textures" and not Path(args.overlay_dir).is_dir():
        fail(f"--overlay-dir {args.overlay_dir}: no such folder; one with pictures, or `textures`")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if args.cuda and torch.cuda.is_available():
        _, memory = torch.cuda.mem_get_info()
    folder = checkpoint_path(args.resume).parent if args.resume else Path(args.runs_dir).absolute()
    disk = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    disk += (folder / "replay.bin").stat().st_size if (folder / "replay.bin").exists() else 0  # a resumed run's own
    kept = rows_needed(args) + overlay * args.overlay_pictures
    for name, frames, room in (("buffer-size", kept, memory), ("total-timesteps", args.total_timesteps, disk)):
        size = frames * 3 * 84 * 84
        if size > room:
            fail(f"--{name}: {size >> 20} MB of pictures do not fit into {room >> 20} MB of memory or disk")


def fail(message):
    """Ends the program the way a wrong flag does: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# Modified from mdpo.py: one agent, and what an evaluation of it may change.
def main(flags=None, make_envs=make_envs, make_agent=Agent):
    """The command line. flags: instead of the program's own; the factories are train's."""
    args = tyro.cli(Args, args=flags)
    if not (args.resume or args.evaluate):
        return train(args, make_envs, make_agent)
    if args.resume and args.evaluate:
        fail("--resume and --evaluate: one of them")
    state = load_checkpoint(args.resume or args.evaluate)
    free = {"resume", "evaluate", "total_timesteps", "save_minutes", "cuda", "cuda_required", "cuda_graphs", "track"}
    free |= {"eval_seed", "eval_every", "eval_episodes", "final_eval_episodes", "wandb_project_name", "wandb_entity"}
    free |= {"eval_modes", "eval_batch_norm", "dmcgb_dir"}
    try:
        args = tyro.cli(Args, args=flags, default=Args(**state["args"] | {"resume": None, "evaluate": None}))
    except TypeError as error:
        fail(f"the checkpoint is of another version of this script: {error}")
    if args.precision == "auto":
        args.precision = state["args"]["precision"]
    for name in state["args"].keys() - free:
        if getattr(args, name) != state["args"][name]:
            fail(f"--{name.replace('_', '-')} is {state['args'][name]} in that run and stays so")
    if args.resume:
        del state  # `train` reads it again
        return train(args, make_envs, make_agent)
    check(args)
    agent = load_agent(args, state, make_envs, make_agent)
    table = compare(agent, args, make_envs, args.final_eval_episodes)
    report(table, state["step"], checkpoint_path(args.evaluate).parent)


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # TensorBoard's writer fails in its thread, and again in this one
    try:
        main()
    except OSError as error:  # a full disk, say
        sys.exit(f"error: {error}; what was saved before is whole")

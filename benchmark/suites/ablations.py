"""A script with one thing changed from outside, through train's two factories: the baselines that papers compare with.

    python benchmark/suites/ablations.py                                            # what there is
    python benchmark/suites/ablations.py ppo_netrand cutout --plain-look --seed 2   # script, ablation, its flags
    python benchmark/suites/ablations.py ppo_netrand cutout --plain-look --netrand  # with the paper's method too
    python benchmark/suites/ablations.py algos/mine.py cutout                       # your copy of ppo_netrand.py
    python benchmark/suites/ablations.py ppo_netrand cutout --resume runs/<folder>
    python benchmark/suites/ablations.py mdpo frozen --encoder runs/<folder>        # new heads on a trained encoder
    python benchmark/suites/ablations.py drqv2_pieg timm --encoder-name resnet50    # any model of timm
    python benchmark/analyses/evaluate.py runs/<folder>                             # as any other run

The command in a run's args.json says which ablation it is.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import networks
import observations

# ---- What there is ----
# {script: {name: (kind, what changes it, flags)}}. Kinds: see observations.py ("envs") and networks.py ("change",
# "class", "loss"). The papers' baselines are the plain algorithm and one thing more. A captured call cannot branch, so
# agents that branch go without.
PPO, BASE, RATE = ["--no-netrand"], ["--no-sam", "--reset-every", "0"], ["--learning-rate", "1.414e-4"]
DER = ["--no-augment", "--replay-ratio", "1", "--learning-starts", "1600", "--tau", "1"]
DOUBLED = ["--num-agents", "1", "--num-envs", "128", "--total-timesteps", "100000000"]
ABLATIONS = {
    "ppo_netrand": {
        "gray": ("envs", observations.Gray, PPO),
        "cutout": ("envs", observations.Cutout, PPO),
        "inversion": ("envs", observations.Inversion, PPO),
        "jitter": ("envs", observations.Jitter, PPO),
        "dropout": ("class", networks.dropout, [*PPO, "--no-cuda-graphs"]),
        "batch_norm": ("change", networks.batch_norm, PPO),
        "l2": ("change", networks.l2(1e-4, spared="bias"), [*PPO, "--no-cuda-graphs"]),
    },
    "drq_sam_reset": {
        "layer_norm": ("change", networks.rainbow_layer_norm, BASE),
        "crelu": ("change", networks.rainbow_crelu, BASE),
        "l2_1e-3": ("change", networks.l2(1e-3, spared=()), BASE),  # Paper: 7.3, the best of three
        "l2_1e-4": ("change", networks.l2(1e-4, spared=()), BASE),
        "l2_1e-5": ("change", networks.l2(1e-5, spared=()), BASE),
        "swa": ("class", networks.swa, [*BASE, "--no-cuda-graphs"]),
        "der": ("class", networks.der, [*DER, *BASE, "--no-cuda-graphs"]),
        "plastic": ("change", networks.rainbow_plastic, ["--sam-scope", "backbone", *RATE]),
        "plastic_code": ("change", networks.rainbow_plastic_code, RATE),
        "plastic_dagger": ("change", networks.rainbow_plastic_dagger, ["--no-sam", *RATE]),
    },
    "sac_sam_reset": {
        "layer_norm": ("change", networks.sac_layer_norm, BASE),
        "crelu": ("change", networks.sac_crelu, BASE),
        "l2_1e-3": ("change", networks.l2(1e-3, spared="log_alpha"), BASE),  # 7.4 adopts Nikishin et al.'s
        "l2_1e-4": ("change", networks.l2(1e-4, spared="log_alpha"), BASE),
        "l2_1e-5": ("change", networks.l2(1e-5, spared="log_alpha"), BASE),
        "plastic": ("change", networks.sac_plastic, ["--sam-on", "critic", "--learning-rate", "1e-4"]),
    },
    "mdpo": {
        "doubled": ("change", networks.doubled, DOUBLED),
        "doubled_equal": ("change", networks.doubled_equal, DOUBLED),
        "frozen": ("change", networks.frozen(), ["--num-agents", "1"]),
        "detached": ("loss", networks.detached, []),
        "detached_own": ("loss", networks.detached_own, []),
    },
    "drqv2_pieg": {
        "timm": ("class", networks.timm_encoder(), []),
    },
}
# An argument by which a copy of a script is known, whatever its name is.
OWN_ARGUMENTS = {
    "ppo_netrand": "netrand",
    "drq_sam_reset": "sam_scope",
    "sac_sam_reset": "sam_on",
    "mdpo": "distill_coef",
    "drqv2_pieg": "encoder_layer",
}


def find(script, name):
    """(kind, what changes it, flags) of an ablation of a script or of a copy of one."""
    arguments = vars(script.Args())
    for original, argument in OWN_ARGUMENTS.items():
        if argument in arguments:
            rows = ABLATIONS[original]
            if name not in rows:
                common.fail(f"no ablation {name!r} of {original}, there are: {' '.join(rows)}")
            return rows[name]
    common.fail(f"no ablations of {Path(script.__file__).name}, there are some of: {' '.join(ABLATIONS)}")


def factories(script, kind, change):
    """make_envs and make_agent of an ablation."""
    if kind == "envs":
        return partial(observations.make_envs, script, change), script.Agent
    if kind == "class":
        return script.make_envs, change(script)
    if kind == "loss":
        change(script)
        return script.make_envs, script.Agent
    return script.make_envs, partial(networks.make_agent, script, change)


def seams(script, about):
    """What common.load_run gives a run of an ablation: make_envs, make_agent."""
    name = ablation_of(about)
    kind, change, _ = find(script, name)
    if name == "timm":
        change = timm_of(own_of(about["command"][3:]))
    return factories(script, kind, change)


def ablation_of(about):
    """The ablation that a run is, from its args.json; "" for none."""
    command = about["command"]
    if Path(command[0]).name != "ablations.py" or len(command) < 3:
        return ""
    return command[2]


# ---- The command line ----
@dataclass
class Own:
    """The flags that are not the script's, and --resume, which is both's."""

    encoder: str = ""  # run folder of mdpo.py
    encoder_agent: int = 1  # which of its agents
    encoder_name: str = ""  # model of timm
    encoder_stage: int = 0  # which of its features, from 1 (0: the last of stride 8)
    resume: str | None = None


def own_of(words):
    """The Own of a command's words."""
    return tyro.cli(Own, args=words, return_unknown_args=True, add_help=False)[0]


def main(argv):
    if not argv or {"-h", "--help"} & set(argv[:2]):
        print_ablations()
        return
    path = common.find_script(argv[0])
    name = argv[1] if len(argv) > 1 else ""
    script = common.load_script(path)
    kind, change, flags = find(script, name)
    own, given = tyro.cli(Own, args=argv[2:], return_unknown_args=True, add_help=False)
    if own.resume:
        about = common.read_about(own.resume)
        if ablation_of(about) != name:  # its network may have the same shape all the same
            common.fail(f"--resume {own.resume}: that run is not of the ablation {name}, but {ablation_of(about)!r}")
        flags = ["--resume", own.resume]  # a run keeps its arguments
        before = own_of(about["command"][3:])
        for key in ("encoder_name", "encoder_stage"):
            if getattr(own, key) not in (getattr(Own, key), getattr(before, key)):
                common.fail(f"--{key.replace('_', '-')} is {getattr(before, key)} in that run and stays so")
            setattr(own, key, getattr(before, key))
    else:
        flags = ["--exp-name", f"{path.stem}_{name}", *flags]
    if name == "frozen" and not own.resume:
        encoder, more = read_encoder(own)
        change, flags = networks.frozen(encoder), [*flags, *more]
    if name == "timm":
        if {"--encoder", "--encoder-layer"} & {word.partition("=")[0].replace("_", "-") for word in argv}:
            common.fail("timm: has --encoder-name and --encoder-stage in the place of --encoder and --encoder-layer")
        change = timm_of(own)
        if not own.resume:  # runs on different encoders are different methods
            stage = f"_{own.encoder_stage}" if own.encoder_stage else ""
            flags += ["--exp-name", f"{path.stem}_timm_{own.encoder_name}{stage}"]
    make_envs, make_agent = factories(script, kind, change)
    script.main([*flags, *given], make_envs, make_agent)


def print_ablations():
    print("python benchmark/suites/ablations.py SCRIPT ABLATION [FLAGS OF THE SCRIPT]")
    for script, rows in ABLATIONS.items():
        for name, (_, change, _) in rows.items():
            print(f"  {f'{script} {name}':30}{change.__doc__.splitlines()[0]}")
    print("  SVEA is no ablation, but algos/drqv2_pieg.py --encoder drqv2, with the overlay as by default")


def read_encoder(own):
    """The weights of the encoder that --encoder names, and the flags for its game and levels."""
    if not own.encoder:
        common.fail("frozen: needs --encoder, the folder of a run of mdpo.py")
    run = common.load_run(own.encoder)
    if "distill_coef" not in vars(run.args):
        common.fail(f"--encoder {own.encoder}: a run of mdpo.py or of a copy of it is needed")
    agents = run.agents()
    if not 1 <= own.encoder_agent <= len(agents):
        common.fail(f"--encoder-agent {own.encoder_agent}: there is no such agent in {own.encoder}")
    flags = []
    for name in ("env_id", "distribution_mode", "num_levels", "start_level"):
        flags.append(f"--{name.replace('_', '-')}={getattr(run.args, name)}")
    return agents[own.encoder_agent - 1].encoder.state_dict(), flags


def timm_of(own):
    """The ablation with the model that --encoder-name and --encoder-stage name."""
    networks.check_timm(own.encoder_name)
    return networks.timm_encoder(own.encoder_name, own.encoder_stage)


if __name__ == "__main__":
    common.run(main, sys.argv[1:])

"""How much the policy that averages over random kernels gains from more of them, and how much its
return depends on which kernels it draws.

Paper: Lee et al. 2020, network randomization, Figure 3d. Each number of kernels is evaluated several
times, on the same levels and with the same noise of actions, but with other kernels. So the standard
deviation over the repeats is that of the kernels alone; levels and seeds of training are no part of it.

    python benchmark/analyses/mc_samples.py runs/<netrand> --out mc_samples.csv

It is for runs of ppo_netrand.py and copies of it.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from evaluate import load_runs, report


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # [METHOD=]FOLDER of some runs
    out: str | None = None  # .csv file for the table
    samples: tuple[int, ...] = (1, 2, 5, 10, 20)  # M, random kernels that a step's policy is averaged over
    repeats: int = 5  # evaluations of each M
    episodes: int = 0  # of an evaluation (0: as many as in the run's last one)
    cuda: bool = True  # use a GPU if there is one


def main():
    args = tyro.cli(Args, description=__doc__)
    if min(args.samples, default=0) < 1 or args.repeats < 2 or args.episodes < 0:
        common.fail("--samples: at least 1; --repeats: at least 2; --episodes: at least 0")
    if args.out:
        common.check_out(args.out, ".csv")
    runs, rows = load_runs(args.runs, args.cuda), []
    for run in runs:
        if not getattr(run.args, "netrand", False):
            common.fail(f"{run.folder}: this is for runs of ppo_netrand.py with its method on, and copies of them")
    for run in runs:
        rows += sweep(run, args)
    report(rows, args.out)


def sweep(run, args):
    """Rows of a run, one for each split and number of kernels: mean and std over the repeats' mean returns."""
    (agent,), script, rows = run.agents(), run.script, []
    episodes = args.episodes or script.final_episodes(run.args)
    for split in ("test", "full_look") if run.args.plain_look else ("test",):
        for samples in args.samples:
            own = dataclasses.replace(run.args, mc_samples=samples, eval_episodes=episodes)
            means = [mean_return(run, agent, own, split, seed) for seed in range(args.repeats)]
            row = run.source() | {"split": split, "mc_samples": samples, "episodes": episodes}
            rows.append(row | {"repeats": len(means), "mean": np.mean(means), "std": np.std(means, ddof=1)})
    return rows


def mean_return(run, agent, args, split, seed):
    """The script's own evaluation with kernels of the stream `seed` in place of --eval-seed's."""
    script, own = run.script, run.script.random_kernel
    kernel_rng = torch.Generator().manual_seed(seed)
    script.random_kernel = lambda _: own(kernel_rng)  # that `evaluate` calls
    try:
        return script.evaluate(agent, args, run.make_envs, split).mean()
    finally:
        script.random_kernel = own


if __name__ == "__main__":
    main()

"""What a GPU shows, in one command: `make gpu`. At most nine minutes for all scripts together.

First the tests that need a GPU. Then each script at its default sizes, in tf32, bf16 and fp32, with CUDA graphs and
without: an iteration to warm up and one that counts, which is a rollout with its updates or, for a script that
learns with every step, 200 steps. With graphs and without, the weights have to be equal bit for bit. Last, a run
that began on the CPU goes on on the GPU, and then on the CPU again.

    python benchmark/gpu.py                   # all five
    python benchmark/gpu.py algos/mdpo.py     # one, or a copy of one

The table is also written to benchmark/results/gpu_<card>.csv, a row for each measurement. Peak memory is the GPU's,
as torch reserves it. The limit is what the bare network reaches: forward, backward and Adam, without CUDA graphs. The
clock waits for the GPU at the ends of each phase, so nothing overlaps: the steps per second are a lower bound.
"""

import csv
import gc
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import common
import throughput
import torch
import tyro

SCRIPTS = ("mdpo", "ppo_netrand", "drq_sam_reset", "sac_sam_reset", "drqv2_pieg")
PRECISIONS = ("tf32", "bf16", "fp32")
STEPS = 200  # of an iteration, where there are no rollouts
COLUMNS = ["script", "precision", "graphs", "steps_per_second", "ms_per_update", "environments", "inference", "update"]
COLUMNS += ["rest", "peak_gb", "limit_fraction", "same_weights", "resumed", "command", "commit", "packages", "hardware"]


@dataclass
class Args:
    scripts: tyro.conf.Positional[tuple[str, ...]] = ()  # files of algos/, or copies of them (none: all five)
    minutes: float = 9.0  # most that all may take together
    out: str = ""  # CSV file (none: benchmark/results/gpu_<card>.csv)
    inside: bool = False  # be the process that measures one script (used by this program itself)


def main():
    args = tyro.cli(Args)
    if args.inside:
        return inside(args.scripts[0])
    if not torch.cuda.is_available():
        common.fail("torch finds no GPU here")
    scripts = args.scripts or [str(common.ROOT / "algos" / f"{name}.py") for name in SCRIPTS]
    for script in scripts:
        if not Path(script).is_file():
            common.fail(f"{script}: no such script")
    scripts = [str(Path(script).absolute()) for script in scripts]
    card = re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower()
    out = args.out or str(common.ROOT / "benchmark" / "results" / f"gpu_{card}.csv")
    common.check_out(out, ".csv")
    end = time.monotonic() + 60 * args.minutes
    tests = [sys.executable, "-m", "pytest", "-q", "tests/test_capture.py", "-k", "on_a_gpu"]
    output, good = finished(tests, 60 * args.minutes / 3)
    if not good:
        print(f"{output}\nerror: the tests failed, or took longer than a third of the time", file=sys.stderr)
    rows = []
    for number, script in enumerate(scripts):
        seconds = (end - time.monotonic()) / (len(scripts) - number)
        output, whole = finished([sys.executable, __file__, script, "--inside"], seconds)
        rows += [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        if not whole:
            print(f"error: {script} failed, or took longer than {seconds:.0f} s", file=sys.stderr)
        good = good and whole
        write(out, rows)
    show(rows)
    wrong = [row["script"] for row in rows if not (row["same_weights"] and row["resumed"])]
    print(f"weights or resumes WRONG: {' '.join(wrong)}" if wrong else "all weights and resumes are as they must be")
    sys.exit(not good or bool(wrong))


def finished(command, seconds):
    """Runs a command, for so long at most -> what it printed, whether it came to its end."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, cwd=common.ROOT)
        try:
            whole = process.wait(timeout=max(seconds, 1)) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            whole = False
        output.seek(0)
        return output.read(), whole


def inside(script):
    """Prints a row of JSON for each precision, with and without graphs."""
    resumed = resumes(script)
    for precision in PRECISIONS:
        digests = []
        for graphs in (False, True):
            row, own = measure(script, precision, graphs)
            digests.append(own)
            print(json.dumps(row | {"same_weights": own == digests[0], "resumed": resumed}), flush=True)


def sizes(script):
    """Flags with which a script begins to learn soon and needs no network. Sizes of updates stay as they are."""
    names, flags = vars(script.Args()), []
    if "learning_starts" in names:
        flags += ["--learning-starts", "100"]
    if "encoder_weights" in names:
        flags += ["--encoder-weights", "random", "--overlay-pictures", "100"]
    return flags


def measure(path, precision, graphs, flags=(), make_envs=None, limit=1.0):
    """A row of the table, and the digest of the weights after its iterations."""
    own_flags = [*sizes(common.load_script(path)), "--precision", precision]
    own_flags += ["--cuda-graphs" if graphs else "--no-cuda-graphs", *flags]
    iterations, peaks = [], []

    def between(iteration):
        iterations.append(iteration)
        peaks.append(torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()

    gc.collect()
    torch.cuda.empty_cache()
    about, weights = throughput.iterate(path, own_flags, STEPS, 2, between, make_envs, limit)
    phases, updates = iterations[1]["phases"], iterations[1]["updates"]
    seconds = sum(phases.values())
    row = {"script": Path(path).stem, "precision": precision, "graphs": graphs, "peak_gb": peaks[1] / 1e9}
    row["steps_per_second"] = about["steps"] / seconds
    row["ms_per_update"] = 1000 * phases["update"] / updates
    row["limit_fraction"] = throughput.limit_fraction(iterations[1:], about)
    for phase in ("environments", "inference", "update", "rest"):
        row[phase] = phases[phase] / seconds
    row |= {key: about[key] for key in ("command", "commit", "packages", "hardware")}
    return row, digest(weights)


def digest(weights):
    """A fingerprint of the state_dicts of some networks."""
    found = hashlib.sha256()
    for state in weights:
        for value in state.values():
            found.update(value.cpu().numpy().tobytes())
    return found.hexdigest()


def resumes(path, **seams):
    """Whether a short run goes on from the CPU to the GPU and back. seams: make_envs and make_agent of `main`."""
    script = common.load_script(path)
    if "num_steps" in vars(script.Args()):
        steps, flags = 32, ["--num-envs", "4", "--num-steps", "8", "--num-minibatches", "2"]
    else:
        steps, flags = 40, [*sizes(script), "--learning-starts", "20", "--batch-size", "8"]
    with tempfile.TemporaryDirectory() as runs_dir:
        flags += ["--runs-dir", runs_dir, "--precision", "fp32", "--eval-every", "0"]
        script.main([*flags, "--no-cuda", "--total-timesteps", str(steps)], **seams)
        (folder,) = Path(runs_dir).iterdir()
        for device, total in (("--cuda", 2 * steps), ("--no-cuda", 3 * steps)):
            script.main(["--resume", str(folder), device, "--total-timesteps", str(total)], **seams)
        return script.load_checkpoint(folder)["step"] == 3 * steps


def write(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def show(rows):
    """Prints the table. Phases are shares of the time."""
    names = [
        "script",
        "precision",
        "graphs",
        "steps/s",
        "ms/update",
        "env",
        "act",
        "update",
        "rest",
        "GB",
        "limit",
        "same",
    ]
    print(f"{names[0]:16}{names[1]:>10}" + "".join(f"{name:>10}" for name in names[2:]))
    for row in rows:
        numbers = [f"{row['steps_per_second']:.1f}", f"{row['ms_per_update']:.2f}"]
        for phase in ("environments", "inference", "update", "rest"):
            numbers.append(f"{row[phase]:.1%}")
        numbers += [f"{row['peak_gb']:.2f}", f"{row['limit_fraction']:.2f}", "yes" if row["same_weights"] else "NO"]
        words = [row["precision"], "yes" if row["graphs"] else "no", *numbers]
        print(f"{row['script']:16}" + "".join(f"{word:>10}" for word in words))


if __name__ == "__main__":
    main()

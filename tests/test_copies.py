"""The five scripts repeat each other word for word; this holds the copies equal. Other files are the user's own.

python tests/test_copies.py --fix NAME --from algos/mdpo.py    # shows what differs and writes that file's text over it
"""

import argparse
import ast
import difflib
import io
import re
import sys
import tokenize
import tomllib
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FIVE = ("drq_sam_reset.py", "drqv2_pieg.py", "mdpo.py", "ppo_netrand.py", "sac_sam_reset.py")
BANNERS = ["Imports", "Arguments", "Environments", "Networks", "The method", "Losses, targets, replay", "Update"]
BANNERS += ["Training and evaluation", "Checkpoints, logs, command line"]
BANNERS = [f"# ---- {number}. {title} ----" for number, title in enumerate(BANNERS, 1)]
# Names whose text differs from script to script by nature.
DIFFER = {"Args", "make_envs", "Agent", "act", "update", "train", "evaluate", "compare", "load_agents", "check"}
DIFFER |= {"MAY_CHANGE", "POSITIVE", "SMALLEST", "LARGEST", "GAMES", "Replay", "random_shift", "final_episodes"}
DIFFER |= {"Critic", "Actor", "projection", "mlp", "FRAMES", "ControlEnvs"}  # of DeepMind Control's two scripts
BESIDES = {"torch.utils.tensorboard": "tensorboard", "dm_control": "mujoco"}  # what an import needs besides its own
NAMED = {"cv2": "opencv-python-headless"}  # packages that are not called what is imported of them
OPTIONAL = {"wandb"}  # imported if a flag asks for it


def read(folder):
    """{file name: source} of the five scripts in a folder."""
    paths = [Path(folder) / file for file in FIVE]
    return {path.name: path.read_text() for path in paths if path.is_file()}


class Definition(NamedTuple):
    """A top-level name: lines[first:last] of its file are its text."""

    text: str
    first: int
    last: int


def definitions(source):
    """{name: Definition} of the functions, classes and constants. The comments right above a name are of its text."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])]) - 1
        while first > 0 and lines[first - 1].startswith("#") and not lines[first - 1].startswith("# ----"):
            first -= 1
        for name in names(node):
            found[name] = Definition("\n".join(lines[first : node.end_lineno]), first, node.end_lineno)
    return found


def names(node):
    """What a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", []) or [getattr(node, "target", None)]
    parts = [part for target in targets if target for part in ast.walk(target) if isinstance(part, ast.Name)]
    return [part.id for part in parts if isinstance(part.ctx, ast.Store)]


def differing_copies(sources):
    """A name has one text in all files, but for those that differ by nature."""
    found, problems = {file: definitions(source) for file, source in sources.items()}, []
    for one, two in combinations(found, 2):
        for name in sorted((found[one].keys() & found[two].keys()) - DIFFER):
            if found[one][name].text != found[two][name].text:
                problems.append(f"{name} differs in {one} and {two}: --fix it, or add it to DIFFER")
    return problems


def wrong_banners(sources):
    """The nine banners, in order."""
    found = {file: re.findall(r"^# --.*", source, re.MULTILINE) for file, source in sources.items()}
    return [f"{file}: banners {banners}" for file, banners in found.items() if banners != BANNERS]


def fields(source):
    """{field of Args: (type, comment)}."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    found = [node for args in classes for node in args.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: (ast.unparse(node.annotation), comments.get(node.end_lineno, "")) for node in found}


def differing_fields(sources):
    """A field of Args has one type in all files. Its comment is true for its own script."""
    found = {file: fields(source) for file, source in sources.items()}
    problems = []
    for one, two in combinations(found, 2):
        for name in sorted(found[one].keys() & found[two].keys()):
            if found[one][name][0] != found[two][name][0]:
                problems.append(f"the field {name} differs in {one} and {two}")
    return problems


def imports(source):
    """Dotted names of all that a script imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def dependencies(source):
    """The requirements in the PEP 723 block."""
    block = re.search(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", source)
    return tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))["dependencies"] if block else []


def wrong_packages(sources, requirements):
    """The PEP 723 block lists what the file imports (and the Qt that it loads by hand), pinned as in `requirements`."""
    problems = []
    for file, source in sources.items():
        listed, imported = dependencies(source), imports(source)
        needed = (
            {NAMED.get(name.split(".")[0], name.split(".")[0]) for name in imported}
            - sys.stdlib_module_names
            - OPTIONAL
        )
        needed |= {BESIDES[name] for name in imported & BESIDES.keys()}
        needed |= {"PyQt5-Qt5"} if "libQt5" in source else set()
        unlike = {pin.split("==")[0] for pin in listed} ^ needed
        problems += [f"{file}: its PEP 723 block and its imports differ in {sorted(unlike)}"] if unlike else []
        unpinned = set(listed) - set(requirements.splitlines())
        problems += [f"{file}: {sorted(unpinned)} not as in requirements.txt"] if unpinned else []
    return problems


def imports_of_ours(sources):
    """A script imports nothing of this repository."""
    ours = {Path(file).stem for file in sources} | {"algos", "benchmark", "tests", ""}
    found = [(file, name) for file, source in sources.items() for name in imports(source)]
    return [f"{file} imports {name or '.'}" for file, name in found if name.split(".")[0] in ours]


def wrong_docstrings(sources):
    """A docstring of at most 25 lines."""
    found = {file: ast.get_docstring(ast.parse(source), clean=False) for file, source in sources.items()}
    counts = {file: len(text.split("\n")) if text else 0 for file, text in found.items()}
    return [f"{file}: a docstring of {count} lines" for file, count in counts.items() if not 1 <= count <= 25]


def all_problems(sources, requirements):
    rules = [differing_copies, wrong_banners, differing_fields, imports_of_ours, wrong_docstrings]
    return [problem for rule in rules for problem in rule(sources)] + wrong_packages(sources, requirements)


def fix(name, origin):
    """Writes one script's text of a name into the other four, and prints what it overwrites."""
    sources = read(origin.parent)
    text = definitions(sources[origin.name])[name].text
    for file, source in sources.items():
        part = definitions(source).get(name)
        if part and part.text != text:
            lines = source.splitlines()
            lines[part.first : part.last] = text.splitlines()
            about = {"fromfile": file, "tofile": f"{file}, now", "lineterm": "", "n": 0}
            print("\n".join(difflib.unified_diff(part.text.splitlines(), text.splitlines(), **about)))
            (origin.parent / file).write_text("\n".join(lines) + "\n")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", metavar="NAME", required=True)
    parser.add_argument("--from", dest="origin", metavar="FILE", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.origin.name not in FIVE:
        parser.error(f"{options.origin} is not one of {' '.join(FIVE)}")
    if not options.origin.is_file() or options.fix not in definitions(options.origin.read_text()):
        parser.error(f"{options.origin} has no {options.fix}")
    if options.fix in DIFFER:
        parser.error(f"{options.fix} differs by nature")
    fix(options.fix, options.origin)


def test_the_scripts_keep_the_rules():
    sources = read(ROOT / "algos")
    assert sources.keys() == set(FIVE)
    assert all_problems(sources, (ROOT / "requirements.txt").read_text()) == []


# A whole script, made up. `in_two(old, new)` is two copies of it, with a change in the second.
REQUIREMENTS = "PyQt5-Qt5==5.0\ntensorboard==2.0\ntorch==3.0\ntqdm==4.0\n"
SCRIPT = '''# /// script
# dependencies = [
#     "PyQt5-Qt5==5.0", "tensorboard==2.0", "torch==3.0",
# ]
# ///
"""What it does."""

# ---- 1. Imports ----
import os

import torch
from torch.utils.tensorboard import SummaryWriter

# ---- 2. Arguments ----
@dataclass
class Args:
    seed: int = 1  # one seed, one run


# ---- 3. Environments ----
# What they draw with.
LIBRARIES = ("libQt5Core.so.5",)


# ---- 4. Networks ----
@torch.no_grad()
def noise_of(agent):
    return agent()  # sampled


# ---- 5. The method ----
LEFT, RIGHT = 1, 2


# ---- 6. Losses, targets, replay ----
class Captured:
    size = 1


# ---- 7. Update ----
def update():
    import wandb


# ---- 8. Training and evaluation ----
RATE: float = 0.1


# ---- 9. Checkpoints, logs, command line ----
def save():
    return None
'''


def in_two(*changes):
    changed = SCRIPT
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert changed.count(old) == 1
        changed = changed.replace(old, new)
    return {"mdpo.py": SCRIPT, "ppo_netrand.py": changed}


ALLOWED = {
    "no change": [],
    "differs by nature": ["    import wandb", "    import wandb as w"],
    "another default": ["int = 1", "int = 2"],
    "a field more": ["    seed", "    size: int = 1  # images\n    seed"],
    "a name more": ["LEFT,", "MIDDLE = 0\nLEFT,"],
    "25 lines of docstring": ["What it does.", "What it does." + 24 * "\n"],
    "blank lines": ["RATE", "\n\nRATE"],
    "a comment that is true for one": ["one seed,", "a seed,"],
}
REFUSED = {
    "function": (["return None", "return 1"], "save differs in mdpo.py and ppo_netrand.py"),
    "class": (["size = 1", "size = 2"], "Captured differs"),
    "constant": (["0.1", "0.2"], "RATE differs"),
    "decorator": (["@torch.no_grad()\n", ""], "noise_of differs"),
    "comment behind": (["sampled", "drawn"], "noise_of differs"),
    "comment above": (["# What they", "# All they"], "LIBRARIES differs"),
    "banner missing": (["# ---- 6. Losses, targets, replay ----\n", ""], "ppo_netrand.py: banners"),
    "banner spelled otherwise": (["3. Environments", "3. Environment"], "ppo_netrand.py: banners"),
    "banners out of order": (
        ["4. Networks", "4. x", "5. The method", "4. Networks", "4. x", "5. The method"],
        "banners",
    ),
    "a tenth banner": (["def save", "# ---- 10. More ----\ndef save"], "ppo_netrand.py: banners"),
    "type of a field": (["int = 1", "float = 1"], "the field seed differs"),
    "package not listed": (["import os", "import os\nimport tqdm"], "differ in ['tqdm']"),
    "package not imported": (['"torch==', '"tqdm==4.0", "torch=='], "differ in ['tqdm']"),
    "package imported inside": (["import wandb", "import tqdm.auto"], "differ in ['tqdm']"),
    "events not listed": (['"tensorboard==2.0", ', ""], "differ in ['tensorboard']"),
    "Qt not listed": (['"PyQt5-Qt5==5.0", ', ""], "differ in ['PyQt5-Qt5']"),
    "another pin": (["torch==3.0", "torch==3.1"], "['torch==3.1'] not as in requirements.txt"),
    "no pin": (["torch==3.0", "torch"], "['torch'] not as in requirements.txt"),
    "another script imported": (["import os", "import os\n\nfrom mdpo import save"], "ppo_netrand.py imports mdpo"),
    "a folder of ours imported": (
        ["import os", "import os\n\nimport benchmark.x"],
        "ppo_netrand.py imports benchmark.x",
    ),
    "a relative import": (["import os", "import os\n\nfrom . import x"], "ppo_netrand.py imports ."),
    "long docstring": (["What it does.", "What it does." + 25 * "\n"], "a docstring of 26 lines"),
    "no docstring": (['"""What it does."""\n', ""], "a docstring of 0 lines"),
}


@pytest.mark.parametrize("changes", ALLOWED.values(), ids=ALLOWED)
def test_allowed(changes):
    assert all_problems(in_two(*changes), REQUIREMENTS) == []


@pytest.mark.parametrize("changes, said", REFUSED.values(), ids=REFUSED)
def test_refused(changes, said):
    assert any(said in problem for problem in all_problems(in_two(*changes), REQUIREMENTS))


def test_a_name_is_what_a_top_level_statement_makes():
    source = "import x\nx.y = x['z'] = 1\na, (b, *c) = d = 1\ne: int = 2\nclass F:\n    g = 1\nprint(h := 1)\n"
    assert sorted(definitions(source)) == ["F", "a", "b", "c", "d", "e"]


def test_fix_writes_one_text_into_the_others_and_says_what_it_overwrites(tmp_path, capsys):
    """Comment, decorator and body go over, the rest stays, and so does each file that is not one of the five."""
    sources = in_two("# What they", "# All they", '.5",)', '.6",)', "RATE: float = 0.1", "RATE: float = 0.2")
    sources["mine.py"] = SCRIPT.replace("# What they", "# Mine")
    for file, source in sources.items():
        (tmp_path / file).write_text(source)
    second = in_two("RATE: float = 0.1", "RATE: float = 0.2")["ppo_netrand.py"]
    main(["--fix", "LIBRARIES", "--from", str(tmp_path / "mdpo.py")])
    assert (tmp_path / "ppo_netrand.py").read_text() == second
    assert "-# All they draw with.\n" in capsys.readouterr().out
    main(["--fix", "RATE", "--from", str(tmp_path / "ppo_netrand.py")])
    assert (tmp_path / "mdpo.py").read_text() == second
    assert "-RATE: float = 0.1\n" in capsys.readouterr().out
    main(["--fix", "RATE", "--from", str(tmp_path / "ppo_netrand.py")])
    assert capsys.readouterr().out == ""
    assert (tmp_path / "mine.py").read_text() == sources["mine.py"]


@pytest.mark.parametrize(
    ("name", "file"), [("Args", "mdpo.py"), ("nowhere", "mdpo.py"), ("RATE", "mine.py"), ("RATE", "sac_sam_reset.py")]
)
def test_fix_refuses(name, file, tmp_path, capsys):
    """A name that differs by nature, one that the file lacks, a file that is not one of the five or not there."""
    for other in ("mdpo.py", "ppo_netrand.py", "mine.py"):
        (tmp_path / other).write_text(SCRIPT)
    with pytest.raises(SystemExit, match="2"):
        main(["--fix", name, "--from", str(tmp_path / file)])
    error = capsys.readouterr().err
    assert name in error or file in error
    assert {path.read_text() for path in tmp_path.iterdir()} == {SCRIPT}


if __name__ == "__main__":
    main()

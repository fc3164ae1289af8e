"""The scripts repeat each other word for word; this holds the copies equal.

python tests/test_copies.py --fix NAME --from algos/mdpo.py    # writes that file's text of NAME into the others
"""

import argparse
import ast
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
BANNERS = ["Imports", "Arguments", "Environments", "Networks", "The method", "Losses, targets, replay", "Update"]
BANNERS += ["Training", "Evaluation, checkpoints and logs"]
BANNERS = [f"# ---- {number}. {title} ----" for number, title in enumerate(BANNERS, 1)]
DIFFER = {"Args", "make_envs", "Agent", "update", "train", "evaluate", "check"}  # by nature, without a mark
MARK = "# Modified from"
BESIDES = {"torch.utils.tensorboard": "tensorboard", "dm_control": "mujoco"}  # what an import needs besides its own
NAMED = {"cv2": "opencv-python-headless"}  # packages that are not called what is imported of them
OPTIONAL = {"wandb"}  # imported if a flag asks for it


def read(folder):
    """{file name: source} of the scripts in a folder."""
    return {path.name: path.read_text() for path in sorted(Path(folder).glob("*.py"))}


class Definition(NamedTuple):
    """A top-level name: lines[first:last] of its file are its text and its mark."""

    text: str
    mark: str
    first: int
    last: int


def definitions(source):
    """{name: Definition} of the functions, classes and constants. The comments right above a name are of its text."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        first = code = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])]) - 1
        while first > 0 and lines[first - 1].startswith("#") and not lines[first - 1].startswith("# ----"):
            first -= 1
        marked = next((i for i in range(first, code) if lines[i].startswith(MARK)), code)
        text = "\n".join(lines[first:marked] + lines[code : node.end_lineno])
        mark = " ".join(lines[marked:code])
        for name in names(node):
            found[name] = Definition(text, mark, first, node.end_lineno)
    return found


def names(node):
    """What a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", []) or [getattr(node, "target", None)]
    parts = [part for target in targets if target for part in ast.walk(target) if isinstance(part, ast.Name)]
    return [part.id for part in parts if isinstance(part.ctx, ast.Store)]


def differing_copies(sources):
    """A name has one text in all files, but for the marked and for those that differ by nature."""
    found, problems = {file: definitions(source) for file, source in sources.items()}, []
    for one, two in combinations(found, 2):
        for name in sorted((found[one].keys() & found[two].keys()) - DIFFER):
            a, b = found[one][name], found[two][name]
            if not (a.mark or b.mark) and a.text != b.text:
                problems.append(f"{name} differs in {one} and {two}: --fix it, or put `{MARK} <file>: <why>` above one")
    return problems


def untrue_marks(sources):
    """A mark says file and reason, stands right above a name, and that file's text of the name is another."""
    problems = []
    for file, source in sources.items():
        marked = {name: part for name, part in definitions(source).items() if part.mark}
        if len(re.findall(rf"^\s*{MARK}", source, re.MULTILINE)) != len({part.first for part in marked.values()}):
            problems.append(f"{file}: a mark that is not right above a top-level name")
        for name, part in marked.items():
            match = re.fullmatch(rf"{MARK} (\w+\.py): \S.*", part.mark)
            origin = match and definitions(sources.get(match[1], "")).get(name)
            if not match:
                problems.append(f"{file}: the mark of {name} is not `{MARK} <file>: <what and why>`")
            elif match[1] == file or origin is None:
                problems.append(f"{file}: {name} is marked as of {match[1]}, which is no other file with that name")
            elif origin.text == part.text:
                problems.append(f"{file}: {name} is marked, but has the text of {match[1]}")
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
    """A field of Args has one type and one comment in all files."""
    found = {file: fields(source) for file, source in sources.items()}
    return [
        f"the field {name} differs in {one} and {two}"
        for one, two in combinations(found, 2)
        for name in sorted(found[one].keys() & found[two].keys())
        if found[one][name] != found[two][name]
    ]


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
    rules = [differing_copies, untrue_marks, wrong_banners, differing_fields, imports_of_ours, wrong_docstrings]
    return [problem for rule in rules for problem in rule(sources)] + wrong_packages(sources, requirements)


def fix(name, origin):
    """Writes one script's text of a name into the scripts beside it, but where it is marked as modified."""
    sources = read(origin.parent)
    text = definitions(sources[origin.name])[name].text
    for file, source in sources.items():
        part = definitions(source).get(name)
        if part and not part.mark:
            lines = source.splitlines()
            lines[part.first : part.last] = text.splitlines()
            (origin.parent / file).write_text("\n".join(lines) + "\n")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", metavar="NAME", required=True)
    parser.add_argument("--from", dest="origin", metavar="FILE", type=Path, required=True)
    options = parser.parse_args(arguments)
    if not options.origin.is_file() or options.fix not in definitions(options.origin.read_text()):
        parser.error(f"{options.origin} has no {options.fix}")
    if options.fix in DIFFER:
        parser.error(f"{options.fix} differs by nature")
    fix(options.fix, options.origin)


def test_the_scripts_keep_the_rules():
    sources = read(ROOT / "algos")
    assert sources
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
def act(agent):
    return agent()  # sampled


# ---- 5. The method ----
LEFT, RIGHT = 1, 2


# ---- 6. Losses, targets, replay ----
class Replay:
    size = 1


# ---- 7. Update ----
def update():
    import wandb


# ---- 8. Training ----
RATE: float = 0.1


# ---- 9. Evaluation, checkpoints and logs ----
def save():
    return None
'''


def in_two(*changes):
    changed = SCRIPT
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert changed.count(old) == 1
        changed = changed.replace(old, new)
    return {"one.py": SCRIPT, "two.py": changed}


ALLOWED = {
    "no change": [],
    "differs by nature": ["    import wandb", "    import wandb as w"],
    "another default": ["int = 1", "int = 2"],
    "a field more": ["    seed", "    size: int = 1  # images\n    seed"],
    "a name more": ["LEFT,", "MIDDLE = 0\nLEFT,"],
    "25 lines of docstring": ["What it does.", "What it does." + 24 * "\n"],
    "blank lines": ["RATE", "\n\nRATE"],
    "marked": ["class Replay:\n    size = 1", "# Modified from one.py: more room\nclass Replay:\n    size = 2"],
    "marked in two lines": [
        "def save():\n    return None",
        "# Modified from one.py: a\n# b\ndef save():\n    return 1",
    ],
    "marked below its comment": ["with.\n", "with.\n# Modified from one.py: one more\n", '5",)', '5", "")'],
}
REFUSED = {
    "function": (["return None", "return 1"], "save differs in one.py and two.py"),
    "class": (["size = 1", "size = 2"], "Replay differs"),
    "constant": (["0.1", "0.2"], "RATE differs"),
    "decorator": (["@torch.no_grad()\n", ""], "act differs"),
    "comment behind": (["sampled", "drawn"], "act differs"),
    "comment above": (["# What they", "# All they"], "LIBRARIES differs"),
    "mark of an equal copy": (
        ["def save", "# Modified from one.py: why\ndef save"],
        "save is marked, but has the text",
    ),
    "mark of an unknown file": (["def save", "# Modified from six.py: why\ndef save"], "no other file with that name"),
    "mark of itself": (["def save", "# Modified from two.py: why\ndef save"], "no other file with that name"),
    "mark of a file without it": (["RATE", "# Modified from one.py: why\nSIZE"], "no other file with that name"),
    "mark without a reason": (["def save", "# Modified from one.py\ndef save"], "the mark of save is not"),
    "mark apart from a name": (["def save", "# Modified from one.py: why\n\ndef save"], "not right above"),
    "banner missing": (["# ---- 6. Losses, targets, replay ----\n", ""], "two.py: banners"),
    "banner spelled otherwise": (["3. Environments", "3. Environment"], "two.py: banners"),
    "banners out of order": (
        ["4. Networks", "4. x", "5. The method", "4. Networks", "4. x", "5. The method"],
        "banners",
    ),
    "a tenth banner": (["def save", "# ---- 10. More ----\ndef save"], "two.py: banners"),
    "type of a field": (["int = 1", "float = 1"], "the field seed differs"),
    "comment of a field": (["one seed,", "a seed,"], "the field seed differs"),
    "package not listed": (["import os", "import os\nimport tqdm"], "differ in ['tqdm']"),
    "package not imported": (['"torch==', '"tqdm==4.0", "torch=='], "differ in ['tqdm']"),
    "package imported inside": (["import wandb", "import tqdm.auto"], "differ in ['tqdm']"),
    "events not listed": (['"tensorboard==2.0", ', ""], "differ in ['tensorboard']"),
    "Qt not listed": (['"PyQt5-Qt5==5.0", ', ""], "differ in ['PyQt5-Qt5']"),
    "another pin": (["torch==3.0", "torch==3.1"], "['torch==3.1'] not as in requirements.txt"),
    "no pin": (["torch==3.0", "torch"], "['torch'] not as in requirements.txt"),
    "another script imported": (["import os", "import os\n\nfrom one import save"], "two.py imports one"),
    "a folder of ours imported": (["import os", "import os\n\nimport benchmark.x"], "two.py imports benchmark.x"),
    "a relative import": (["import os", "import os\n\nfrom . import x"], "two.py imports ."),
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


def test_fix_writes_one_text_into_the_others(tmp_path):
    """Comment, decorator and body go over, the rest and marked copies stay."""
    sources = in_two("# What they", "# All they", '.5",)', '.6",)', "RATE: float = 0.1", "RATE: float = 0.2")
    sources["six.py"] = SCRIPT.replace("# What they", "# Modified from one.py: more\n# What they")
    for file, source in sources.items():
        (tmp_path / file).write_text(source)
    main(["--fix", "LIBRARIES", "--from", str(tmp_path / "one.py")])
    assert read(tmp_path) == sources | {"two.py": in_two("RATE: float = 0.1", "RATE: float = 0.2")["two.py"]}
    main(["--fix", "RATE", "--from", str(tmp_path / "two.py")])
    assert read(tmp_path)["one.py"] == in_two("RATE: float = 0.1", "RATE: float = 0.2")["two.py"]


@pytest.mark.parametrize("name", ["Args", "nowhere"])
def test_fix_refuses(name, tmp_path, capsys):
    """A name that differs by nature, and one that the file lacks."""
    (tmp_path / "one.py").write_text(SCRIPT)
    with pytest.raises(SystemExit, match="2"):
        main(["--fix", name, "--from", str(tmp_path / "one.py")])
    assert name in capsys.readouterr().err


if __name__ == "__main__":
    main()

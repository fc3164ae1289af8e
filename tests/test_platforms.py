"""Other platforms than the one at hand: every pin has a wheel there, and no script needs Linux or its Qt's layout."""

import ctypes
import json
import os
import re
import subprocess
import sys
import tomllib
import types
import zipfile

import pytest
from conftest import ROOT, SCRIPTS, load
from packaging.markers import default_environment
from packaging.requirements import Requirement

load("drqv2_pieg")  # torchvision imports triton, which crashes if Mesa's LLVM, which EGL brings, is there before it

# What markers see there, and the wheels that fit. torch has none for an older macOS or glibc, or for Intel's Macs.
PLATFORMS = {
    "macOS on arm64": (
        {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
        ["macosx_14_0_arm64", "macosx_13_0_arm64", "macosx_12_0_arm64", "macosx_11_0_arm64"],
    ),
    "Linux on aarch64": (
        {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
        [f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 26, 24, 17)] + ["manylinux2014_aarch64"],
    ),
}
ONLY_AS_SOURCE = {"rliable"}  # pure Python, for any platform


def pins():
    """The requirements of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pip(*words):
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_each_pin_has_a_wheel(platform, python, tmp_path):
    """pip looks at markers with the eyes of the machine it runs on, so they are looked at here."""
    environment, tags = PLATFORMS[platform]
    environment = default_environment() | environment | {"python_version": python}
    wanted = [pin for pin in pins() if pin.marker is None or pin.marker.evaluate(environment)]
    names = {pin.name.lower().replace("_", "-") for pin in wanted}
    words = ["install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-"]
    words += ["--target", str(tmp_path), "--python-version", python, "--implementation", "cp"]
    words += ["--only-binary", ":all:", "--no-binary", ",".join(ONLY_AS_SOURCE)]
    for tag in tags:
        words += ["--platform", tag]
    report = json.loads(pip(*words, *[f"{pin.name}{pin.specifier}" for pin in wanted]))
    files = {}
    for package in report["install"]:
        name = package["metadata"]["name"].lower().replace("_", "-")
        files[name] = package["download_info"]["url"].rpartition("/")[2]
    assert files.keys() == names
    for name, file in files.items():
        fits = file.endswith("-none-any.whl") or any(tag in file for tag in tags)
        assert fits or name in ONLY_AS_SOURCE, file


def test_what_is_left_out_on_other_platforms():
    """Qt on aarch64, where the system has it, and nothing else."""
    left_out = set()
    for environment, _ in PLATFORMS.values():
        for pin in pins():
            if pin.marker and not pin.marker.evaluate(default_environment() | environment):
                left_out.add((pin.name, environment["platform_machine"]))
    assert left_out == {("PyQt5-Qt5", "aarch64")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_asks_for_a_python_that_has_the_wheels(name):
    """uv takes the newest Python that the script allows, and that one has no torch yet."""
    block = re.search(r"(?m)^# requires-python = (\".*\")$", (ROOT / "algos" / f"{name}.py").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert json.loads(block[1]) == project["requires-python"] == ">=3.11,<3.13"


# Loads each script as if on a Mac, and trains with it on scripted environments. What it imports is loaded before, as
# Linux's torch does not run on a Mac. At import sysconf knows no memory; macOS knows it, so for training it is back.
MAC = """
import ctypes, os, platform, sys, types

from conftest import SCRIPTS, ScriptedEnvs, load, make_agent_of, tiny_args

for name in SCRIPTS:
    load(name)
cdll, sysconf = ctypes.CDLL, os.sysconf
for call in "sched_getaffinity sched_setaffinity posix_fallocate posix_fadvise copy_file_range memfd_create".split():
    delattr(os, call)
sys.platform, os.environ["PATH"] = "darwin", sys.argv[1]  # no lscpu, sed or git
platform.system, platform.machine = lambda: "Darwin", lambda: "arm64"
ctypes.CDLL = lambda name, *args, **kwargs: cdll(name, *args, **kwargs) if name else types.SimpleNamespace()


def unknown(name):
    raise ValueError("unrecognized configuration name")


for name in SCRIPTS:
    os.sysconf = unknown
    del sys.modules[name]
    script = load(name)
    os.sysconf = sysconf
    script.train(tiny_args(name, sys.argv[1], exp_name=name), ScriptedEnvs, make_agent_of(script))
"""


@pytest.mark.slow
def test_the_scripts_train_without_linux(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", MAC, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for name in SCRIPTS:
        (about,) = tmp_path.glob(f"*__{name}__*/args.json")
        assert json.loads(about.read_text())["hardware"]["cores"] == os.cpu_count()
        assert (about.parent / "checkpoint.pt").stat().st_size > 0


@pytest.mark.parametrize("name", ["drqv2_pieg", "sac_sam_reset"])
@pytest.mark.parametrize("wanted, says", [(None, "MUJOCO_GL=glfw: no window"), ("cgl", "MUJOCO_GL=cgl: no window")])
def test_a_mac_is_asked_for_glfw_alone(name, wanted, says, monkeypatch, capsys):
    """dm_control knows no CGL, and there is no EGL; a user's own wish comes first and is tried as any other."""
    script, tried, works = load(name), [], False

    def probe(command, env, **_):
        tried.append(env["MUJOCO_GL"])
        return types.SimpleNamespace(returncode=int(not works), stderr="Traceback\nno window\n")

    suite = script.import_suite()  # with Linux's renderer, as it stays for the other tests
    monkeypatch.setattr(script.subprocess, "run", probe)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("MUJOCO_GL", wanted or "")
    script.import_suite.cache_clear()
    with pytest.raises(SystemExit, match=r"^2$"):
        script.import_suite()
    error = capsys.readouterr().err
    assert tried == [wanted or "glfw"] and says in error and error.count("\n") == 1
    works = True
    assert script.import_suite() is suite and os.environ["MUJOCO_GL"] == (wanted or "glfw")


# Where the Qt libraries lie in PyQt5-Qt5's wheels, and where EnvPool's wheel for macOS looks for them.
QT_ON_LINUX = ["libQt5Core.so.5", "libQt5Gui.so.5"]
QT_ON_MACOS = ["QtCore.framework/Versions/5/QtCore", "QtGui.framework/Versions/5/QtGui"]
HOMEBREW = "/opt/homebrew/opt/qt@5/lib"


@pytest.fixture
def qt(tmp_path, monkeypatch):
    """qt(platform, files, broken) -> what import_envpool loads there, PyQt5 being a package with these files.

    Without files there is no package; with `broken`, nothing can be loaded.
    """
    folder = tmp_path / "PyQt5" / "Qt5" / "lib"

    def go(platform, files, broken=False):
        loaded = []

        def cdll(name, mode):
            if broken:
                raise OSError("libGL.so.1: cannot open shared object file")
            assert mode == ctypes.RTLD_GLOBAL
            loaded.append(name)

        for file in files or ():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
        package = None if files is None else types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "PyQt5")])
        monkeypatch.setattr(load("mdpo"), "find_spec", lambda name: package)
        monkeypatch.setattr(ctypes, "CDLL", cdll)
        monkeypatch.setattr(sys, "platform", platform)
        assert load("mdpo").import_envpool().__name__ == "envpool"
        return loaded

    go.folder = folder
    return go


def test_qt_of_the_package_on_linux(qt):
    assert qt("linux", QT_ON_LINUX) == [str(qt.folder / name) for name in QT_ON_LINUX]


@pytest.mark.parametrize("files", [None, []], ids=["no package", "a distribution's PyQt5"])
def test_qt_of_the_system_on_linux(qt, files):
    """As on aarch64, where the package has no wheel."""
    assert qt("linux", files) == QT_ON_LINUX


@pytest.mark.parametrize("files", [None, QT_ON_MACOS], ids=["Homebrew's", "the package's"])
def test_qt_on_macos(qt, files):
    """The files that EnvPool's wheel names; macOS puts DYLD_FRAMEWORK_PATH before their part from .framework on."""
    assert qt("darwin", files) == [f"{HOMEBREW}/{file}" for file in QT_ON_MACOS]


@pytest.mark.parametrize(
    "platform, files, cure",
    [
        ("linux", QT_ON_LINUX, "apt-get install libgl1 libglib2.0-0"),
        ("linux", [], "pip install PyQt5-Qt5; apt-get install"),
        ("linux", None, "pip install PyQt5-Qt5; apt-get install"),
        ("darwin", QT_ON_MACOS, "brew install qt@5, or export DYLD_FRAMEWORK_PATH={folder}"),
        ("darwin", None, "brew install qt@5"),
    ],
)
def test_without_qt_one_line_says_what_to_do(qt, platform, files, cure, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        qt(platform, files, broken=True)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "libGL.so.1" in error
    assert cure.format(folder=qt.folder) in error


@pytest.mark.slow
def test_the_wheels_lie_as_the_tests_say(tmp_path):
    """PyQt5-Qt5's for both systems, and what EnvPool's for macOS asks for."""
    versions = {pin.name: f"{pin.name}{pin.specifier}" for pin in pins()}
    for package, tag in (
        ("PyQt5-Qt5", "manylinux2014_x86_64"),
        ("PyQt5-Qt5", "macosx_11_0_arm64"),
        ("envpool", "macosx_11_0_arm64"),
    ):
        words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--python-version", "3.11"]
        pip(*words, "--platform", tag, "--dest", str(tmp_path), versions[package])
    (linux,), (macos,) = tmp_path.glob("*qt5*manylinux*"), tmp_path.glob("*qt5*macosx*")
    for wheel, files in ((linux, QT_ON_LINUX), (macos, QT_ON_MACOS)):
        assert {f"PyQt5/Qt5/lib/{file}" for file in files} <= set(zipfile.ZipFile(wheel).namelist())
    (envpool,) = tmp_path.glob("envpool*")
    procgen = zipfile.ZipFile(envpool).read("envpool/procgen/procgen_envpool.so")
    assert all(f"{HOMEBREW}/{file}".encode() in procgen for file in QT_ON_MACOS)

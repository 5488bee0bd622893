"""scripts/env: which way it goes, what it builds, and what it says, with stand-ins for the slow tools."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest

ROOT = Path(__file__).parent.parent
STAND_INS = {
    "python3": "exit 1",  # a Python without DOLFINx
    "id": "echo 0",
    "bwrap": "exit 1",
    "apt-config": "exit 0",
    # No namespaces: what is to run inside the root (after --) runs here, except pip and the check.
    "unshare": """
        while [[ $1 == --* ]]; do [[ $1 == --propagation ]] && shift; shift; done
        if [[ $1 == bash ]]; then
            while [[ $1 != -- ]]; do shift; done; shift
            [[ "$*" == *"pip install"* || "$*" == *"import dolfinx"* ]] && exit 0
        fi
        exec "$@" """,
    "mmdebstrap": """
        echo "$@" >>"$STORY"
        mkdir -p "${@: -1}"/{etc,usr}
        [[ ! -e $STORY.fail ]] || { echo "E: no route to deb.debian.org"; exit 1; }
        [[ ! -e $STORY.hang ]] || { touch "${@: -1}/half"; exec sleep 60; }
        sleep 0.5""",
}


class Machine:
    """A bare machine: `run` calls its scripts/env to the end, `start` without waiting."""

    def __init__(self, folder: Path) -> None:
        copytree(ROOT / "scripts", folder / "a project/scripts")
        self.project = folder / "a project"
        self.cache = folder / "cache/gliode"
        self.story = folder / "story"
        self.tools = folder / "tools"
        self.tools.mkdir()
        for name, body in STAND_INS.items():
            self.stand_in(name, body)
        hidden = ("GLIODE_SUITE", "PYTHONPATH", "SUDO_UID", "SUDO_GID")
        self.variables = {k: v for k, v in os.environ.items() if k not in hidden} | {
            "PATH": f"{self.tools}:/usr/bin:/bin",
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "STORY": str(self.story),
        }

    def stand_in(self, name: str, body: str) -> None:
        file = self.tools / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        script = [str(self.project / "scripts/env"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(script, env=self.variables, text=True, **pipes)  # type: ignore[call-overload, no-any-return]

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def builds(self) -> int:
        return len(self.story.read_text().splitlines()) if self.story.exists() else 0

    def roots(self) -> list[Path]:
        return [f for f in self.cache.glob("*-*") if f.is_dir() and not f.suffix]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def until(condition: Callable[[], object]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def test_the_command_runs_at_once_where_dolfinx_is(machine: Machine) -> None:
    machine.stand_in("python3", "exit 0")
    assert machine.run("sh", "-c", "echo $PYTHONPATH; exit 7") == (7, f"{machine.project}\n", "")
    assert machine.builds() == 0


def test_the_first_call_builds_and_the_second_does_not(machine: Machine) -> None:
    code, out, err = machine.run("sh", "-c", 'echo "$1"; exit 7', "sh", "two  words")
    assert (code, out) == (7, "two  words\n") and "ready" in err
    assert machine.run("pwd", "-P") == (0, f"{Path.cwd().resolve()}\n", "")
    assert machine.builds() == 1 and len(machine.roots()) == 1


def test_two_calls_at_once_build_once(machine: Machine) -> None:
    both = [machine.start("echo", "done") for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in both] == ["done\n", "done\n"]
    assert machine.builds() == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_build_is_not_taken_for_finished(machine: Machine, how: signal.Signals) -> None:
    hang = Path(f"{machine.story}.hang")
    hang.touch()
    process = machine.start("true")
    until(lambda: list(machine.cache.glob("*.tmp/half")))
    process.send_signal(how)
    process.communicate(timeout=60)
    assert not machine.roots()
    if how != signal.SIGKILL:
        assert process.returncode == 130 and not list(machine.cache.glob("*.tmp"))
    hang.unlink()
    assert machine.run("true")[0] == 0
    assert (
        machine.builds() == 2
        and not list(machine.cache.glob("*/half"))
        and not list(machine.cache.glob("*.tmp"))
    )


def test_a_changed_list_builds_anew(machine: Machine) -> None:
    machine.run("true")
    with (machine.project / "scripts/packages/pip.txt").open("a") as file:
        file.write("# a comment changes nothing\n")
    machine.run("true")
    assert machine.builds() == 1
    with (machine.project / "scripts/packages/pip.txt").open("a") as file:
        file.write("attrs\n")
    assert "an older environment" in machine.run("true")[2]
    assert machine.builds() == 2 and len(machine.roots()) == 2


def test_a_suite_asked_for_by_name_is_built(machine: Machine) -> None:
    machine.stand_in("python3", "exit 0")
    assert machine.run("--suite", "sid", "true")[0] == 0
    assert " sid " in machine.story.read_text() and machine.roots()[0].name.startswith("sid-")


def test_a_failed_build_says_why_and_leaves_nothing(machine: Machine) -> None:
    Path(f"{machine.story}.fail").touch()
    code, _, err = machine.run("true")
    assert code == 125 and "E: no route to deb.debian.org" in err and ".log" in err
    assert not machine.roots()


def test_without_root_one_line_says_the_ways_out(machine: Machine) -> None:
    machine.stand_in("id", "echo 1000")
    code, out, err = machine.run("true")
    assert code == 125 and not out and err.count("\n") == 1
    assert "sudo" in err and "environment.yml" in err and "Dockerfile" in err


def test_where_mounts_are_refused_one_line_says_the_ways_out(machine: Machine) -> None:
    machine.run("true")
    machine.stand_in("unshare", "exit 1")
    code, _, err = machine.run("true")
    assert code == 125 and err.count("\n") == 1 and "Dockerfile" in err


@pytest.mark.parametrize("arguments", [["--suite", "bookworm", "true"], ["--suite"], ["--nonsense"]])
def test_wrong_options_are_one_line(machine: Machine, arguments: list[str]) -> None:
    code, out, err = machine.run(*arguments)
    assert code == 125 and not out and err.count("\n") == 1


def test_inside_a_suite_the_other_is_refused(machine: Machine) -> None:
    machine.variables["GLIODE_SUITE"] = "trixie"
    assert machine.run("echo", "inside") == (0, "inside\n", "")
    code, _, err = machine.run("--suite", "sid", "true")
    assert code == 125 and "from outside" in err


def test_a_form_whose_compilation_was_killed_is_cleared(machine: Machine) -> None:
    """FFCx would wait for it, then fail: "JIT compilation timed out"."""
    machine.run("true")
    forms = Path(f"{machine.roots()[0]}.cache") / "fenics"
    forms.mkdir()
    for name in ("whole.c", "whole.c.cached", "killed.c"):
        (forms / name).touch()
    machine.run("true")
    assert sorted(f.name for f in forms.iterdir()) == ["whole.c", "whole.c.cached"]


def test_mpirun_defaults_to_one_thread_a_rank(machine: Machine) -> None:
    machine.variables.pop("OMP_NUM_THREADS", None)
    machine.stand_in("mpirun", "echo $OMP_NUM_THREADS")
    machine.variables["GLIODE_SUITE"] = "trixie"
    assert machine.run("mpirun")[1] == "1\n"

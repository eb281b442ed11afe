"""Nothing is lost: runs that are killed, stopped or out of disk, and their resumption, in real processes."""

import atexit
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, paper, scalars, tuned

TUNED, PAPER = ROOT / "ddpg_continuous_action.py", ROOT / "ddpg_paper_faithful.py"
SMALL = "--learning-starts 300 --batch-size 16 --checkpoint-interval 200 --eval-interval 200 --eval-episodes 2"
SMALL += " --final-eval-episodes 3 --num-threads 1 --no-cuda --run-name x"
# Episodes of 200 steps: at each 200 steps it writes eval.csv, model.pt and checkpoint.pt, and at 700 steps it ends.
PENDULUM = f"{SMALL} --env-id Pendulum-v1 --total-timesteps 700 --buffer-size 500"

# Importing torch takes longer than most runs here. One process imports, and forks into a fresh __main__ for each run.
NURSERY = """
import gc, json, os, runpy, signal, sys, time
import gymnasium.envs.mujoco.mujoco_env, mujoco, psutil, torch._dynamo, torch.utils.tensorboard, tqdm, tyro
gc.freeze()  # or each child would copy what its garbage collector looks at
for line in sys.stdin:
    job = json.loads(line)
    if "argv" in job:
        pid = os.fork()
        if pid == 0:
            break
        print(pid, flush=True)
    else:
        end = time.time() + job["timeout"]
        while not (ended := os.waitpid(job["pid"], os.WNOHANG))[0]:
            if time.time() > end:
                os.kill(job["pid"], signal.SIGABRT)
            time.sleep(0.01)
        print(os.waitstatus_to_exitcode(ended[1]), flush=True)
else:
    sys.exit()
os.chdir(job["cwd"])
sys.path[0] = job["cwd"]
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
os.dup2(1, 2)
exec(job["hook"], {})
sys.argv = job["argv"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def ask_nursery(**job) -> list[str]:
    if not hasattr(ask_nursery, "process"):
        command = [sys.executable, "-c", NURSERY]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        ask_nursery.process = subprocess.Popen(command, **pipes)
        atexit.register(ask_nursery.process.communicate)  # it ends when its input does
    print(json.dumps(job), file=ask_nursery.process.stdin, flush=True)
    return ask_nursery.process.stdout.readline().split()


class Ended(NamedTuple):
    code: int  # minus the signal if one killed it; -6 when it hung and had to be aborted
    output: str


class Run:
    """A script in a process of its own in the folder `cwd`; `hook` is Python code that it runs first."""

    def __init__(self, cwd: Path, script: Path, flags: str, hook: str = "", output: Path | None = None):
        self.output = output or cwd / "output.txt"
        argv = [str(script), *flags.split()]
        self.pid = int(ask_nursery(cwd=str(cwd), argv=argv, output=str(self.output), hook=hook)[0])

    def wait(self, timeout=600) -> Ended:
        (code,) = ask_nursery(pid=self.pid, timeout=timeout)
        return Ended(int(code), self.output.read_text() if self.output.is_file() else "")  # not from a terminal


def run(*args, **kwargs) -> Ended:
    return Run(*args, **kwargs).wait()


def before(function: str, count: int, action: str, only: str = "True") -> str:
    """A hook: just before the count-th call of a function for which `only` holds, it does `action`."""
    owner, name = function.rsplit(".", 1)
    return f"""
import os, pkgutil, resource, signal
def hook(owner, name):
    original, calls = getattr(owner, name), 0
    def hooked(*args, **kwargs):
        nonlocal calls
        if {only}:
            calls += 1
            if calls == {count}:
{indent(action, 16 * " ")}
        return original(*args, **kwargs)
    setattr(owner, name, hooked)
hook(pkgutil.resolve_name("{owner}"), "{name}")
"""


def writing(name: str, count: int, action: str) -> str:
    """A hook: just before the file is written for the count-th time, next to the one that it will replace."""
    return before("torch.save", count, action, f"str(getattr(args[1], 'name', '')).endswith('/{name}.tmp')")


def renaming(name: str, count: int, action: str) -> str:
    """A hook: just before what was written replaces the file for the count-th time."""
    return before("pathlib.Path.replace", count, action, f"args[1].name == '{name}'")


def send(number: signal.Signals) -> str:
    return f"os.kill(os.getpid(), {int(number)})"


KILL = send(signal.SIGKILL)
STEP = "gymnasium.envs.classic_control.pendulum.PendulumEnv.step"
ANY_STEP = "gymnasium.wrappers.common.OrderEnforcing.step"  # in training and in evaluations
COUNT_STEPS = """
import atexit, gymnasium.wrappers.common
step, calls = gymnasium.wrappers.common.OrderEnforcing.step, []
gymnasium.wrappers.common.OrderEnforcing.step = lambda *args: calls.append(1) or step(*args)
atexit.register(lambda: print("steps:", len(calls)))
"""


def kill_after(steps: int, milliseconds: float) -> str:
    """A hook: dies, without any clean-up, anywhere in the work that comes after so many steps."""
    return before(ANY_STEP, steps, f"signal.setitimer(signal.ITIMER_PROF, {milliseconds / 1e3})")


def outcome(run_dir: Path) -> dict:
    """All of a finished run that must not depend on whether it was broken off; SPS depends on the clock."""
    assert not list(run_dir.glob("*.tmp"))
    result = json.loads((run_dir / "result.json").read_text())
    files = {name: (run_dir / name).read_bytes() for name in ("eval.csv", "model.pt")}
    results = {name: result[name] for name in ("final_return", "final_eval", "global_step")}
    log = scalars(run_dir)
    del log["charts/SPS"]
    return files | results | {"log": log}


def contents(folder: Path) -> dict:
    """Of its files that are not empty, as a log is that a full disk has no room for."""
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(path): hashlib.sha256(data).hexdigest() for path, data in files.items() if data}


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The outcome of a run that nothing disturbs, and how many steps it took, those of evaluations too."""
    known = {}

    def reference(script, flags):
        if (script, flags) not in known:
            cwd = tmp_path_factory.mktemp("uninterrupted")
            ended = run(cwd, script, flags, COUNT_STEPS)
            assert ended.code == 0, ended.output
            known[script, flags] = outcome(cwd / "runs/x"), int(ended.output.split("steps:")[-1])
        return known[script, flags]

    return reference


def assert_resumes(cwd: Path, uninterrupted, flags: str = PENDULUM):
    """To the same bytes as a run that was never broken off."""
    ended = run(cwd, TUNED, "--resume runs/x")
    assert ended.code == 0, ended.output
    assert outcome(cwd / "runs/x") == uninterrupted(TUNED, flags)[0]


@pytest.fixture(scope="module")
def broken_off_once(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("broken")
    assert run(cwd, TUNED, PENDULUM, renaming("model.pt", 3, KILL)).code == -signal.SIGKILL
    return cwd


@pytest.fixture
def broken_off(broken_off_once, tmp_path):
    """A folder with runs/x, killed at step 600: its checkpoint is of step 400, its eval.csv has a row for 600."""
    shutil.copytree(broken_off_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def small_disk(tmp_path):
    """A folder whose runs/ is a disk of 8 MB."""
    disk = tmp_path / "runs"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mounting a disk needs root: {mount.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", disk], check=True)


# Killed and resumed


SHORT = '--env-id HalfCheetah-v5 --env-kwargs {"max_episode_steps":100} --total-timesteps 700 --buffer-size 400'
OPTIONS = "--noise parameter --layer-norm both --n-step 3 --target-noise 0.2 --noise-anneal-steps 900"
CASES = {  # truncation only, and every option; termination, batch norm and OU noise; buffers that wrap around
    "tuned-HalfCheetah": (TUNED, f"{SMALL} {SHORT} {OPTIONS} --policy-frequency 2 --eval-interval 350"),
    "paper-Hopper": (PAPER, f"{SMALL} --env-id Hopper-v5 --total-timesteps 700 --buffer-size 350"),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_moments(tmp_path, uninterrupted, case):
    """tests/soak.py has more and longer ones."""
    (script, flags), rng, run_dir = CASES[case], random.Random(), tmp_path / "runs/x"
    expected, steps = uninterrupted(script, flags)
    hook = kill_after(int(0.6 * steps), rng.uniform(0, 20))
    assert run(tmp_path, script, flags, hook).code == -signal.SIGPROF
    assert (run_dir / "checkpoint.pt").exists()
    hook = kill_after(int(rng.uniform(0.1, 0.5) * steps), rng.uniform(0, 20))
    if run(tmp_path, script, "--resume runs/x", hook).code and not (run_dir / "result.json").exists():
        assert run(tmp_path, script, "--resume runs/x").code == 0
    assert outcome(run_dir) == expected


WRITE_LOG = "tensorboard.summary.writer.record_writer.RecordWriter.write"
SLOW_LOG = "import time\n" + before(WRITE_LOG, 0, "pass", "time.sleep(0.1) or True")


def test_killed_when_complete(tmp_path, uninterrupted, assert_refused):
    """result.json says that all is on the disk: the log's last rows too, which a thread of their own writes."""
    hook = SLOW_LOG + before("pathlib.Path.unlink", 1, KILL, "args[0].name == 'checkpoint.pt'")
    assert run(tmp_path, TUNED, PENDULUM, hook).code == -signal.SIGKILL
    assert_refused(tuned, "--resume runs/x", "complete")
    assert outcome(tmp_path / "runs/x") == uninterrupted(TUNED, PENDULUM)[0]


@pytest.mark.parametrize("function, count", [(WRITE_LOG, 3), ("os.fsync", 1)])
def test_killed_while_resuming(broken_off, uninterrupted, function, count):
    assert run(broken_off, TUNED, "--resume runs/x", before(function, count, KILL)).code == -signal.SIGKILL
    assert_resumes(broken_off, uninterrupted)


def test_a_raised_total_is_not_forgotten(tmp_path, uninterrupted, assert_refused):
    """Killed after it was raised, the run ends as one longer run does."""
    short, run_dir = PENDULUM.replace("700", "500") + " --keep-checkpoint", tmp_path / "runs/x"
    assert run(tmp_path, TUNED, short).code == 0
    assert_refused(tuned, "--resume runs/x", "complete")
    hook = renaming("checkpoint.pt", 1, KILL)
    assert run(tmp_path, TUNED, "--resume runs/x --total-timesteps 7e2", hook).code == -signal.SIGKILL
    assert not (run_dir / "result.json").exists()
    assert_resumes(tmp_path, uninterrupted, f"{PENDULUM} --keep-checkpoint")
    assert json.loads((run_dir / "args.json").read_text())["args"]["total_timesteps"] == 700


def test_a_run_keeps_others_out_of_its_folder(tmp_path, uninterrupted, assert_refused):
    """Resumed while it is still running, both would write there; when it is complete, there is no checkpoint."""
    hook = before(STEP, 700, "import time\nwhile not os.path.exists('go'): time.sleep(0.01)")
    first, run_dir = Run(tmp_path, TUNED, PENDULUM, hook), tmp_path / "runs/x"
    while not (run_dir / "checkpoint.pt").exists():
        time.sleep(0.01)
    assert_refused(tuned, "--resume runs/x", "runs/x is in use")
    assert_refused(tuned, PENDULUM, "runs/x holds a run")
    (tmp_path / "go").touch()
    assert first.wait().code == 0
    assert outcome(run_dir) == uninterrupted(TUNED, PENDULUM)[0]
    files = {path.name for path in run_dir.iterdir() if "events" not in path.name}
    assert files == {".lock", "args.json", "eval.csv", "model.pt", "result.json"}
    assert_refused(tuned, "--resume runs/x --total-timesteps 800", "complete")


# Refused, with one line and exit code 2, and nothing is changed


@pytest.fixture
def assert_refused(tmp_path, cli, capfd):
    """assert_refused(script, flags, line), in this process."""

    def assert_refused(script, flags: str, line: str):
        earlier = contents(tmp_path / "runs")
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli(script, *flags.split())
        said = capfd.readouterr()
        assert (ended.value.code, said.out, said.err.count("\n")) == (2, "", 1), said
        assert said.err.startswith("error: ") and line in said.err
        assert contents(tmp_path / "runs") == earlier

    return assert_refused


class Evil:
    def __reduce__(self):
        return os.system, ("touch runs/evil",)


def edit(path, **changes):
    torch.save(torch.load(path, weights_only=True) | changes, path)


def edit_args(path, **changes):
    edit(path, args=torch.load(path, weights_only=True)["args"] | changes)


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


REFUSED = {  # what happened to the checkpoint, and what the one line says
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "cannot read"),
    "a flipped bit": (flip, "is corrupt"),
    "empty": (lambda path: os.truncate(path, 0), "cannot read"),
    "a tensor": (lambda path: torch.save(torch.zeros(2), path), "belongs to another run or script"),
    "another dict": (lambda path: torch.save({"a": 1}, path), "belongs to another run or script"),
    "the model": (lambda path: shutil.copy(path.with_name("model.pt"), path), "format is None"),
    "code": (lambda path: torch.save(Evil(), path), "cannot read"),
    "older": (lambda path: edit(path, format=1), "format is 1"),
    "of the other script": (lambda path: edit(path, script=PAPER.stem), "script is ddpg_paper_faithful"),
    "of another seed": (lambda path: edit_args(path, seed=2), "its seed is 2"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot read"),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_refuses_a_checkpoint(broken_off, damage, assert_refused):
    change, line = REFUSED[damage]
    change(broken_off / "runs/x/checkpoint.pt")
    assert_refused(tuned, "--resume runs/x", line)


def test_refuses_flags(broken_off, assert_refused):
    assert_refused(tuned, "--resume runs/x --seed 2", "its seed is 1")
    assert_refused(tuned, "--resume runs/x --total-timesteps 699", "can only be raised")
    assert_refused(tuned, "--resume runs", "runs holds no run of ddpg_continuous_action.py")
    assert_refused(paper, "--resume runs/x", "runs/x holds a run of ddpg_continuous_action.py")
    assert_refused(tuned, PENDULUM, "runs/x holds a run")
    os.truncate(broken_off / "runs/x/args.json", 100)
    assert_refused(tuned, "--resume runs/x", "runs/x")


def test_no_place_for_a_run(tmp_path, assert_refused):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/file").touch()
    assert_refused(tuned, PENDULUM.replace("-name x", "-name file/x"), "cannot write to runs/file/x")
    assert_refused(tuned, PENDULUM.replace("-name x", "-name /proc/x"), "cannot write to /proc/x")


# Ended early: by SIGINT or SIGTERM, by an environment that fails, by a full disk

SIGINT, SIGTERM = send(signal.SIGINT), send(signal.SIGTERM)
HALF_A_FILE = "args[1].write(b'half'); args[1].flush(); " + KILL
LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))"
SIZE_OF_LOG = "import glob\nsize = os.path.getsize(*glob.glob('runs/x/events.*'))\n"
TOO_LARGE = "^error: runs/x: File too large"
ENDS = {  # when and how; exit code, what is said, where it ends, from which it goes on; steps, evaluations included
    "killed within the first checkpoint": (writing("checkpoint.pt", 1, HALF_A_FILE), -9, "", None, 0),
    "killed within a checkpoint": (writing("checkpoint.pt", 2, HALF_A_FILE), -9, "", None, 200),
    "killed between flush and rename": (renaming("checkpoint.pt", 2, KILL), -9, "", None, 200),
    "killed before result.json": (renaming("result.json", 1, KILL), -9, "", None, 600),
    "killed with no step left": (renaming("result.json", 1, KILL), -9, "", None, 600),
    "stopped before a checkpoint": (before(STEP, 100, SIGINT), 130, "^stopped", 100, 0, 100),
    "stopped in training": (before(STEP, 700, SIGTERM), 143, "^stopped", 300, 200, 700),
    "stopped in an evaluation": (before(STEP, 900, SIGINT), 130, "^stopped", 400, 200, 900),
    "stopped in the last evaluation": (before(STEP, 2400, SIGTERM), 143, "^stopped", 700, 600, 2400),
    "stopped while writing": (writing("checkpoint.pt", 2, SIGINT), 130, "^stopped", 400, 400, 1200),
    "stopped while logging": (before("queue.Queue.put", 20, SIGTERM), 143, "^stopped", 400, 400, 1200),
    "stopped while waiting for the log": (before("queue.Queue.join", 3, SIGINT), 130, "^stopped", 400, 400, 1200),
    "by the environment": (before(STEP, 700, "raise ValueError('it broke')"), 1, "^ValueError: it broke\n", 300, 200),
    "by the model's size": (writing("model.pt", 2, f"size = 100_000\n{LIMIT}"), 1, TOO_LARGE, 400, 200),
    "by the log's size": (before(STEP, 700, SIZE_OF_LOG + LIMIT), 1, TOO_LARGE, 400, 200),
}


@pytest.mark.parametrize("moment", ENDS)
def test_ends_early_and_resumes(tmp_path, uninterrupted, moment):
    """A signal stops it between two steps, but at once in an evaluation: it takes no step more."""
    hook, code, said, end, start, *steps = ENDS[moment]
    flags = PENDULUM.replace("700", "600") if "no step" in moment else PENDULUM
    ended, checkpoint = run(tmp_path, TUNED, flags, hook + COUNT_STEPS), tmp_path / "runs/x/checkpoint.pt"
    assert ended.code == code and ("Traceback" in ended.output) == ("environment" in moment), ended
    assert (step_of(checkpoint) if checkpoint.exists() else 0) == start
    if said:
        line = f"{said}.*ended at step {end}; --resume runs/x goes on from step {start}$"
        assert re.search(line, ended.output, re.MULTILINE), ended
    if steps:
        assert ended.output.endswith(f"\nsteps: {steps[0]}\n"), ended
        assert not re.search("Error|Exception|Interrupt", ended.output)
    assert_resumes(tmp_path, uninterrupted, flags)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_second_signal_ends_it_at_once(tmp_path, number, code):
    hook = before(STEP, 700, f"{send(number)}\n{send(number)}\nprint('still here')")
    ended = run(tmp_path, TUNED, PENDULUM, hook)
    assert ended.code == code and "still here" not in ended.output and "Traceback" not in ended.output, ended


def test_another_signal_while_it_ends(tmp_path):
    """Ctrl-C reaches a sweep and its runs, and then the sweep stops them."""
    hook = before(STEP, 900, send(signal.SIGINT))
    hook += before("torch.utils.tensorboard.SummaryWriter.close", 1, send(signal.SIGTERM))
    ended = run(tmp_path, TUNED, PENDULUM, hook)
    assert ended.code in (130, 143) and "Traceback" not in ended.output, ended
    assert ended.output.endswith("\nstopped: ended at step 400; --resume runs/x goes on from step 200\n")


FILL = "open('runs/filler', 'wb', 0).write(bytes(10**8))"
READ_ONLY = "assert os.system('mount --bind runs runs && mount -o remount,bind,ro runs') == 0"
FULL = {  # when it happens
    "at a small file": before(STEP, 900, FILL),
    "within a checkpoint": writing("checkpoint.pt", 2, FILL),
    "at a film": before("gymnasium.wrappers.RecordVideo.stop_recording", 2, FILL),
    "read-only": before(STEP, 900, READ_ONLY),
    "also where it prints": before(STEP, 900, FILL),
}


@pytest.mark.parametrize("moment", FULL)
def test_disk_full(small_disk, uninterrupted, moment):
    flags = f'{PENDULUM} --env-kwargs {{"max_episode_steps":20}} --capture-video' if "film" in moment else PENDULUM
    output = small_disk / "runs/output.txt" if "prints" in moment else None
    ended = run(small_disk, TUNED, flags, FULL[moment], output)
    reason = "Read-only file system" if "read" in moment else "No space left on device"
    line = rf"^error: .*{reason}.*; ended at step (400|600); --resume runs/x goes on from step (200|400)$"
    said = re.search(line, ended.output, re.MULTILINE)
    assert ended.code == 1 and (said or output) and "Traceback" not in ended.output, ended
    refused = run(small_disk, TUNED, "--resume runs/x")
    assert refused.code == 2 and re.fullmatch("error: cannot write to runs/x: .*\n", refused.output), refused
    subprocess.run(["umount", "runs"] if "read" in moment else ["rm", "runs/filler"], cwd=small_disk, check=True)
    if "film" not in moment:  # filming is slow
        assert_resumes(small_disk, uninterrupted)


# Memory and file handles

CHEAP = """
import gymnasium, numpy, psutil
from gymnasium.spaces import Box

class Cheap(gymnasium.Env):
    action_space, steps = Box(-1, 1, (1,)), 0

    def __init__(self, size=2, render_mode=None):
        self.observation_space, self.obs = Box(-1, 1, (size,)), numpy.zeros(size, "f")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.obs, {}

    def step(self, action):
        self.steps += 1
        if self.steps % 500 == 0:
            process = psutil.Process()
            with open("memory.csv", "a") as file:
                print(process.memory_info().rss, process.num_fds(), sep=",", file=file)
        return self.obs, 0.0, False, False, {}

gymnasium.register("Cheap-v0", Cheap, max_episode_steps=100)
"""


def test_long_runs_stay_flat(tmp_path):
    flags = "--env-id Cheap-v0 --total-timesteps 16e3 --learning-starts 15e3 --buffer-size 5e3"
    flags += " --eval-interval 6e3 --checkpoint-interval 3e3 --final-eval-episodes 0"
    assert run(tmp_path, TUNED, f"{SMALL} {flags}", CHEAP).code == 0
    rows = [line.split(",") for line in (tmp_path / "memory.csv").read_text().splitlines()]
    memory, handles = ([int(row[i]) for row in rows] for i in (0, 1))
    assert len(rows) == 32
    acting = memory[13:30]  # since the first evaluation
    assert max(acting) - min(acting) < 1e6
    assert memory[31] - memory[30] < 4e6  # and while it learns
    assert max(handles[2:]) - min(handles[2:]) <= 1  # the log's, opened for each row


PEAK = """
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1e3  # MB
"""


def test_no_second_copy_of_the_buffer(tmp_path):
    """The buffer of 160 MB is the only large thing in memory while it is written, and when it has been read."""
    flags = f'{SMALL} --env-id Cheap-v0 --env-kwargs {{"size":2500}}'
    flags += " --total-timesteps 8050 --learning-starts 8040 --buffer-size 8e3 --eval-interval 0"
    flags += " --checkpoint-interval 8e3 --keep-checkpoint"
    before_saving = PEAK + "open('/proc/self/clear_refs', 'w').write('5'); print('before:', memory('VmRSS'))"
    after_saving = PEAK + "print('peak:', memory('VmHWM'))"
    hook = before("psutil.Process", 16, before_saving) + renaming("checkpoint.pt", 1, after_saving)
    ended = run(tmp_path, TUNED, flags, CHEAP + hook)
    words = ended.output.split()
    used, peak = (float(words[words.index(word) + 1]) for word in ("before:", "peak:"))
    assert ended.code == 0 and 160 < used and 160 < peak < used + 30  # saving may let go of pages, too

    hook = before("torch.utils.tensorboard.SummaryWriter.__init__", 1, PEAK + "print('loaded:', memory('RssAnon'))")
    ended = run(tmp_path, TUNED, "--resume runs/x --total-timesteps 8060", CHEAP + hook)
    words = ended.output.split()
    assert ended.code == 0 and float(words[words.index("loaded:") + 1]) < used + 30  # what is mapped doesn't count
    assert "note: resuming may not be exact here" in ended.output


def test_a_resumed_run_lets_go_of_the_checkpoint_it_came_from(broken_off):
    """Its 170 MB, or 1 GB and more from pixels, would stay on the disk until the run ends."""
    held = "print('held:', 'checkpoint.pt' in open('/proc/self/maps').read())"
    ended = run(broken_off, TUNED, "--resume runs/x", renaming("checkpoint.pt", 1, held))
    assert ended.code == 0 and "held: False" in ended.output

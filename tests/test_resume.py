"""Nothing is lost: runs that are killed, stopped or out of disk, and their resumption, in real processes."""

import atexit
import contextlib
import fcntl
import functools
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

import pytest
import torch
from conftest import tuned
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

ROOT = Path(__file__).parent.parent
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
        shutil.rmtree(self.output) if self.output.is_dir() else None
        if self.output.is_file():
            self.output.unlink()
        argv = [str(script), *flags.split()]
        self.pid = int(ask_nursery(cwd=str(cwd), argv=argv, output=str(self.output), hook=hook)[0])

    def wait(self, timeout=600) -> Ended:
        (code,) = ask_nursery(pid=self.pid, timeout=timeout)
        return Ended(int(code), self.output.read_text() if self.output.is_file() else "")


def run(*args, **kwargs) -> Ended:
    return Run(*args, **kwargs).wait()


def before(function: str, count: int, action: str) -> str:
    """A hook: just before the count-th call of a function, such as os.replace, it does `action`."""
    owner, name = function.rsplit(".", 1)
    return f"""
import os, pkgutil, resource
def hook(owner, name):
    original, calls = getattr(owner, name), 0
    def hooked(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == {count}:
{indent(action, 12 * " ")}
        return original(*args, **kwargs)
    setattr(owner, name, hooked)
hook(pkgutil.resolve_name("{owner}"), "{name}")
"""


def send(number: signal.Signals) -> str:
    return f"os.kill(os.getpid(), {int(number)})"


ANY_STEP = "gymnasium.wrappers.common.OrderEnforcing.step"  # in training and in evaluations
COUNT_STEPS = """
import atexit, gymnasium.wrappers.common
step, calls = gymnasium.wrappers.common.OrderEnforcing.step, []
gymnasium.wrappers.common.OrderEnforcing.step = lambda *args: calls.append(1) or step(*args)
atexit.register(lambda: print("steps:", len(calls)))
"""


def kill_after(steps: int, milliseconds: float) -> str:
    """A hook: dies, without any clean-up, anywhere in the work that comes after so many steps."""
    return before(ANY_STEP, steps, f"import signal; signal.setitimer(signal.ITIMER_PROF, {milliseconds / 1e3})")


def scalars(run_dir: Path) -> dict:
    """Every row of the TensorBoard log, tag to [(step, value)], as it lies in the files; SPS depends on the clock."""
    rows = {}
    for path in sorted(run_dir.glob("events.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value") and value.tag != "charts/SPS":
                    rows.setdefault(value.tag, []).append((event.step, value.simple_value))
    return rows


def dashboard(run_dir: Path) -> dict:
    """The rows that TensorBoard makes of the log."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = set(log.Tags()["scalars"]) - {"charts/SPS"}
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in tags}


def outcome(run_dir: Path) -> dict:
    """All of a finished run that must not depend on whether it was broken off."""
    assert not list(run_dir.glob("*.tmp"))
    result = json.loads((run_dir / "result.json").read_text())
    assert dashboard(run_dir) == scalars(run_dir)
    files = {name: (run_dir / name).read_bytes() for name in ("eval.csv", "model.pt")}
    results = {name: result[name] for name in ("final_return", "final_eval", "global_step")}
    return files | results | {"scalars": scalars(run_dir)}


def contents(folder: Path) -> dict:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


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


@pytest.fixture(scope="module")
def broken_off_once(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("broken")
    assert run(cwd, TUNED, PENDULUM, before("os.replace", 9, send(signal.SIGKILL))).code == -9
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


CASES = {  # truncation only, termination, batch norm and OU noise; a buffer that wraps around, and one that doesn't
    "tuned-HalfCheetah": (TUNED, f"{SMALL} --env-id HalfCheetah-v5 --total-timesteps 2200 --learning-starts 900"
                                 " --buffer-size 950 --policy-frequency 2 --eval-interval 700 --eval-episodes 1"),
    "tuned-Hopper": (TUNED, f"{SMALL} --env-id Hopper-v5 --total-timesteps 900"),
    "paper-Hopper": (PAPER, f"{SMALL} --env-id Hopper-v5 --total-timesteps 700 --buffer-size 350"),
    "paper-Pendulum": (PAPER, f"{PENDULUM} --policy-frequency 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_moments(tmp_path, uninterrupted, case):
    """tests/soak.py has more and longer ones."""
    (script, flags), rng, run_dir = CASES[case], random.Random(), tmp_path / "runs/x"
    expected, steps = uninterrupted(script, flags)
    hook = kill_after(int(0.6 * steps), rng.uniform(0, 20))
    assert run(tmp_path, script, flags, hook).code == -signal.SIGPROF
    assert (run_dir / "checkpoint.pt").exists()
    hook = kill_after(int(rng.uniform(0.1, 0.5) * steps), rng.uniform(0, 20))
    if run(tmp_path, script, "--resume runs/x", hook).code:
        if not (run_dir / "result.json").exists():
            assert run(tmp_path, script, "--resume runs/x").code == 0
    assert outcome(run_dir) == expected


HALF_A_FILE = "args[1].write(b'half'); args[1].flush(); " + send(signal.SIGKILL)
# Before the first step torch.save writes to memory, to see that it can, and args.json is replaced; then, at 200, 400
# and 600 steps, eval.csv, model.pt and checkpoint.pt.
SAVING = {
    "before the first checkpoint": ("os.replace", 3, send(signal.SIGKILL)),
    "within the first checkpoint": ("torch.save", 3, HALF_A_FILE),
    "within a checkpoint": ("torch.save", 5, HALF_A_FILE),
    "between flush and rename": ("os.replace", 7, send(signal.SIGKILL)),
    "before result.json": ("os.replace", 13, send(signal.SIGKILL)),
}


@pytest.mark.parametrize("moment", SAVING)
def test_killed_while_saving(tmp_path, uninterrupted, moment):
    assert run(tmp_path, TUNED, PENDULUM, before(*SAVING[moment])).code == -signal.SIGKILL
    path = tmp_path / "runs/x/checkpoint.pt"
    assert path.exists() == ("first" not in moment)
    if path.exists():
        assert torch.load(path, weights_only=True)["global_step"] in (200, 400, 600)
    assert run(tmp_path, TUNED, "--resume runs/x").code == 0
    assert outcome(tmp_path / "runs/x") == uninterrupted(TUNED, PENDULUM)[0]


@pytest.mark.parametrize("function", ["os.truncate", "os.replace"])
def test_killed_while_resuming(broken_off, uninterrupted, function):
    assert run(broken_off, TUNED, "--resume runs/x", before(function, 1, send(signal.SIGKILL))).code == -9
    assert run(broken_off, TUNED, "--resume runs/x").code == 0
    assert outcome(broken_off / "runs/x") == uninterrupted(TUNED, PENDULUM)[0]


def test_the_same_checkpoint_twice(broken_off, uninterrupted):
    shutil.copytree(broken_off / "runs/x", broken_off / "runs/y")
    for name in "x", "y":
        assert run(broken_off, TUNED, f"--resume runs/{name}").code == 0
        assert outcome(broken_off / f"runs/{name}") == uninterrupted(TUNED, PENDULUM)[0]


@pytest.mark.parametrize("script", [TUNED, PAPER])
def test_raising_the_total_equals_one_longer_run(tmp_path, uninterrupted, script):
    short, run_dir = PENDULUM.replace("700", "500") + " --keep-checkpoint", tmp_path / "runs/x"
    assert run(tmp_path, script, short).code == 0
    assert (run_dir / "checkpoint.pt").exists()
    assert_refused(tmp_path, script, "--resume runs/x", "complete")
    hook = before("os.replace", 5, send(signal.SIGKILL))  # the raised total is not forgotten when it is killed
    assert run(tmp_path, script, "--resume runs/x --total-timesteps 7e2", hook).code == -9
    assert not (run_dir / "result.json").exists()
    assert run(tmp_path, script, "--resume runs/x").code == 0
    assert outcome(run_dir) == uninterrupted(script, f"{PENDULUM} --keep-checkpoint")[0]
    assert json.loads((run_dir / "args.json").read_text())["args"]["total_timesteps"] == 700


def test_a_finished_run_keeps_its_checkpoint_only_when_asked(broken_off):
    assert run(broken_off, TUNED, "--resume runs/x").code == 0
    files = {path.name for path in (broken_off / "runs/x").iterdir() if "events" not in path.name}
    assert files == {"args.json", "eval.csv", "model.pt", "result.json"}
    assert_refused(broken_off, TUNED, "--resume runs/x", "complete")
    assert_refused(broken_off, TUNED, "--resume runs/x --total-timesteps 800", "complete")


# Refused, with one line and exit code 2, and nothing is changed


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def edit(path, **changes):
    torch.save(torch.load(path, weights_only=True) | changes, path)


def edit_args(path, **changes):
    edit(path, args=torch.load(path, weights_only=True)["args"] | changes)


REFUSED = {  # what happened to the checkpoint, and what the one line says
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "cannot read"),
    "empty": (lambda path: os.truncate(path, 0), "cannot read"),
    "text": (lambda path: path.write_text("hello"), "cannot read"),
    "a tensor": (lambda path: torch.save(torch.zeros(2), path), "belongs to another run or script"),
    "another dict": (lambda path: torch.save({"a": 1}, path), "belongs to another run or script"),
    "the model": (lambda path: shutil.copy(path.with_name("model.pt"), path), "format is None"),
    "code": (lambda path: torch.save(Evil(), path), "cannot read"),
    "older": (lambda path: edit(path, format=1), "format is 1"),
    "of the other script": (lambda path: edit(path, script=PAPER.stem), "script is ddpg_paper_faithful"),
    "of another seed": (lambda path: edit_args(path, seed=2), "its seed is 2"),
    "of a longer buffer": (lambda path: edit_args(path, buffer_size=501), "its buffer_size is 501"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot read"),
}


def assert_refused(cwd, script, flags, line):
    earlier = contents(cwd / "runs")
    ended = run(cwd, script, flags)
    assert ended.code == 2 and ended.output.count("\n") == 1 and ended.output.startswith("error: "), ended
    assert line in ended.output
    assert contents(cwd / "runs") == earlier
    assert not (cwd / "evil").exists()


@pytest.mark.parametrize("damage", REFUSED)
def test_refuses_a_checkpoint(broken_off, damage):
    change, line = REFUSED[damage]
    change(broken_off / "runs/x/checkpoint.pt")
    assert_refused(broken_off, TUNED, "--resume runs/x", line)


def test_refuses_flags(broken_off):
    assert_refused(broken_off, TUNED, "--resume runs/x --seed 2", "its seed is 1")
    assert_refused(broken_off, TUNED, "--resume runs/x --total-timesteps 699", "can only be raised")
    assert_refused(broken_off, TUNED, "--resume runs/x --evaluate runs/x", "cannot be combined")
    assert_refused(broken_off, TUNED, "--resume runs", "runs holds no run of ddpg_continuous_action.py")
    assert_refused(broken_off, TUNED, "--resume runs/y", "runs/y holds no run")
    assert_refused(broken_off, PAPER, "--resume runs/x", "runs/x holds no run of ddpg_paper_faithful.py")
    assert_refused(broken_off, TUNED, PENDULUM, "runs/x holds a run")
    (broken_off / "runs/y").mkdir()
    (broken_off / "runs/y/events.out.tfevents.1.another").touch()  # CleanRL's, say
    assert_refused(broken_off, TUNED, PENDULUM.replace("-name x", "-name y"), "runs/y holds a run")
    os.truncate(broken_off / "runs/x/args.json", 100)
    assert_refused(broken_off, TUNED, "--resume runs/x", "runs/x holds no run")


def leaves(value, name=""):
    """Names and values of everything within dicts, lists and tuples."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, each in pairs for leaf in leaves(each, f"{name}/{key}")]
    return [(name, value.tolist() if torch.is_tensor(value) else value)]


def test_flipped_bytes_are_refused_or_harmless(broken_off, capfd):
    sys.path.insert(0, str(ROOT))
    load = importlib.import_module("ddpg_continuous_action").load
    path, rng, refused = broken_off / "runs/x/checkpoint.pt", random.Random(4), 0
    intact = path.read_bytes()
    expected = leaves(load(path, "cpu"))
    ends = [*range(5_000), *range(len(intact) - 9_000, len(intact))]  # the pickle, and the archive's directory
    for position in [*rng.sample(range(len(intact)), 60), *rng.sample(ends, 60)]:
        flipped = bytearray(intact)
        flipped[position] ^= rng.randrange(1, 256)
        path.unlink()  # the earlier one may still be mapped
        path.write_bytes(flipped)
        try:
            assert leaves(load(path, "cpu")) == expected, position
        except SystemExit as exit:
            assert exit.code == 2
            refused += 1
    assert 60 < refused < 120  # the archive has padding and unused fields
    assert capfd.readouterr().err.count("\n") == refused


# SIGINT and SIGTERM

STEP = "gymnasium.envs.classic_control.pendulum.PendulumEnv.step"
MOMENTS = {  # after the first checkpoint
    "training": (STEP, 700),
    "evaluation": (STEP, 900),
    "the start of an evaluation": ("gymnasium.envs.classic_control.pendulum.PendulumEnv.reset", 5),
    "writing": ("torch.save", 5),
    "renaming": ("os.replace", 7),
    "logging": ("queue.Queue.put", 40),
    "waiting for the log": ("queue.Queue.join", 4),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped(tmp_path, uninterrupted, moment):
    number = [signal.SIGINT, signal.SIGTERM][list(MOMENTS).index(moment) % 2]
    ended = Run(tmp_path, TUNED, PENDULUM, before(*MOMENTS[moment], send(number))).wait()
    assert ended.code == 128 + number, ended
    run_dir = tmp_path / "runs/x"
    step = torch.load(run_dir / "checkpoint.pt", weights_only=True)["global_step"]
    assert step % 200 == 0
    assert ended.output.endswith(f"\nstopped by {number.name}. Resume it with --resume runs/x (from step {step})\n")
    assert "Error" not in ended.output and "Exception" not in ended.output
    assert not list(run_dir.glob("*.tmp"))
    assert torch.load(run_dir / "model.pt", weights_only=True)["global_step"] % 200 == 0
    assert dashboard(run_dir)["eval/episodic_return"][0][0] == 200
    assert run(tmp_path, TUNED, "--resume runs/x").code == 0
    assert outcome(run_dir) == uninterrupted(TUNED, PENDULUM)[0]


def test_an_evaluation_under_way_stops_at_its_next_step(tmp_path):
    """Each of its steps is one of 2,000 environments; the 10,000th is within the fifth of 200."""
    hook = before(STEP, 10_000, send(signal.SIGTERM)) + before(STEP, 12_000, "print('still evaluating')")
    ended = run(tmp_path, TUNED, f"{PENDULUM} --eval-interval 50 --eval-episodes 2000", hook)
    assert ended.code == 143 and "still evaluating" not in ended.output, ended.output
    assert "stopped by SIGTERM. Resume it with --resume runs/x (from the start: no checkpoint yet)" in ended.output


def test_a_second_interrupt_ends_it_at_once(tmp_path):
    hook = before("os.replace", 7, send(signal.SIGINT))
    hook += before("torch.utils.tensorboard.SummaryWriter.close", 1, send(signal.SIGINT))
    ended = run(tmp_path, TUNED, PENDULUM, hook)
    assert ended.code == -signal.SIGINT
    assert "Traceback" not in ended.output
    assert torch.load(tmp_path / "runs/x/checkpoint.pt", weights_only=True)["global_step"] in (200, 400)


# An environment that fails


@pytest.mark.parametrize("script", [TUNED, PAPER])
def test_an_error_of_the_environment(tmp_path, uninterrupted, script):
    """After 100 steps of the second episode: with 2 x 200 steps of an evaluation, Pendulum's 700th."""
    ended = run(tmp_path, script, PENDULUM, before(STEP, 700, "raise ValueError('the simulator broke')"))
    assert ended.code == 1 and "Traceback" in ended.output
    last = "This ended the run at step 300. Resume it with --resume runs/x (from step 200)"
    assert ended.output.endswith(f"\nValueError: the simulator broke\n{last}\n")
    assert run(tmp_path, script, "--resume runs/x").code == 0
    assert outcome(tmp_path / "runs/x") == uninterrupted(script, PENDULUM)[0]


def test_a_run_keeps_others_out_of_its_folder(tmp_path, uninterrupted):
    """Resumed while it is still running, both would write there."""
    lock = "import fcntl; fcntl.flock(os.open('runs/x', os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    ended = run(tmp_path, TUNED, PENDULUM, before(STEP, 300, lock))
    assert ended.code == 1 and "BlockingIOError" in ended.output, ended.output
    held = os.open(tmp_path / "runs/x", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert_refused(tmp_path, TUNED, "--resume runs/x", "runs/x is in use")
    os.close(held)
    assert run(tmp_path, TUNED, "--resume runs/x").code == 0
    assert outcome(tmp_path / "runs/x") == uninterrupted(TUNED, PENDULUM)[0]


# Full disks and folders without write permission

FILL = "open('runs/filler', 'wb', 0).write(bytes(10**8))"
FILL_UP_TO_64_KB = FILL + "\nos.truncate('runs/filler', os.path.getsize('runs/filler') - 2**16)"
FULL = {  # when it happens, what then fails
    "eval.csv": (before(STEP, 700, FILL), ["eval.csv", "model.pt", "checkpoint.pt"]),
    "checkpoint.pt": (before("torch.save", 5, FILL), ["checkpoint.pt", "model.pt"]),
    "large files": (before("torch.save", 4, FILL_UP_TO_64_KB), ["model.pt", "checkpoint.pt"]),
}


def assert_went_on(ended: Ended, failed: list[str], run_dir: Path, reason: str):
    """It said so and trained to the end, but does not count as complete, and what was saved before is whole."""
    assert ended.code == 1 and "Traceback" not in ended.output, ended.output
    assert "\nstep 600: " in ended.output and "complete" not in ended.output
    for name in failed:
        lines = [line for line in ended.output.splitlines() if line.startswith("warning: ") and name in line]
        assert lines and all(reason in line for line in lines), ended.output
    assert not (run_dir / "result.json").exists()
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["global_step"] in (200, 400)
    assert torch.load(run_dir / "model.pt", weights_only=True)["global_step"] in (200, 400)
    steps = [line.split(",")[0] for line in (run_dir / "eval.csv").read_text().splitlines()]
    assert steps == ["global_step", "200", "400", "600", "700"][: len(steps)] and len(steps) > 1
    assert not list(run_dir.glob("*.tmp"))


@pytest.mark.parametrize("first", FULL)
def test_disk_full(small_disk, uninterrupted, first):
    hook, failed = FULL[first]
    run_dir = small_disk / "runs/x"
    assert_went_on(run(small_disk, TUNED, PENDULUM, hook), failed, run_dir, "No space left on device")
    (small_disk / "runs/filler").unlink()
    assert run(small_disk, TUNED, "--resume runs/x").code == 0
    assert outcome(run_dir) == uninterrupted(TUNED, PENDULUM)[0]


def test_the_log_goes_on_when_there_is_room_again(small_disk, monkeypatch):
    """A single failed write must not end it: tensorboard's writer thread does not survive one."""
    folder, filler = small_disk / "runs/x", small_disk / "runs/filler"
    monkeypatch.setattr(threading, "excepthook", functools.partial(tuned.quiet_log_writer, threading.excepthook))
    log, row = tuned.Log(str(folder)), {f"a/{i}": 1.0 for i in range(200)}  # more than a page of the disk
    log.add(row, 1)
    with contextlib.suppress(OSError):
        filler.write_bytes(bytes(10**8))
    for step in range(2, 6):
        log.add(row, step)
    filler.unlink()
    for step in range(6, 9):
        log.add(row, step)
    log.close()
    steps = {step for values in scalars(folder).values() for step, _ in values}
    assert {1, 7, 8} <= steps and 4 not in steps
    assert all(path.stat().st_size for path in folder.iterdir())


def test_file_size_limit(tmp_path, uninterrupted):
    hook = before("torch.save", 4, "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))")
    ended, run_dir = run(tmp_path, TUNED, PENDULUM, hook), tmp_path / "runs/x"
    assert_went_on(ended, ["model.pt", "checkpoint.pt"], run_dir, "File too large")
    assert run(tmp_path, TUNED, "--resume runs/x").code == 0
    assert outcome(run_dir) == uninterrupted(TUNED, PENDULUM)[0]


def test_disk_becomes_read_only(small_disk, uninterrupted):
    hook = before(STEP, 700, "assert os.system('mount -o remount,ro runs') == 0")
    ended, run_dir = run(small_disk, TUNED, PENDULUM, hook), small_disk / "runs/x"
    failed = ["eval.csv", "model.pt", "checkpoint.pt", "TensorBoard"]
    assert_went_on(ended, failed, run_dir, "Read-only file system")
    assert_refused(small_disk, TUNED, "--resume runs/x", "cannot write to runs/x")
    assert_refused(small_disk, TUNED, PENDULUM.replace("-name x", "-name y"), "cannot write to runs/y")
    subprocess.run(["mount", "-o", "remount,rw", small_disk / "runs"], check=True)
    assert run(small_disk, TUNED, "--resume runs/x").code == 0
    assert outcome(run_dir) == uninterrupted(TUNED, PENDULUM)[0]


def test_folder_disappears(tmp_path, uninterrupted):
    """It is moved, and then a file takes its place: no permission is needed for that, and root has no way around."""
    hook = before(STEP, 700, "os.rename('runs/x', 'runs/y'); open('runs/x', 'w')")
    ended, failed = run(tmp_path, TUNED, PENDULUM, hook), ["eval.csv", "model.pt", "checkpoint.pt", "TensorBoard"]
    (tmp_path / "runs/x").unlink()
    (tmp_path / "runs/y").rename(tmp_path / "runs/x")
    assert_went_on(ended, failed, tmp_path / "runs/x", "Not a directory")
    assert run(tmp_path, TUNED, "--resume runs/x").code == 0
    assert outcome(tmp_path / "runs/x") == uninterrupted(TUNED, PENDULUM)[0]


def test_last_step_cannot_be_written(tmp_path, uninterrupted):
    """Its checkpoint would make --resume believe that its results are there."""
    flags = PENDULUM.replace("700", "600")
    ended, run_dir = (
        run(tmp_path, TUNED, flags, before("os.replace", 8, "raise OSError(5, 'broken')")),
        tmp_path / "runs/x",
    )
    assert ended.code == 1 and "cannot write runs/x/eval.csv" in ended.output, ended.output
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["global_step"] == 400
    assert run(tmp_path, TUNED, "--resume runs/x").code == 0
    assert outcome(run_dir) == uninterrupted(TUNED, flags)[0]


def test_film_cannot_be_written(tmp_path):
    hook = before("gymnasium.wrappers.RecordVideo.stop_recording", 1, "raise OSError(28, 'full')")
    flags = PENDULUM.replace("700", "400") + " --capture-video"
    ended = run(tmp_path, TUNED, flags, hook)
    assert ended.code == 0 and "warning: cannot write the video, training goes on" in ended.output, ended.output
    assert [path.name.split("-episode")[0] for path in (tmp_path / "runs/x/videos").glob("*.mp4")] == ["step-400"]


def test_a_checkpoint_that_failed_is_tried_again_at_the_next_episodes_end(tmp_path, uninterrupted):
    """Not only when the next one is due, at 800 steps."""
    flags = PENDULUM.replace("--checkpoint-interval 200", "--checkpoint-interval 400")
    hook = before("os.replace", 6, "raise OSError(5, 'broken')") + before("os.replace", 10, send(signal.SIGKILL))
    ended = run(tmp_path, TUNED, flags, hook)
    assert ended.code == -signal.SIGKILL and "cannot write runs/x/checkpoint.pt" in ended.output, ended.output
    assert torch.load(tmp_path / "runs/x/checkpoint.pt", weights_only=True)["global_step"] == 600
    assert run(tmp_path, TUNED, "--resume runs/x").code == 0
    assert outcome(tmp_path / "runs/x") == uninterrupted(TUNED, flags)[0]


def test_no_place_for_a_run(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/file").touch()
    assert_refused(tmp_path, TUNED, PENDULUM.replace("-name x", "-name file/x"), "cannot write to runs/file/x")
    assert_refused(tmp_path, TUNED, PENDULUM.replace("-name x", "-name /proc/x"), "cannot write to /proc/x")


def test_nowhere_to_print(tmp_path, uninterrupted):
    """The disk that is full may be the one that the run's own output goes to."""
    hook = before(STEP, 300, send(signal.SIGTERM))
    assert Run(tmp_path, TUNED, PENDULUM, hook, output=Path("/dev/full")).wait().code == 128 + signal.SIGTERM
    Run(tmp_path, TUNED, "--resume runs/x", output=Path("/dev/full")).wait()
    assert outcome(tmp_path / "runs/x") == uninterrupted(TUNED, PENDULUM)[0]


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
        if self.steps % 1_000 == 0:
            process = psutil.Process()
            with open("memory.csv", "a") as file:
                print(self.steps, process.memory_info().rss, process.num_fds(), sep=",", file=file)
        return self.obs, 0.0, False, False, {}

gymnasium.register("Cheap-v0", Cheap, max_episode_steps=100)
gymnasium.register("Wide-v0", Cheap, max_episode_steps=100, kwargs={"size": 5_000})
"""


def test_long_runs_stay_flat(tmp_path):
    (tmp_path / "cheap.py").write_text(CHEAP)
    flags = "--env-id cheap:Cheap-v0 --total-timesteps 60e3 --learning-starts 58e3 --buffer-size 5e3"
    flags += " --eval-interval 25e3 --checkpoint-interval 10e3 --final-eval-episodes 0"
    assert run(tmp_path, TUNED, f"{SMALL} {flags}").code == 0
    rows = [[int(x) for x in line.split(",")] for line in (tmp_path / "memory.csv").read_text().splitlines()]
    assert len(rows) == 60
    acting = [memory for step, memory, _ in rows if 30_000 <= step <= 58_000]
    assert max(acting) - min(acting) < 4e6
    assert rows[-1][1] - rows[-2][1] < 4e6  # and while it learns
    assert len({handles for step, _, handles in rows if step > 1_000}) == 1


PEAK = """
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1e3  # MB
"""


def test_no_second_copy_of_the_buffer(tmp_path):
    """The buffer of 320 MB is the only large thing in memory while it is written, and when it has been read."""
    (tmp_path / "cheap.py").write_text(CHEAP)
    flags = f"{SMALL} --env-id cheap:Wide-v0 --total-timesteps 8050 --learning-starts 8040 --buffer-size 8e3"
    flags += " --eval-interval 0 --checkpoint-interval 8e3"
    before_saving = PEAK + "open('/proc/self/clear_refs', 'w').write('5'); print('before:', memory('VmRSS'))"
    after_saving = PEAK + "print('peak:', memory('VmHWM'))"
    hook = before("psutil.Process", 8, before_saving) + before("os.replace", 2, after_saving)
    ended = run(tmp_path, TUNED, flags + " --keep-checkpoint", hook)
    words = ended.output.split()
    used, peak = (float(words[words.index(word) + 1]) for word in ("before:", "peak:"))
    assert ended.code == 0 and 320 < used < peak < used + 30

    hook = before("torch.utils.tensorboard.SummaryWriter.__init__", 1, PEAK + "print('loaded:', memory('RssAnon'))")
    ended = run(tmp_path, TUNED, "--resume runs/x --total-timesteps 8060", hook)
    words = ended.output.split()
    assert ended.code == 0 and float(words[words.index("loaded:") + 1]) < used + 30  # what is mapped doesn't count
    assert "note: resuming will not be exact here" in ended.output


def test_a_resumed_run_lets_go_of_the_checkpoint_it_came_from(broken_off):
    """Its 170 MB, or 1 GB and more from pixels, would stay on the disk until the run ends."""
    held = "print('held:', 'checkpoint.pt' in open('/proc/self/maps').read())"
    ended = run(broken_off, TUNED, "--resume runs/x", before("os.replace", 4, held))
    assert ended.code == 0 and "held: False" in ended.output

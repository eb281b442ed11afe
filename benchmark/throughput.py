"""Steps per second of our scripts and their peers; the time of an update beside its limit; runs side by side.

    python benchmark/throughput.py --out benchmark/results/throughput.md
    python benchmark/throughput.py --against 16d24ab --scripts ddpg_continuous_action.py ddpg_paper_faithful.py

Training runs are real ones, launched by sweep.sh, without evaluations and checkpoints, timed after the warm-up by the
clock in their TensorBoard logs. Whatever is compared alternates, round by round, since a machine's speed drifts. Leave
the machine alone meanwhile. Prints Markdown. Where there is a GPU, it times the parts of a training step there, instead
of the update on the CPU:

    python benchmark/throughput.py --threads 1 --scripts "ddpg_continuous_action.py --cudagraphs" \
        ddpg_continuous_action.py benchmark/sb3_ddpg.py --out benchmark/results/throughput_gpu.md
"""

import functools
import importlib
import itertools
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddpg_continuous_action as tuned
from ddpg_continuous_action import exit_unless

ROOT = Path(__file__).resolve().parents[1]
LOG_INTERVAL = 200  # steps between rows of the scripts' logs
WARM_UP = 1_000  # random steps before learning, not timed; nor are those up to the log's first row after it
FLAGS = [f"--learning-starts {WARM_UP}", "--no-save-model"]
FLAGS += ["--eval-interval 0", "--final-eval-episodes 0", "--checkpoint-interval 0"]
OBS_DIM, ACTION_DIM = 17, 6  # HalfCheetah-v5


@dataclass
class Args:
    scripts: tuple[str, ...] = (
        "ddpg_continuous_action.py",
        "benchmark/sb3_ddpg.py",
        "benchmark/jax_ddpg.py",
        "ddpg_paper_faithful.py",
    )
    """scripts to compare, each with its own flags, interpreter and environment variables if need be:
    "PYTHON=~/jax/bin/python TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 x.py --y 1" """
    against: str | None = None
    """commit whose versions of the scripts run beside today's, those of benchmark/ excepted"""
    env_id: str = "HalfCheetah-v5"
    """environment of the training runs"""
    steps: int = 5_000
    """timed steps of each run, 200 or a multiple of it: the log's rows are so far apart"""
    rounds: int = 5
    """rounds, each with one measurement of everything that is compared"""
    threads: tuple[int, ...] = (1, 2)
    """numbers of CPU threads"""
    cores: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    """runs side by side, one thread each, against one alone"""
    out: Path | None = None
    """file for what is printed"""


@dataclass
class Entry:
    """What to train: one of --scripts, or its version of another commit."""

    label: str
    script: str
    python: str = sys.executable
    flags: list[str] = field(default_factory=list)
    root: Path = field(default_factory=lambda: ROOT)  # of the repository that holds the script
    environment: dict[str, str] = field(default_factory=dict)


def parse_entry(text: str) -> Entry:
    words, environment = shlex.split(text), {}
    while words and re.match(r"[A-Z_0-9]+=", words[0]):
        name, value = words.pop(0).split("=", 1)
        environment[name] = value
    exit_unless(words, f"--scripts names no script in '{text}'")
    python = environment.pop("PYTHON", None)
    python = str(ROOT / Path(python).expanduser()) if python else sys.executable
    label = " ".join([f"{name}={value}" for name, value in environment.items()] + words)
    return Entry(label, words[0], python, shlex.split(" ".join(FLAGS)) + words[1:], environment=environment)


@functools.cache
def why_not(python: str, script: Path) -> str | None:
    """Why it cannot be run here, a library being missing, say; None if it can."""
    if not script.exists():
        return "no such file"
    try:
        tried = subprocess.run([python, script, "--help"], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return tried.stderr.strip().splitlines()[-1] if tried.returncode else None


def older_version(entry: Entry, commit: str, folder: Path) -> Entry:
    """The script of that commit, in a repository of its own that holds today's sweep.sh."""
    command = ["git", "-C", ROOT, "show", f"{commit}:{entry.script}"]
    shown = subprocess.run(command, capture_output=True, encoding="utf-8")
    exit_unless(shown.returncode == 0, f"--against {commit}: {shown.stderr.strip()}")
    (folder / "benchmark").mkdir(exist_ok=True)
    shutil.copy(ROOT / "benchmark/sweep.sh", folder / "benchmark")
    (folder / entry.script).write_text(shown.stdout, encoding="utf-8")
    flags = []
    for flag in FLAGS:  # those that it had already
        name = re.sub("^--(no-)?", "", flag.split()[0]).replace("-", "_")
        if re.search(rf"^    {name}: ", shown.stdout, re.MULTILINE):
            flags += flag.split()
    return Entry(f"{entry.script} at {commit}", entry.script, entry.python, flags, folder)


def train(args: Args, entry: Entry, threads: int, copies: int = 1) -> list[float]:
    """Steps a second of so many runs at once."""
    settings = {"SCRIPT": entry.script, "PYTHON": entry.python, "ENVS": args.env_id, "OUT": "runs/throughput"}
    settings |= {"STEPS": WARM_UP + LOG_INTERVAL + args.steps, "THREADS": threads, "JOBS": copies}
    settings |= {"SEEDS": " ".join(map(str, range(1, copies + 1))), "VARIANT": "default"}
    command = [entry.root / "benchmark/sweep.sh", *(f"{name}={value}" for name, value in settings.items())]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | entry.environment
        sweep = subprocess.run([*command, "--", *entry.flags], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        if sweep.returncode:  # it has said why
            sys.exit(1)
        return [logged_speed(path.parent) for path in Path(folder).glob("runs/*/*/args.json")]


def logged_speed(run_dir: Path) -> float:
    rows = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload().Scalars("charts/SPS")
    return (rows[-1].step - rows[0].step) / (rows[-1].wall_time - rows[0].wall_time)


def seconds_each(function, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def agent_and_buffer(script, args, device: torch.device):
    """A script's agent at HalfCheetah's sizes, and a buffer of random transitions to learn from."""
    high = np.ones(ACTION_DIM, np.float32)
    agent = script.DDPG(args, Box(-np.inf, np.inf, (OBS_DIM,)), Box(-high, high), device)
    buffer, rng = script.ReplayBuffer(100_000, OBS_DIM, ACTION_DIM, device), np.random.default_rng(0)
    for _ in range(10_000):
        obs, next_obs = rng.normal(size=(2, OBS_DIM))
        buffer.add(obs, rng.uniform(-1, 1, ACTION_DIM), rng.normal(), next_obs, args.gamma)
    return agent, buffer


def time_update(module_name: str, rounds: int) -> dict[str, list[float]]:
    """Of a script's update at HalfCheetah's sizes, and of the product of its two hidden layers, the rounds' figures.

    mkl, onednn: the update with that --matmul, in seconds; limit: its matrix products alone, at the rate of the fastest
    of the products, torch's by MKL and by oneDNN, and NumPy's. Those rates, GFLOP/s, are the rest.
    """
    script = importlib.import_module(module_name)
    args = script.Args()
    agent, buffer = agent_and_buffer(script, args, torch.device("cpu"))

    def learn():
        return agent.update(buffer.sample(args.batch_size))

    with FlopCounterMode(display=False) as counter:
        learn()
    flops = counter.get_total_flops()
    x, weight = torch.rand(args.batch_size, agent.actor.fc2.in_features), agent.actor.fc2.weight.detach()
    np_x, np_weight, np_out = x.numpy(), weight.numpy().T, np.empty((len(x), len(weight)), np.float32)
    product_flops = 2 * x.numel() * len(weight)
    learn_by_onednn = functools.partial(script.by_onednn, learn)
    seconds_each_by_onednn = functools.partial(script.by_onednn, seconds_each)

    figures = {name: [] for name in ("mkl", "onednn", "limit", "torch, MKL", "torch, oneDNN", "NumPy")}
    for i in range(rounds + 1):
        seconds = {
            "torch, MKL": seconds_each(lambda: F.linear(x, weight), 500),
            "torch, oneDNN": seconds_each_by_onednn(lambda: F.linear(x, weight), 500),
            "NumPy": seconds_each(lambda: np.matmul(np_x, np_weight, out=np_out), 500),
        }
        measured = {name: product_flops / value / 1e9 for name, value in seconds.items()}
        measured |= {"limit": min(seconds.values()) * flops / product_flops}
        measured |= {"mkl": seconds_each(learn, 100), "onednn": seconds_each(learn_by_onednn, 100)}
        if i:  # the first round warms up
            for name, value in measured.items():
                figures[name].append(value)
    return figures


PARTS = "launching an update", "an update, back to back", "an action", "the environment's step"


def time_parts(module_name: str, flags: list[str], rounds: int, device: str = "cuda") -> dict[str, list[float]]:
    """Seconds that the parts of a step on the GPU take, HalfCheetah-v5's, by name: the rounds' figures of each.

    The host launches an update, and goes on; updates back to back show what the device takes, unless it is the host
    that is behind; an action is waited for.
    """
    script = importlib.import_module(module_name)
    args, device = tyro.cli(script.Args, args=[*flags, "--env-id", "HalfCheetah-v5"]), torch.device(device)
    env = script.make_env(args)
    agent, buffer = agent_and_buffer(script, args, device)
    obs, _ = env.reset(seed=1)

    def learn(update_actor):
        return agent.update(buffer.sample(args.batch_size), update_actor)

    agent.explore, learn = script.accelerated(agent, buffer, learn)
    action = agent.act(obs)
    figures = {name: [] for name in PARTS}
    for i in range(rounds + 1):
        start = time.perf_counter()
        launched = seconds_each(lambda: learn(True), 200)
        torch.cuda.synchronize()
        update = (time.perf_counter() - start) / 200
        acted = seconds_each(lambda: agent.act(obs), 200)
        stepped = seconds_each(lambda: env.step(action), 200)
        if i:  # the first round warms up
            for name, value in zip(PARTS, (launched, update, acted, stepped), strict=True):
                figures[name].append(value)
    return figures


def in_own_process(threads: int, function, *arguments):
    """The function's value where every library, NumPy's OpenBLAS among them, has that many threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # as sweep.sh has it for training runs
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def spread(values, form=".0f") -> str:
    """Median, and the range in brackets."""
    return f"{np.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def header(*cells) -> str:
    return f"\n{row(*cells)}\n{row(*['---'] * len(cells))}"


def training_tables(args: Args, entries: list[Entry], pairs: list[tuple[Entry, Entry]]):
    speeds = {(entry.label, threads): [] for entry in entries for threads in args.threads}
    for _ in range(args.rounds):
        for entry, threads in itertools.product(entries, args.threads):
            speeds[entry.label, threads] += train(args, entry, threads)
    columns = [f"{threads} thread{'s' * (threads > 1)}" for threads in args.threads]
    yield f"\nTraining on {args.env_id}, {args.steps:,} steps after the warm-up, without evaluations:"
    yield header("steps a second", *columns)
    for entry in entries:
        yield row(entry.label, *(spread(speeds[entry.label, threads]) for threads in args.threads))
    yield "\n<!-- more -->"  # a page shows what is above: report.py --show file
    if pairs:
        yield header("times as fast", *columns)
    for entry, other in pairs:
        ratios = (np.divide(speeds[entry.label, threads], speeds[other.label, threads]) for threads in args.threads)
        yield row(f"{entry.label} / {other.label}", *(spread(ratio, ".2f") for ratio in ratios))


def update_tables(args: Args, scripts: list[str]):
    figures = {}
    for script, threads in itertools.product(scripts, args.threads):
        figures[script, threads] = in_own_process(threads, time_update, Path(script).stem, args.rounds)
    yield "\nOne update (batch sampled from the buffer, both networks and targets); and its limit, its matrix products"
    yield "alone at the rate of the fastest library:"
    yield header("update, ms", "threads", "--matmul mkl", "--matmul onednn", "limit", "mkl / limit", "onednn / limit")
    for (script, threads), update in figures.items():
        milliseconds = (spread(1e3 * np.array(update[name]), ".2f") for name in ("mkl", "onednn", "limit"))
        ratios = (spread(np.divide(update[name], update["limit"]), ".2f") for name in ("mkl", "onednn"))
        yield row(script, threads, *milliseconds, *ratios)
    libraries = "torch, MKL", "torch, oneDNN", "NumPy"
    yield header("product of a batch and the hidden layers, GFLOP/s", "threads", *libraries)
    for (script, threads), update in figures.items():
        yield row(script, threads, *(spread(update[name]) for name in libraries))


def gpu_table(args: Args, entries: list[Entry]):
    yield "\nThe parts of a step on the GPU, microseconds:"
    yield header("", *PARTS)
    for entry in entries:
        parts = in_own_process(1, time_parts, Path(entry.script).stem, entry.flags, args.rounds)
        yield row(entry.label, *(spread(1e6 * np.array(parts[name])) for name in PARTS))


def side_by_side_table(args: Args, entry: Entry):
    alone, together = [], []
    for _ in range(args.rounds):
        alone += train(args, entry, 1)
        together.append(sum(train(args, entry, 1, args.cores)))
    yield f"\n{entry.label}, {args.cores} runs side by side on {args.cores} cores, one thread each:"
    yield header("runs", "steps a second, all runs together", "times one run")
    yield row(1, spread(alone), "")
    yield row(args.cores, spread(together), spread(np.divide(together, alone), ".2f"))


def report(args: Args, folder: Path):
    """The page, piece by piece as it is measured."""
    entries, skipped = [], []
    for entry in map(parse_entry, args.scripts):
        if reason := why_not(entry.python, entry.root / entry.script):
            skipped.append(f"Left out: {entry.label}: {reason}")
        else:
            entries.append(entry)
    exit_unless(entries, f"nothing to measure. {' '.join(skipped)}")
    first = entries[0]
    alike = [entry for entry in entries if entry.script == first.script]
    peers = [entry for entry in entries[1:] if entry.script.startswith("benchmark/") and entry not in alike]
    pairs = [(first, entry) for entry in alike[1:]] + [(entry, peer) for entry in alike for peer in peers]
    ours = [entry for entry in entries if "/" not in entry.script]
    older = {}
    if args.against:
        older = {entry.script: older_version(entry, args.against, folder) for entry in ours}
        pairs += [(entry, older[entry.script]) for entry in ours]

    gpu = torch.cuda.is_available()
    tuned.set_up(usual := tuned.Args())
    about = tuned.provenance(torch.device("cuda" if gpu else "cpu"))
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    yield f"Median of {args.rounds} rounds (range). Commit {about['commit'] or 'unknown'}; {versions};"
    yield f"{about['hardware']['platform']}, {cpu_name()}, {torch.backends.cpu.get_cpu_capability()},"
    yield f"{args.cores} cores; `--matmul auto` chose {usual.matmul}."
    if gpu:
        yield f"GPU: {about['hardware']['gpu']}."
    yield from (f"\n{line}" for line in skipped)
    yield from training_tables(args, [*entries, *older.values()], pairs)
    if gpu:
        yield from gpu_table(args, [e for e in ours if "--no-cuda" not in e.flags and not e.environment])
    else:
        yield from update_tables(args, list(dict.fromkeys(entry.script for entry in ours)))
    yield from side_by_side_table(args, first)


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text(encoding="utf-8")) if path.exists() else None
    return found[1] if found else "unknown CPU"


def main(args: Args):
    exit_unless(args.steps > 0 and args.steps % LOG_INTERVAL == 0, f"--steps must be a multiple of {LOG_INTERVAL}")
    exit_unless(args.rounds > 0 and min(args.threads) > 0, "--rounds and --threads must be positive")
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for line in report(args, Path(folder)):
            print(line, flush=True)
            lines.append(line)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args))

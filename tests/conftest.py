"""What the tests share: the two scripts as modules, runs of them in this process or another, and their outputs."""

import ast
import csv
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: there is a worker a core already

import gymnasium as gym
import numpy as np
import pytest
import torch

# A shell starts what it puts into the background with SIGINT ignored, and so would all that the tests start
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT, TESTS = Path(__file__).parents[1], Path(__file__).parent
sys.path[:0] = [str(ROOT), str(TESTS)]

import ddpg_continuous_action as tuned  # noqa: E402
import ddpg_paper_faithful as paper  # noqa: E402

SCRIPTS = [tuned, paper]
CPU = torch.device("cpu")
LOW, HIGH = (-0.4, -3.0), (0.4, 1.0)  # bounds of actions
HALF_RANGE, MIDDLE = np.array([0.4, 2.0]), np.array([0.0, -1.0])
TINY = dict(  # a whole run, past warm-up, evaluation, logging and saving, in a fraction of a second
    env_id="stubs:Point-v0",
    run_name="tiny",
    total_timesteps=120,
    learning_starts=40,
    batch_size=16,
    buffer_size=100,
    eval_interval=60,
    eval_episodes=2,
    final_eval_episodes=2,
    num_threads=1,
    exp_name="test",
)


# Tests that take what a system lacks: fork, /proc, bash, EGL, a terminal, messages without backslashes
NOT_ON = {
    "darwin": """sweep slurm peer_leaves throughput_of bad_setting dry_run without_gl second_copy lets_go stay_flat
        shipped_model committed_baselines""",
    "win32": """sweep slurm peer_leaves throughput_of bad_setting dry_run without_gl terminal_shows files_of_a_run
        numbers_below notebook pipe bad_input warm_start shipped_model four_lines containers_limit mode_of_batch
        not_finite weights_that_become another_environment error_of_the_environment""",
}
if sys.platform == "win32":
    collect_ignore = [f"test_{name}.py" for name in ("resume", "copying", "compile", "jax")]


def pytest_collection_modifyitems(items):
    for item in items:
        if any(word in item.name for word in NOT_ON.get(sys.platform, "").split()):
            item.add_marker(pytest.mark.skip(reason=f"not on {sys.platform}"))


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.SCRIPT)
def script(request):
    return request.param


@pytest.fixture(autouse=True)
def own_process_state(monkeypatch):
    """main() sets these for a process of its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads, deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    torch.manual_seed(0)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    torch.backends.cudnn.deterministic = deterministic


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(script, flag=value, ...) trains in this process, in an empty folder, and returns the run's folder."""
    monkeypatch.chdir(tmp_path)

    def run(script, **flags):
        flags = TINY | flags
        script.main(script.Args(**flags))
        return Path("runs", flags["run_name"]).resolve()

    return run


@pytest.fixture
def made(monkeypatch):
    """made(script, name) is a list of the instances of the script's class `name`, from now on."""

    def made(script, name):
        instances, original = [], getattr(script, name)

        class Spy(original):
            def __init__(self, *args):
                super().__init__(*args)
                instances.append(self)

        monkeypatch.setattr(script, name, Spy)
        return instances

    return made


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """cli(script, "--flag", ...) runs the script's `__main__` block, under that command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def cli(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script.SCRIPT}.py", *map(str, flags)])
        block = ast.parse(Path(script.__file__).read_text()).body[-1]
        assert ast.unparse(block.test) == "__name__ == '__main__'"
        with pytest.MonkeyPatch.context() as patch:  # what a peer's block sets in our scripts is put back
            for each, name in itertools.product(SCRIPTS, "SCRIPT __file__ Args provenance DDPG ReplayBuffer".split()):
                patch.setattr(each, name, getattr(each, name))
            exec(compile(ast.Module(block.body, []), script.__file__, "exec"), dict(vars(script)))

    return cli


@pytest.fixture
def refused(capsys):
    """refused(f, ...) is the one line with which this call exits with code 2."""

    def refused(function, *args, **flags) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            function(*args, **flags)
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and out == "" and re.fullmatch("error: .+\n", err), (out, err)
        return err.strip()

    return refused


def command(script, **flags) -> list[str]:
    """The tiny run's command line, with these flags changed; None leaves one out."""
    line = [sys.executable, str(ROOT / f"{script.SCRIPT}.py")]
    for name, value in (TINY | flags).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            line += [f"--{flag}", str(value)]
    return line


def environment(**changed) -> dict:
    return os.environ | {"PYTHONPATH": str(TESTS)} | changed


def process(line: list[str], cwd, **env) -> subprocess.CompletedProcess:
    return subprocess.run(line, cwd=cwd, env=environment(**env), capture_output=True, text=True)


def eval_rows(run_dir: Path) -> list[dict]:
    with open(run_dir / "eval.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def scalars(run_dir: Path) -> dict:
    """What TensorBoard shows: {tag: [(step, value), ...]}.

    It reads the files by name: by the second they were made in, then by the process's number. That two are made in one
    second is an accident of these tests, so here they come as they were written, one process after the other.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as folder:
        for i, path in enumerate(sorted(run_dir.glob("events.*"), key=lambda path: path.stat().st_mtime_ns)):
            shutil.copy(path, Path(folder, f"events.out.tfevents.{i:010}"))
        log = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
        return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def model(run_dir: Path) -> dict:
    return torch.load(run_dir / "model.pt", weights_only=True)


def weights(network) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def felt_weights(network) -> torch.Tensor:
    """Without the biases just before a batch normalisation, which takes them out: their gradients are rounding."""
    norm_after = {"input.bias": "norm1", "fc1.bias": "norm1", "fc2.bias": "norm2"}
    norms = {name: getattr(network, norm_after.get(name, ""), None) for name, _ in network.named_parameters()}
    felt = [p for name, p in network.named_parameters() if not isinstance(norms[name], torch.nn.BatchNorm1d)]
    return torch.cat([parameter.detach().flatten() for parameter in felt])


def agent(script, obs_dim=3, low=(-1.0,), high=(1.0,), **flags):
    """The script's own agent in such spaces; the paper's without batch normalisation unless asked for."""
    flags = ({"batch_norm": "none"} if script is paper else {}) | flags
    spaces = gym.spaces.Box(-np.inf, np.inf, (obs_dim,)), gym.spaces.Box(np.float32(low), np.float32(high))
    return script.DDPG(script.Args(**flags), *spaces, CPU)


def networks(script, *args, **kwargs):
    """Actor and critic of such an agent."""
    made = agent(script, *args, **kwargs)
    return made.actor, made.qf


def random_batch(script, obs_dim=3, action_dim=1, n=32, gamma=0.99):
    return script.Batch(
        obs=torch.randn(n, obs_dim),
        action=torch.rand(n, action_dim) * 2 - 1,
        reward=torch.randn(n),
        next_obs=torch.randn(n, obs_dim),
        discount=gamma * (torch.rand(n) > 0.2),
    )


def numpy(tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


def linear(layer, x: np.ndarray) -> np.ndarray:
    return x @ numpy(layer.weight).T + numpy(layer.bias)


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def randomize(network):
    """Weights and running averages as training leaves them: those of normalisations are no longer 1 and 0."""
    for name, tensor in network.state_dict().items():
        if "running_var" in name:
            torch.nn.init.uniform_(tensor, 0.5, 2)
        elif "action" not in name and tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.1)

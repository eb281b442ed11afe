"""A script from its command line: flags, what a run leaves behind, bad input, what it prints, determinism."""

import ast
import contextlib
import ctypes.util
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, SCRIPTS, TESTS, TINY, command, environment, eval_rows, model, paper, process, scalars, tuned


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def record(run_dir: Path) -> dict:
    return json.loads((run_dir / "args.json").read_text())


def result(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


@pytest.fixture
def refused(capsys):
    """refused(f, ...) is the one line with which this call exits with code 2."""

    def refused(function, *args, **flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            function(*args, **flags)
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out == "" and re.fullmatch("error: .+\n", err), (out, err)
        return err

    return refused


# Flags


@pytest.mark.parametrize("text, number", [("1e6", 10**6), ("25e3", 25_000), ("1_000", 1000), ("7", 7), ("7.0", 7)])
def test_integers_as_people_type_them(script, text, number, monkeypatch):
    line = f"{script.SCRIPT}.py --total-timesteps {text} --batch-size {text} --learning-starts 1"
    monkeypatch.setattr(sys, "argv", line.split())
    script.set_up(args := script.parse_args())
    for value in args.total_timesteps, args.batch_size:
        assert value == number and isinstance(value, int)


CLEANRL = (
    dict(exp_name="ddpg_continuous_action", seed=7, torch_deterministic=False, cuda=False, track=False)
    | dict(wandb_project_name="cleanRL", wandb_entity="me", capture_video=False, save_model=True)
    | dict(env_id="stubs:Point-v0", total_timesteps=80, learning_rate=1e-3, buffer_size=1000, gamma=0.98, tau=0.01)
    | dict(batch_size=32, exploration_noise=0.2, learning_starts=50, policy_frequency=2)
)


def test_a_command_line_for_cleanrl_works_unchanged(tmp_path):
    """In a process of its own, with an environment from a third-party module."""
    ours_only = set(TINY) - set(CLEANRL)
    done = process(command(tuned, **dict.fromkeys(ours_only) | CLEANRL), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"stubs-Point-v0__ddpg_continuous_action__7__\d{10}", run_dir.name)
    assert record(run_dir)["args"].items() >= CLEANRL.items()


def test_the_paper_script_takes_cleanrls_flags_but_for_what_the_paper_does_otherwise():
    names = {field.name for field in dataclasses.fields(paper.Args)}
    assert set(CLEANRL) - names == {"learning_rate", "exploration_noise"}


def test_defaults():
    """PRODUCT.md: the tuned baseline, and PAPER.md: section 7."""
    args = tuned.Args()
    assert (args.env_id, args.total_timesteps, args.env_kwargs) == ("HalfCheetah-v5", 10**6, "{}")
    assert (args.learning_rate, args.batch_size, args.learning_starts) == (3e-4, 256, 25_000)
    assert (args.tau, args.gamma, args.buffer_size) == (0.005, 0.99, 10**6)
    assert (args.exploration_noise, args.policy_frequency, args.eval_interval, args.eval_episodes) == (0.1, 1, 5000, 10)
    args = paper.Args()
    assert (args.actor_lr, args.critic_lr, args.critic_weight_decay) == (1e-4, 1e-3, 1e-2)
    assert (args.tau, args.gamma, args.buffer_size, args.batch_size) == (0.001, 0.99, 10**6, 64)
    assert (args.ou_theta, args.ou_sigma, args.policy_frequency) == (0.15, 0.2, 1)
    assert (args.batch_norm, args.weights_init, args.pixels) == ("both", "paper", False)
    assert paper.Args(pixels=True).batch_size == 16


def test_help_matches_its_snapshot(script):
    snapshot = TESTS / f"help_{script.SCRIPT}.txt"
    line = [sys.executable, f"{script.SCRIPT}.py", "--help"]
    shown = process(line, ROOT, COLUMNS="120", NO_COLOR="1", TERM="dumb").stdout
    fix = f"COLUMNS=120 NO_COLOR=1 TERM=dumb python {script.SCRIPT}.py --help > {snapshot.relative_to(ROOT)}"
    assert shown == snapshot.read_text(), f"if the change is meant: {fix}"
    assert all(f"--{field.name.replace('_', '-')}" in shown for field in dataclasses.fields(script.Args))


# Every flag has an effect


def actor_weights(run_dir):
    return {name: value.tolist() for name, value in model(run_dir)["actor"].items()}


def files(pattern):
    return lambda run_dir: len(list(run_dir.glob(pattern)))


def column(name):
    return lambda run_dir: [row[name] for row in eval_rows(run_dir)]


def final_episodes(run_dir):
    return result(run_dir)["final_eval"]["episodes"]


# flag: another value than the tiny run's, and what the run then shows otherwise
EFFECTS = {
    "torch_deterministic": (False, lambda run_dir: torch.backends.cudnn.deterministic),
    "save_model": (False, files("model.pt")),
    "checkpoint_interval": (0, files("checkpoint.pt")),
    "keep_checkpoint": (False, files("checkpoint.pt")),
    "eval_interval": (40, column("global_step")),
    "eval_episodes": (3, column("episodes")),
    "final_eval_episodes": (3, final_episodes),
    "max_eval_steps": (5, column("mean")),
    "capture_video": (True, files("videos/*.mp4")),
    "env_id": ("stubs:Scripted-v0", lambda run_dir: len(model(run_dir)["actor"]["action_low"])),
    "total_timesteps": (100, column("global_step")),
}
WEIGHTS = dict(seed=3, buffer_size=50, gamma=0.9, tau=0.1, batch_size=20, learning_starts=60, policy_frequency=2)
WEIGHTS_OF = {  # those that change the trained actor's weights
    tuned: dict(learning_rate=1e-2, exploration_noise=0.5, noise="parameter", ou_theta=0.9, ou_dt=0.1, n_step=3)
    | dict(noise_anneal_steps=60, exploration_noise_final=0.5, layer_norm="actor")
    | dict(target_noise=0.2, target_noise_clip=0.01),
    paper: dict(actor_lr=1e-2, critic_lr=1e-2, critic_weight_decay=1.0, ou_theta=0.9, ou_sigma=0.7, ou_dt=0.1)
    | dict(weights_init="kaiming", batch_norm="actor", batch_norm_momentum=0.5, pixels=True),
}
NEEDED = {  # flags that another one takes
    (tuned, "ou_theta"): dict(noise="ou"),
    (tuned, "ou_dt"): dict(noise="ou"),
    (tuned, "exploration_noise_final"): dict(noise_anneal_steps=60),
    (tuned, "target_noise_clip"): dict(target_noise=0.2),
}
EFFECTS_OF = {
    script: EFFECTS | {name: (value, actor_weights) for name, value in (WEIGHTS | WEIGHTS_OF[script]).items()}
    for script in SCRIPTS
}
TESTED_ELSEWHERE = {
    "test_the_name_of_a_run": "exp_name run_name",
    "test_num_threads": "num_threads",
    "test_no_cuda_stays_off_the_gpu": "cuda",
    "test_track": "track wandb_project_name wandb_entity",
    "test_evaluate_reproduces_the_last_evaluation": "evaluate",
    "test_algorithm.py": "matmul",
    "test_compile.py": "compile",
    "test_gpu.py": "cudagraphs",
    "test_people.py": "warm_start env_kwargs",
    "test_resume.py": "resume",
}
CHECKPOINTS = dict(checkpoint_interval=50, keep_checkpoint=True)


def test_every_flag_has_a_test_of_its_effect(script):
    elsewhere = " ".join(TESTED_ELSEWHERE.values()).split()
    assert {field.name for field in dataclasses.fields(script.Args)} == {*EFFECTS_OF[script], *elsewhere}
    assert all(test in globals() or (TESTS / test).exists() for test in TESTED_ELSEWHERE)


@functools.cache
def shown_by_the_tiny_run(script, folder):
    with contextlib.chdir(folder):
        script.main(script.Args(**TINY | CHECKPOINTS))
    return {name: observe(folder / "runs" / "tiny") for name, (_, observe) in EFFECTS_OF[script].items()}


@pytest.mark.parametrize("script, name", [(script, name) for script in SCRIPTS for name in EFFECTS_OF[script]])
def test_flag_has_an_effect(script, name, run, tmp_path_factory):
    value, observe = EFFECTS_OF[script][name]
    needed = NEEDED.get((script, name))
    if needed:
        usual = observe(run(script, **CHECKPOINTS | needed | dict(run_name="without")))
    else:
        folder = tmp_path_factory.getbasetemp() / script.SCRIPT
        folder.mkdir(exist_ok=True)
        usual = shown_by_the_tiny_run(script, folder)[name]
    assert observe(run(script, **CHECKPOINTS | (needed or {}) | {name: value})) != usual


def test_the_name_of_a_run(script, run, tmp_path):
    """Windows has no colons."""
    assert run(script, run_name="sweep/mine", total_timesteps=50).is_dir()
    run(script, run_name="a:name", total_timesteps=50)
    script.main(script.Args(**TINY | dict(run_name=None, exp_name="try/it", seed=5)))
    found = {path.name for path in (tmp_path / "runs").iterdir()} - {"sweep", "a-name"}
    assert len(found) == 1 and re.fullmatch(r"stubs-Point-v0__try-it__5__\d{10}", found.pop())


def test_num_threads(script, run):
    """A few steps of learning only: two threads are very slow where another process keeps a core busy."""
    for threads in 2, 1:
        run(script, run_name=f"{threads}", num_threads=threads, total_timesteps=42, eval_interval=0)
        assert torch.get_num_threads() == threads


def test_numbers_below_1e_38_are_zero_in_every_thread(script):
    """Where nothing has started torch's threads yet: in a process of its own."""
    code = f"import torch, {script.SCRIPT} as script\nscript.set_up(script.Args(env_id='Pendulum-v1', num_threads=2))\n"
    code += "print((torch.full((1_000_000,), 2e-38) / 10).count_nonzero().item())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).stdout == b"0\n"


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="such a torch looks for the GPU that is feigned")
def test_no_cuda_stays_off_the_gpu(script, run, monkeypatch):
    """With a GPU feigned, only --no-cuda trains here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    with pytest.raises((AssertionError, RuntimeError)):
        run(script, run_name="gpu")
    assert result(run(script, cuda=False))["global_step"] == 120


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A stand-in for the wandb package, which records its calls."""
    init, finish = "lambda **options: calls.append(options)", "lambda exit_code: ends.append(exit_code)"
    (tmp_path / "wandb.py").write_text(f"calls, ends = [], []\ninit = {init}\nfinish = {finish}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield importlib.import_module("wandb")
    del sys.modules["wandb"]


def test_track(script, run, wandb):
    """It tells runs of one name apart, say of two sweeps, and knows a resumed one again."""
    flags = dict(track=True, wandb_project_name="mine", wandb_entity="us", **CHECKPOINTS)
    one, other = (run(script, run_name=f"{sweep}/x", **flags) for sweep in "ab")
    script.main(script.args_of(str(one), total_timesteps=150))
    ids = [record(run_dir)["id"] for run_dir in (one, other, one)]
    assert ids[0] != ids[1] and [call["id"] for call in wandb.calls] == ids
    for call in wandb.calls:
        assert (call["project"], call["entity"], call["name"], call["resume"]) == ("mine", "us", "x", "allow")
        assert call["sync_tensorboard"] and call["config"]["batch_size"] == TINY["batch_size"]
    with pytest.raises(SystemExit):
        run(script, track=True, env_id="stubs:NanReward-v0", run_name="failed", total_timesteps=170)
    assert wandb.ends == [0, 0, 0, 1]


# What a run leaves behind


def test_files_of_a_run(script, run):
    run_dir = run(script)
    names = {re.sub(r"^events.*", "events", path.name) for path in run_dir.iterdir()}
    assert names == {".lock", "args.json", "eval.csv", "model.pt", "result.json", "events"}

    found, args = record(run_dir), script.Args(**TINY)
    script.set_up(args)  # which resolves --matmul auto
    assert found["args"] == dataclasses.asdict(args) and found["args"]["matmul"] in ("mkl", "onednn")
    assert found["defaults"] == dataclasses.asdict(script.Args())
    assert found["script"] == script.SCRIPT and re.fullmatch("[0-9a-f]{40}(-dirty)?", found["commit"])
    assert found["sha256"] == hashlib.sha256(Path(script.__file__).read_bytes()).hexdigest()
    assert re.fullmatch("[0-9a-f]{8}", found["id"])
    assert found["versions"]["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    assert set(found["versions"]) == {"python", "torch", "gymnasium", "mujoco", "numpy"}
    assert found["hardware"]["threads"] == 1 and found["hardware"]["cpus"] == os.cpu_count()

    assert (run_dir / "eval.csv").read_text().startswith("global_step,mean,std,min,max,episodes\n60,")
    rows = eval_rows(run_dir)
    assert [(row["global_step"], row["episodes"]) for row in rows] == [(60, 2), (120, 2)]
    assert all(row["min"] <= row["mean"] <= row["max"] and row["std"] >= 0 for row in rows)

    written = result(run_dir)
    assert (written["global_step"], written["evaluations"]) == (120, 2)
    assert written["final_return"] == pytest.approx((rows[0]["mean"] + rows[1]["mean"]) / 2)
    assert set(written["final_eval"]) == {"mean", "std", "min", "max", "episodes"}


def test_final_evaluation(script, run, recwarn):
    """Five episodes in two environments, whose first three pay 3, 21 and 86; eval.csv stays as it is without."""
    scripted = dict(env_id="stubs:Scripted-v0", eval_interval=0)
    written = result(run(script, **scripted, final_eval_episodes=5))
    expected = dict(mean=26.8, std=pytest.approx(940.96**0.5), min=3, max=86, episodes=5)
    assert written["final_eval"] == expected and written["final_return"] is None
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]
    with_one, without = (run(script, run_name=f"{n}", final_eval_episodes=n) for n in (5, 0))
    assert (with_one / "eval.csv").read_bytes() == (without / "eval.csv").read_bytes()
    assert result(without)["final_eval"] is None


@pytest.mark.parametrize("learning_starts, first", [(15, 2), (50, 5)])
def test_the_final_return_is_the_mean_of_the_last_ten_evaluations(script, learning_starts, first, run):
    """Of those after learning started."""
    run_dir = run(script, eval_interval=10, learning_starts=learning_starts)
    means = [row["mean"] for row in eval_rows(run_dir)]
    assert len(means) == 12
    assert result(run_dir)["final_return"] == pytest.approx(np.mean(means[first:]), rel=1e-12)


def test_the_last_step_is_evaluated_too(script, run):
    assert [row["global_step"] for row in eval_rows(run(script, eval_interval=50))] == [50, 100, 120]


def test_statistics_in_eval_csv(script, run, monkeypatch):
    returns = np.array([1.0, 2.0, 6.0])
    monkeypatch.setattr(script, "evaluate", lambda *args: (returns, returns, returns))
    row = eval_rows(run(script))[0]
    assert row == dict(global_step=60, mean=3, std=pytest.approx((14 / 3) ** 0.5), min=1, max=6, episodes=3)


def test_the_saved_model_acts_like_the_trained_one(script, run, made):
    """model.pt holds what is needed to rebuild the networks, and these give the trained ones' actions and values."""
    agents = made(script, "DDPG")
    saved = model(run(script))
    low, high = saved["actor"]["action_low"], saved["actor"]["action_high"]
    (obs_dim,) = shape = saved["obs_shape"]
    shape = obs_dim if script is tuned else shape
    actor, qf = script.Actor(shape, low, high), script.QNetwork(shape, low, high)
    actor.load_state_dict(saved["actor"])
    qf.load_state_dict(saved["qf"])
    for network in actor, qf, agents[0].actor, agents[0].qf:
        network.eval()
    obs, action = torch.randn(6, 2), torch.randn(6, 1)
    assert torch.equal(actor(obs), agents[0].actor(obs))
    assert torch.equal(qf(obs, action), agents[0].qf(obs, action))
    assert (saved["global_step"], saved["env_id"]) == (120, TINY["env_id"])
    assert script.Args(**saved["args"]).gamma == 0.99


def test_tensorboard(script, run):
    """Scripted: the episodes' returns and lengths are known."""
    run_dir = run(script, env_id="stubs:Scripted-v0", total_timesteps=210, learning_starts=150)
    log = scalars(run_dir)
    assert set(log) == {
        *("charts/episodic_return", "charts/episodic_length", "charts/SPS"),
        *("charts/saturated_actions", "charts/exploration_difference"),
        *("losses/qf1_loss", "losses/qf1_values", "losses/actor_loss"),
        *("eval/episodic_return", "eval/discounted_return", "eval/q_estimate"),
    }
    # episodes of 3, 2, 4, 1, 1 steps, paying 10 x episode + step
    assert log["charts/episodic_length"][:6] == [(3, 3), (5, 2), (9, 4), (10, 1), (11, 1), (14, 3)]
    returns = [(3, 0 + 1 + 2), (5, 10 + 11), (9, 20 + 21 + 22 + 23), (10, 30), (11, 40), (14, 50 + 51 + 52)]
    assert log["charts/episodic_return"][:6] == returns
    # the first 6 evaluation episodes, in 2 environments: (3, 21), (86, 30), (40, 153)
    assert log["eval/episodic_return"] == [(60, 3), (120, 21), (180, 86), (210, 30)]
    assert [(step, pytest.approx(value)) for step, value in log["eval/episodic_return"]] == [
        (row["global_step"], row["mean"]) for row in eval_rows(run_dir)
    ]
    assert [step for step, _ in log["losses/qf1_loss"]] == [180, 200, 210]  # every 200 steps, and to evaluations
    assert 0 <= log["charts/saturated_actions"][0][1] <= 1
    text = next(path for path in run_dir.glob("events*")).read_bytes()
    assert b"|batch_size|16|" in text and b"|gamma|0.99|" in text


def test_diagnostics(script, run, monkeypatch):
    """A saturated actor, and an exploration that always takes 1 off."""

    class Saturated(script.Actor):
        def forward(self, obs):
            return super().forward(obs) * 0 + self.action_high * 0.999

    monkeypatch.setattr(script, "Actor", Saturated)
    monkeypatch.setattr(script.DDPG, "explore", lambda self: self.actor(self.obs).detach() - 1)
    log = scalars(run(script))
    assert log["charts/saturated_actions"] == [(60, 1), (120, 1)]
    assert log["charts/exploration_difference"] == [(60, pytest.approx(1)), (120, pytest.approx(1))]


def test_evaluate_reproduces_the_last_evaluation(script, run, cli, capsys, monkeypatch):
    run_dir = run(script, eval_episodes=4)
    last = eval_rows(run_dir)[-1]
    before = contents(run_dir)
    results = []
    evaluate = script.evaluate
    monkeypatch.setattr(script, "evaluate", lambda *args: results.append(evaluate(*args)) or results[-1])
    capsys.readouterr()
    cli(script, "--evaluate", run_dir)
    expected = f"{last['mean']:.2f} ± {last['std']:.2f} over 4 episodes"
    assert capsys.readouterr().out == f"{TINY['env_id']} after 120 steps: {expected}\n"
    assert results[0][0].mean() == last["mean"] and results[0][0].std() == last["std"]  # to the last bit
    assert contents(run_dir) == before

    cli(script, "--evaluate", run_dir, "--eval-episodes", 7)
    assert capsys.readouterr().out.endswith("over 7 episodes\n")


def test_evaluate_needs_only_the_model(script, run, cli, capsys, tmp_path):
    """Somebody else's, say; from a notebook, too."""
    run_dir, alone = run(script, eval_episodes=3), tmp_path / "alone"
    alone.mkdir()
    (alone / "model.pt").write_bytes((run_dir / "model.pt").read_bytes())
    capsys.readouterr()
    cli(script, "--evaluate", run_dir)
    cli(script, "--evaluate", alone)
    script.main(script.args_of(str(alone), evaluate=True))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and len(set(lines)) == 1 and lines[0].endswith("over 3 episodes")
    assert [path.name for path in alone.iterdir()] == ["model.pt"]


def test_evaluate_films_only_if_asked_to(script, run, cli):
    """Not because training did, perhaps on a machine that could render."""
    run_dir = run(script, env_id="Pendulum-v1", capture_video=True)
    films = sorted((run_dir / "videos").iterdir())
    cli(script, "--evaluate", run_dir)
    script.main(script.args_of(str(run_dir), evaluate=True))
    assert films and sorted((run_dir / "videos").iterdir()) == films


def test_evaluate_films_every_episode(script, run, cli):
    run_dir = run(script)
    cli(script, "--evaluate", run_dir, "--eval-episodes", 3, "--capture-video")
    videos = list((run_dir / "videos").glob("*.mp4"))
    assert len(videos) == 3 and all(video.stat().st_size > 500 for video in videos)


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="EGL is not installed")
def test_films_mujoco_without_a_screen(tmp_path):
    line = command(tuned, env_id="InvertedPendulum-v5", capture_video=True, total_timesteps=60, eval_interval=50)
    env = environment()
    env.pop("DISPLAY", None), env.pop("MUJOCO_GL", None)
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    videos = sorted((tmp_path / "runs/tiny/videos").glob("*.mp4"))
    assert [video.name.split("-episode")[0] for video in videos] == ["step-50", "step-60"]
    assert all(video.stat().st_size > 1000 for video in videos)


# Bad input: one line on stderr, exit code 2, nothing left behind

WRONG = {  # what is said of a flag, and where
    "must be an integer, not": "total-timesteps 1.5, batch-size 1.5, buffer-size 1e-3, seed nan, eval-interval inf",
    "must be positive, not": "total-timesteps 0, total-timesteps -5, buffer-size 0, batch-size -1, policy-frequency 0, "
    "eval-episodes 0, max-eval-steps 0, tau 0, tau nan",
    "must be at least 0, not": "eval-interval -1, final-eval-episodes -1, checkpoint-interval -1, learning-starts -1, "
    "num-threads -1, seed -1, ou-theta -0.1, ou-dt -1",
    "must be below 2**32, not": "seed 5_000_000_000",
    "must be in [0, 1], not": "gamma 1.01, gamma -0.1, gamma nan, tau 1.1",
}
WRONG_OF = {
    tuned: {
        "must be positive, not": "batch-size 0, learning-rate 0, learning-rate -1e-3, learning-rate nan, "
        "learning-rate inf, n-step 0",
        "must be at least 0, not": "exploration-noise -0.1, exploration-noise nan, exploration-noise inf, "
        "exploration-noise-final -1, noise-anneal-steps -1, target-noise -0.1, target-noise-clip nan",
    },
    paper: {
        "must be positive, not": "actor-lr 0, critic-lr -1, actor-lr nan",
        "must be at least 0, not": "critic-weight-decay -1, ou-sigma nan",
        "must be in [0, 1], not": "batch-norm-momentum -0.1, batch-norm-momentum 2, batch-norm-momentum nan",
    },
}
ENVS = {  # what is said of an environment, and of which
    "Did you mean: `HalfCheetah`": "HalfCheeta-v5",
    "HalfCheetah": "HalfCheetah-v55",
    "no_such_module": "no_such_module:Env-v0",
    "cannot make": "stubs:Nothing-v0 two:colons:Env-v0 (",
    "continuous action space, a flat Box": "CartPole-v1 stubs:DiscreteAction-v0 stubs:DictAction-v0 "
    "stubs:IntegerAction-v0 stubs:MatrixAction-v0",
    "finite bounds": "stubs:UnboundedAction-v0 stubs:HalfBoundedAction-v0 stubs:HugeAction-v0",
    "cannot make the observations flat": "stubs:SequenceObs-v0",
    "observes images: ddpg_paper_faithful.py --pixels": "stubs:ImageObs-v0",
}
BOTH = {
    "--learning-starts 120": "--learning-starts 120 must be below --total-timesteps 120",
    "--learning-starts 1e3": "--learning-starts 1,000 must be below --total-timesteps 120",
    "--buffer-size 1e12": "lower --buffer-size",
    "--no-cuda --cudagraphs": "--cudagraphs needs a CUDA device",
    "--env-id stubs:RenderModeless-v0 --capture-video": "render_mode",
    "--env-id stubs:Unrendered-v0 --capture-video": "apt-get install",
    "--evaluate nowhere": "cannot read nowhere/model.pt",
    "--evaluate .": "cannot read model.pt",
    "--evaluate . --resume .": "--resume and --evaluate cannot be combined",
    "--resume nowhere": "nowhere holds no run of",
    "--track": "pip install wandb",
}
BOTH |= {f"--env-id {env_id}": said for said, env_ids in ENVS.items() for env_id in env_ids.split()}
BAD_INPUT = {
    tuned: BOTH
    | {
        "--n-step 42": "--learning-starts must be at least --n-step - 1",
    },
    paper: BOTH
    | {
        "--batch-size 1": "batch normalisation",
        "--pixels --env-id stubs:Unrendered-v0": "apt-get install",
        "--pixels --env-id stubs:RenderModeless-v0": "render_mode",
        "--pixels --buffer-size 1e7": "lower --buffer-size",
    },
}


def refusals():
    for script in SCRIPTS:
        for said, flags in [*WRONG.items(), *WRONG_OF[script].items()]:
            for flag in flags.split(", "):
                yield script, f"--{flag}", f"--{flag.split()[0]} {said} "
        for flags, message in BAD_INPUT[script].items():
            yield script, flags, message


@pytest.mark.parametrize("script, flags, message", [*refusals()], ids=lambda value: getattr(value, "SCRIPT", value))
def test_bad_input(script, flags, message, cli, refused, tmp_path, recwarn):
    line = command(script)[2:] + flags.split()  # the last value of a flag counts
    line = flags.split() if flags.startswith(("--evaluate", "--resume")) else line
    assert message in refused(cli, script, *line)
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]
    assert not list(tmp_path.iterdir())


def test_bad_input_to_a_process_of_its_own(script, tmp_path):
    done = process(command(script, env_id="HalfCheeta-v5"), tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Did you mean: `HalfCheetah`" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ["--gamma much", "--no-such-flag 1", "--total-timesteps ten", "--seed"])
def test_what_cannot_be_read_is_refused(script, flags, cli, capfd, tmp_path):
    with pytest.raises(SystemExit) as end:
        cli(script, *flags.split())
    assert end.value.code == 2 and flags.split()[0] in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_buffer_that_cannot_fit_is_refused(script, cli, refused, monkeypatch):
    """1e6 transitions of HalfCheetah: 4 bytes x (17 + 6 + 1 + 17 + 1) x 1e6 = 0.156 GiB, here with 0.1 GiB free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0.1 * 2**30))
    needs = "the replay buffer needs 0.16 GiB, 0.10 GiB are free: lower --buffer-size"
    assert refused(cli, script) == f"error: {needs}\n"


def test_a_finished_runs_name_is_taken(script, run, refused):
    before = contents(run_dir := run(script))
    assert re.fullmatch("error: runs/tiny holds a run: .*--run-name\n", refused(run, script))
    assert contents(run_dir) == before


def test_evaluate_needs_a_model_of_this_script(script, run, cli, refused):
    run_dir = run(script, save_model=False)
    assert f"cannot read {run_dir}/model.pt" in refused(cli, script, "--evaluate", run_dir)
    other = run(paper if script is tuned else tuned, run_name="other")
    (run_dir / "model.pt").write_bytes((other / "model.pt").read_bytes())
    assert "its script is" in refused(cli, script, "--evaluate", run_dir)


def test_a_reward_that_is_not_finite_ends_a_process_with_one_line(script, tmp_path):
    """What was saved before stays; nothing is saved after."""
    done = process(command(script, env_id="stubs:NanReward-v0", total_timesteps=210, eval_interval=100), tmp_path)
    ended = "ended at step 151; --resume runs/tiny goes on from step 0"
    nan = "the environment's reward must be finite and of shape (), but is nan"
    assert (done.returncode, done.stderr) == (1, f"error: {nan}; {ended}\n")
    run_dir = tmp_path / "runs/tiny"
    assert not (run_dir / "result.json").exists() and [row["global_step"] for row in eval_rows(run_dir)] == [100]
    assert all(value.isfinite().all() for value in model(run_dir)["actor"].values())


def test_the_advice_names_flags_that_exist(script):
    """Every --flag that a message or docstring names is git's or one of this script's; shared code may name both's."""
    own, both = ({field.name for each in of for field in dataclasses.fields(each.Args)} for of in ([script], SCRIPTS))
    algorithm, plumbing = (ROOT / f"{script.SCRIPT}.py").read_text().split("class Args")[1].split("\n# From here on")
    for code, flags in (algorithm, own), (plumbing, both | {"always", "dirty", "abbrev", "exclude"}):
        named = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", code.replace("[-_]", "-"))}
        assert named <= flags, named - flags


class Endless(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 1.0, False, False, {}


gym.register("Endless-v0", Endless)


def test_episodes_that_never_end(script, run, capfd):
    """They are cut after 30 steps, each of which pays 1, in two evaluations and the final one."""
    run_dir = run(script, env_id="Endless-v0", checkpoint_interval=20, keep_checkpoint=True, max_eval_steps=30)
    warnings = capfd.readouterr().err.splitlines()
    assert warnings == ["warning: 2 evaluation episodes cut at --max-eval-steps"] * 3
    assert not (run_dir / "checkpoint.pt").exists()
    assert [(row["mean"], row["std"]) for row in eval_rows(run_dir)] == [(30, 0), (30, 0)]


# Errors


def test_a_threads_error_shows_unless_it_is_the_logs(script, run, monkeypatch):
    """The environment has threads of its own that fail; that the log cannot be written comes back in a later step."""
    shown = []
    monkeypatch.setattr(threading, "excepthook", usual := lambda error: shown.append(str(error.exc_value)))

    def fail(error, *_):
        raise error

    class Careless(gym.Wrapper):
        errors = [OSError("a thread's"), RuntimeError("another's")]

        def step(self, action):
            writer = "tensorboard.summary.writer.record_writer.RecordWriter.write"
            monkeypatch.setattr(writer, lambda *_: fail(OSError(28, "No space left on device", "the log")))
            if self.errors:
                thread = threading.Thread(target=fail, args=[self.errors.pop()])
                thread.start()
                thread.join()
            return super().step(action)

    monkeypatch.setattr(script, "wrap", lambda env, args: Careless(env))
    with pytest.raises(SystemExit) as end:
        run(script)
    ended = r"error: runs/tiny: No space left on device; ended at step \d+; --resume runs/tiny goes on from step 0"
    assert re.fullmatch(ended, end.value.code)
    assert sorted(shown) == ["a thread's", "another's"] and threading.excepthook is usual


# From a notebook


@pytest.fixture
def broken(script, run, monkeypatch):
    """The folder of a run whose environment failed after 90 steps; its checkpoint is of step 50."""

    class Broken(gym.Wrapper):
        steps = 0

        def step(self, action):
            self.steps += 1
            if self.steps > 90:
                raise ZeroDivisionError("of the environment")
            return super().step(action)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError) as error:
        patch.setattr(script, "wrap", lambda env, args: Broken(env))
        run(script, **CHECKPOINTS, gamma=0.9)
    assert error.value.__notes__ == ["This run ended at step 91; --resume runs/tiny goes on from step 50"]
    return "runs/tiny"


def handlers():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), threading.excepthook, sys.excepthook


@pytest.mark.parametrize("total", [None, 150])
def test_a_notebook_resumes_under_the_runs_own_flags(script, broken, total, tmp_path, monkeypatch):
    """In an environment that counts as exact, with the same bytes as one longer run."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["notebook", "--no-such-flag"])
    before = handlers()
    script.main(script.args_of(broken, **{} if total is None else dict(total_timesteps=total)))
    assert handlers() == before
    (tmp_path / "longer").mkdir()
    monkeypatch.chdir(tmp_path / "longer")
    script.main(script.Args(**TINY | CHECKPOINTS | dict(gamma=0.9, total_timesteps=total or 120)))
    assert handlers() == before
    assert outcome(tmp_path / "runs/tiny") == outcome(tmp_path / "longer/runs/tiny")


@pytest.mark.parametrize("change, message", [("gamma", "its gamma is 0.9"), ("total_timesteps", "can only be raised")])
def test_a_notebook_cannot_change_a_runs_flags(script, broken, change, message, refused):
    """Neither with args_of nor without, when all that is not given is the default; the run's own value may be given."""
    before = contents(broken)
    own = record(Path(broken))["args"][change]
    assert message in refused(script.main, script.args_of(broken, **{change: own * 0.99 if change == "gamma" else 119}))
    without = {name: value for name, value in (TINY | CHECKPOINTS).items() if name != "run_name"}
    assert "its run_name is tiny" in refused(script.main, script.Args(resume=broken, **without))
    assert contents(broken) == before
    script.main(script.args_of(broken, **{change: own}))
    assert result(Path(broken))["global_step"] == 120


def test_a_notebook_is_told_of_a_fraction_of_a_step(script, run, refused, tmp_path):
    message = "error: --total-timesteps must be an integer, not 120.5\n"
    assert refused(run, script, total_timesteps=120.5) == message
    assert not list(tmp_path.iterdir())
    assert '"total_timesteps": 120,' in (run(script, total_timesteps=1.2e2) / "args.json").read_text()


# What it prints


def test_output_to_a_pipe_is_a_few_plain_lines(script, tmp_path):
    done = process(command(script, env_id="Pendulum-v1"), tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "" and "\r" not in done.stdout
    assert re.fullmatch("Pendulum-v1 on cpu with 1 CPU threads?; results in runs/tiny", lines[0])
    assert lines[1] == "the replay buffer takes 0.00 GiB when it is full"
    for step, line in zip((60, 120), lines[2:4], strict=True):
        assert re.fullmatch(rf"step {step}: evaluation -[\d.,]+, \d+ steps/s, \d\d:\d\d left", line)
    complete = r"complete after 120 steps in \d\d:\d\d; final return -[\d.,]+, the mean of 2 evaluations"
    assert re.fullmatch(complete, lines[4]) and len(lines) == 5


@pytest.mark.parametrize("to_file", [False, True])
def test_a_terminal_shows_a_progress_bar_too(script, to_file, tmp_path):
    """And what goes to a file instead is plain lines."""
    pty, termios = map(importlib.import_module, ("pty", "termios"))  # Windows has neither
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 120))
    with open(tmp_path / "log", "wb") as log:
        line, out = command(script), log if to_file else there
        process = subprocess.Popen(line, cwd=tmp_path, env=environment(), stdout=out, stderr=there)
    os.close(there)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux tells the end of a pseudo-terminal
        while chunk := os.read(here, 4096):
            shown += chunk
    assert process.wait() == 0, shown
    assert re.search(rb"\r100%\|.+\| 120/120 \[\d\d:\d\d<00:00, +[\d.]+ steps/s, return=-[\d.]+\]", shown)
    assert re.search(rb"\revaluating: .+return=-", shown)
    logged = (tmp_path / "log").read_bytes()
    assert b"\r" not in logged
    for line in b"step 60: ", b"step 120: ", b"complete after 120 steps":
        assert (line in logged) == to_file and (line in shown) != to_file


# Determinism


def outcome(run_dir):
    log = scalars(run_dir)
    del log["charts/SPS"]
    return (run_dir / "eval.csv").read_bytes(), (run_dir / "model.pt").read_bytes(), log


def test_the_same_seed_gives_the_same_bytes(script, run, tmp_path):
    """Here and in another process; another seed gives others."""
    flags = dict(env_id="Pendulum-v1", total_timesteps=300, eval_interval=150)
    here, elsewhere = outcome(run(script, **flags)), tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = process(command(script, **flags), elsewhere)
    assert done.returncode == 0, done.stderr
    again, other = outcome(elsewhere / "runs/tiny"), outcome(run(script, **flags, seed=2, run_name="other"))
    assert here == again
    assert all(mine != others for mine, others in zip(here, other, strict=True))


def test_two_threads_on_a_busy_machine_give_the_same_bytes_twice(tmp_path):
    flags = dict(env_id="Hopper-v5", batch_size=256, buffer_size=1000, num_threads=2, total_timesteps=80)
    folders, processes = [tmp_path / "one", tmp_path / "other"], []
    for folder in folders:  # side by side, each in the other's way
        folder.mkdir()
        env = environment(OMP_NUM_THREADS="2")
        processes.append(subprocess.Popen(command(tuned, **flags), cwd=folder, env=env))
    assert [process.wait() for process in processes] == [0, 0]
    assert outcome(folders[0] / "runs/tiny") == outcome(folders[1] / "runs/tiny")


# What the scripts are made of


def inline_metadata(script) -> dict:
    source = (ROOT / f"{script.SCRIPT}.py").read_text()
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", source)[1]
    return tomllib.loads(re.sub(r"(?m)^# ?", "", block))


def test_inline_metadata_is_in_step_with_requirements(script):
    metadata = inline_metadata(script)
    pins = {line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert set(metadata["dependencies"]) <= pins and all("==" in pin for pin in metadata["dependencies"])
    assert metadata == inline_metadata(tuned)


def test_a_script_imports_its_dependencies_and_nothing_else(script):
    names = {re.match(r"[\w-]+", pin)[0] for pin in inline_metadata(script)["dependencies"]}
    tree = ast.parse((ROOT / f"{script.SCRIPT}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    third_party = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert third_party <= names | {"wandb"}
    assert names - third_party == {"tensorboard", "moviepy"}  # used through torch and gymnasium

"""A script from its command line: flags, what a run leaves behind, bad input, what it prints, determinism."""

import ast
import contextlib
import ctypes.util
import dataclasses
import functools
import importlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import tomllib
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, TESTS, TINY, command, environment, eval_rows, model, paper, process, scalars, tuned

# Flags


@pytest.mark.parametrize("text, number", [("1e6", 10**6), ("25e3", 25_000), ("1_000_000", 10**6), ("7", 7), ("-2", -2)])
def test_integers_as_people_type_them(script, text, number):
    assert script.parse_int(text) == number and isinstance(script.parse_int(text), int)
    assert tyro.cli(script.Args, args=["--total-timesteps", text], registry=script.registry).total_timesteps == number


@pytest.mark.parametrize("text", ["1.5", "1e-3", "nan", "inf", "ten", ""])
def test_what_is_no_integer_is_refused(script, text, capsys):
    with pytest.raises(SystemExit) as end:
        tyro.cli(script.Args, args=["--batch-size", text], registry=script.registry)
    assert end.value.code == 2 and "--batch-size" in capsys.readouterr().err


CLEANRL = dict(
    exp_name="ddpg_continuous_action",
    seed=7,
    torch_deterministic=False,
    cuda=False,
    track=False,
    wandb_project_name="cleanRL",
    wandb_entity="me",
    capture_video=False,
    save_model=True,
    env_id="stubs:Point-v0",
    total_timesteps=80,
    learning_rate=1e-3,
    buffer_size=1000,
    gamma=0.98,
    tau=0.01,
    batch_size=32,
    exploration_noise=0.2,
    learning_starts=50,
    policy_frequency=2,
)


def test_a_command_line_for_cleanrl_works_unchanged(tmp_path):
    """In a process of its own, with an environment from a third-party module."""
    ours_only = set(TINY) - set(CLEANRL)
    done = process(command(tuned, **dict.fromkeys(ours_only) | CLEANRL), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"stubs:Point-v0__ddpg_continuous_action__7__\d{10}", run_dir.name)
    args = json.loads((run_dir / "args.json").read_text())["args"]
    assert args.items() >= CLEANRL.items()


def test_the_paper_script_takes_cleanrls_flags_but_for_what_the_paper_does_otherwise():
    names = {field.name for field in dataclasses.fields(paper.Args)}
    assert set(CLEANRL) - names == {"learning_rate", "exploration_noise"}


def test_defaults():
    """PRODUCT.md: the tuned baseline, and PAPER.md: section 7."""
    args = tuned.Args()
    assert (args.env_id, args.total_timesteps, args.learning_rate, args.batch_size) == (
        "HalfCheetah-v5",
        10**6,
        3e-4,
        256,
    )
    assert (args.tau, args.gamma, args.buffer_size, args.learning_starts) == (0.005, 0.99, 10**6, 25_000)
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
    for field in dataclasses.fields(script.Args):
        assert f"--{field.name.replace('_', '-')}" in shown


# Every flag has an effect


def actor_weights(run_dir):
    return {name: value.tolist() for name, value in model(run_dir)["actor"].items()}


def files(pattern):
    return lambda run_dir: len(list(run_dir.glob(pattern)))


def column(name):
    return lambda run_dir: [row[name] for row in eval_rows(run_dir)]


def final_episodes(run_dir):
    return json.loads((run_dir / "result.json").read_text())["final_eval"]["episodes"]


# flag: another value than the tiny run's, what the run then shows otherwise, and the flags that it needs for that
EFFECTS = {
    "seed": (3, actor_weights),
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
    "buffer_size": (50, actor_weights),
    "gamma": (0.9, actor_weights),
    "tau": (0.1, actor_weights),
    "batch_size": (20, actor_weights),
    "learning_starts": (60, actor_weights),
    "policy_frequency": (2, actor_weights),
}
EFFECTS_OF = {
    tuned: EFFECTS
    | {
        "learning_rate": (1e-2, actor_weights),
        "exploration_noise": (0.5, actor_weights),
        "noise": ("parameter", actor_weights),
        "ou_theta": (0.9, actor_weights, dict(noise="ou")),
        "ou_dt": (0.1, actor_weights, dict(noise="ou")),
        "noise_anneal_steps": (60, actor_weights),
        "exploration_noise_final": (0.5, actor_weights, dict(noise_anneal_steps=60)),
        "layer_norm": ("actor", actor_weights),
        "n_step": (3, actor_weights),
        "target_noise": (0.2, actor_weights),
        "target_noise_clip": (0.01, actor_weights, dict(target_noise=0.2)),
    },
    paper: EFFECTS
    | {
        "actor_lr": (1e-2, actor_weights),
        "critic_lr": (1e-2, actor_weights),
        "critic_weight_decay": (1.0, actor_weights),
        "ou_theta": (0.9, actor_weights),
        "ou_sigma": (0.7, actor_weights),
        "ou_dt": (0.1, actor_weights),
        "weights_init": ("kaiming", actor_weights),
        "batch_norm": ("actor", actor_weights),
        "batch_norm_momentum": (0.5, actor_weights),
        "pixels": (True, actor_weights),
    },
}
TESTED_ELSEWHERE = {
    "exp_name": "test_the_name_of_a_run",
    "run_name": "test_the_name_of_a_run",
    "num_threads": "test_num_threads",
    "matmul": "test_algorithm.py",
    "cuda": "test_no_cuda_stays_off_the_gpu",
    "cudagraphs": "test_gpu.py",
    "compile": "test_gpu.py",
    "track": "test_track",
    "wandb_project_name": "test_track",
    "wandb_entity": "test_track",
    "evaluate": "test_evaluate_reproduces_the_last_evaluation",
    "resume": "test_resume.py",
}
CHECKPOINTS = dict(checkpoint_interval=50, keep_checkpoint=True)


def test_every_flag_has_a_test_of_its_effect(script):
    assert {field.name for field in dataclasses.fields(script.Args)} == {*EFFECTS_OF[script], *TESTED_ELSEWHERE}
    assert all(test in globals() or (TESTS / test).exists() for test in TESTED_ELSEWHERE.values())


@functools.cache
def shown_by_the_tiny_run(script, folder):
    with contextlib.chdir(folder):
        script.main(script.Args(**TINY | CHECKPOINTS))
    return {name: observe(folder / "runs" / "tiny") for name, (_, observe, *_) in EFFECTS_OF[script].items()}


@pytest.mark.parametrize("script, name", [(script, name) for script in SCRIPTS for name in EFFECTS_OF[script]])
def test_flag_has_an_effect(script, name, run, tmp_path_factory):
    value, observe, *needed = EFFECTS_OF[script][name]
    flags = CHECKPOINTS | (needed[0] if needed else {})
    if needed:
        usual = observe(run(script, **flags | dict(run_name="without")))
    else:
        folder = tmp_path_factory.getbasetemp() / script.SCRIPT
        folder.mkdir(exist_ok=True)
        usual = shown_by_the_tiny_run(script, folder)[name]
    assert observe(run(script, **flags | {name: value})) != usual


def test_the_name_of_a_run(script, run, tmp_path):
    assert run(script, run_name="mine", total_timesteps=50).name == "mine"
    script.main(script.Args(**TINY | dict(run_name=None, exp_name="try", seed=5, env_id="stubs:Point-v0")))
    (other,) = (path.name for path in (tmp_path / "runs").iterdir() if path.name != "mine")
    assert re.fullmatch(r"stubs:Point-v0__try__5__\d{10}", other)


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


def test_no_cuda_stays_off_the_gpu(script, run, monkeypatch):
    """With a GPU feigned, only --no-cuda trains here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    if not torch.backends.cuda.is_built():
        with pytest.raises((AssertionError, RuntimeError)):
            run(script, run_name="gpu")
    assert (run(script, cuda=False) / "result.json").exists()


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A stand-in for the wandb package, which records its calls."""
    (tmp_path / "wandb.py").write_text(
        "calls, ends = [], []\n"
        "init = lambda **options: calls.append(options)\n"
        "finish = lambda exit_code: ends.append(exit_code)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield importlib.import_module("wandb")
    del sys.modules["wandb"]


def test_track(script, run, wandb):
    run(script, track=True, wandb_project_name="mine", wandb_entity="us")
    (options,) = wandb.calls
    assert (options["project"], options["entity"], options["name"]) == ("mine", "us", "tiny")
    assert options["sync_tensorboard"] and options["config"]["batch_size"] == TINY["batch_size"]


def test_wandb_tells_runs_of_one_name_apart_and_knows_a_resumed_one_again(script, run, wandb):
    """Two sweeps, say: the second must not be written into the first."""
    flags = dict(track=True, checkpoint_interval=50, keep_checkpoint=True)
    one, other = (run(script, run_name=f"{sweep}/x", **flags) for sweep in "ab")
    script.main(script.Args(resume=str(one), total_timesteps=150))
    assert [options["name"] for options in wandb.calls] == ["x", "x", "x"]
    ids = [options["id"] for options in wandb.calls]
    assert ids[0] == ids[2] != ids[1] and wandb.calls[2]["resume"] == "allow"
    assert [json.loads((run_dir / "args.json").read_text())["wandb_id"] for run_dir in (one, other)] == ids[:2]


def test_wandb_is_told_of_a_run_that_failed(script, run, wandb):
    run(script, track=True)
    with pytest.raises(SystemExit):
        run(script, track=True, env_id="stubs:NanReward-v0", run_name="failed", total_timesteps=170, learning_starts=20)
    assert wandb.ends == [0, 1]


# What a run leaves behind


def test_files_of_a_run(script, run):
    run_dir = run(script)
    names = {re.sub(r"^events.*", "events", path.name) for path in run_dir.iterdir()}
    assert names == {"args.json", "eval.csv", "model.pt", "result.json", "events"}

    record = json.loads((run_dir / "args.json").read_text())
    matmul = "onednn" if script.mkl_holds_back() else "mkl"
    assert record["args"] == dataclasses.asdict(script.Args(**TINY)) | {"matmul": matmul}
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", record["commit"])
    assert (
        record["versions"]["torch"] == torch.__version__.split("+")[0]
        or record["versions"]["torch"] == torch.__version__
    )
    assert set(record["versions"]) == {"python", "torch", "gymnasium", "mujoco", "numpy"}
    assert record["hardware"]["threads"] == 1 and record["hardware"]["cpus"] == os.cpu_count()

    assert (run_dir / "eval.csv").read_text().startswith("global_step,mean,std,min,max,episodes\n60,")
    rows = eval_rows(run_dir)
    assert [(row["global_step"], row["episodes"]) for row in rows] == [(60, 2), (120, 2)]
    assert all(row["min"] <= row["mean"] <= row["max"] and row["std"] >= 0 for row in rows)

    result = json.loads((run_dir / "result.json").read_text())
    assert (result["global_step"], result["evaluations"]) == (120, 2)
    assert result["final_return"] == pytest.approx((rows[0]["mean"] + rows[1]["mean"]) / 2)
    assert set(result["final_eval"]) == {"mean", "std", "min", "max", "episodes"}


def test_final_evaluation(script, run):
    """Five episodes in two environments, whose first three pay 3, 21 and 86; eval.csv stays as it is without."""
    scripted = dict(env_id="stubs:Scripted-v0", eval_interval=0)
    result = json.loads((run(script, **scripted, final_eval_episodes=5) / "result.json").read_text())
    expected = dict(mean=26.8, std=pytest.approx(940.96**0.5), min=3, max=86, episodes=5)
    assert result["final_eval"] == expected and result["final_return"] is None
    with_one, without = (run(script, run_name=f"{n}", final_eval_episodes=n) for n in (5, 0))
    assert (with_one / "eval.csv").read_bytes() == (without / "eval.csv").read_bytes()
    assert json.loads((without / "result.json").read_text())["final_eval"] is None


def test_the_final_return_is_the_mean_of_the_last_ten_evaluations(script, run):
    run_dir = run(script, eval_interval=10)
    means = [row["mean"] for row in eval_rows(run_dir)]
    assert len(means) == 12
    result = json.loads((run_dir / "result.json").read_text())
    assert result["final_return"] == pytest.approx(np.mean(means[2:]), rel=1e-12)


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
    actor.eval(), qf.eval()
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
        *(
            "losses/qf1_loss",
            "losses/qf1_values",
            "losses/actor_loss",
            "losses/actor_grad_norm",
            "losses/qf1_grad_norm",
        ),
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
    assert 0 <= log["charts/saturated_actions"][0][1] <= 1 and log["losses/qf1_grad_norm"][0][1] > 0
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
    assert log["losses/actor_grad_norm"] == [(60, 0), (120, 0)]


def test_evaluate_reproduces_the_last_evaluation(script, run, cli, capsys, monkeypatch):
    run_dir = run(script, eval_episodes=4)
    last = eval_rows(run_dir)[-1]
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    results = []
    evaluate = script.evaluate
    monkeypatch.setattr(script, "evaluate", lambda *args: results.append(evaluate(*args)) or results[-1])
    capsys.readouterr()
    cli(script, "--evaluate", run_dir)
    expected = f"{last['mean']:.2f} ± {last['std']:.2f} over 4 episodes"
    assert capsys.readouterr().out == f"{TINY['env_id']} after 120 steps: {expected}\n"
    assert results[0][0].mean() == last["mean"] and results[0][0].std() == last["std"]  # to the last bit
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before

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
    script.main(script.Args(evaluate=str(alone)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and len(set(lines)) == 1 and lines[0].endswith("over 3 episodes")
    assert [path.name for path in alone.iterdir()] == ["model.pt"]


def test_evaluate_films_only_if_asked_to(script, run, cli):
    """Not because training did, perhaps on a machine that could render."""
    run_dir = run(script, env_id="Pendulum-v1", capture_video=True)
    films = sorted((run_dir / "videos").iterdir())
    cli(script, "--evaluate", run_dir)
    script.main(script.Args(evaluate=str(run_dir)))
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
    assert done.returncode == 0, done.stderr
    videos = sorted((tmp_path / "runs/tiny/videos").glob("*.mp4"))
    assert [video.name.split("-episode")[0] for video in videos] == ["step-50", "step-60"]
    assert all(video.stat().st_size > 1000 for video in videos)


# Bad input: one line on stderr, exit code 2, nothing left behind

BOTH = {
    "--total-timesteps 0": "--total-timesteps must be positive",
    "--total-timesteps -5": "--total-timesteps must be positive",
    "--buffer-size 0": "--buffer-size must be positive",
    "--batch-size -1": "--batch-size must be positive",
    "--policy-frequency 0": "--policy-frequency must be positive",
    "--eval-episodes 0": "--eval-episodes must be positive",
    "--eval-interval -1": "--eval-interval must be at least 0",
    "--final-eval-episodes -1": "--final-eval-episodes must be at least 0",
    "--max-eval-steps 0": "--max-eval-steps must be positive",
    "--checkpoint-interval -1": "--checkpoint-interval must be at least 0",
    "--learning-starts -1": "--learning-starts must be at least 0",
    "--num-threads -1": "--num-threads must be at least 0",
    "--seed -1": "--seed must be at least 0",
    "--seed 5_000_000_000": "--seed must be",
    "--gamma 1.01": "--gamma must be in [0, 1]",
    "--gamma -0.1": "--gamma must be in [0, 1]",
    "--gamma nan": "--gamma must be in [0, 1]",
    "--tau 0": "--tau must be in (0, 1]",
    "--tau 1.1": "--tau must be in (0, 1]",
    "--tau nan": "--tau must be in (0, 1]",
    "--buffer-size 15": "--buffer-size must be at least --batch-size",
    "--learning-starts 120": "--learning-starts must be below --total-timesteps",
    "--learning-starts 121": "--learning-starts must be below --total-timesteps",
    "--buffer-size 1e12": "lower --buffer-size",
    "--env-id HalfCheetah-v55": "HalfCheetah",
    "--env-id HalfCheeta-v5": "Did you mean: `HalfCheetah`",
    "--env-id no_such_module:Env-v0": "no_such_module",
    "--env-id stubs:Nothing-v0": "Nothing",
    "--env-id two:colons:Env-v0": "two:colons:Env-v0",
    "--env-id (": "(",
    "--env-id CartPole-v1": "continuous action",
    "--env-id stubs:DiscreteAction-v0": "continuous action",
    "--env-id stubs:DictAction-v0": "continuous action",
    "--env-id stubs:IntegerAction-v0": "continuous action",
    "--env-id stubs:UnboundedAction-v0": "bounded actions",
    "--env-id stubs:HalfBoundedAction-v0": "bounded actions",
    "--env-id stubs:HugeAction-v0": "float32's maximum",
    "--env-id stubs:MatrixAction-v0": "flat",
    "--env-id stubs:DiscreteObs-v0": "must be a Box",
    "--env-id stubs:DictObs-v0": "must be a Box",
    "--env-id stubs:MatrixObs-v0": "flat",
    "--env-id stubs:ImageObs-v0": "pixels",
    "--env-id stubs:RenderModeless-v0 --capture-video": "rende",
    "--env-id stubs:Unrendered-v0 --capture-video": "render",
    "--evaluate nowhere": "nowhere holds no run of",
    "--evaluate .": ". holds no run of",
    "--evaluate . --resume .": "--resume and --evaluate cannot be combined",
    "--resume nowhere": "nowhere holds no run of",
    "--track": "pip install wandb",
}
BAD_INPUT = {
    tuned: BOTH
    | {
        "--batch-size 0": "--batch-size must be positive",
        "--learning-rate 0": "--learning-rate must be positive",
        "--learning-rate -1e-3": "--learning-rate must be positive",
        "--learning-rate nan": "--learning-rate must be positive",
        "--learning-rate inf": "--learning-rate must be positive",
        "--exploration-noise -0.1": "--exploration-noise must be at least 0",
        "--exploration-noise nan": "--exploration-noise must be at least 0",
        "--exploration-noise inf": "--exploration-noise must be at least 0",
        "--exploration-noise-final -1": "--exploration-noise-final must be at least 0",
        "--noise-anneal-steps -1": "--noise-anneal-steps must be at least 0",
        "--noise parameter --exploration-noise 0": "--exploration-noise, which must be positive",
        "--n-step 0": "--n-step must be positive",
        "--n-step 42": "--learning-starts must be at least --n-step - 1",
        "--noise-anneal-steps 40": "--noise-anneal-steps must be above --learning-starts",
        "--target-noise -0.1": "--target-noise must be at least 0",
        "--target-noise-clip nan": "--target-noise-clip must be at least 0",
        "--env-id stubs:ImageObs-v0 ": "ddpg_paper_faithful.py --pixels",
    },
    paper: BOTH
    | {
        "--actor-lr 0": "--actor-lr must be positive",
        "--critic-lr -1": "--critic-lr must be positive",
        "--actor-lr nan": "--actor-lr must be positive",
        "--critic-weight-decay -1": "--critic-weight-decay must be at least 0",
        "--ou-theta -0.1": "--ou-theta must be at least 0",
        "--ou-sigma nan": "--ou-sigma must be at least 0",
        "--ou-dt -1": "--ou-dt must be at least 0",
        "--batch-norm-momentum -0.1": "--batch-norm-momentum must be in [0, 1]",
        "--batch-norm-momentum 2": "--batch-norm-momentum must be in [0, 1]",
        "--batch-norm-momentum nan": "--batch-norm-momentum must be in [0, 1]",
        "--batch-size 1": "batch normalisation",
        "--env-id stubs:ImageObs-v0 ": "--pixels",
        "--pixels --env-id stubs:Unrendered-v0": "apt-get install",
        "--pixels --env-id stubs:RenderModeless-v0": "render",
        "--pixels --buffer-size 1e7": "lower --buffer-size",
    },
}
REFUSALS = [(script, flags, message) for script in SCRIPTS for flags, message in BAD_INPUT[script].items()]


@pytest.mark.parametrize("script, flags, message", REFUSALS, ids=[f"{s.SCRIPT}: {flags}" for s, flags, _ in REFUSALS])
def test_bad_input(script, flags, message, cli, capfd, tmp_path, recwarn):
    line = command(script)[2:] + flags.split()  # the last value of a flag counts
    line = flags.split() if flags.startswith(("--evaluate", "--resume")) else line
    with pytest.raises(SystemExit) as end:
        cli(script, *line)
    out, err = capfd.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    assert message in err
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]
    assert not list(tmp_path.iterdir())


def test_bad_input_to_a_process_of_its_own(script, tmp_path):
    done = process(command(script, env_id="HalfCheeta-v5"), tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Did you mean: `HalfCheetah`" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ["--gamma much", "--no-such-flag 1", "--total-timesteps 1.5", "--seed"])
def test_what_cannot_be_read_is_refused(script, flags, cli, capfd, tmp_path):
    with pytest.raises(SystemExit) as end:
        cli(script, *flags.split())
    assert end.value.code == 2 and flags.split()[0] in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_buffer_that_cannot_fit_is_refused(script, cli, capsys, monkeypatch):
    """1e6 transitions of HalfCheetah: 4 bytes x (17 + 6 + 1 + 17 + 1) x 1e6 = 0.156 GiB, here with 0.1 GiB free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0.1 * 2**30))
    with pytest.raises(SystemExit):
        cli(script)
    assert "needs 0.16 GiB, 0.10 GiB are free: lower --buffer-size" in capsys.readouterr().err


def test_a_finished_runs_name_is_taken(script, run, capsys):
    run_dir = run(script)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(script)
    assert end.value.code == 2 and re.fullmatch("error: runs/tiny holds a run: .*--run-name\n", capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


def test_evaluate_needs_a_model_of_this_script(script, run, cli, capsys):
    run_dir = run(script, save_model=False)
    other = paper if script is tuned else tuned
    model_of_the_other = run(other, run_name="other") / "model.pt"
    for message in "holds no run", "its script is":
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli(script, "--evaluate", run_dir)
        err = capsys.readouterr().err
        assert end.value.code == 2 and message in err and err.count("\n") == 1
        (run_dir / "model.pt").write_bytes(model_of_the_other.read_bytes())


@pytest.mark.parametrize("env_id", ["stubs:NanReward-v0", "stubs:InfiniteReward-v0"])
@pytest.mark.parametrize("eval_interval", [100, 0])
def test_a_loss_that_is_not_finite_stops_the_run(script, env_id, eval_interval, run, capsys, tmp_path):
    """Rewards go bad after 150 steps. What was saved before stays; nothing is saved after."""
    with pytest.raises(SystemExit) as end:
        run(script, env_id=env_id, total_timesteps=210, eval_interval=eval_interval, learning_starts=20)
    message, run_dir = end.value.code, tmp_path / "runs/tiny"  # a string goes to stderr, with exit code 1
    assert message.startswith("error: a loss is not finite at step 200") and "\n" not in message
    assert re.search(r"losses/qf1_loss': (nan|inf)", message) and "lower the learning rate" in message
    assert capsys.readouterr().err == ""
    assert not (run_dir / "result.json").exists()
    assert (run_dir / "model.pt").exists() == bool(eval_interval)
    if eval_interval:
        assert [row["global_step"] for row in eval_rows(run_dir)] == [100]
        assert all(value.isfinite().all() for value in model(run_dir)["actor"].values())


def test_the_advice_names_flags_that_exist(script):
    """Every --flag that a message or docstring names is git's or one of this script's; shared code may name both's."""
    own, both = ({field.name for each in of for field in dataclasses.fields(each.Args)} for of in ([script], SCRIPTS))
    algorithm, plumbing = (ROOT / f"{script.SCRIPT}.py").read_text().split("class Args")[1].split("\n# From here on")
    for code, flags in (algorithm, own), (plumbing, both | {"always", "dirty", "abbrev", "exclude"}):
        named = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", code)}
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
    """One line says that no checkpoint is possible, one that evaluations are cut: after 30 steps, each paying 1."""
    run_dir = run(script, env_id="Endless-v0", checkpoint_interval=20, keep_checkpoint=True, max_eval_steps=30)
    unsaved, cut = capfd.readouterr().err.splitlines()  # each once
    assert unsaved == "warning: no checkpoint since step 0: checkpoints are written only when an episode ends"
    assert cut == "warning: 2 evaluation episodes did not end within --max-eval-steps 30: cut there"
    assert not (run_dir / "checkpoint.pt").exists()
    assert [(row["mean"], row["std"]) for row in eval_rows(run_dir)] == [(30, 0), (30, 0)]


# Errors


def test_a_threads_error_shows_unless_it_is_the_logs(script, run, monkeypatch, capsys):
    """The log's writer cannot write, and the environment has threads of its own that fail."""
    shown = []
    monkeypatch.setattr(threading, "excepthook", usual := lambda error: shown.append(error.exc_value))

    def fail(error, *_):
        raise error

    class Careless(gym.Wrapper):
        errors = [OSError("a thread's"), RuntimeError("another's")]

        def step(self, action):
            writer = "tensorboard.summary.writer.record_writer.RecordWriter.write"
            monkeypatch.setattr(writer, lambda *_: fail(OSError(28, "the log's")))
            if self.errors:
                thread = threading.Thread(target=fail, args=[self.errors.pop()])
                thread.start()
                thread.join()
            return super().step(action)

    monkeypatch.setattr(script, "wrap", lambda env, args: Careless(env))
    run(script)
    assert (
        "warning: cannot write TensorBoard's log, training goes on: [Errno 28] the log's\n" == capsys.readouterr().err
    )
    assert sorted(map(str, shown)) == ["a thread's", "another's"]
    assert threading.excepthook is usual


class Unsaveable:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


def test_only_the_disks_errors_become_warnings(script, tmp_path, capsys):
    assert not script.save(tmp_path / "x.pt", Unsaveable(OSError(28, "full")))
    assert capsys.readouterr().err == f"warning: cannot write {tmp_path}/x.pt, training goes on: [Errno 28] full\n"
    with pytest.raises(RuntimeError, match="a bug"):
        script.save(tmp_path / "x.pt", Unsaveable(RuntimeError("a bug")))


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
        run(script, checkpoint_interval=50, keep_checkpoint=True, gamma=0.9)
    (note,) = error.value.__notes__
    assert note == "This ended the run at step 91. Resume it with --resume runs/tiny (from step 50)"
    return "runs/tiny"


def handlers():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), threading.excepthook, sys.excepthook


@pytest.mark.parametrize("total", [None, 150])
def test_a_notebook_resumes_under_the_runs_own_flags(script, broken, total, tmp_path, monkeypatch, capsys):
    """In an environment that counts as exact, with the same bytes as one longer run."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["notebook", "--no-such-flag"])
    before = handlers()
    script.main(script.Args(resume=broken, **{} if total is None else dict(total_timesteps=total)))
    assert handlers() == before
    (tmp_path / "longer").mkdir()
    monkeypatch.chdir(tmp_path / "longer")
    flags = dict(checkpoint_interval=50, keep_checkpoint=True, gamma=0.9, total_timesteps=total or 120)
    script.main(script.Args(**TINY | flags))
    assert handlers() == before
    assert outcome(tmp_path / "runs/tiny") == outcome(tmp_path / "longer/runs/tiny")


@pytest.mark.parametrize("flag", ["gamma", "eval_episodes", "total_timesteps"])
def test_a_notebook_cannot_change_a_runs_flags(script, broken, flag, capsys):
    """Not even to the flag's default, once that is given; the run's own value may be."""
    before = {path.name: path.read_bytes() for path in Path(broken).iterdir()}
    default, own = getattr(script.Args(), flag), json.loads(before["args.json"])["args"][flag]
    other = 119 if flag == "total_timesteps" else default
    message = "can only be raised" if flag == "total_timesteps" else f"its {flag} is {own}"
    with pytest.raises(SystemExit) as end:
        script.main(script.Args(resume=broken, **{flag: other}))
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path(broken).iterdir()} == before
    script.main(script.Args(resume=broken, **{flag: own}))
    assert Path(broken, "result.json").exists()


def test_a_notebook_is_told_of_a_fraction_of_a_step(script, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        script.main(script.Args(**TINY | dict(total_timesteps=120.5)))
    assert end.value.code == 2 and "--total-timesteps must be an integer, not 120.5" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_never_saved(script, run, tmp_path):
    """The last step is neither evaluated nor a multiple of the logging interval, and the loss is nan by then."""
    with pytest.raises(SystemExit) as end:
        run(script, env_id="stubs:NanReward-v0", total_timesteps=170, eval_interval=0, learning_starts=20)
    assert "not finite" in end.value.code and not (tmp_path / "runs/tiny/model.pt").exists()


# What it prints


def test_output_to_a_pipe_is_a_few_plain_lines(script, tmp_path):
    done = process(command(script, env_id="Pendulum-v1"), tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "" and "\r" not in done.stdout
    assert lines[0] == "Pendulum-v1: observations (3,), actions (1,); results in runs/tiny"
    assert re.fullmatch("cpu, CPU threads: 1, matrix products by (MKL|oneDNN)", lines[1])
    for step, line in zip((60, 120), lines[2:4], strict=True):
        assert re.fullmatch(rf"step {step}: evaluation -[\d.]+, \d+ steps/s, \d\d:\d\d left", line)
    complete = r"complete after 120 steps in \d\d:\d\d; final return -[\d.]+, the mean of 2 evaluations"
    assert re.fullmatch(complete, lines[4]) and len(lines) == 5


def test_output_to_a_file_is_plain_lines_though_errors_go_to_a_terminal(tmp_path):
    here, there = pty.openpty()
    done = subprocess.run(command(tuned), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=there)
    os.close(there)
    with contextlib.suppress(OSError):
        assert not os.read(here, 4096)
    assert b"\nstep 60: " in done.stdout


def test_a_terminal_shows_a_progress_bar(script, tmp_path):
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 120))
    process = subprocess.Popen(command(script), cwd=tmp_path, env=environment(), stdout=there, stderr=there)
    os.close(there)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux tells the end of a pseudo-terminal
        while chunk := os.read(here, 4096):
            shown += chunk
    assert process.wait() == 0
    assert re.search(rb"\r100%\|.+\| 120/120 \[\d\d:\d\d<00:00, +[\d.]+ steps/s, return=-[\d.]+, evaluation=-", shown)
    assert b"step 60:" not in shown


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

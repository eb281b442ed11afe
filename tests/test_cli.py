"""A script from its command line: flags, what a run leaves behind, bad input, what it prints, determinism."""

import ast
import contextlib
import ctypes.util
import dataclasses
import functools
import json
import os
import pty
import re
import subprocess
import sys
import termios
import tomllib
from types import SimpleNamespace

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
    assert tyro.cli(script.Args, args=["--total-timesteps", text]).total_timesteps == number


@pytest.mark.parametrize("text", ["1.5", "1e-3", "nan", "inf", "ten", ""])
def test_what_is_no_integer_is_refused(script, text, capsys):
    with pytest.raises(SystemExit) as end:
        tyro.cli(script.Args, args=["--batch-size", text])
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
    assert (args.batch_norm, args.weights_init, args.pixels) == (True, "paper", False)
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


# flag: another value than the tiny run's, and what the run then shows otherwise
EFFECTS = {
    "seed": (3, actor_weights),
    "torch_deterministic": (False, lambda run_dir: torch.backends.cudnn.deterministic),
    "save_model": (False, files("model.pt")),
    "checkpoint_interval": (0, files("checkpoint.pt")),
    "keep_checkpoint": (False, files("checkpoint.pt")),
    "eval_interval": (40, column("global_step")),
    "eval_episodes": (3, column("episodes")),
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
    tuned: EFFECTS | {"learning_rate": (1e-2, actor_weights), "exploration_noise": (0.5, actor_weights)},
    paper: EFFECTS
    | {
        "actor_lr": (1e-2, actor_weights),
        "critic_lr": (1e-2, actor_weights),
        "critic_weight_decay": (1.0, actor_weights),
        "ou_theta": (0.9, actor_weights),
        "ou_sigma": (0.7, actor_weights),
        "ou_dt": (0.1, actor_weights),
        "weights_init": ("kaiming", actor_weights),
        "batch_norm": (False, actor_weights),
        "pixels": (True, actor_weights),
    },
}
TESTED_ELSEWHERE = {
    "exp_name": "test_the_name_of_a_run",
    "run_name": "test_the_name_of_a_run",
    "num_threads": "test_num_threads",
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
    return {name: observe(folder / "runs" / "tiny") for name, (_, observe) in EFFECTS_OF[script].items()}


@pytest.mark.parametrize("script, name", [(script, name) for script in SCRIPTS for name in EFFECTS_OF[script]])
def test_flag_has_an_effect(script, name, run, tmp_path_factory):
    value, observe = EFFECTS_OF[script][name]
    folder = tmp_path_factory.getbasetemp() / script.SCRIPT
    folder.mkdir(exist_ok=True)
    usual = shown_by_the_tiny_run(script, folder)[name]
    run_dir = run(script, **CHECKPOINTS | {name: value})
    assert observe(run_dir) != usual


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


def test_no_cuda_stays_off_the_gpu(script, run, monkeypatch):
    """With a GPU feigned, only --no-cuda trains here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    if not torch.backends.cuda.is_built():
        with pytest.raises((AssertionError, RuntimeError)):
            run(script, run_name="gpu")
    assert (run(script, cuda=False) / "result.json").exists()


def test_track(script, run, tmp_path, monkeypatch):
    """A stand-in for the wandb package that notes how it was called."""
    (tmp_path / "wandb.py").write_text("calls = []\ninit = lambda **options: calls.append(options)\n")
    monkeypatch.syspath_prepend(tmp_path)
    run(script, track=True, wandb_project_name="mine", wandb_entity="us")
    (options,) = sys.modules.pop("wandb").calls
    assert (options["project"], options["entity"], options["name"]) == ("mine", "us", "tiny")
    assert options["sync_tensorboard"] and options["config"]["batch_size"] == TINY["batch_size"]


# What a run leaves behind


def test_files_of_a_run(script, run):
    run_dir = run(script)
    names = {re.sub(r"^events.*", "events", path.name) for path in run_dir.iterdir()}
    assert names == {"args.json", "eval.csv", "model.pt", "result.json", "events"}

    record = json.loads((run_dir / "args.json").read_text())
    assert record["args"] == dataclasses.asdict(script.Args(**TINY))
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


def test_the_saved_model_acts_like_the_trained_one(script, run, monkeypatch):
    """model.pt holds what is needed to rebuild the networks, and these give the trained ones' actions and values."""
    trained = []

    def spy(actor, qf, *rest):
        trained[:] = [actor, qf]
        return evaluate(actor, qf, *rest)

    evaluate = script.evaluate
    monkeypatch.setattr(script, "evaluate", spy)
    saved = model(run(script))
    low, high = saved["actor"]["action_low"], saved["actor"]["action_high"]
    shape = saved["obs_dim"] if script is tuned else saved["obs_shape"]
    actor, qf = script.Actor(shape, low, high), script.QNetwork(shape, len(low))
    actor.load_state_dict(saved["actor"])
    qf.load_state_dict(saved["qf"])
    actor.eval(), qf.eval()
    obs, action = torch.randn(6, 2), torch.randn(6, 1)
    assert torch.equal(actor(obs), trained[0](obs)) and torch.equal(qf(obs, action), trained[1](obs, action))
    assert (saved["global_step"], saved["env_id"]) == (120, TINY["env_id"])


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
    monkeypatch.setattr(script, "explore", lambda actor, obs, noise: torch.stack([g := actor(obs)[0].detach(), g - 1]))
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
    "--buffer-size 15": "--buffer-size must hold a batch",
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
    "--env-id stubs:UnboundedAction-v0": "bounded actions",
    "--env-id stubs:HalfBoundedAction-v0": "bounded actions",
    "--env-id stubs:MatrixAction-v0": "flat",
    "--env-id stubs:DiscreteObs-v0": "must be a Box",
    "--env-id stubs:DictObs-v0": "must be a Box",
    "--env-id stubs:MatrixObs-v0": "flat",
    "--env-id stubs:ImageObs-v0": "pixels",
    "--env-id stubs:RenderModeless-v0 --capture-video": "rende",
    "--env-id stubs:Unrendered-v0 --capture-video": "render",
    "--evaluate nowhere": "nowhere holds no run of",
    "--evaluate .": ". holds no run of",
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
    for message in "cannot read", "its script is":
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
    """Every --flag that a message or docstring names is one of this script's, but for git's and the sibling's."""
    flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(script.Args)}
    code = (ROOT / f"{script.SCRIPT}.py").read_text().split("class Args")[1]
    assert set(re.findall(r"--[a-z][a-z-]+", code)) <= flags | {
        "--always",
        "--dirty",
        "--abbrev",
        "--exclude",
        "--pixels",
    }


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
    assert lines[0].startswith("Pendulum-v1: ") and lines[0].endswith("1 actions; results in runs/tiny")
    assert lines[1] == "cpu, 1 CPU threads; replay buffer 0.00 GiB when full"
    for step, line in zip((60, 120), lines[2:4], strict=True):
        assert re.fullmatch(rf"step {step}: evaluation -[\d.]+, \d+ steps/s, \d\d:\d\d left", line)
    assert lines[4].startswith("complete after 120 steps in ") and len(lines) == 5


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
    here = outcome(run(script, **flags))
    done = process(command(script, **flags, run_name="again"), tmp_path)
    assert done.returncode == 0, done.stderr
    again, other = outcome(tmp_path / "runs/again"), outcome(run(script, **flags, seed=2, run_name="other"))
    assert here == again
    assert all(mine != others for mine, others in zip(here, other, strict=True))


def test_two_threads_on_a_busy_machine_give_the_same_bytes_twice(tmp_path):
    flags = dict(env_id="Hopper-v5", batch_size=256, buffer_size=1000, num_threads=2)
    processes = [
        subprocess.Popen(command(tuned, **flags, run_name=name), cwd=tmp_path, env=environment(OMP_NUM_THREADS="2"))
        for name in ("one", "other")  # side by side, each in the other's way
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert outcome(tmp_path / "runs/one") == outcome(tmp_path / "runs/other")


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

"""Sweeps with the real scripts, killed and started again; the report against numbers computed here by hand."""

import csv
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))
import baselines
import report
import sb3_ddpg
import throughput

import ddpg_continuous_action as script

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "--learning-starts 100 --batch-size 16 --eval-interval 500 --eval-episodes 2 --checkpoint-interval 500".split()


def sweep_command(*settings, flags=FLAGS):
    return [ROOT / "benchmark/ddpg_continuous_action.sh", f"PYTHON={sys.executable}", *settings, "--", *flags]


def sweep(folder, *settings, flags=FLAGS, **options):
    options = dict(cwd=folder, capture_output=True, text=True, timeout=120) | options
    return subprocess.run(sweep_command(*settings, flags=flags), **options)


def wait_until(condition, seconds=90):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "timed out"
        time.sleep(0.05)


def evaluations(run_dir):
    with open(run_dir / "eval.csv") as file:
        return [(int(row["global_step"]), float(row["mean"])) for row in csv.DictReader(file)]


def early(checkpoint):
    steps = [step for step, _ in evaluations(checkpoint.parent)]
    return bool(steps) and steps[-1] <= 1000


def test_sweep_killed_and_started_again(tmp_path):
    settings = ["ENVS=Pendulum-v1\nInvertedPendulum-v5", "SEEDS=1 2", "STEPS=2.2e3", "JOBS=2", "OUT=runs/sweep"]
    out, steps = tmp_path / "runs/sweep", list(range(200, 2201, 200))
    flags = " ".join(FLAGS).replace("--eval-interval 500", "--eval-interval 200").split()
    command = sweep_command(*settings, flags=flags)
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    # Interrupted when a run is finished, and another one has a checkpoint behind it and most steps before it
    wait_until(lambda: any(out.glob("*/result.json")) and any(map(early, out.glob("*/checkpoint.pt"))))
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0].decode()
    assert process.returncode == 130, output
    assert "the same command goes on" in output
    started = {path.parent.name for path in out.glob("*/args.json")}
    finished = {path.parent.name for path in out.glob("*/result.json")}
    assert started > finished
    for name in started - finished:
        assert "stopped by SIG" in (out / f"{name}.log").read_text()
    kept = {name: (out / name / "result.json").stat().st_mtime_ns for name in finished}

    again = sweep(tmp_path, *settings, flags=flags)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "4 done, 0 running, 0 waiting, 0 failed" in again.stdout
    names = [
        f"{env}__ddpg_continuous_action__{seed}" for env in ("InvertedPendulum-v5", "Pendulum-v1") for seed in "12"
    ]
    for name in names:
        commands = [line for line in (out / f"{name}.log").read_text().splitlines() if line.startswith("$ ")]
        assert len(commands) == 1 + (name in started - finished)  # nothing is run twice
        assert ("--resume" in commands[-1]) == (name in started - finished)
        assert [step for step, _ in evaluations(out / name)] == steps
    assert kept == {name: (out / name / "result.json").stat().st_mtime_ns for name in finished}

    # Other settings in the same folder would mix two experiments in one table
    other = sweep(tmp_path, *settings, flags=[*flags, "--gamma", "0.9"])
    assert other.returncode == 2 and "other settings" in other.stderr and other.stderr.count("\n") == 1

    # The report, to the digit
    made = subprocess.run(
        [sys.executable, ROOT / "benchmark/report.py", out], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stderr
    with open(out / "report/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["env_id"] for row in rows] == ["InvertedPendulum-v5", "Pendulum-v1"]
    for row, pair in zip(rows, (names[:2], names[2:]), strict=True):
        finals = [statistics.fmean(mean for _, mean in evaluations(out / name)[1:]) for name in pair]  # of 11
        assert [float(value) for value in row["returns"].split()] == pytest.approx(finals, rel=1e-12)
        assert float(row["final_return"]) == pytest.approx(statistics.fmean(finals), rel=1e-12)
        assert float(row["std_over_seeds"]) == pytest.approx(statistics.stdev(finals), rel=1e-9)
        shown = f"**{statistics.fmean(finals):,.1f}** ± {statistics.stdev(finals):,.1f}".replace("-", "−")
        assert shown in (out / "report/results.md").read_text() and shown in made.stdout
    for name in ("learning_curves.png", "learning_curves.svg", "q_estimates.png", "q_estimates.svg"):
        assert (out / "report" / name).stat().st_size > 1000


def test_sweep_killed_outright_finds_its_run_still_going(tmp_path):
    settings = ["ENVS=Pendulum-v1", "SEEDS=1", "STEPS=2e3", "OUT=runs/sweep"]
    process = subprocess.Popen(sweep_command(*settings), cwd=tmp_path, stdout=subprocess.DEVNULL)
    run_dir = tmp_path / "runs/sweep/Pendulum-v1__ddpg_continuous_action__1"
    wait_until((run_dir / "eval.csv").exists)
    process.kill()
    again = sweep(tmp_path, *settings)
    assert again.returncode == 0 and "1 done, 0 running, 0 waiting, 0 failed" in again.stdout
    log = run_dir.with_name(f"{run_dir.name}.log").read_text()
    assert "waiting for another process" in log and log.count("$ ") == 1
    assert [step for step, _ in evaluations(run_dir)] == [500, 1000, 1500, 2000]


def test_failed_run_fails_the_sweep_but_not_the_others(tmp_path):
    failed = sweep(tmp_path, "ENVS=NoSuch-v5 Pendulum-v1", "SEEDS=1", "STEPS=600", "JOBS=2", "OUT=runs/sweep")
    assert failed.returncode == 1
    assert (tmp_path / "runs/sweep/Pendulum-v1__ddpg_continuous_action__1/result.json").exists()
    assert "1 done, 0 running, 0 waiting, 1 failed" in failed.stdout
    assert "failed: NoSuch-v5__ddpg_continuous_action__1" in failed.stderr
    assert "Environment `NoSuch` doesn't exist" in failed.stderr  # the end of its log


def test_dry_run_prints_the_commands_and_writes_nothing(tmp_path):
    dry = sweep(
        tmp_path,
        "SEEDS=1 2",
        "STEPS=300e3",
        "--dry-run",
        "--slurm",  # submits nothing then
        flags=["--wandb-entity", "a b"],
        env=os.environ | {"ENVS": "A B/C"},
    )
    assert dry.returncode == 0 and not list(tmp_path.iterdir())
    lines = dry.stdout.splitlines()
    assert len(lines) == 4
    assert "--env-id B/C --seed 2 --run-name ddpg_continuous_action/B-C__ddpg_continuous_action__2" in lines[3]
    assert "--total-timesteps 300000 --num-threads 1 --wandb-entity a\\ b" in lines[3]


@pytest.mark.parametrize(
    "setting",
    "SEED=1,SEEDS=1 1,OUT=elsewhere,OUT=runs/../x,STEPS=many,STEPS=1.5,STEPS=0,JOBS=0,THREADS=0,ENVS= ,PYTHON=no".split(
        ","
    ),
)
def test_bad_setting_is_one_line(tmp_path, setting):
    bad = sweep(tmp_path, setting)
    assert bad.returncode == 2 and not list(tmp_path.iterdir())
    assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1


def test_slurm_submits_what_is_left_and_a_task_passes_signals_on(tmp_path):
    """Against a stand-in for sbatch; tests/slurm.sh tries the real one."""
    stub = tmp_path / "bin/sbatch"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "$@" >sbatch_args\ncat >batch_script\necho 7\n')
    stub.chmod(0o755)
    done = tmp_path / "runs/sweep/Pendulum-v1__ddpg_continuous_action__1"
    done.mkdir(parents=True)
    (done / "result.json").touch()
    env = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    submitted = sweep(tmp_path, "ENVS=Pendulum-v1", "SEEDS=1 2 3", "STEPS=1e6", "OUT=runs/sweep", "--slurm", env=env)
    assert submitted.returncode == 0, submitted.stderr
    assert "job array 7 of 2 runs (3 in the sweep)" in submitted.stdout
    arguments = (tmp_path / "sbatch_args").read_text().split()
    assert {"--array=1,2", "--requeue", "--open-mode=append"} <= set(arguments)

    def task(index):
        return subprocess.Popen(["bash", "batch_script"], cwd=tmp_path, env=env | {"SLURM_ARRAY_TASK_ID": str(index)})

    assert task(0).wait(timeout=30) == 0  # finished: nothing to do
    name = "Pendulum-v1__ddpg_continuous_action__2"
    process = task(1)
    run_dir = tmp_path / "runs/sweep" / name
    wait_until(lambda: (run_dir / "eval.csv").exists() and evaluations(run_dir))
    log = tmp_path / "runs/sweep" / f"{name}.log"
    second = task(1)  # the same run again, while the first goes on: requeued by a cluster in a hurry
    wait_until(lambda: "waiting for another process" in log.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    wait_until(lambda: "--resume" in log.read_text().splitlines()[-1])
    wait_until(lambda: log.read_text().count("replay buffer") == 2)
    second.send_signal(signal.SIGTERM)
    assert second.wait(timeout=30) in (143, -signal.SIGTERM)
    assert log.read_text().count("$ ") == 2


def test_shellcheck():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if not shellcheck:
        pytest.skip("no shellcheck")
    scripts = [*ROOT.glob("benchmark/*.sh"), *ROOT.glob("tests/*.sh")]
    assert len(scripts) >= 4
    subprocess.run([shellcheck, *scripts], check=True)


# The report, on runs written by hand

ENTRIES = {
    "versions": {"python": "3.11.7", "torch": "2.13.0", "gymnasium": "1.4.0", "mujoco": "4.0.0", "numpy": "2.4.6"},
    "hardware": {"threads": 1, "gpu": None},
}


def write_run(folder, env_id, seed, means, exp_name="ddpg_continuous_action", tail="", complete=True, **flags):
    run_dir = folder / "_".join([env_id, exp_name, str(seed), *map(str, flags.values())])
    run_dir.mkdir(parents=True)
    args = dict(exp_name=exp_name, env_id=env_id, seed=seed, run_name=run_dir.name, eval_episodes=10) | flags
    (run_dir / "args.json").write_text(json.dumps({"args": args} | ENTRIES))
    rows = "".join(f"{5000 * (i + 1)},{mean},1.0,0.0,2.0,10\n" for i, mean in enumerate(means))
    (run_dir / "eval.csv").write_text("global_step,mean,std,min,max,episodes\n" + rows + tail)
    if complete:
        result = {"global_step": 5000 * len(means), "seconds": 3600.0, "steps_per_second": 100.0}
        (run_dir / "result.json").write_text(json.dumps(result))
    return run_dir


def run_report(*arguments):
    command = [sys.executable, ROOT / "benchmark/report.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_report_on_odd_input(tmp_path):
    runs = tmp_path / "runs"
    means = list(range(0, 1200, 100))  # 12 evaluations; the last 10 have the mean 650
    write_run(runs, "Hopper-v5", 1, means)
    write_run(runs, "Hopper-v5", 2, [mean + 100 for mean in means])
    write_run(runs, "Ant-v5", 1, means)
    write_run(runs, "Ant-v5", 2, [])
    write_run(runs, "Hopper-v5", 3, means, exp_name="sb3_ddpg", tail="65000,12", complete=False)
    (write_run(runs, "Hopper-v5", 4, means) / "args.json").write_text('{"args": {')
    (write_run(runs, "Hopper-v5", 5, means) / "result.json").write_text("{}")
    (write_run(runs, "Hopper-v5", 6, means) / "args.json").write_text('{"args": {"env_id": "Hopper-v5"}}')
    write_run(runs, "Hopper-v5", 7, means[:1], complete=False)
    broken = write_run(runs, "Ant-v5", 3, means[:11], tail="inf,1,1,0,2,10\n")
    (broken / "q_estimates.csv").write_text("global_step,q_estimate,discounted_return\n5000,oh\n")
    made = run_report(runs)
    assert made.returncode == 0
    warnings = [line for line in made.stderr.splitlines() if line.startswith("warning: ")]
    for expected in (
        "Ant-v5_ddpg_continuous_action_2: no evaluations: left out",
        "Hopper-v5_sb3_ddpg_3: line 14 of eval.csv is broken and left out: '65000,12'",
        "Hopper-v5_sb3_ddpg_3: the run is not complete (no result.json)",
        "Hopper-v5_ddpg_continuous_action_4: cannot be read and is left out",
        "Hopper-v5_ddpg_continuous_action_5: cannot be read and is left out",
        "Hopper-v5_ddpg_continuous_action_6: cannot be read and is left out",
        "Hopper-v5_ddpg_continuous_action_7: the run is not complete (no result.json)",
        "Hopper-v5_ddpg_continuous_action_7: 1 evaluations: the final return is the mean of those",
        "Hopper-v5_ddpg_continuous_action_7: left out, other seeds of its row are complete",
        "Ant-v5, ddpg_continuous_action: no run of seed 2",
        "Ant-v5, ddpg_continuous_action: runs of 55,000 to 60,000 steps in one row",
        "Ant-v5, sb3_ddpg: no run of seed 3",
        "Ant-v5_ddpg_continuous_action_3: line 13 of eval.csv is broken and left out: 'inf,1,1,0,2,10'",
        "Hopper-v5, ddpg_continuous_action: no run of seed 3",
        "Ant-v5_ddpg_continuous_action_3: q_estimates.csv is broken and left out",
        "2 scripts, each in rows of its own: ddpg_continuous_action, sb3_ddpg",
    ):
        assert sum(expected in line for line in warnings) == 1, (expected, warnings)
    assert len(warnings) == 16 and "Traceback" not in made.stderr
    rows = [line for line in made.stdout.splitlines() if line.startswith(("| Ant", "| Hopper"))]
    assert [row.split(" | ")[:5] for row in rows] == [
        ["| Ant-v5", "ddpg_continuous_action", "**600.0** ± 70.7", "650, 550", "2"],
        ["| Hopper-v5", "ddpg_continuous_action", "**700.0** ± 70.7", "650, 750", "2"],
        ["| Hopper-v5", "sb3_ddpg", "**650.0**", "650", "1"],
    ]


def test_report_without_runs_is_one_line(tmp_path):
    empty = run_report(tmp_path)
    assert empty.returncode == 2 and empty.stderr.startswith("error: no runs") and empty.stderr.count("\n") == 1


def test_variants_of_a_script_are_told_apart_by_their_flags(tmp_path):
    for batch_norm in (True, False):
        for seed in (1, 2):
            write_run(tmp_path, "Hopper-v5", seed, [1] * 10, "ddpg_paper_faithful", batch_norm=batch_norm, tau=0.001)
    runs, problems = report.read_runs(report.Args(runs=(tmp_path,)))
    assert problems == []
    labels = [(label, [run.seed for run in same]) for _, label, same in report.group(runs)]
    assert labels == [("ddpg_paper_faithful --batch-norm", [1, 2]), ("ddpg_paper_faithful --no-batch-norm", [1, 2])]


def test_export_keeps_sweeps_of_the_same_run_names_apart(tmp_path):
    for sweep_name, tau in ("a", 0.1), ("b", 0.2):
        run_dir = write_run(tmp_path / sweep_name, "Hopper-v5", 1, [tau] * 10, tau=tau)
        run_dir.rename(run_dir.parent / "same_name")
    runs, _ = report.read_runs(report.Args(runs=(tmp_path / "a", tmp_path / "b")))
    report.export(runs, tmp_path / "data")
    again, problems = report.read_runs(report.Args(runs=(tmp_path / "data",)))
    assert problems == [] and [run.final_return for run in again] == pytest.approx([0.1, 0.2])
    report.export(runs[:1], tmp_path / "data")  # the same again, with less
    again, problems = report.read_runs(report.Args(runs=(tmp_path / "data",)))
    assert problems == [] and [run.final_return for run in again] == pytest.approx([0.1])
    with pytest.raises(SystemExit):
        report.export(again, tmp_path / "data")  # it would remove what it is to copy
    assert report.read_runs(report.Args(runs=(tmp_path / "data",)))[0]


def test_export_removes_nothing_but_an_export(tmp_path, capsys):
    (run,) = report.read_runs(report.Args(runs=(write_run(tmp_path / "runs", "Hopper-v5", 1, [1] * 10),)))[0]
    for kept in "other/run/model.pt", "other/learning_curves.png":  # somebody's runs; a folder of exports
        write_run(tmp_path / "data/other", "Ant-v5", 1, [1] * 10)
        path = tmp_path / "data" / kept
        path.parent.mkdir(exist_ok=True)
        path.touch()
        with pytest.raises(SystemExit):
            report.export([run], tmp_path / "data")
        assert "holds more than an export" in capsys.readouterr().err
        assert len(list((tmp_path / "data").rglob("args.json"))) == 1
        shutil.rmtree(tmp_path / "data")
    with pytest.raises(SystemExit):  # two sweeps of one name
        twin = write_run(tmp_path / "elsewhere/runs", "Hopper-v5", 1, [1] * 10)
        report.export([run, *report.read_runs(report.Args(runs=(twin,)))[0]], tmp_path / "data")
    assert "overwrite each other" in capsys.readouterr().err and not (tmp_path / "data").exists()


def test_up_to_compares_runs_of_different_lengths(tmp_path):
    write_run(tmp_path, "Hopper-v5", 1, range(60))
    runs, _ = report.read_runs(report.Args(runs=(tmp_path,), up_to=100e3))
    assert runs[0].last_step == 100_000 and runs[0].final_return == np.mean(range(10, 20))


def test_interquartile_mean_and_interval():
    assert report.interquartile_mean(np.array([0, 3, 4, 100]), np.array([5, 6, 7, 8])) == (4 + 5 + 6 + 7) / 4
    # Strata are resampled by themselves: where each is constant, there is nothing to vary
    assert tuple(report.interval([np.zeros(3), np.ones(3)], report.interquartile_mean)) == (0.5, 0.5)
    # The level: against all the 5^5 samples that there are of five seeds
    seeds = np.array([0.0, 1.0, 3.0, 7.0, 20.0])
    means = [np.mean(sample) for sample in itertools.product(seeds, repeat=5)]
    assert tuple(report.interval([seeds], np.mean)) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.15)


def test_scores_are_normalised_by_the_random_policy_and_the_reference(tmp_path):
    for env_id in ("Hopper-v5", "Pusher-v5", "Unheard-v0"):
        write_run(tmp_path, env_id, 1, [50] * 10)
    runs, _ = report.read_runs(report.Args(runs=(tmp_path,)))
    rows, left_out = report.aggregate_rows(runs, "CleanRL docs")
    (random_hopper, _), (random_pusher, _) = (report.baselines([run]) for run in runs[:2])
    # CleanRL's torch script: 1,576.78 on Hopper-v4, -77.30 on Pusher-v4
    scores = [(50 - random_hopper) / (1576.78 - random_hopper), (50 - random_pusher) / (-77.30 - random_pusher)]
    assert rows[0]["IQM"] == f"{np.mean(scores):.2f}" and rows[0]["environments"] == "Hopper-v5, Pusher-v5"
    assert left_out == ["Unheard-v0"]


def test_untrained_policy_from_pixels_is_the_run_before_learning(tmp_path):
    for seed, learning_starts in (1, 5_000), (2, 5_000), (3, 4_999):
        flags = dict(pixels=True, critic_lr=1e-3, learning_starts=learning_starts)
        write_run(tmp_path, "Hopper-v5", seed, [10 * seed] + [50] * 9, **flags)
    runs, _ = report.read_runs(report.Args(runs=(tmp_path,)))
    assert report.baselines([run for run in runs if run.seed < 3]) == (None, 15)
    assert report.baselines([run for run in runs if run.seed == 3]) == (None, None)  # it has learned by then


def test_page_is_made_from_the_exported_data(tmp_path):
    run_dir = write_run(tmp_path / "runs", "Hopper-v5", 1, range(0, 1000, 100))
    with script.Log(run_dir) as log:
        for step in (5000, 10000):
            log.add({"eval/q_estimate": step / 100, "eval/discounted_return": 40.5}, step)
    data = tmp_path / "benchmark/results/short"
    assert run_report(tmp_path / "runs", "--export", data).returncode == 0
    exported = data / run_dir.name
    assert (exported / "eval.csv").read_bytes() == (run_dir / "eval.csv").read_bytes()
    assert (exported / "q_estimates.csv").read_text() == (
        "global_step,q_estimate,discounted_return\n5000,50,40.5\n10000,100,40.5\n"
    )

    page = tmp_path / "README.md"
    page.write_text("before\n<!-- results:short:begin -->\nold\n<!-- results:short:end -->\nafter\n")
    made = run_report("--readme", page)
    assert made.returncode == 0, made.stderr
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "**450.0**" in text
    assert (data / "learning_curves.png").exists() and (data / "q_estimates.png").exists()
    assert report.rendered(page) == text
    eval_csv = exported / "eval.csv"
    eval_csv.write_text(eval_csv.read_text().replace("900,1.0", "901,1.0"))
    assert report.rendered(page) != text  # what the next test would notice


def test_readme_agrees_with_the_committed_data(tmp_path):
    page = ROOT / "README.md"
    sections = report.SECTION.findall(page.read_text())
    names = [name for _, name, *_ in sections]
    assert names == ["first-run", "ddpg_continuous_action", "peer", "ddpg_paper_faithful", "pixels"]
    assert page.read_text().count("<!-- results:") == 2 * len(names) + 2  # and two in the sentence that explains them
    assert report.rendered(page) == page.read_text(), "run: python benchmark/report.py --readme README.md"
    for _, name, flags, _ in sections:
        args = report.section_args(name, flags, page)
        report.write_report(report.read_runs(args)[0], args, tmp_path / name)
        for made in (tmp_path / name).glob("*.[!p]*"):  # the PNG is the same figure as the SVG
            assert made.read_bytes() == (args.out / made.name).read_bytes(), made.name


def test_committed_baselines_cover_the_published_set_up():
    measured = {(row["env_id"], row["policy"]) for row in report.read_csv(ROOT / "benchmark/baselines.csv")}
    for name in ("ddpg_continuous_action", "ddpg_paper_faithful"):
        shell = (ROOT / f"benchmark/{name}.sh").read_text()
        env_ids = shell.split("ENVS:-")[1].split("}")[0].split()
        assert len(env_ids) == 6
        assert {(env_id, policy) for env_id in env_ids for policy in ("random", f"untrained {name}")} <= measured


def test_baselines_are_measured():
    returns = baselines.random_returns("Pendulum-v1", 3)
    assert len(returns) == 3 and returns == baselines.random_returns("Pendulum-v1", 3)
    for name in ("ddpg_continuous_action", "ddpg_paper_faithful"):
        (mean,) = baselines.untrained_returns(name, "Pendulum-v1", 10)
        assert -2000 < mean < -500


def test_committed_baselines_are_what_the_command_measures(tmp_path):
    args = baselines.Args(env_ids=("InvertedPendulum-v5",), out=tmp_path / "baselines.csv")
    baselines.main(args)
    committed = report.read_csv(ROOT / "benchmark/baselines.csv")
    assert report.read_csv(args.out) == [row for row in committed if row["env_id"] in args.env_ids]


def test_peer_leaves_the_same_files_and_is_evaluated_alike(tmp_path, monkeypatch, capsys):
    env = os.environ | {"SCRIPT": "benchmark/sb3_ddpg.py", "ENVS": "Pendulum-v1", "SEEDS": "1", "STEPS": "1100"}
    command = [ROOT / "benchmark/sweep.sh", f"PYTHON={sys.executable}", "--", *FLAGS]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=120)
    run_dir = tmp_path / "runs/sb3_ddpg/Pendulum-v1__sb3_ddpg__1"
    assert [step for step, _ in evaluations(run_dir)] == [500, 1000, 1100]
    assert json.loads((run_dir / "result.json").read_text())["evaluations"] == 3
    (run,), _ = report.read_runs(report.Args(runs=(run_dir,)))
    assert run.label == "sb3_ddpg" and len(report.q_estimates(run)) == 3

    # It has no checkpoints: --resume starts over, so it must not take a run of the script for its own
    ours = write_run(tmp_path, "Pendulum-v1", 1, [1.0], complete=False)
    monkeypatch.setattr(sys, "argv", ["sb3_ddpg.py", "--resume", str(ours)])
    with pytest.raises(SystemExit):
        sb3_ddpg.main(script.Args(resume=str(ours)))
    assert "is no run of sb3_ddpg.py" in capsys.readouterr().err and (ours / "eval.csv").exists()

    # Its policy as our evaluation sees it, against its own
    env = script.make_env(script.Args(env_id="Pendulum-v1"))
    model = sb3_ddpg.DDPG("MlpPolicy", env, seed=1, buffer_size=10)
    greedy, obs = sb3_ddpg.Greedy(model), np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    with torch.no_grad():
        action = greedy(torch.as_tensor(obs))
        q = greedy.q(torch.as_tensor(obs), action)
        their_q = model.critic(torch.as_tensor(obs), model.actor(torch.as_tensor(obs)))[0]
    assert action.numpy() == pytest.approx(model.predict(obs, deterministic=True)[0], abs=1e-6)
    assert q.numpy() == pytest.approx(their_q.squeeze(1).numpy(), abs=1e-6)


def test_throughput_reads_the_clock_of_the_log(tmp_path):
    with script.Log(tmp_path) as log:
        for step, seconds in (1200, 1000.0), (1400, 1002.0), (2200, 1010.0):
            log.add_scalar("charts/SPS", 0.0, step, walltime=seconds)
    assert throughput.logged_speed(str(tmp_path)) == 100.0


def test_throughput_measures_the_update():
    updates, limits = throughput.time_update(rounds=1)
    assert len(updates) == len(limits) == 1 and 0 < limits[0] < updates[0]
    # Multiply-adds a row: five forward passes, four backward ones that reach an input, one more for the weights of each
    actor, critic = 17 * 256 + 256 * 256 + 256 * 6, 23 * 256 + 256 * 256 + 256
    assert 0.95 < throughput.UPDATE_FLOPS / (2 * 256 * 5 * (actor + critic)) < 1.05


@pytest.mark.parametrize(
    "main, args", [(throughput.main, throughput.Args(steps=300)), (baselines.main, baselines.Args(episodes=5))]
)
def test_measuring_commands_refuse_bad_flags_in_one_line(main, args, capsys):
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1

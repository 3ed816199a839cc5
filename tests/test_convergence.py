"""benchmarks/convergence.py: the split, the diagnostics, the selections to try out, and whole commands at tiny size."""

import contextlib
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

REPO = Path(__file__).parent.parent
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]
os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}  # for subprocesses too

import convergence  # noqa: E402
import experiments  # noqa: E402
import plot_convergence  # noqa: E402

import train_colm  # noqa: E402

FLAGS = "--pool_size 16 --lora_r 4 --lora_alpha 8 --learning_rate 1e-2 --max_tokens_per_micro_batch 400"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    convergence.SETTINGS["full-16"] = "--selection full --pool_size 16"
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def build(work):
    """build(setting, steps, flags): the spec of a run at tiny size."""
    own, flags = convergence.build_parser().parse_known_args([*FLAGS.split(), "--held_out", "40"])
    own.eval_every, own.warm_steps, own.random_coresets = 2, 1, 2
    data, about = convergence.cached_data(own, train_colm.parse_args([*flags, "--coreset_size", "1"]), work)
    assert about["train_rows"] + about["held_out_rows"] == 1500

    def build(setting, steps=3, extra=(), **more):
        k = None if setting.startswith("full") else 12
        return convergence.make_spec(own, None, [*flags, *extra], setting, k, 0, steps, data, work, **more)

    return build


def test_no_question_is_in_both_parts():
    suffixes = ["", " Let's write a Python program to solve it.", " Please write a program.", "\nOptions: (A) 2, (B) 3"]
    rows = [{"instruction": f"What is {i} + {i}?{suffix}"} for i in range(50) for suffix in suffixes]
    rows += [{"prompt": "What is 1+1?"}, {"instruction": "Let's program."}, {"instruction": "Options: a or b?"}]
    rows += [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    train, held_out = convergence.split(rows, 10, 3)
    assert sorted(train + held_out) == list(range(len(rows)))
    asked = [{convergence.question(rows[i]) for i in part} for part in (train, held_out)]
    assert not asked[0] & asked[1] and len(asked[1]) == 10 and "" not in asked[0] | asked[1]
    assert len(asked[0] | asked[1]) == 50 + 3
    assert convergence.split(rows, 10, 3) == (train, held_out) != convergence.split(rows, 10, 4)


def test_gradient_matching_error_and_noise(build):
    """Against per-example gradients, and against what random coresets should show on average."""
    run = convergence.load_run(build("random_keep"))
    pool = train_colm.draw_pool(len(run.train), 16, 0, 0)
    for p in run.trained:
        torch.nn.init.normal_(p, std=0.1)
    each = torch.stack([convergence.gradient(run, pool[i : i + 1]) for i in range(16)]).double()
    weights = torch.tensor([1.0, 2.0, 5.0])
    weighted = convergence.gradient(run, pool[[3, 1, 9]], weights).double()
    torch.testing.assert_close(weighted, weights.double() @ each[[3, 1, 9]] / 8, rtol=1e-4, atol=1e-5)

    choice = train_colm.choose_coreset(run, pool, 0, train_colm.Clock(run.device))
    got = convergence.matching(run, pool, choice, choice.weight, 0, repeats=20)
    mean = each.mean(0)
    error = (each[choice.index].mean(0) - mean).norm() / mean.norm()
    assert got["error"] == pytest.approx(error.item(), rel=1e-4)
    assert got["pool_norm"] == pytest.approx(mean.norm().item(), rel=1e-4)
    assert got["signal"] + got["noise"] == pytest.approx(got["pool_norm"] ** 2)
    exact = (each - mean).square().sum() / (16 * 15)  # the variance of the mean from single examples
    distance = [
        (each[list(c)].mean(0) - mean).norm()
        for c in itertools.islice(itertools.combinations(range(16), 12), 0, None, 7)
    ]
    assert got["random_error"] == pytest.approx((sum(distance) / len(distance) / mean.norm()).item(), rel=0.05)
    assert torch.stack(distance).square().mean() == pytest.approx((exact * (16 / 12 - 1)).item(), rel=0.05)
    whole = train_colm.Choice(torch.arange(16), torch.ones(16), choice.kept)
    blocks = [convergence.matching(run, pool, whole, whole.weight, step, 1)["noise"] for step in range(15)]
    assert sum(blocks) / 15 == pytest.approx(exact.item(), rel=0.1)  # random blocks: unbiased
    full = experiments.lora_gradients(run, pool).double()
    torch.testing.assert_close(full @ full.T, each @ each.T, rtol=1e-3, atol=1e-3)
    assert all(p.grad is None for p in run.trained)


def test_packed_examples_have_the_same_gradients(build):
    padded, packed = (convergence.load_run(build("random", extra=extra)) for extra in ([], ["--packing"]))
    pool = train_colm.draw_pool(len(padded.train), 16, 0, 0)
    for gradients in (convergence.gradient, experiments.lora_gradients, experiments.last_v_gradients):
        a, b = (gradients(run, pool) for run in (padded, packed))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_selections():
    """Each picks what its definition says, on gradients where it can be checked."""
    g = torch.randn(12, 30, generator=torch.Generator().manual_seed(0)) + 0.3
    run = SimpleNamespace(memory={})
    assert set(experiments.largest_norms(run, g, 4)[0].tolist()) == set(g.norm(dim=1).argsort()[-4:].tolist())

    chosen = []
    for t in range(1, 6):
        left = [i for i in range(12) if i not in chosen]
        chosen.append(min(left, key=lambda i: (g[[*chosen, i]].sum(0) - t * g.mean(0)).norm()))  # noqa: B023
    assert experiments.herding(run, g, 5)[0].tolist() == chosen

    def distance(rows, weights):
        return (g.sum(0) - weights.float() @ g[rows]).norm().item()

    rows, weights = experiments.nonnegative_omp(run, g, 4)
    assert len(rows) == 4 and (weights > 0).all()
    fit = torch.linalg.lstsq(g[rows].T, g.sum(0)[:, None]).solution[:, 0]
    torch.testing.assert_close(weights.float(), fit, rtol=1e-3, atol=1e-4)  # the best weights for its rows
    all_rows, ones = experiments.nonnegative_omp(run, g, 12)
    assert distance(all_rows, ones) < 1e-3 * g.sum(0).norm() < distance(rows, weights)
    torch.testing.assert_close(ones.float(), torch.ones(12), rtol=1e-3, atol=1e-3)
    doubled = torch.cat([g[:3], g[:3], -g[:1]])  # copies and an opposite: no unique solution, negative weights tempting
    rows, weights = experiments.nonnegative_omp(run, doubled, 6)
    assert (weights > 0).all() and (doubled.sum(0) - weights.float() @ doubled[rows]).norm() < 1e-3

    first, _ = experiments.error_feedback(run, g, 5)
    assert first.tolist() == chosen
    torch.testing.assert_close(run.memory["residual"], 0.9 * (g.mean(0) - g[chosen].mean(0)))
    second, _ = experiments.error_feedback(run, g, 5)
    assert second.tolist() != chosen  # what was left out comes back


@pytest.mark.parametrize("setting", sorted(convergence.EXPERIMENTS))
def test_experiments_keep_small_sources(build, setting):
    run = convergence.load_run(build(setting))
    for step in range(2):
        pool = train_colm.draw_pool(len(run.train), 16, 0, step)
        choice = convergence.EXPERIMENTS[setting](run, pool, step, train_colm.Clock(run.device))
        small = [i for i, q in enumerate(run.train.sources[pool].tolist()) if q in run.keep]
        assert choice.index[: len(small)].tolist() == choice.kept.tolist() == small
        assert len(set(choice.index.tolist())) == len(choice.index) == len(choice.weight) <= 12
        assert len(choice.index) == 12 or setting.startswith(("omp", "oracle"))
        assert (choice.weight > 0).all() and choice.probe_tokens > 0


@pytest.mark.parametrize("setting", ["colm-grad", "feedback"])
def test_diagnostics_do_not_change_the_training(build, setting):
    results = []
    for match_every in (0, 1):
        torch.manual_seed(match_every)
        run = convergence.load_run(build(setting, extra=["--lora_dropout", "0.2"]))
        result = convergence.measure(run, build(setting) | {"match_every": match_every})
        results.append((result, torch.cat([p.detach().flatten() for p in run.trained])))
    (plain, w0), (diagnosed, w1) = results
    assert torch.equal(w0, w1) and plain["loss"] == diagnosed["loss"]
    assert not plain["match"] and [r["step"] for r in diagnosed["match"]] == [0, 1, 2]
    assert [r["step"] for r in plain["eval"]] == [0, 2, 3]
    for a, b in zip(plain["eval"], diagnosed["eval"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_it_is_the_trainers_own_training(build, work):
    """The same losses as train_colm.py itself, on the same rows."""
    spec = build("colm-grad")
    run = convergence.load_run(spec)
    result = convergence.measure(run, spec)
    again = convergence.load_run(spec)
    args = again.args
    args.output_dir, args.save_every, args.eval_every = str(work / "own"), 0, 2
    Path(args.output_dir).mkdir()
    train_colm.train_loop(again, 0)
    own = train_colm.read_records(work / "own" / "metrics.jsonl")
    assert [round(r["loss"], 6) for r in own] == result["loss"]
    assert sum(r["tokens"] for r in own) == result["eval"][-1]["tokens"]
    assert train_colm.read_records(work / "own" / "eval.jsonl")[-1]["eval_loss"] == result["eval"][-1]["eval_loss"]


def run_json(label, seed, losses, seconds):
    points = [(0, 4.0), *zip((2, 4), losses, strict=True)]
    evals = [dict.fromkeys(convergence.MEASURES.values(), y) | {"step": x, "seconds": x * seconds} for x, y in points]
    evals = [r | {"tokens": 1000 * r["step"], "probe_tokens": 0} for r in evals]
    return {"label": label, "seed": seed, "eval": evals, "match": [], "peak_gb": 1.0}


def test_tables():
    runs = [run_json("full-64", 0, (3, 2.0), 1), run_json("full-64", 1, (3, 2.02), 1)]
    runs += [run_json("full-256", s, (2, 1.0 + s / 100), 4) for s in range(2)]
    runs += [run_json("random@64", s, (3, 1.5), 2) for s in range(2)]
    text = convergence.tables(runs, False)
    at_steps, at_seconds = text.split("**Held-out loss after 4.0 seconds")
    assert "| full-64 | 2 | 2.010 ± 0.014 (0%)" in at_steps and "| random@64 | 2 | 1.500 ± 0.000 (51%)" in at_steps
    assert "| gap full-64 to full-256 |  | 1.005 ± 0.016" in at_steps
    assert "| full-256 | 2 | 3.000 ± 0.000 |" in at_seconds  # half way to its first evaluation; no gap in its favour
    assert "| random@64 | 2 | 3.000 ± 0.000 |" in at_seconds
    assert convergence.at(runs[0], "eval_loss", "step", 3) == pytest.approx(2.5)


class InProcess:
    """Stands in for Popen: the worker without another start of Python."""

    returncode = 0

    def __init__(self, command, stdout, stderr, env):
        threads = torch.get_num_threads()
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))  # sums depend on it in the last bit
        with contextlib.redirect_stderr(stderr), contextlib.suppress(SystemExit):
            convergence.main(command[2:])
        torch.set_num_threads(threads)

    def poll(self):
        return self.returncode


def test_a_whole_command(work, capsys, monkeypatch):
    """A prepared model, several runs, timing alone, a setting that fails, nothing done twice, and figures."""
    monkeypatch.setattr(convergence, "PREPARE", "full-16")
    monkeypatch.setattr(convergence.signal, "signal", lambda *_: None)
    monkeypatch.setitem(convergence.SETTINGS, "random", "--selection random --lora_target_modules nothing")
    output = work / "results.json"
    command = f"{FLAGS} --held_out 40 --steps 2 --eval_every 1 --match_every 1 --random_coresets 1 --warm_steps 1"
    command += f" --jobs 2 --time_steps 2 --coreset_sizes 12 --prepare 3 --work {work} --output {output}"
    command = [*command.split(), "--settings", "feedback", "random_keep"]
    with monkeypatch.context() as patch:
        patch.setattr(convergence.subprocess, "Popen", InProcess)
        assert convergence.main([*command, "random"]) == 1
    result = json.loads(output.read_text())
    run, other = result["runs"]
    assert run["label"] == "feedback@12" and len(run["match"]) == 2 and other["label"] == "random_keep@12"
    assert run["eval"][-1]["seconds"] == 2 * result["step_s_alone"]["feedback@12"]
    assert all("random@12 seed 0" in problem and "nothing" in problem for problem in result["problems"])
    assert len(result["problems"]) == 2 and result["tables"] in capsys.readouterr().out
    # the merged model is the one that preparation ended with
    prepared = result["preparation"]["eval"]
    assert run["eval"][0]["eval_loss"] == pytest.approx(prepared[-1]["eval_loss"], abs=1e-4)
    assert prepared[-1]["eval_loss"] < prepared[0]["eval_loss"]

    Path(run["output"]).unlink()  # only this one is repeated, in a process of its own, with the same outcome
    assert convergence.main(command) == 0
    out = capsys.readouterr().out
    assert out.count("0 runs to do") == 2 and out.count("1 runs to do") == 1
    again = json.loads(output.read_text())["runs"][0]
    assert again["weights"] == run["weights"] and again["loss"] == run["loss"]

    pytest.importorskip("matplotlib")
    plot_convergence.main([str(output)])
    assert {p.name for p in work.glob("*.png")} == {f"results-{x}.png" for x in ("steps", "seconds", "matching")}


def test_bad_flags(tmp_path):
    for flags in (
        ["--settings", "nothing"],
        ["--steps", "0"],
        ["--held_out", "0"],
        ["--no_such_flag", "1"],
        ["--seed", "1"],
    ):
        with pytest.raises(train_colm.UserError):
            convergence.main([*flags, "--work", str(tmp_path)])

"""benchmarks/convergence.py: the split, the diagnostics, the selections to try out, and whole commands at tiny size."""

import contextlib
import io
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
os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}  # for subprocesses too

import convergence  # noqa: E402
import experiments  # noqa: E402
import plot_convergence  # noqa: E402
from experiments import JOINT, SCORES, STRUCTURES, Candidates  # noqa: E402

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
    full = experiments.lora_gradients(Candidates(run, pool)).double()
    torch.testing.assert_close(full @ full.T, each @ each.T, rtol=1e-3, atol=1e-3)
    assert all(p.grad is None for p in run.trained)


def test_packed_examples_have_the_same_gradients(build):
    padded, packed = (convergence.load_run(build("random", extra=extra)) for extra in ([], ["--packing"]))
    pool = train_colm.draw_pool(len(padded.train), 16, 0, 0)
    for signal in (experiments.lora_gradients, experiments.last_v_gradients, experiments.mean_losses):
        a, b = (signal(Candidates(run, pool)) for run in (padded, packed))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    a, b = (convergence.gradient(run, pool) for run in (padded, packed))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_joint_picks():
    """Each picks what its definition says, on gradients where it can be checked."""
    g = torch.randn(12, 30, generator=torch.Generator().manual_seed(0)) + 0.3
    c = SimpleNamespace(run=SimpleNamespace(memory={}))
    chosen = []
    for t in range(1, 6):
        left = [i for i in range(12) if i not in chosen]
        chosen.append(min(left, key=lambda i: (g[[*chosen, i]].sum(0) - t * g.mean(0)).norm()))  # noqa: B023
    assert experiments.herding(c, g, 5)[0].tolist() == chosen

    def distance(rows, weights):
        return (g.sum(0) - weights.float() @ g[rows]).norm().item()

    rows, weights = experiments.omp(c, g, 4)
    assert len(rows) == 4 and (weights > 0).all()
    fit = torch.linalg.lstsq(g[rows].T, g.sum(0)[:, None]).solution[:, 0]
    torch.testing.assert_close(weights.float(), fit, rtol=1e-3, atol=1e-4)  # the best weights for its rows
    all_rows, ones = experiments.omp(c, g, 12)
    assert distance(all_rows, ones) < 1e-3 * g.sum(0).norm() < distance(rows, weights)
    torch.testing.assert_close(ones.float(), torch.ones(12), rtol=1e-3, atol=1e-3)
    doubled = torch.cat([g[:3], g[:3], -g[:1]])  # copies and an opposite: no unique solution, negative weights tempting
    rows, weights = experiments.omp(c, doubled, 6)
    assert (weights > 0).all() and (doubled.sum(0) - weights.float() @ doubled[rows]).norm() < 1e-3

    first, _ = experiments.error_feedback(c, g, 5)
    assert first.tolist() == chosen
    torch.testing.assert_close(c.run.memory["residual"], 0.9 * (g.mean(0) - g[chosen].mean(0)))
    second, _ = experiments.error_feedback(c, g, 5)
    assert second.tolist() != chosen  # what was left out comes back


def test_structures():
    """Ten rows of a big source with scores 0..9, six of two small ones with scores 10..15."""
    sources = torch.tensor([0] * 10 + [1, 1, 1, 1, 2, 2])
    c = SimpleNamespace(sources=sources, small=sources > 0)
    score = torch.arange(16.0)

    def picked(pick, score=score, k=8, **more):
        rows, weights = pick(c, score, k, **more)
        assert len(set(rows.tolist())) == len(rows) == len(weights) == k
        return sorted(rows.tolist())

    assert picked(experiments.largest) == [8, 9, 10, 11, 12, 13, 14, 15]
    assert picked(experiments.by_source) == [5, 6, 7, 8, 9, 12, 13, 15]  # 5, 2 and 1 of 10, 4 and 2
    assert picked(experiments.half_way) == [6, 7, 8, 9, 12, 13, 14, 15]  # between 3 and 6 of the small, rounded to even
    assert picked(experiments.half_way, k=1) == [15] and len(picked(experiments.half_way, k=15)) == 15
    assert picked(experiments.boost, 20 - score, factor=2) == [0, 1, 2, 3, 4, 10, 11, 12]
    assert picked(experiments.boost, -score, factor=3) == [
        0,
        1,
        2,
        3,
        4,
        5,
        10,
        11,
    ]  # shifted to begin at 0
    assert picked(experiments.trim) == list(range(7, 15))  # without the best of 16
    assert picked(experiments.trim, k=16) == list(range(16))


@pytest.fixture(scope="module")
def trained_run(build):
    """A run with a few updates behind it, so that Adam has a state; and the pool of the next step."""
    run = convergence.load_run(build("norms"))
    convergence.measure(run, build("norms"))
    return run, train_colm.draw_pool(len(run.train), 16, 0, 3)


def test_scores(trained_run):
    """On one pool, against what they are defined by."""
    run, pool = trained_run
    c = Candidates(run, pool, 3)
    g, losses, tokens = experiments.last_v_gradients(c), experiments.mean_losses(c), c.tokens
    run.mode(training=False)
    for i, row in enumerate(pool.tolist()):
        batch = train_colm.collate([run.train.example(row)])
        with torch.no_grad():
            loss = train_colm.example_losses(run.inner, run.hook, batch)[0]
        assert batch.counts.item() == tokens[i] and loss.item() == pytest.approx(losses[i].item(), rel=1e-4)
    weight = next(p for name, p in run.probe.module.named_parameters() if "lora_B" in name)
    state = run.optimizer.state[weight]
    metric = ((state["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8).flatten()
    others = torch.stack([torch.cat([g[:i], g[i + 1 :]]).sum(0) / 16 for i in range(16)])
    expected = {
        "norms": g.norm(dim=1),
        "sumnorms": g.norm(dim=1) * tokens,
        "sqrtnorms": g.norm(dim=1) * tokens.sqrt(),
        "adam+norms": (g / metric).norm(dim=1),
        "agree": (g * others).sum(1),
        "sumloss": losses * tokens,
        "longest": tokens,
    }
    for name, score in expected.items():
        torch.testing.assert_close(SCORES[name](c), score, rtol=1e-3, atol=1e-5)
    run.memory = {}
    torch.testing.assert_close(experiments.trend(c), g @ g.mean(0), rtol=1e-3, atol=1e-5)
    other = Candidates(run, train_colm.draw_pool(len(run.train), 16, 0, 4), 4)
    h = experiments.last_v_gradients(other)
    torch.testing.assert_close(experiments.trend(other), h @ g.mean(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(run.memory["trend"], 0.9 * g.mean(0) + 0.1 * h.mean(0), rtol=1e-3, atol=1e-5)


NAMES = [structure + score for score in SCORES for structure in STRUCTURES if structure + score != "random"]
NAMES += ["keep+" * keep + name for name in [*JOINT, "leftover"] for keep in (0, 1)]


@pytest.mark.parametrize("name", NAMES)
def test_experiments(trained_run, monkeypatch, name):
    """K distinct positions, positive weights, small sources whole where they should be, the same choice twice."""
    run, pool = trained_run
    choose = convergence.EXPERIMENTS[name]
    small = [i for i, q in enumerate(run.train.sources[pool].tolist()) if q in run.keep]
    kept = small if name.startswith("keep+") else []
    for size in (12, 2):  # with room for all small sources, and without
        monkeypatch.setattr(run.args, "coreset_size", size)
        outcomes = []
        for step in (2, 3, 2, 3):
            run.memory = run.memory if step == 3 else {}
            clock = train_colm.Clock(run.device)
            choice = choose(run, train_colm.draw_pool(len(run.train), 16, 0, step), step, clock)
            outcomes.append((choice.index.tolist(), choice.weight.tolist()))
        assert outcomes[:2] == outcomes[2:]
        index = choice.index.tolist()
        assert len(set(index)) == len(index) == len(choice.weight) <= size
        assert len(index) == size or name.endswith(("omp", "oracle"))
        assert choice.weight.isfinite().all() and (choice.weight > 0).all()
        assert choice.kept.tolist()[: len(small)] == kept and 2 < len(small) < 12
        assert not kept or set(index[: len(small)]) <= set(small)
        free = name.endswith(("longest", "random")) or (kept and size == 2 and "leftover" not in name)
        probed = [row for i, row in enumerate(pool.tolist()) if i not in kept]
        assert choice.probe_tokens == (0 if free else sum(map(run.train.length, probed)))
        assert ("probe" in [mark[0] for mark in clock.marks]) == (not free)


def test_weights_by_tokens(trained_run, monkeypatch):
    run, pool = trained_run
    for name, power in train_colm.TOKEN_POWER.items():
        monkeypatch.setattr(run.args, "example_weights", name)
        choice = convergence.EXPERIMENTS["omp"](run, pool, 3, train_colm.Clock(run.device))
        c = Candidates(run, pool, 3)
        rows, base = experiments.omp(c, experiments.last_v_gradients(c), 12)
        assert choice.index.tolist() == rows.tolist() and base.unique().numel() > 1
        torch.testing.assert_close(choice.weight, base.float() * c.tokens[rows] ** power)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith(("longest", "random", "oracle"))])
def test_experiments_pass_over_what_is_not_finite(trained_run, monkeypatch, name):
    run, pool = trained_run
    probe, losses, bad = train_colm.probe_pool, experiments.example_losses, slice(0, 3)

    def broken_probe(*args):
        gradients, order = probe(*args)
        gradients.blocks = [torch.cat(gradients.blocks).index_fill(0, torch.arange(len(order))[bad], torch.nan)]
        spoilt.update(args[1][order[bad]].tolist())
        return gradients, order

    def broken_losses(*args):
        values = losses(*args)
        values[:, bad] = torch.inf
        return values

    monkeypatch.setattr(train_colm, "probe_pool", broken_probe)
    monkeypatch.setattr(experiments, "example_losses", broken_losses)
    monkeypatch.setattr(run.args, "coreset_size", 8)
    for bad, good in ((slice(0, 3), True), (slice(0, 16), False)):  # noqa: B007
        run.memory, spoilt = {}, set()
        choice = convergence.EXPERIMENTS[name](run, pool, 3, train_colm.Clock(run.device))
        assert len(set(choice.index.tolist())) == len(choice.index) == len(choice.weight) > 0
        assert choice.weight.isfinite().all()
        if good:
            assert not spoilt.intersection(pool[choice.index].tolist())
            assert len(choice.index) == 8 or "omp" in name or name.startswith("keep+")
            assert "leftover" in name or choice.skipped_probes >= 3


def test_leftover(trained_run):
    """The second step ranks the first pool's leftovers among its own rows."""
    run, _ = trained_run
    run.memory, pools = {}, [train_colm.draw_pool(len(run.train), 16, 0, step) for step in (3, 4)]
    choose, score = convergence.EXPERIMENTS["leftover"], [experiments.norms(Candidates(run, pool)) for pool in pools]
    first = choose(run, pools[0], 3, train_colm.Clock(run.device))
    assert first.pool[first.index].tolist() == pools[0][score[0].argsort(descending=True)[:12]].tolist()
    rows, left = run.memory["left"]
    assert rows.tolist() == pools[0][score[0].argsort(descending=True)[12:]].tolist()
    run.memory["left"] = rows, 4 * left
    second = choose(run, pools[1], 4, train_colm.Clock(run.device))
    best = torch.cat([score[1], 0.9 * 4 * left]).argsort(descending=True)[:12]
    assert second.pool[second.index].tolist() == torch.cat([pools[1], rows])[best].tolist() and best.max() >= 16


@pytest.mark.parametrize("setting", ["colm-grad", "keep+feedback", "adam+norms", "full-16"])
def test_a_run_after_another_is_what_it_would_be_alone(build, setting):
    alone = convergence.load_run(build(setting))
    run = convergence.load_run(build("random"))
    results = [convergence.measure(alone, build(setting)), convergence.measure(run, build("random"))]
    assert convergence.restarted(run, build(setting)) is run
    results[1] = convergence.measure(run, build(setting))
    for result in results:
        del result["step_s"], result["peak_gb"]
        result["eval"] = [record | {"seconds": 0} for record in result["eval"]]
    assert results[0] == results[1]
    assert all(torch.equal(p, q) for p, q in zip(run.trained, alone.trained, strict=True))
    assert convergence.restarted(run, build(setting, steps=4)) is None
    assert convergence.restarted(None, build(setting)) is None


@pytest.mark.parametrize("setting", ["colm-grad", "keep+feedback"])
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
    rows = [row for r in train_colm.read_records(work / "own" / "selection.jsonl") for row in r["selected"]]
    row_of = {number: row for row, number in enumerate(again.train.numbers.tolist())}
    completions = [len(ids) - prompt for ids, prompt in (again.train.example(row_of[number]) for number in rows)]
    assert sum(completions) == result["eval"][-1]["completion_tokens"]
    assert sum(again.train.sources[row_of[number]].item() in again.keep for number in rows) == sum(result["small"])
    assert train_colm.read_records(work / "own" / "eval.jsonl")[-1]["eval_loss"] == result["eval"][-1]["eval_loss"]


class InProcess:
    """Stands in for Popen: the worker without another start of Python."""

    returncode = None

    def __init__(self, command, stdin, stdout, stderr, env, text):
        assert command[1:] == [convergence.__file__, "--worker"]
        self.stdin, self.log, self.env, self.device = self, stderr.name, env, env["CUDA_VISIBLE_DEVICES"]

    def write(self, line):
        assert self.env["OMP_NUM_THREADS"] == str(torch.get_num_threads())  # sums depend on it in the last bit
        with open(self.log, "a") as log, contextlib.redirect_stderr(log), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(line))
            with pytest.raises(SystemExit) as end:
                convergence.main(["--worker"])
        self.returncode = end.value.code or None

    def flush(self):
        pass

    close = wait = terminate = flush

    def poll(self):
        return self.returncode


def run_json(label, seed, losses, seconds):
    points = [(0, 4.0), *zip((2, 4), losses, strict=True)]
    evals = [dict.fromkeys(convergence.MEASURES.values(), y) | {"step": x, "seconds": x * seconds} for x, y in points]
    evals = [r | {"tokens": 1000 * r["step"], "completion_tokens": 500 * r["step"], "probe_tokens": 0} for r in evals]
    return {"label": label, "seed": seed, "eval": evals, "match": [], "peak_gb": 1.0, "small": [3, 4]}


def test_tables():
    runs = [run_json("full-64", 0, (3, 2.0), 1), run_json("full-64", 1, (3, 2.02), 1)]
    runs += [run_json("full-256", s, (2, 1.0 + s / 100), 4) for s in range(2)]
    runs += [run_json("random@64", s, (3, 1.5), 2) for s in range(2)]
    text = convergence.tables(runs)
    at_steps, at_seconds = text.split("**Held-out loss after 4.0 seconds")
    assert "| full-64 | 2 | 2.010 ± 0.014 (0%)" in at_steps and "| random@64 | 2 | 1.500 ± 0.000 (51%)" in at_steps
    assert "| gap full-64 to full-256 |  | 1.005 ± 0.016" in at_steps
    assert "| full-256 | 2 | 3.000 ± 0.000 |" in at_seconds  # half way to its first evaluation; no gap in its favour
    assert "| random@64 | 2 | 3.000 ± 0.000 |" in at_seconds
    assert convergence.at(runs[0], "eval_loss", "step", 3) == pytest.approx(2.5)
    runs[0]["eval"][-1]["eval_loss"] = None
    text = convergence.tables(runs, ["step"], ["eval_loss", "eval_loss_per_token"])
    assert [text.index(f"| {label} |") for label in ("full-256", "random@64", "full-64")] == sorted(
        text.index(f"| {label} |") for label in ("full-256", "random@64", "full-64")
    )
    many = [run_json(f"keep+adam+sumnorms-sqrt{i}@64", 0, (3, 1.5), 2) for i in range(40)]
    assert len(convergence.tables([*runs, *many], ["step"])) < 7000
    assert len(convergence.tables([*runs, *many])) < 12000


@pytest.mark.parametrize(
    "listed, count, expected", [(None, 2, ["0", "1"]), ("3, 5", 2, ["3", "5"]), (None, 0, [""]), ("", 0, [""])]
)
def test_runs_are_spread_over_the_visible_devices(tmp_path, monkeypatch, listed, count, expected):
    started = []

    class Fake(InProcess):
        def write(self, line):
            started.append((self.device, json.loads(line)["output"]))
            self.written = started[-1][1]

        def poll(self):  # a run is done when four have begun
            if len(started) > 3:
                Path(self.written).write_text("{}")
            return None

    monkeypatch.setattr(convergence.torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setattr(convergence.subprocess, "Popen", Fake)
    specs = [{"output": str(tmp_path / f"{i}.json"), "label": "x", "seed": i} for i in range(6)]
    assert convergence.run_all(specs, 4, float("inf")) == []
    assert [device for device, _ in started[:4]] == (expected * 4)[:4]
    assert [name for _, name in started] == [spec["output"] for spec in specs]


def test_a_whole_command(work, capsys, monkeypatch):
    """A prepared model, several runs, timing alone, a setting that fails, nothing done twice, and figures."""
    monkeypatch.setattr(convergence, "PREPARE", "full-16")
    monkeypatch.setattr(convergence.signal, "signal", lambda *_: None)
    monkeypatch.setitem(convergence.SETTINGS, "random", "--selection random --lora_target_modules nothing")
    output = work / "results.json"
    command = f"{FLAGS} --held_out 40 --steps 2 --eval_every 1 --match_every 1 --random_coresets 1 --warm_steps 1"
    command += f" --jobs 2 --time_steps 2 --coreset_sizes 12 --prepare 3 --work {work} --output {output}"
    command += " --time_flags=--gradient_checkpointing"
    command = [*command.split(), "--settings", "keep+feedback", "random_keep"]
    with monkeypatch.context() as patch:
        patch.setattr(convergence.subprocess, "Popen", InProcess)
        assert convergence.main([*command, "random"]) == 1
    result = json.loads(output.read_text())
    run, other = result["runs"]
    whole = {one["label"]: one for one in map(json.loads, map(Path.read_text, work.glob("run-*.json")))}
    assert run["label"] == "keep+feedback@12" and len(run["match"]) == 2 and other["label"] == "random_keep@12"
    assert run["eval"][-1]["seconds"] == 2 * result["step_s_alone"]["keep+feedback@12"]
    timed = [json.loads(path.read_text()) for path in work.glob("time-*.json")]
    assert timed and all("--gradient_checkpointing" in one["argv"] for one in timed)
    assert not any("--gradient_checkpointing" in one["argv"] for one in whole.values())
    assert all("random@12 seed 0" in problem and "nothing" in problem for problem in result["problems"])
    assert len(result["problems"]) == convergence.TIME_ROUNDS + 1 and result["tables"] in capsys.readouterr().out
    # the merged model is the one that preparation ended with
    prepared = result["preparation"]["eval"]
    assert run["eval"][0]["eval_loss"] == pytest.approx(prepared[-1]["eval_loss"], abs=1e-4)
    assert prepared[-1]["eval_loss"] < prepared[0]["eval_loss"]

    file, before = Path(whole[run["label"]]["output"]), whole[run["label"]]
    file.unlink()  # only this one is repeated, in a process of its own, with the same outcome
    assert convergence.main(command) == 0
    out = capsys.readouterr().out
    assert out.count("0 runs to do") == 2 and out.count("1 runs to do") == 1
    again = json.loads(output.read_text())["runs"][0]
    assert again["weights"] == run["weights"] and json.loads(file.read_text())["loss"] == before["loss"]
    assert convergence.main(["--show", str(output), "--sort", "eval_loss"]) == 0
    assert "| random_keep@12 |" in capsys.readouterr().out

    # step times of that command stand in for new ones: as many steps as fit
    slow = work / "slow.json"
    slow.write_text(json.dumps({"step_s_alone": {"random_keep@12": 0.3}, "timed_on": ["a card"], "code": []}))
    short = [*command[: command.index("--settings")], "--times", str(slow), "--seconds", "0.7", "--settings"]
    with monkeypatch.context() as patch:
        patch.setattr(convergence.subprocess, "Popen", InProcess)
        assert convergence.main([*short, "random_keep", "--output", str(work / "short.json")]) == 0
    result = json.loads((work / "short.json").read_text())
    assert result["runs"][0]["eval"][-1]["step"] == 2 and result["timed_on"] == ["a card"]
    assert result["runs"][0]["eval"][-1]["seconds"] == pytest.approx(0.6)
    with pytest.raises(train_colm.UserError, match="slow.json lacks keep.feedback@12: time them, or leave them out"):
        convergence.main([*short, "random_keep", "keep+feedback"])
    for text in ("", "[1]", "{}"):
        slow.write_text(text)
        with pytest.raises(train_colm.UserError, match=r"slow.json \(.*: give a JSON of this script"):
            convergence.main([*short, "random_keep"])
    with pytest.raises(train_colm.UserError, match="--seeds without a number times the settings"):
        convergence.main([*command, "--seeds", "--time_steps", "0"])

    pytest.importorskip("matplotlib")
    plot_convergence.main([str(output)])
    assert {p.name for p in work.glob("*.png")} == {f"results-{x}.png" for x in ("steps", "seconds", "matching")}


def test_bad_flags(tmp_path):
    for flags in (
        ["--settings", "random", "nothing"],
        ["--sort", "nothing"],
        ["--steps", "0"],
        ["--held_out", "0"],
        ["--no_such_flag", "1"],
        ["--seed", "1"],
    ):
        with pytest.raises(train_colm.UserError):
            convergence.main([*flags, "--work", str(tmp_path)])

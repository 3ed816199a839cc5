"""benchmarks/convergence.py: the split, the regimes, the selections to try out, and whole commands at tiny size."""

import contextlib
import io
import json
import os
import statistics
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).parent.parent
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]
os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}  # for subprocesses too

import convergence  # noqa: E402
import experiments  # noqa: E402
import plot_convergence  # noqa: E402
from convergence import Cell  # noqa: E402

import train_colm  # noqa: E402
from colm_data import UserError  # noqa: E402

FLAGS = "--pool_size 16 --coreset_size 12 --lora_r 4 --lora_alpha 8 --max_tokens_per_micro_batch 400 --held_out 40"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    convergence.SETTINGS["full-16"] = "--selection full --pool_size 16 --coreset_size 16"
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def build(work):
    """build(setting, regime, budget, steps): the spec of a run at tiny size."""

    def build(setting, regime="clean", budget="steps", steps=3, seed=1, extra=()):
        command = [*FLAGS.split(), "--steps", str(steps), "--eval_start", *extra]
        own, flags = convergence.build_parser().parse_known_args(command)
        clean = convergence.tokenised(own, train_colm.parse_args(flags), work)
        return convergence.make_spec(own, flags, Cell(regime, setting, budget, 1), 1e-2, seed, clean)

    return build


@pytest.fixture(scope="module")
def clean_rows(build):
    """The training rows as they are."""
    return convergence.load_data(build("random")["data"])["train"]


def test_no_question_is_in_two_parts():
    suffixes = ["", " Let's write a Python program to solve it.", " Please write a program.", "\nOptions: (A) 2, (B) 3"]
    rows = [{"instruction": f"What is {i} + {i}?{suffix}"} for i in range(50) for suffix in suffixes]
    rows += [{"prompt": "What is 1+1?"}, {"instruction": "Let's program."}, {"instruction": "Options: a or b?"}]
    rows += [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    parts = convergence.split(rows, 10, 3)
    assert sorted(i for part in parts.values() for i in part) == list(range(len(rows)))
    asked = {name: {convergence.question(rows[i]) for i in part} for name, part in parts.items()}
    assert {name: len(questions) for name, questions in asked.items()} == {"train": 43, "tune": 5, "report": 5}
    assert len(set.union(*asked.values())) == 50 + 3 and "" not in set.union(*asked.values())
    assert convergence.split(rows, 10, 3) == parts != convergence.split(rows, 10, 4)


# ------------------------------------------------------------------------------------------------------------- regimes


def texts(data):
    """Each row as (prompt, answer)."""
    examples = [data.example(i) for i in range(len(data))]
    prompts = [experiments.prompt_tokens(example) for example in examples]
    return [(tuple(e.ids[:p].tolist()), tuple(e.ids[p:].tolist())) for e, p in zip(examples, prompts, strict=True)]


@pytest.mark.parametrize("regime, changed", [("copies", 0), ("near_copies", 0.15), ("far_copies", 0.5)])
def test_copies(clean_rows, monkeypatch, regime, changed):
    monkeypatch.setattr(experiments, "ORIGINALS", 60)
    data, marks = experiments.spoil(clean_rows, regime, 0, 512)
    copied, before, after = marks["copies"], texts(clean_rows), texts(data)
    assert torch.equal(data.sources, clean_rows.sources) and data.names == clean_rows.names
    same = torch.tensor([a == b for a, b in zip(before, after, strict=True)])
    assert same[~copied].all() and copied.float().mean() == pytest.approx(0.6 + 60 / len(data), abs=0.04)
    originals = {after[i] for i in (copied & same).nonzero()[:, 0].tolist()}
    head, tail = experiments.template([clean_rows.example(i) for i in range(len(data))])
    assert head > 10 and tail > 3
    shares = []
    for i in (copied & ~same).nonzero()[:, 0].tolist():
        prompt, answer = after[i]
        alike = [p for p, a in originals if a == answer and len(p) == len(prompt)]  # only the question may change
        differ = min(sum(x != y for x, y in zip(p, prompt, strict=True)) for p in alike)
        shares.append(differ / (len(prompt) - head - tail))
        assert any(p[:head] + p[len(p) - tail :] == prompt[:head] + prompt[len(prompt) - tail :] for p in alike)
    assert statistics.fmean(shares) == pytest.approx(changed, abs=0.05)  # a random token may be the same by chance
    again, _ = experiments.spoil(clean_rows, regime, 0, 512)
    assert torch.equal(again.ids, data.ids) and texts(clean_rows) == before


def test_swapped_answers(clean_rows):
    data, marks = experiments.spoil(clean_rows, "noise", 0, 512)
    swapped, before, after = marks["noise"], texts(clean_rows), texts(data)
    for q in range(len(data.names)):
        mine = (data.sources == q).nonzero()[:, 0].tolist()
        assert int(swapped[mine].sum()) == round(0.3 * len(mine))
        assert sorted(after[i][1] for i in mine) == sorted(before[i][1] for i in mine)  # none is lost
    assert [p for p, _ in after] == [p for p, _ in before]
    assert all(a == b for i, (a, b) in enumerate(zip(after, before, strict=True)) if not swapped[i])
    for i in range(len(data)):  # the whole answer carries loss, and nothing else
        example = data.example(i)
        assert example.supervised.tolist() == [False] * len(after[i][0]) + [True] * len(after[i][1])
    short, _ = experiments.spoil(clean_rows, "noise", 0, 30)  # prompts give way, answers do not
    whole = [clean_rows.length(i) for i in range(len(data))]
    assert all(short.length(i) <= max(30, whole[i]) for i in range(len(data)))
    assert [a for _, a in texts(short)] == [a for _, a in after]


def test_regimes_follow_one_another(clean_rows, monkeypatch):
    monkeypatch.setattr(experiments, "FEW", 100)
    data, marks = experiments.spoil(clean_rows, "copies+noise+few", 0, 512)
    assert len(data) == len(data.sources) == 100 and {len(mark) for mark in marks.values()} == {100}
    assert marks["copies"].float().mean() == pytest.approx(0.6, abs=0.2)
    data, marks = experiments.spoil(clean_rows, "clean", 0, 512)
    assert torch.equal(data.ids, clean_rows.ids) and not marks


def test_near_copies_are_removed(clean_rows, monkeypatch):
    """Against exact Jaccard similarities: what is dropped resembles a row that stays, what stays does not."""
    monkeypatch.setattr(experiments, "ORIGINALS", 20)
    data, _ = experiments.spoil(clean_rows, "near_copies", 0, 512)
    data = experiments.joined(data, [data.example(i) for i in range(300)], data.sources[:300])
    grams, starts = experiments.shingles(data, 2)
    sets = [set(grams[a:b].tolist()) for a, b in zip(starts, [*starts[1:], len(grams)], strict=True)]
    values = experiments.minhash(data, 2)

    def jaccard(i, j):
        return len(sets[i] & sets[j]) / len(sets[i] | sets[j])

    errors = [(values[i] == values[j]).mean() - jaccard(i, j) for i in range(40) for j in range(i)]
    assert abs(statistics.fmean(errors)) < 0.01 and statistics.stdev(errors) < 0.05  # unbiased, 128 draws each
    stays = experiments.without_near_copies(data, threshold=0.5, n=2)
    assert 10 < len(stays) < 250
    for i in range(300):
        nearest = max((jaccard(i, j) for j in stays if j < i), default=0)
        assert nearest < 0.65 if i in stays else nearest > 0.35
    exact = experiments.without_near_copies(data, threshold=1.0, n=2)
    assert len(exact) == len({frozenset(s) for s in sets})


# ---------------------------------------------------------------------------------------------------------- selections


@pytest.fixture(scope="module")
def trained_run(build):
    """A run whose adapters are not at their start."""
    spec = build("colm-grad-sqrt", "copies")
    run = convergence.load_run(spec)
    convergence.measure(run, spec)
    return run


@pytest.mark.parametrize("name", experiments.SELECTIONS)
def test_selections(trained_run, name):
    """A full coreset without repeats, weights of the chosen rows, probes where there were passes, the same again."""
    run, (choose, _) = trained_run, experiments.SELECTIONS[name]
    pool = train_colm.draw_pool(len(run.train), 16, 0, 5)
    choices = []
    for _ in range(2):
        run.memory = {}
        choices.append(choose(run, pool, 6, train_colm.Clock(run.device)))
    choice = choices[0]
    assert choice.index.tolist() == choices[1].index.tolist()
    assert len(choice.index) == len(set(choice.index.tolist())) == 12
    expected = torch.zeros(16)
    expected[choice.index] = run.train.supervised_tokens(pool[choice.index]).sqrt()
    if name != "infobatch": assert torch.equal(choice.weight, expected)
    small = experiments.is_small(run, pool)
    assert 0 < small.sum() < 12 and torch.equal(choice.kept, small)
    if name not in ("losses", "least_like", "fresh"):
        assert set(small.nonzero()[:, 0].tolist()) <= set(choice.index.tolist())
    probed = {"losses": pool, "least_like": pool[:0], "fresh": pool[:0], "tfidf-medoids": pool[:0]}
    rows = probed.get(name, pool[~small])
    assert choice.probe_tokens == sum(run.train.length(row) for row in rows.tolist())


def test_losses_and_gradients_are_those_of_the_rows(trained_run):
    run, rows = trained_run, torch.tensor([3, 50, 7, 400, 12])
    alone = [experiments.mean_losses(run, rows[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(experiments.mean_losses(run, rows), torch.cat(alone), rtol=1e-4, atol=1e-5)
    alone = [experiments.last_v_gradients(run, rows[i : i + 1], 0) for i in range(5)]
    torch.testing.assert_close(experiments.last_v_gradients(run, rows, 0), torch.cat(alone), rtol=1e-3, atol=1e-6)


def test_what_losses_and_unlearnt_take(trained_run):
    run, pool = trained_run, train_colm.draw_pool(len(trained_run.train), 16, 0, 5)
    losses = experiments.mean_losses(run, pool)
    taken = experiments.largest_losses(run, pool, 0, None).index
    assert losses[taken].min() >= losses[[i for i in range(16) if i not in taken.tolist()]].max()
    others = (~experiments.is_small(run, pool)).nonzero()[:, 0]
    lowest = others[losses[others].argsort()[: round(len(others) / 3)]]
    left_out = 16 - 12
    taken = set(experiments.unlearnt(run, pool, 0, None).index.tolist())
    assert len(taken & set(lowest.tolist())) == max(0, len(lowest) - left_out)


def test_alternate(trained_run):
    run, pool = trained_run, train_colm.draw_pool(len(trained_run.train), 16, 0, 5)
    even, odd = (experiments.alternate(run, pool, step, train_colm.Clock(run.device)) for step in (4, 5))
    medoids = train_colm.choose_coreset(run, pool, 4, train_colm.Clock(run.device))
    assert even.index.tolist() == medoids.index.tolist() and even.probe_tokens == medoids.probe_tokens > 0
    assert odd.probe_tokens == 0


def test_recent_rows_are_avoided(trained_run):
    """Rows taken a step ago come last, and what is not like them comes first."""
    run, order = trained_run, torch.randperm(len(trained_run.train), generator=torch.Generator().manual_seed(0))
    for choose in (experiments.least_like, experiments.fresh):
        run.memory = {}
        choose(run, order[:12], 0, None)
        likeness = experiments.likeness(run, order[4:20])
        assert likeness[:8].min() > 0.999 and likeness[8:].min() < 0.9
        choice = choose(run, order[4:20], 1, None)
        assert len(run.memory["taken"]) == 24 and "bags" not in run.memory
        fresh = set((likeness < 0.8).nonzero()[:, 0].tolist())
        assert fresh and fresh <= set(choice.index.tolist())


def test_tf_idf(trained_run):
    run, data = trained_run, trained_run.train
    run.memory = {}
    bags = experiments.tf_idf(run, torch.tensor([0, 1]))
    ids = data.example(1).ids.tolist()
    weights = {}
    for token in set(ids):
        holds = sum(token in data.ids[a:b].tolist() for a, b in zip(data.offsets, data.offsets[1:], strict=False))
        weights[token] = ids.count(token) * torch.tensor(len(data) / holds).log().item()
    norm = sum(w * w for w in weights.values()) ** 0.5
    expected = torch.zeros(bags.shape[1])
    for token, weight in weights.items():
        expected[token] = weight / norm
    torch.testing.assert_close(bags[1], expected, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- whole runs


def test_it_is_the_trainers_own_training(build, work):
    """With a budget in steps, the same rows and held-out loss as train_colm.py itself."""
    spec = build("colm-grad", steps=4)
    run = convergence.load_run(spec)
    result = convergence.measure(run, spec)
    again = convergence.load_run(spec)
    again.args.output_dir, again.args.eval_every = str(work / "own"), 4
    Path(again.args.output_dir).mkdir()
    train_colm.train_loop(again, 0)
    assert all(torch.equal(p, q) for p, q in zip(run.trained, again.trained, strict=True))
    metrics = train_colm.read_records(work / "own" / "metrics.jsonl")
    assert sum(r["tokens"] for r in metrics) == result["tokens"]
    assert sum(r["probe_tokens"] for r in metrics) == result["probe_tokens"] > 0
    own = train_colm.read_records(work / "own" / "eval.jsonl")[-1]
    assert [own[key] for key in convergence.MEASURES.values()] == result["eval"][-1]["report"]
    assert result["eval"][-1]["tune"] != result["eval"][-1]["report"]


@pytest.mark.parametrize("setting", ["full-16", "random", "colm-grad", "losses"])
def test_the_cost_is_spent(build, setting):
    """Trained tokens and priced probes add up to the budget, but for the last step; the rate falls to nearly 0."""
    spec = build(setting, budget="cost", steps=6, extra=["--price", "0.5"])
    run, rates = convergence.load_run(spec), []
    step_of = run.optimizer.step
    run.optimizer.step = lambda: (rates.append(run.optimizer.param_groups[0]["lr"]), step_of())
    result = convergence.measure(run, spec)
    average = len(run.train.ids) / len(run.train)
    assert spec["amount"] == pytest.approx(6 * 12 * average)
    spent = result["tokens"] + 0.5 * result["probe_tokens"]
    assert spec["amount"] <= spent < spec["amount"] * (1 + 1.5 / result["steps"])
    assert (result["probe_tokens"] > 0) == (setting in ("colm-grad", "losses"))
    assert rates[0] == 0 and max(rates) > 5e-3 and rates[-1] < 0.5 * max(rates) and len(rates) == result["steps"]
    assert [record["step"] for record in result["eval"]][-1] == result["steps"]
    assert [round(3 * r["spent"] / spec["amount"]) for r in result["eval"]][:1] == [0]


def test_marks_of_what_was_taken(build, monkeypatch):
    spec = build("full-16", "copies+noise", steps=4)
    run = convergence.load_run(spec)
    marks = convergence.load_data(spec["data"])["marks"]
    taken = convergence.measure(run, spec)["taken"]
    rows = train_colm.draw_pool(len(run.train), 16, 1, 2)
    rows = rows[~experiments.is_small(run, rows)]
    for name in ("copies", "noise"):
        assert taken[name][2] == pytest.approx(marks[name][rows].float().mean().item())
    assert convergence.eighths([0.5, None, 1.0]) == [None, None, 0.5, None, None, None, None, 1.0]


def run_json(setting, rate, seed, losses, regime="clean", budget="cost", **more):
    evals = [{"spent": x, "step": x, "tune": [y] * 3, "report": [y, y + 1, y + 2]} for x, y in enumerate(losses)]
    run = {"cell": f"{regime} {setting} {budget}", "regime": regime, "setting": setting, "budget": budget}
    run |= {"rate": rate, "seed": seed, "steps": 240, "tokens": 2.8e6, "probe_tokens": 0, "eval": evals}
    return run | {"diverged": False, "taken": {}, "code": "x", "card": "y"} | more


def test_the_rate_is_chosen_on_the_other_half():
    runs = [run_json("a", rate, 1, [3, y]) for rate, y in ((1e-3, 1.5), (2e-3, 1.2), (3e-3, 1.3))]
    runs[2]["eval"][-1]["report"] = [0, 0, 0]  # what is reported has no say
    assert convergence.best_rate(runs, "clean a cost") == 2e-3
    runs[1]["diverged"] = True
    assert convergence.best_rate(runs, "clean a cost") == 3e-3
    runs[1]["diverged"] = False
    runs += [run_json("a", 2e-3, 2, [3, 1.22]), run_json("b", 1e-3, 1, [3, 1.0]), run_json("b", 2e-3, 1, [3, 2.0])]
    runs += [run_json("a", 1e-3, 1, [3, 2], "noise", taken={"noise": [0.3] * 7 + [None]})]
    text = convergence.tables(runs)
    assert "| a | 0.002 | 2 | 240 | 2.80 | 0.00 | 1.210 ± 0.014 | 2.210 ± 0.014 | 3.210 ± 0.014 |" in text
    assert text.index("| b | 0.001 | 1 |") < text.index("| a | 0.002 |")  # least loss first
    assert "share of noise" in text and "| 0.30 | - |" in text


def test_what_runs_next():
    cells, rates, begun, done = [Cell("clean", "a", "cost", 3), Cell("clean", "b", "cost", 1)], [1.0, 2.0], set(), []

    def following():
        item = convergence.next_of(cells, rates, done, begun)
        return item and (item[0].setting, *item[1:])

    assert [following() for _ in range(5)] == [("a", 1.0, 1), ("a", 2.0, 1), ("b", 1.0, 1), ("b", 2.0, 1), None]
    done += [run_json("a", 1.0, 1, [2])]
    assert following() is None  # the second seed waits for all rates of the first
    done += [run_json("a", 2.0, 1, [1])]
    assert [following() for _ in range(3)] == [("a", 2.0, 2), ("a", 2.0, 3), None]


class InProcess:
    """Stands in for Popen: the worker without another start of Python."""

    returncode = None

    def __init__(self, command, stdin, stdout, stderr, env, text):
        assert command[1:] == [convergence.__file__, "--worker"]
        self.stdin, self.log, self.device = self, stderr.name, env["CUDA_VISIBLE_DEVICES"]

    def write(self, line):
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
                run = run_json("a", 1.0, int(Path(self.written).stem), [2], amount=1, price=1, seconds=1, weights="")
                Path(self.written).write_text(json.dumps(run))
            return None

    monkeypatch.setattr(convergence.torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setattr(convergence.subprocess, "Popen", Fake)
    own = convergence.build_parser().parse_args(["--learning_rates", "1", "2", "3", "4", "--jobs", "4"])

    def spec_of(cell, rate, seed):
        name = f"{int(rate) if seed == 1 else 10 + seed}"
        return {"output": str(tmp_path / f"{name}.json"), "cell": cell.name, "rate": rate, "seed": seed}

    done = []
    cells = [Cell("clean", "a", "cost", 1)]
    assert convergence.run_all(cells, own, spec_of, done, lambda: None, float("inf")) == []
    assert [device for device, _ in started] == (expected * 4)[:4] and len(done) == 4


def test_a_whole_command(work, capsys, monkeypatch):
    """Several cells, two rates, a setting that fails, nothing done twice, what is known not at all, and figures."""
    monkeypatch.setattr(convergence.signal, "signal", lambda *_: None)
    monkeypatch.setitem(convergence.SETTINGS, "random", "--selection random --lora_target_modules nothing")
    output, more = work / "results.json", work / "more.json"
    command = f"{FLAGS} --steps 2 --jobs 2 --work {work} --output {output} --learning_rates 1e-3 1e-2".split()
    command += ["--cells", "clean,copies:dedup+random_keep-sqrt:cost:2"]
    with monkeypatch.context() as patch:
        patch.setattr(convergence.subprocess, "Popen", InProcess)
        assert convergence.main([*command, "clean:random:steps:1"]) == 1
    result = json.loads(output.read_text())
    assert len(result["problems"]) == 2 and all(
        "clean random steps" in p and "nothing" in p for p in result["problems"]
    )
    ran = [(run["cell"], run["rate"], run["seed"]) for run in result["runs"]]
    for regime in ("clean", "copies"):
        name = f"{regime} dedup+random_keep-sqrt cost"
        best = convergence.best_rate(result["runs"], name)
        assert sorted(one for one in ran if one[0] == name) == sorted(
            [(name, 1e-3, 1), (name, 1e-2, 1), (name, best, 2)]
        )
    assert "copies: " in (out := capsys.readouterr().out) and "rows are left without near copies" in out

    assert convergence.main(command) == 0  # no process is started: all runs are there
    again = json.loads(output.read_text())["runs"]
    assert sorted(map(str, again)) == sorted(map(str, result["runs"]))
    elsewhere = [*command[: command.index("--work")], "--work", str(work / "other"), "--output", str(more)]
    elsewhere += ["--learning_rates", "1e-3", "1e-2", "--known", str(output), *command[command.index("--cells") :]]
    assert convergence.main(elsewhere) == 0 and len(json.loads(more.read_text())["runs"]) == 6
    capsys.readouterr()
    assert convergence.main(["--show", str(output)]) == 0
    assert "**copies, equal cost: share of copies among rows not kept**" in capsys.readouterr().out

    pytest.importorskip("matplotlib")
    plot_convergence.main([str(output)])
    assert {path.name for path in work.glob("*.png")} == {"results-cost.png", "results-cost-taken.png"}
    with pytest.raises(SystemExit, match="--settings nothing is not in the file, which has dedup"):
        plot_convergence.main([str(output), "--settings", "nothing"])


def test_a_real_worker_process(work, capsys, monkeypatch):
    monkeypatch.setattr(convergence.signal, "signal", lambda *_: None)
    command = f"{FLAGS} --steps 1 --work {work} --output {work / 'one.json'} --learning_rates 1e-2".split()
    assert convergence.main([*command, "--cells", "clean:random_keep:steps:1"]) == 0
    (run,) = json.loads((work / "one.json").read_text())["runs"]
    assert run["steps"] == 1 and len(run["weights"]) == 16 and not run["diverged"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--cells clean:random:steps", "is not REGIMES:SETTINGS:BUDGETS:SEEDS"),
        ("--cells clean:random:steps:0", "is not REGIMES:SETTINGS:BUDGETS:SEEDS"),
        ("--cells copies+nothing:random:steps:1", "the regime nothing is unknown"),
        ("--cells clean:nothing-sqrt:steps:1", "the setting nothing-sqrt is unknown"),
        ("--cells clean:random:seconds:1", "the budget seconds is unknown"),
        ("--steps 0", "--steps 0 is out of range"),
        ("--price -1", "--price -1.0 is out of range"),
        ("--held_out 1", "--held_out 1 of"),
        ("--no_such_flag 1", "no_such_flag"),
        ("--seed 1", "--seed is not for train_colm.py here"),
        ("--learning_rate 1", "--learning_rate is not for train_colm.py here"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(convergence.signal, "signal", lambda *_: None)
    with pytest.raises(UserError, match=message):
        convergence.main([*flags.split(), "--work", str(tmp_path)])

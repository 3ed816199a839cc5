"""benchmarks/convergence.py: the split, the regimes, the selections to try out, and whole commands at tiny size."""

import argparse
import json
import os
import runpy
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

import colm_data  # noqa: E402
import train_colm  # noqa: E402
from colm_data import UserError, load_tokenizer  # noqa: E402

FLAGS = "--pool_size 16 --coreset_size 12 --lora_r 4 --lora_alpha 8 --max_tokens_per_micro_batch 400 --held_out 40"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    convergence.SETTINGS["full-16"] = "--selection full --pool_size 16 --coreset_size 16"
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def build(work):
    """build(setting, regime, budget, steps): the spec of a run at tiny size."""

    def build(setting, regime="clean", budget="steps", steps=3, extra=()):
        command = [*FLAGS.split(), "--steps", str(steps), "--budget", budget, *extra]
        command += ["--settings", setting, "--regimes", regime]
        own, flags = convergence.build_parser().parse_known_args(command)
        clean = convergence.tokenised(own, train_colm.parse_args(flags), work)
        (cell,) = convergence.cells_of(own)
        return convergence.make_spec(own, flags, cell, 1e-2, 1, clean)

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
    parts = convergence.split(rows, 10)
    assert sorted(i for part in parts.values() for i in part) == list(range(len(rows)))
    asked = {name: {convergence.question(rows[i]) for i in part} for name, part in parts.items()}
    assert {name: len(questions) for name, questions in asked.items()} == {"train": 43, "tune": 5, "report": 5}
    assert len(set.union(*asked.values())) == 50 + 3 and "" not in set.union(*asked.values())
    assert convergence.split(rows, 10) == parts


# ------------------------------------------------------------------------------------------------------------- regimes


def texts(data):
    """Each row as (prompt, answer)."""
    examples = [data.example(i) for i in range(len(data))]
    prompts = [colm_data.prompt_tokens(example) for example in examples]
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
    head, tail = colm_data.template([clean_rows.example(i) for i in range(len(data))])
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
    rows = [data.example(i) for i in range(300)]
    pairs, starts = colm_data.neighbours(rows, *colm_data.template(rows))
    sets = [set(pairs[a:b].tolist()) for a, b in zip(starts, [*starts[1:], len(pairs)], strict=True)]

    def jaccard(i, j):
        return len(sets[i] & sets[j]) / len(sets[i] | sets[j])

    with monkeypatch.context() as patch:
        patch.setattr(colm_data, "HASHES", 2048)  # with 128 the pairs' common tokens move all estimates by up to 0.02
        values = colm_data.minhash(data)
    errors = [(values[i] == values[j]).mean() - jaccard(i, j) for i in range(40) for j in range(i)]
    assert abs(statistics.fmean(errors)) < 0.005 and statistics.stdev(errors) < 0.0125  # unbiased
    stays = experiments.without_near_copies(data)
    assert 10 < len(stays) < 250
    for i in range(300):
        nearest = max((jaccard(i, j) for j in stays if j < i), default=0)
        assert nearest < 0.65 if i in stays else nearest > 0.35
    exact = data.without_near_copies(1.0)
    assert len(exact) == len({frozenset(s) for s in sets})


def test_copies_are_removed(clean_rows, monkeypatch):
    monkeypatch.setattr(experiments, "ORIGINALS", 20)
    data, _ = experiments.spoil(clean_rows, "copies", 0, 512)
    stays = experiments.without_copies(data)
    whole = texts(data)
    assert [whole[i] for i in stays] == list(dict.fromkeys(whole)) and len(stays) < len(data) / 2


# ---------------------------------------------------------------------------------------------------------- selections


@pytest.mark.parametrize("setting", ["fresh_source", "fresh_wide"])
def test_fresh_settings_pass_over_copies_and_leave_the_mixture(build, setting):
    """As many rows of small sources as random_keep has of pools of K / N = 1 / 2, on average; fewer copies."""
    spec = build(setting, "copies")
    run = convergence.load_run(spec)
    marks = convergence.load_data(spec["data"])["marks"]["copies"]
    run.args.coreset_size, run.args.pool_size = 12, 48 if setting == "fresh_wide" else 24
    shares = {"small": [0, 0], "copies": [0, 0]}  # of a random half of the pool, of what is taken
    for step in range(60):
        pool = train_colm.draw_pool(len(run.train), run.args.pool_size, 0, step)
        choice = train_colm.choose_coreset(run, pool, step, train_colm.Clock(run.device))
        rows = pool[choice.index]
        run.taken = torch.cat([run.taken, rows])
        is_small = torch.isin(run.train.sources, torch.tensor(sorted(run.keep)))
        assert len(rows) == 12 and choice.probe_tokens == 0
        shares["small"][0] += int(is_small[pool].sum()) * 24 / len(pool)
        shares["small"][1] += int(is_small[rows].sum())
        shares["copies"][0] += marks[pool][~is_small[pool]].float().mean().item()
        shares["copies"][1] += marks[rows][~is_small[rows]].float().mean().item()
    assert shares["small"][1] == pytest.approx(shares["small"][0], rel=0.15)
    assert shares["copies"][1] < 0.8 * shares["copies"][0]


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


@pytest.mark.parametrize("setting", ["full-16", "random", "colm-grad", "fresh_source"])
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
    assert (result["probe_tokens"] > 0) == (setting == "colm-grad")
    assert rates[0] == 0 and max(rates) > 5e-3 and rates[-1] < 0.5 * max(rates) and len(rates) == result["steps"]
    assert [record["step"] for record in result["eval"]][-1] == result["steps"]
    assert [r["spent"] > spec["amount"] * (i + 1) / 3 for i, r in enumerate(result["eval"])] == [True] * 3


def test_marks_of_what_was_taken(build):
    spec = build("full-16", "copies+noise", steps=8)
    run = convergence.load_run(spec)
    marks = convergence.load_data(spec["data"])["marks"]
    taken = convergence.measure(run, spec)["taken"]
    rows = train_colm.draw_pool(len(run.train), 16, 1, 2)
    rows = rows[[int(q) not in run.keep for q in run.train.sources[rows]]]
    for name in ("copies", "noise"):
        assert taken[name][2] == pytest.approx(marks[name][rows].float().mean().item(), abs=1e-4)
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
    assert "**noise, equal cost**" in text


def test_what_is_yet_to_be_made():
    own = argparse.Namespace(learning_rates=[1.0, 2.0], seeds=3)
    cells, done = [Cell("clean", "a", "cost"), Cell("clean", "b", "cost")], []

    def names(first_seeds):
        return [(cell.setting, *rest) for cell, *rest in convergence.missing(cells, own, done, first_seeds)]

    assert names(True) == [("a", 1.0, 1), ("a", 2.0, 1), ("b", 1.0, 1), ("b", 2.0, 1)] and names(False) == []
    done += [run_json("a", 1.0, 1, [2]), run_json("a", 2.0, 1, [1]), run_json("a", 2.0, 3, [1])]
    assert names(True) == [("b", 1.0, 1), ("b", 2.0, 1)]
    assert names(False) == [("a", 2.0, 2)]  # at the best rate; b has none yet


@pytest.mark.parametrize(
    "listed, count, expected", [(None, 2, ["0", "1"]), ("3, 5", 2, ["3", "5"]), (None, 0, [""]), ("", 0, [""])]
)
def test_visible_devices(monkeypatch, listed, count, expected):
    monkeypatch.setattr(convergence.torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert convergence.visible_devices() == expected


def test_a_whole_command(work, capsys, monkeypatch):
    """Several cells, two rates, a setting that fails, nothing made twice, another command, and figures."""
    monkeypatch.setitem(convergence.SETTINGS, "random", "--selection random --lora_target_modules nothing")
    output = work / "results.json"
    command = f"{FLAGS} --steps 2 --work {work} --output {output} --learning_rates 1e-3 1e-2".split()
    two = ["--regimes", "clean", "copies", "--settings", "dedup+random_keep-sqrt", "--seeds", "2"]
    assert convergence.main([*command, *two]) == 0
    assert "copies: dedup leaves " in (shown := capsys.readouterr().out)
    runs = json.loads(output.read_text())["runs"]
    made = [(run["cell"], run["rate"], run["seed"]) for run in runs]
    for regime in ("clean", "copies"):
        name = f"{regime} dedup+random_keep-sqrt cost"
        best = convergence.best_rate(runs, name)
        assert sorted(one for one in made if one[0] == name) == sorted(
            [(name, 1e-3, 1), (name, 1e-2, 1), (name, best, 2)]
        )
        assert f"**{regime}, equal cost**" in shown

    with monkeypatch.context() as patch:
        patch.setattr(convergence, "attempt", None)  # no run is made
        assert convergence.main([*command, *two]) == 0
    assert convergence.main([*command, "--settings", "random", "--budget", "steps"]) == 1
    assert capsys.readouterr().err.count("warning: clean random steps") == 2
    assert json.loads(output.read_text())["runs"] == runs
    with pytest.raises(UserError, match="holds runs with other settings"):
        convergence.main([*command, "--steps", "3"])

    pytest.importorskip("matplotlib")
    plot_convergence.main([str(output)])
    assert {path.name for path in work.glob("*.png")} == {"results-cost.png", "results-cost-taken.png"}
    with pytest.raises(SystemExit, match="--settings nothing is not in the file, which has dedup"):
        plot_convergence.main([str(output), "--settings", "nothing"])


def test_two_processes(work):
    command = f"{FLAGS} --steps 1 --work {work} --output {work / 'two.json'} --jobs 2 --budget steps".split()
    assert convergence.main([*command, "--learning_rates", "1e-3", "1e-2", "--settings", "random_keep"]) == 0
    runs = json.loads((work / "two.json").read_text())["runs"]
    assert sorted(run["rate"] for run in runs) == [1e-3, 1e-2]
    assert all(run["steps"] == 1 and not run["diverged"] and "accuracy" not in run for run in runs)


@pytest.mark.parametrize("kind", ["tiny adapter", "tiny model", "adapter of a named model"])
def test_scores(tmp_path, kind):
    """What was trained answers questions, by eval_math.py: an adapter finds its base, the trainer's tiny model too."""
    flags = ["--lora_r", "0"] if kind == "tiny model" else []
    if kind == "adapter of a named model":
        args = train_colm.parse_args(["--output_dir", str(tmp_path), "--seed", "3"])
        tokenizer, model = load_tokenizer(args), str(tmp_path / "model")
        train_colm.demo_model(args, tokenizer).save_pretrained(model)
        tokenizer.save_pretrained(model)
        flags = ["--model", model]
    questions = tmp_path / "sums.json"
    questions.write_text(json.dumps([{"question": "What is 1 + 1?", "answer": 2}]))
    command = [*FLAGS.split(), *flags, "--steps", "1", "--work", str(tmp_path), "--learning_rates", "1e-3"]
    command += ["--output", str(tmp_path / "scores.json"), "--accuracy", f"--tasks {questions} --max_new_tokens 2"]
    assert convergence.main([*command, "--settings", "random_keep"]) == 0
    (run,) = json.loads((tmp_path / "scores.json").read_text())["runs"]
    assert run["accuracy"] == {"sums": 0.0} and "per example | sums |" in convergence.tables([run])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--regimes copies+nothing", "--regimes nothing is unknown"),
        ("--settings nothing-sqrt", "--settings nothing-sqrt is unknown"),
        ("--settings half+random", "--settings half.random is unknown"),
        ("--budget seconds", "invalid choice: 'seconds'"),
        ("--steps 0", "--steps 0 is out of range"),
        ("--price -1", "--price -1.0 is out of range"),
        ("--held_out 1", "--held_out 1 of"),
        ("--no_such_flag 1", "no_such_flag"),
        ("--seed 1", "--seed is not for train_colm.py here"),
        ("--learning_rate 1", "--learning_rate is not for train_colm.py here"),
        ("--accuracy=--nothing", "--accuracy: .*--nothing"),
        ("--accuracy=--mode=pot", "--accuracy: --mode pot runs programs"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        convergence.main([*flags.split(), "--work", str(tmp_path), "--output", str(tmp_path / "out.json")])


def test_an_output_that_cannot_be_used_is_told_before_the_first_run(tmp_path):
    assert convergence.open_output(tmp_path / "new/folder/map.json", {}) == []
    assert (tmp_path / "new/folder").is_dir()
    (tmp_path / "cut.json").write_text('{"settings": {')
    for path in (tmp_path / "cut.json", tmp_path / "cut.json/map.json"):  # cut short; in a "folder" that is a file
        with pytest.raises(convergence.UserError, match="can't be used"):
            convergence.open_output(path, {})


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("step_time", "--learning_rates 1"),
        ("step_time", "--train_file nowhere.jsonl --tokenizer nowhere"),
        ("spsa_precision", "--learning_rates 1"),
        ("trainer_comparison", "--learning_rates 1"),
        ("eval_speed", "--model nowhere --tokenizer nowhere"),
        ("eval_speed", "--model nowhere --questions nowhere.jsonl"),
        ("convergence", "--learning_rate_s 1"),
    ],
)
def test_a_bad_flag_of_a_benchmark_is_told_in_one_line(script, flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(REPO / "benchmarks" / f"{script}.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err.strip().splitlines()[-1]

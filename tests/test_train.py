"""train_colm.py launched as users launch it: one process, DDP, FSDP2, two hosts, killed, resumed and mistreated.

Runs of two ranks share a launch, since starting Python takes longer than training:
    torchrun --nproc_per_node 2 tests/test_train.py {ddp,fsdp} RUNS.json
"""

import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))

import colm_data  # noqa: E402
import train_colm  # noqa: E402
from train_colm import cli, read_records  # noqa: E402

SCRIPT = str(REPO / "train_colm.py")
os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}  # for subprocesses too
COMMON = "--pool_size 24 --coreset_size 10 --lora_r 4 --lora_alpha 8 --sparsify_dims 40 --max_steps 5 --warmup_ratio 0 "
COMMON += "--max_tokens_per_micro_batch 600 --max_length 128 --learning_rate 1e-2"
RUNS = {  # every selection, probe and way to train; the same results are due on one process and on two ranks
    "spsa": "--num_directions 2",
    "paper": "--num_directions 1",  # one direction: features lie on a line, where medoids often tie
    "grad": "--probe grad --gradient_checkpointing --medoid_weights cluster",
    "packed": "--probe grad --packing",
    "spsa_full": "--lora_r 0 --learning_rate 1e-3 --direction run --gradient_checkpointing",
    "grad_full": "--lora_r 0 --learning_rate 1e-3 --probe grad --similarity cosine",
    "random": "--selection random --gradient_checkpointing",
    "random_keep": "--selection random_keep --lora_r 0 --learning_rate 1e-3",
    "fresh": "--selection fresh --lora_r 0 --learning_rate 1e-3",
    "all": "--selection full --packing",
    "clusters": "--probe grad --cluster_sources 3 --cluster_warmup 1 --cluster_updates 1",
}
UNPROBED = ("random", "random_keep", "fresh", "all")
DROPOUT = "--lora_dropout 0.2 --direction step --save_every 2 --max_steps 6"
RESUMED = {"colm": "", "fresh": "--selection fresh"}  # stopped on two ranks, too
SMALL = {"add", "count", "sort", "last"}


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def own_signals():
    """The trainer's signal handlers end with the block."""
    before = [(number, signal.getsignal(number)) for number in STOPPING]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def train(flags: list[str], stop_after: int | None = None) -> int:
    """Run the trainer in this process, with a SIGTERM after one of its steps; returns the exit code."""
    original = train_colm.append

    def append(path, record):
        original(path, record)
        if path.name == "selection.jsonl" and record["step"] == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with mock.patch.object(train_colm, "append", append), own_signals():
            train_colm.main(flags)
        return 0
    except SystemExit as exit_:
        return exit_.code


def free_port() -> str:
    """Below the range that the kernel hands out by itself: there a waiting client can even connect to itself."""
    while True:
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", random.randint(15000, 30000)))
            return str(s.getsockname()[1])


def launch(*command: str, timeout: float = 120, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run([*command], capture_output=True, text=True, timeout=timeout, cwd=cwd)


def torchrun(*command: str, **options) -> subprocess.CompletedProcess:
    """Two ranks on this host."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    return launch(*launcher, *command, **options)


def accelerate_launch(*flags: str) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", *flags]


def steps(folder: Path, name: str = "metrics") -> list[dict]:
    return read_records(folder / f"{name}.jsonl")


def selection(folder: Path) -> str:
    return (folder / "selection.jsonl").read_text()


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in steps(folder)]


def weights(folder: Path) -> bytes:
    return next((folder / "final").glob("*.safetensors")).read_bytes()


def assert_identical(a: Path, b: Path) -> None:
    """Bit for bit the same run."""
    assert losses(a) == losses(b) and len(losses(a)) > 0
    assert selection(a) == selection(b)
    assert steps(a, "eval") == steps(b, "eval")
    assert weights(a) == weights(b)


def assert_close(a: Path, b: Path) -> None:
    """The same coresets, and the same losses and gradients but for rounding."""
    order_free = [[sorted(r[key]) for key in ("pool", "kept", "selected")] for r in steps(a, "selection")]
    assert order_free == [[sorted(r[key]) for key in ("pool", "kept", "selected")] for r in steps(b, "selection")]
    assert losses(a) == pytest.approx(losses(b), rel=2e-5) and len(losses(a)) == 5
    norms = [[r["grad_norm"] for r in steps(folder)] for folder in (a, b)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    for key in ("eval_loss", "eval_loss_source_mean", "eval_loss_per_token", "eval_loss_of"):
        values = [steps(folder, "eval")[-1][key] for folder in (a, b)]
        assert values[0] == pytest.approx(values[1], rel=2e-5), key


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A folder with a tiny model, and a mixture whose rows 0 and 77 are too long to be kept."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = colm_data.demo_rows("train")
    random.Random(0).shuffle(rows)
    for at in (0, 77):
        rows.insert(at, {"source": "repeat", "instruction": "Go on.", "output": "ant bee " * 300})
    for name, part in (("train", rows), ("eval", colm_data.demo_rows("eval")[::2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    tokenizer = colm_data.demo_tokenizer()
    for name, size in (("model", 32), ("other_model", 48)):
        torch.manual_seed(0)
        sizes = {"hidden_size": size, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def flags(inputs):
    def of(out: Path, *texts: str) -> list[str]:
        files = ["--model", inputs / "model", "--train_file", inputs / "train.jsonl"]
        files += ["--eval_file", inputs / "eval.jsonl", "--output_dir", out]
        return [*map(str, files), *" ".join([COMMON, *texts]).split()]

    return of


@pytest.fixture(scope="session")
def one_process(flags, tmp_path_factory) -> Path:
    """A folder with every run of RUNS on one process."""
    folder = tmp_path_factory.mktemp("one")
    for name, text in RUNS.items():
        assert train(flags(folder / name, "--lora_dropout 0", text)) == 0
    return folder


@pytest.fixture(scope="session")
def two_ranks(flags, tmp_path_factory):
    """Folders with every run of RUNS on two ranks, and with a run that was stopped and one that was not."""

    def launch_all(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        runs = [(flags(folder / name, "--lora_dropout 0", text), None) for name, text in RUNS.items()]
        for name, text in RESUMED.items():
            runs.append((flags(folder / f"{name}_whole", DROPOUT, text), None))
            runs.append((flags(folder / f"{name}_stopped", DROPOUT, text), 3))
            runs.append((flags(folder / f"{name}_stopped", DROPOUT, text, "--resume auto"), None))
        (folder / "runs.json").write_text(json.dumps(runs))
        done = torchrun(__file__, kind, str(folder / "runs.json"), timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("stopped by SIGTERM after step 3") == len(RESUMED)
        return folder

    folders = {}
    return lambda kind: folders.get(kind) or folders.setdefault(kind, launch_all(kind))


@pytest.fixture(scope="session")
def whole(flags, tmp_path_factory) -> Path:
    """A run with dropout that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(flags(folder, DROPOUT)) == 0
    return folder


@pytest.fixture
def refused(capsys):
    """Run in this process; the trainer must end with exit code 2 and one line that has all the words."""

    def check(argv: list[str], *words: str) -> str:
        with pytest.raises(SystemExit) as exit_, own_signals():
            cli(argv)
        lines = capsys.readouterr().err.splitlines()
        messages = [line for line in lines if line.startswith("error: ")]
        assert exit_.value.code == 2 and len(messages) == 1 and not any("Traceback" in line for line in lines), lines
        assert all(word in messages[0] for word in words), messages[0]
        return messages[0]

    return check


# ---------------------------------------------------------------------------------------------- one run and its records


@pytest.mark.parametrize("name", [name for name in RUNS if name != "clusters"])
def test_records_tell_pool_kept_and_selected_rows_of_the_file(one_process, inputs, name):
    folder, rows = one_process / name, [json.loads(line) for line in (inputs / "train.jsonl").read_text().splitlines()]
    for metrics, record in zip(steps(folder), steps(folder, "selection"), strict=True):
        pool, kept, selected = (record[key] for key in ("pool", "kept", "selected"))
        assert len(set(pool)) == 24 and not {0, 77} & set(pool)  # those two rows were dropped
        small = [row for row in pool if rows[row]["source"] in SMALL]
        if name == "random":
            small = []
        if name == "fresh":  # where small sources fill a coreset, those in it are told
            small = set(small) & set(selected)
        assert sorted(kept) == sorted(small)
        assert len(set(selected)) == len(selected) == (24 if name == "all" else 10)
        assert set(selected) <= set(pool) and (set(kept) <= set(selected) or len(kept) > 10)
        assert (metrics["pool"], metrics["kept"], metrics["selected"]) == (24, len(kept), len(selected))
        seconds = [metrics[f"{phase}_s"] for phase in ("probe", "select", "train")]
        assert sum(seconds) == pytest.approx(metrics["step_s"], abs=1e-4) and metrics["peak_gb"] > 0.01
        assert (metrics["probe_s"] > 0) == (metrics["probe_tokens"] > 0) == (name not in UNPROBED)
    assert [r["step"] for r in steps(folder)] == [1, 2, 3, 4, 5]
    assert losses(folder)[-1] < losses(folder)[0]
    assert [r["lr"] for r in steps(folder)][0] in (1e-2, 1e-3)
    assert steps(folder, "eval")[-1]["eval_loss"] < steps(folder, "eval")[0]["eval_loss"]
    assert set(steps(folder, "eval")[-1]["eval_loss_of"]) == {row["source"] for row in rows}


def test_selections_draw_the_same_pools_and_pick_differently(one_process):
    pools = {name: [r["pool"] for r in steps(one_process / name, "selection")] for name in RUNS}
    assert all(pool == pools["spsa"] for pool in pools.values())
    picks = {name: str([sorted(r["selected"]) for r in steps(one_process / name, "selection")]) for name in RUNS}
    assert len({picks[name] for name in ("spsa", "grad", *UNPROBED)}) == 6


def picks_of(flags, folder: Path, rows: list[tuple[str, str]], *texts: str) -> list[dict]:
    """selection.jsonl of a run with --selection fresh, on rows given as (source, answer)."""
    folder.mkdir()
    made = [{"source": source, "instruction": "Go on.", "output": answer} for source, answer in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    own = f"--train_file {folder}/rows.jsonl --selection fresh --pool_size 20 --coreset_size 8"
    assert train(flags(folder / "out", own, *texts)) == 0
    return steps(folder / "out", "selection")


def different_answers(count: int) -> list[str]:
    """No two have more than one word in common."""
    alphabet = [a + b for a in "bcdfghjklmnpqrstvwz" for b in "aeiou"]
    rng = random.Random(0)
    return [" ".join("".join(rng.choices(alphabet, k=6)) for _ in range(4)) for _ in range(count)]


def test_without_copies_fresh_is_random_keep_for_several_epochs(flags, tmp_path):
    """And with them it is not. In a later epoch a row is no copy of itself."""
    answers = different_answers(60)
    rows = [("small" if i % 10 == 0 else "big", answer) for i, answer in enumerate(answers)]
    picks = picks_of(flags, tmp_path / "fresh", rows, "--max_steps 8")  # three pools an epoch
    assert picks == picks_of(flags, tmp_path / "random_keep", rows, "--max_steps 8 --selection random_keep")
    rows = [(source, answers[i // 2]) for i, (source, _) in enumerate(rows)]
    assert picks != picks_of(flags, tmp_path / "copies", rows, "--max_steps 8")


def test_copies_give_way_to_what_is_new_in_their_source(flags, tmp_path):
    """In `big` 40 of 100 rows are copies of one row, in `other` all of 40 are copies of each other."""
    answers = different_answers(62)
    rows = [("big", answer) for answer in answers[:60]] + [("big", answers[60])] * 40 + [("other", answers[61])] * 40
    copies, others = set(range(60, 100)), set(range(100, 140))
    picks = picks_of(flags, tmp_path / "run", rows, "--max_steps 7 --keep_sources none")
    for record in picks:
        pool, selected = set(record["pool"]), set(record["selected"])
        of_big = len(selected - others)
        assert len(selected) == 8 and of_big <= len(pool - copies - others)  # enough rows that are no copies
    taken = [row for record in picks for row in record["selected"]]
    assert len(copies.intersection(taken)) <= 1 and len(others.intersection(taken)) > 10
    metrics = steps(tmp_path / "run" / "out")
    assert sum(record["passed_over"] for record in metrics) > 7 and metrics[0].keys() == metrics[-1].keys()


@pytest.mark.parametrize("name", ["spsa", "packed", "spsa_full", "grad_full", "random_keep", "all"])
def test_gradient_checkpointing_changes_nothing(one_process, flags, tmp_path, name):
    switch = "--no-gradient_checkpointing" if "checkpointing" in RUNS[name] else "--gradient_checkpointing"
    assert train(flags(tmp_path, "--lora_dropout 0", RUNS[name], switch)) == 0
    assert_close(tmp_path, one_process / name)


@pytest.mark.parametrize("tokens", [1, 200, 100_000])
def test_micro_batches_change_nothing(one_process, flags, tmp_path, tokens):
    assert train(flags(tmp_path, "--lora_dropout 0", RUNS["spsa"], f"--max_tokens_per_micro_batch {tokens}")) == 0
    assert_close(tmp_path, one_process / "spsa")


def test_packing_changes_nothing_even_below_its_granularity(flags, tmp_path):
    for switch in ("--packing", "--no-packing"):
        assert train(flags(tmp_path / switch, "--lora_dropout 0 --probe grad --max_length 70", switch)) == 0
    assert_close(tmp_path / "--packing", tmp_path / "--no-packing")


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_compiling_changes_nothing(one_process, flags, tmp_path):
    assert train(flags(tmp_path, "--lora_dropout 0 --compile", RUNS["spsa"])) == 0
    assert_close(tmp_path, one_process / "spsa")


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_compiling_under_fsdp2_changes_nothing(one_process, flags, tmp_path):
    run = flags(tmp_path / "run", "--lora_dropout 0 --compile", RUNS["grad"])
    (tmp_path / "runs.json").write_text(json.dumps([(run, None)]))
    done = torchrun(__file__, "fsdp", str(tmp_path / "runs.json"), timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close(tmp_path / "run", one_process / "grad")


def test_dropout_is_redrawn_at_each_step_and_repeats_with_the_seed(whole, flags, tmp_path):
    assert train(flags(tmp_path / "again", DROPOUT)) == 0
    assert_identical(tmp_path / "again", whole)
    for name, change in (("seed", "--seed 1"), ("dropout", "--lora_dropout 0.1")):
        assert train(flags(tmp_path / name, DROPOUT, change)) == 0
        assert losses(tmp_path / name) != losses(whole)


def test_the_demo_needs_no_flags_and_ends_with_a_summary(tmp_path):
    done = launch(sys.executable, SCRIPT, cwd=tmp_path, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = map(float, re.search(r"held-out loss: ([\d.]+) -> ([\d.]+) in 40 steps", done.stdout).groups())
    assert after < before - 1
    table = re.findall(r"^(\w+) +(\d+) +(\d+) +(\d+) +(\d+)(  \(kept whole\))?$", done.stdout, re.MULTILINE)
    assert len(table) == 7 and {row[0] for row in table if row[5]} == SMALL
    for row in table:
        _, seen, kept, selected = map(int, row[1:5])
        assert seen == kept == selected if row[5] else seen > selected > kept == 0
    assert sum(int(row[2]) for row in table) == 40 * 64 and sum(int(row[4]) for row in table) == 40 * 32
    final = tmp_path / re.search(r"^adapter: (.*)$", done.stdout, re.MULTILINE)[1]
    base = AutoModelForCausalLM.from_pretrained(final.parent / "base")
    assert peft.PeftModel.from_pretrained(base, final).peft_config["default"].r == 16


# ------------------------------------------------------------------------------------------------------------ launching


def test_accelerate_launch_on_one_process(one_process, flags, tmp_path):
    command = accelerate_launch("--config_file", str(REPO / "accelerate_configs" / "cpu.yaml"), SCRIPT)
    done = launch(*command, *flags(tmp_path, "--lora_dropout 0", RUNS["spsa"]))
    assert done.returncode == 0, done.stderr[-2000:]
    assert_identical(tmp_path, one_process / "spsa")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_give_the_coresets_and_losses_of_one(one_process, two_ranks, kind, name):
    folder = two_ranks(kind)
    assert_close(folder / name, one_process / name)
    one, two = (load_file(next((f / name / "final").glob("*.safetensors"))) for f in (one_process, folder))
    assert one.keys() == two.keys() and all(one[key].shape == two[key].shape for key in one)


def two_hosts(folder: Path, *command: str) -> list[int | str]:
    """Exit codes of two launchers on one host, "hung" for one that does not end; output in `folder`/log0 and log1."""
    settings = ["--multi_gpu", "--mixed_precision=no", "--dynamo_backend=no", "--num_machines=2", "--num_processes=2"]
    settings += ["--main_process_ip=127.0.0.1", f"--main_process_port={free_port()}"]
    hosts, end = [], time.monotonic() + 90
    for rank in range(2):
        with open(folder / f"log{rank}", "w") as log:
            whole = [*accelerate_launch(*settings, f"--machine_rank={rank}", SCRIPT), *command]
            hosts.append(subprocess.Popen(whole, stdout=log, stderr=log, start_new_session=True))
    codes = []
    for host in hosts:
        try:
            codes.append(host.wait(timeout=max(1, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append("hung")
            os.killpg(host.pid, signal.SIGKILL)
    return codes


def test_two_hosts_train_together(two_ranks, flags, tmp_path):
    command = flags(tmp_path, "--lora_dropout 0", RUNS["spsa"])
    codes = two_hosts(tmp_path, *command)
    if "hung" in codes and not (tmp_path / "metrics.jsonl").exists():  # somebody else took the port meanwhile
        codes = two_hosts(tmp_path, *command)
    assert codes == [0, 0], [(tmp_path / f"log{rank}").read_text()[-2000:] for rank in range(2)]
    assert_identical(tmp_path, two_ranks("ddp") / "spsa")


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "text",
    [
        "",
        "--probe grad --packing",
        "--lora_r 0 --gradient_checkpointing",
        "--compile",
        "--selection fresh",
        "--selection fresh --cluster_sources 3 --cluster_warmup 2",
    ],
)
def test_a_resumed_run_is_bit_for_bit_an_uninterrupted_one(flags, tmp_path, capsys, text):
    assert train(flags(tmp_path / "whole", DROPOUT, text)) == 0
    folder = tmp_path / "stopped"
    assert train(flags(folder, DROPOUT, text), stop_after=3) == 0
    assert f"stopped by SIGTERM after step 3: resume from {folder / 'checkpoint-000003'}" in capsys.readouterr().out
    assert len(losses(folder)) == 3 and not (folder / "final").exists()
    free = "--save_every 1 --keep_checkpoints 7 --eval_every 100"  # settings that shape no result
    assert train(flags(folder, DROPOUT, text, free, "--resume auto"), stop_after=5) == 0
    for name in ("metrics.jsonl", "selection.jsonl"):  # records that a kill left beyond the checkpoint, one cut short
        (folder / name).write_text((folder / name).read_text() + '{"step": 6, "loss": 0}\n{"step": 7, "lo')
    assert train(flags(folder, DROPOUT, text, "--resume auto")) == 0
    assert_identical(folder, tmp_path / "whole")


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_resumed_run_is_bit_for_bit_an_uninterrupted_one_on_two_ranks(two_ranks, kind, name):
    assert_identical(two_ranks(kind) / f"{name}_stopped", two_ranks(kind) / f"{name}_whole")


def test_a_run_resumes_from_a_named_checkpoint_and_saves_again(whole, flags, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    assert [p.name for p in train_colm.checkpoints(folder)] == ["checkpoint-000004", "checkpoint-000006"]
    assert train(flags(folder, DROPOUT, f"--resume {folder}/checkpoint-000004"), stop_after=5) == 0
    assert Path(re.search(r"resume from (\S+)", capsys.readouterr().out)[1]).exists()
    assert len(losses(folder)) == 5
    assert train(flags(folder, DROPOUT, "--resume auto")) == 0
    assert_identical(folder, whole)


def test_resuming_a_finished_run_changes_nothing(whole, flags, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    assert train(flags(tmp_path / "run", DROPOUT, "--resume auto")) == 0
    assert_identical(tmp_path / "run", whole)


def test_old_checkpoints_and_leftovers_are_removed(flags, tmp_path):
    (tmp_path / "tmp-checkpoint-000002").mkdir()
    (tmp_path / "tmp-metrics.jsonl").write_text("cut sho")
    (tmp_path / "checkpoint-notes").mkdir()
    assert train(flags(tmp_path, "--save_every 1 --keep_checkpoints 3 --max_steps 5")) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        *("metrics.jsonl", "selection.jsonl", "eval.jsonl", "final", "checkpoint-notes", ".lock"),
        *("checkpoint-000003", "checkpoint-000004", "checkpoint-000005"),
    }


def test_without_saving_there_is_no_checkpoint(flags, tmp_path):
    assert train(flags(tmp_path, "--save_every 0 --max_steps 2")) == 0
    assert not [*tmp_path.glob("checkpoint-*")] and (tmp_path / "final").exists()


@pytest.mark.parametrize("text", ["--lora_dropout 0.3", "--lora_r 0 --learning_rate 1e-3"])
def test_the_final_model_gives_the_logits_of_the_trained_one(flags, inputs, tmp_path, text):
    ids, found = torch.arange(3, 60)[None], []

    @torch.no_grad()
    def summary(run, final):
        found.append(run.model(input_ids=ids).logits)
        return ""

    with mock.patch.object(train_colm, "summary", summary):
        assert train(flags(tmp_path, text)) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final" if "lora_r 0" in text else inputs / "model")
    untrained = AutoModelForCausalLM.from_pretrained(inputs / "model")
    if "lora_r 0" not in text:
        model = peft.PeftModel.from_pretrained(model, tmp_path / "final")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, found[0], rtol=0, atol=1e-5)
        assert (untrained(input_ids=ids).logits - found[0]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["packed", "spsa_full"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_final_model_of_two_ranks_has_the_evaluated_loss(two_ranks, flags, inputs, tmp_path, kind, name):
    folder = two_ranks(kind) / name
    model = AutoModelForCausalLM.from_pretrained(folder / "final" if name == "spsa_full" else inputs / "model")
    model = model if name == "spsa_full" else peft.PeftModel.from_pretrained(model, folder / "final")
    args = train_colm.parse_args(flags(tmp_path))
    held_out = train_colm.load_data(args, train_colm.load_tokenizer(args), show=False)[1]
    batch = train_colm.collate([held_out.example(i) for i in range(len(held_out))])
    with torch.no_grad():
        loss = train_colm.micro_batch_losses(model.eval(), train_colm.LabelledLogits(model), batch).mean()
    assert float(loss) == pytest.approx(steps(folder, "eval")[-1]["eval_loss"], rel=1e-5)


def start(*command: str, folder: Path) -> subprocess.Popen:
    """A run without an end, two steps under way."""
    process = subprocess.Popen(
        [*command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(steps(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


ENDLESS = "--save_every 0 --max_steps 100000"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_save_and_say_how_to_resume(flags, tmp_path, name):
    process = start(sys.executable, SCRIPT, *flags(tmp_path, ENDLESS), folder=tmp_path)
    try:
        process.send_signal(getattr(signal, name))
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    step = len(steps(tmp_path))
    assert process.returncode == 0 and step >= 2
    assert f"stopped by {name} after step {step}: resume from {tmp_path / f'checkpoint-{step:06d}'}" in output
    assert "--resume auto" in output
    assert [p.name for p in train_colm.checkpoints(tmp_path)] == [f"checkpoint-{step:06d}"]


def test_a_second_ctrl_c_ends_at_once():
    """A run that is asked twice within one step, which here never ends."""
    lines = [
        "import os, signal, time, types, train_colm",
        "run = types.SimpleNamespace(stop=None)",
        "train_colm.stop_on_signals(run)",
        "os.kill(os.getpid(), signal.SIGINT)",
        "print('asked by', run.stop, flush=True)",
        "os.kill(os.getpid(), signal.SIGINT)",
        "time.sleep(30)",
    ]
    done = launch(sys.executable, "-c", "\n".join(lines), timeout=60, cwd=REPO)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "asked by SIGINT\n")


def assert_ends_with_a_checkpoint(launcher: subprocess.Popen, number: signal.Signals, folder: Path) -> None:
    """A signal to the launcher alone ends an endless run that saves nothing by itself."""
    launcher.send_signal(number)
    deadline = time.monotonic() + 60
    while not train_colm.checkpoints(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        assert train_colm.checkpoints(folder)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ending_accelerate_launch_ends_the_run_with_a_checkpoint(flags, tmp_path, ranks):
    settings = ["--mixed_precision=no", "--dynamo_backend=no", "--num_machines=1", f"--num_processes={ranks}"]
    if ranks > 1:
        settings += ["--multi_gpu", f"--main_process_port={free_port()}"]
    launcher = start(*accelerate_launch(*settings, SCRIPT), *flags(tmp_path, ENDLESS), folder=tmp_path)
    assert_ends_with_a_checkpoint(launcher, signal.SIGTERM, tmp_path)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGKILL"])
def test_ranks_end_with_a_checkpoint_when_torchrun_ends_without_a_word(flags, tmp_path, name):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    launcher = start(*command, SCRIPT, *flags(tmp_path, ENDLESS), folder=tmp_path)
    assert_ends_with_a_checkpoint(launcher, getattr(signal, name), tmp_path)


def test_two_runs_never_share_an_output_folder(flags, tmp_path, refused):
    process = start(sys.executable, SCRIPT, *flags(tmp_path, ENDLESS), folder=tmp_path)
    try:
        refused(flags(tmp_path, ENDLESS, "--overwrite"), str(tmp_path), "in use by another process")
        assert process.poll() is None
    finally:
        process.kill()  # leaves a lock behind that nobody holds
        process.communicate(timeout=60)
    assert train(flags(tmp_path, "--overwrite --max_steps 2")) == 0


def test_a_refused_demo_leaves_the_base_model_of_the_running_one(tmp_path, refused):
    process = start(sys.executable, SCRIPT, "--output_dir", str(tmp_path), "--max_steps", "100000", folder=tmp_path)
    try:
        before = (tmp_path / "base" / "model.safetensors").read_bytes()
        refused(["--output_dir", str(tmp_path), "--seed", "1", "--overwrite"], "in use by another process")
        assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    finally:
        process.kill()
        process.communicate(timeout=60)


@pytest.mark.parametrize("name", ["", "final"])
def test_a_dangling_link_is_named(flags, tmp_path, refused, name):
    (tmp_path / "out").mkdir()
    link = tmp_path / "out" / name if name else tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    refused(flags(tmp_path / "out" if name else link), str(link), "nowhere", "remove the link")


def test_a_finished_run_with_a_constant_rate_can_be_extended(flags, tmp_path, refused):
    constant = DROPOUT + " --lr_scheduler constant"
    assert train(flags(tmp_path / "whole", constant, "--max_steps 6")) == 0
    assert train(flags(tmp_path / "run", constant, "--max_steps 4")) == 0
    assert train(flags(tmp_path / "run", constant, "--max_steps 6 --resume auto")) == 0
    for name in ("metrics", "selection"):
        drop_times = [{k: v for k, v in r.items() if k[-2:] not in ("_s", "gb")} for r in steps(tmp_path / "run", name)]
        whole = [{k: v for k, v in r.items() if k[-2:] not in ("_s", "gb")} for r in steps(tmp_path / "whole", name)]
        assert drop_times == whole
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    refused(flags(tmp_path / "run", constant, "--max_steps 90 --warmup_ratio 0.1 --resume auto"), "--warmup_ratio")
    warm = constant + " --warmup_ratio 0.5"
    assert train(flags(tmp_path / "warm", warm, "--max_steps 4")) == 0
    refused(flags(tmp_path / "warm", warm, "--max_steps 90 --resume auto"), "--max_steps 90", "warm-up", "4 steps done")
    resume = f"--max_steps 6 --resume {tmp_path}/warm/checkpoint-000002"  # 3 steps of warm-up after 2 of 4 steps
    refused(flags(tmp_path / "warm", warm, resume), "--max_steps 6", "warm-up", "2 steps done")


def test_a_checkpoint_is_an_adapter_that_peft_loads(whole, inputs):
    """Its weights are stored once."""
    checkpoint = whole / "checkpoint-000006"
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    model = peft.PeftModel.from_pretrained(base, checkpoint)
    stored = load_file(whole / "final" / "adapter_model.safetensors")
    assert torch.equal(
        peft.get_peft_model_state_dict(model)["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"],
        stored["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"],
    )
    assert (checkpoint / "adapter_model.safetensors").read_bytes() == weights(whole)
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert set(state) == {"step", "optimizer", "scheduler", "moments", "taken", "clusters"}
    numbers = [row for record in steps(whole, "selection") for row in record["selected"]]
    assert len(state["taken"]) == len(numbers) == 60


def test_tensorboard_continues_the_curves_of_a_resumed_run(flags, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curve() -> list[tuple[int, float]]:
        events = EventAccumulator(str(next((tmp_path / "tensorboard").iterdir())))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars("loss")]

    text = DROPOUT + " --report_to tensorboard --save_every 0"
    assert train(flags(tmp_path, text, "--save_every 2"), stop_after=5) == 0
    shutil.rmtree(tmp_path / "checkpoint-000005")  # as if killed before it: steps 5 and 6 are made again
    assert train(flags(tmp_path, text, "--resume auto")) == 0
    assert [step for step, _ in curve()] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in curve()] == pytest.approx(losses(tmp_path))
    assert train(flags(tmp_path, text, "--overwrite --max_steps 2")) == 0
    assert [step for step, _ in curve()] == [1, 2]


def test_the_picture_of_a_run_follows_it(flags, tmp_path):
    pytest.importorskip("matplotlib")
    assert train(flags(tmp_path, "--report_to png --eval_every 2 --max_steps 3")) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG") and not [*tmp_path.glob("tmp-*")]


@pytest.mark.parametrize("evaluated", [["left", "right"], []])
def test_the_picture_shows_every_held_out_source_and_needs_none(tmp_path, evaluated):
    """Clustered training rows have sources of other names; without --eval_file there is nothing to show."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    folder, drawn = tmp_path / "out", []
    files = tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"
    for file, sources in zip(files, (["all"], evaluated), strict=True):
        rows = [{"source": source, "prompt": f"w{i}", "completion": "w1"} for source in sources for i in range(12)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "--pool_size 8 --coreset_size 4 --max_steps 2 --cluster_sources 2 --cluster_warmup 1 --lora_r 2"
    argv = [*text.split(), "--report_to", "png", "--train_file", str(files[0]), "--output_dir", str(folder)]
    if evaluated:
        argv += ["--eval_file", str(files[1])]

    def save(figure, *args, **kwargs):
        drawn.append([line.get_label() for line in figure.axes[1].lines])
        Path(args[0]).touch()

    with mock.patch.object(Figure, "savefig", save), own_signals(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="No artists with labels")
        train_colm.main(argv)
    assert drawn[-1] == evaluated


def test_kill_9_at_any_moment_costs_only_the_steps_since_the_last_checkpoint(flags, tmp_path):
    """Every third kill comes at the start of a save, the others at random times. COLM_KILLS=20 does it 20 times."""
    kills, rng = int(os.environ.get("COLM_KILLS", 3)), random.Random(os.environ.get("COLM_KILLS_SEED", 0))
    text = f"{DROPOUT} --max_steps {6 + 12 * kills} --save_every 1 --eval_every 0 --lora_r 64"
    folder, in_a_save = tmp_path / "killed", 0
    for attempt in range(kills):
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *flags(folder, text, "--resume auto")], stderr=subprocess.PIPE, text=True
        )
        start = newest(folder)
        deadline = time.monotonic() + 60
        while process.poll() is None and newest(folder) <= start and time.monotonic() < deadline:
            time.sleep(0.001)
        if attempt % 3 == 0:
            while process.poll() is None and not [*folder.glob("tmp-checkpoint-*")]:
                pass
        else:
            time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, process.stderr.read()[-2000:]
        process.kill()
        process.communicate(timeout=60)
        in_a_save += bool([*folder.glob("tmp-*")])
        assert newest(folder) > start
    assert train(flags(folder, text, "--resume auto")) == 0
    assert train(flags(tmp_path / "whole", text)) == 0
    print(f"{kills} kills, {in_a_save} of them during a save")
    assert_identical(folder, tmp_path / "whole")


def newest(folder: Path) -> int:
    return max((int(p.name[-6:]) for p in train_colm.checkpoints(folder)), default=0)


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_directions_that_no_probe_takes_are_refused(flags, refused, tmp_path):
    refused(flags(tmp_path / "out", "--probe grad --num_directions 2"), "--num_directions 2 has no effect", "drop one")


def test_a_run_with_other_settings_is_not_resumed(whole, flags, inputs, refused, tmp_path):
    before = selection(whole)
    for change in ("--seed 1", "--learning_rate 2e-2", "--coreset_size 9", "--probe grad", "--num_directions 3"):
        name, value = change.split()
        refused(flags(whole, DROPOUT, change, "--resume auto"), name, str(float(value) if "rate" in name else value))
    refused(flags(whole, DROPOUT, "--max_steps 5 --resume auto"), "--max_steps is 5", "6")
    refused(flags(whole, DROPOUT, "--max_steps 9 --resume auto"), "--max_steps 9", "6", "cosine", "constant")
    lines = (inputs / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "changed.jsonl").write_text("".join([*lines[:-1], lines[-2]]))
    refused(flags(whole, DROPOUT, f"--train_file {tmp_path}/changed.jsonl --resume auto"), "training data")
    assert selection(whole) == before


def test_a_run_of_another_model_is_not_resumed(whole, flags, inputs, refused):
    refused(flags(whole, DROPOUT, f"--model {inputs}/other_model --resume auto"), "--model")


def test_attention_that_would_mix_packed_examples_is_refused(flags, refused, tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_stablelm())
    model.save_pretrained(tmp_path / "model")
    colm_data.demo_tokenizer().save_pretrained(tmp_path / "model")
    refused(flags(tmp_path / "run", f"--model {tmp_path}/model --packing"), "packed examples", "--no-packing")


def test_resuming_never_deletes_another_run_or_its_own_checkpoint(whole, flags, refused, tmp_path):
    assert train(flags(tmp_path / "other", DROPOUT, "--max_steps 3 --seed 5")) == 0
    before = sorted(path.name for path in (tmp_path / "other").iterdir())
    checkpoint = f"--resume {whole}/checkpoint-000004"
    refused(flags(tmp_path / "other", DROPOUT, checkpoint), "would delete what", "choose another folder")
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == before
    refused(flags(whole, DROPOUT, "--resume auto --overwrite"), "exclude each other")


def tiny_stablelm():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoConfig.for_model("stablelm", vocab_size=600, num_key_value_heads=4, **sizes)


def test_speed_and_memory_flags_may_change_on_resume(flags, tmp_path):
    still = DROPOUT + " --lora_dropout 0 --max_steps 5"  # other micro-batches draw other dropout masks
    assert train(flags(tmp_path / "plain", still)) == 0
    assert train(flags(tmp_path / "run", still), stop_after=2) == 0
    change = "--max_tokens_per_micro_batch 300 --gradient_checkpointing --resume auto"
    assert train(flags(tmp_path / "run", still, change)) == 0
    assert_close(tmp_path / "run", tmp_path / "plain")


def test_accelerates_accumulation_steps_do_not_scale_the_gradient(one_process, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert train(flags(tmp_path, "--lora_dropout 0", RUNS["spsa"])) == 0
    assert_identical(tmp_path, one_process / "spsa")


def test_a_state_without_updates_is_resumed_exactly(flags, tmp_path, monkeypatch):
    original = train_colm.accumulate_gradients
    monkeypatch.setattr(train_colm, "accumulate_gradients", lambda *args: original(*args) * float("nan"))
    with pytest.raises(train_colm.UserError, match="checkpoint-000000"):
        train(flags(tmp_path / "run", DROPOUT))
    monkeypatch.undo()
    assert train(flags(tmp_path / "run", DROPOUT, "--resume auto")) == 0
    assert train(flags(tmp_path / "plain", DROPOUT)) == 0
    assert_identical(tmp_path / "run", tmp_path / "plain")


@pytest.mark.parametrize("name", ["settings.json", "state.pt", "adapter_model.safetensors"])
def test_a_broken_checkpoint_is_named(whole, flags, refused, tmp_path, name):
    shutil.copytree(whole, tmp_path / "run")
    for path in (tmp_path / "run").glob(f"checkpoint-*/{name}"):
        path.write_bytes(path.read_bytes()[:100])
    refused(flags(tmp_path / "run", DROPOUT, "--resume auto"), name, "can't be read")


def test_a_moved_model_and_data_may_be_resumed(flags, inputs, tmp_path):
    assert train(flags(tmp_path / "run", DROPOUT), stop_after=2) == 0
    shutil.copytree(inputs, tmp_path / "moved")
    moved = f"--model {tmp_path}/moved/model --train_file {tmp_path}/moved/train.jsonl"
    assert train(flags(tmp_path / "run", DROPOUT, moved, "--resume auto")) == 0


def test_another_run_in_the_output_folder_is_refused_or_deleted(flags, refused, tmp_path):
    assert train(flags(tmp_path, DROPOUT)) == 0
    before = weights(tmp_path)
    refused(flags(tmp_path, DROPOUT), str(tmp_path), "holds another run", "--resume auto", "--overwrite")
    assert weights(tmp_path) == before
    assert train(flags(tmp_path, "--overwrite --max_steps 3 --save_every 0"), stop_after=2) == 0
    assert [p.name for p in train_colm.checkpoints(tmp_path)] == ["checkpoint-000002"]
    assert len(losses(tmp_path)) == 2 and not (tmp_path / "final").exists()


@pytest.mark.parametrize("name", ["final", "checkpoint-000006"])
def test_overwriting_never_deletes_the_model_that_is_trained(whole, flags, refused, name):
    model = whole / name
    argv = flags(whole, DROPOUT, "--overwrite", f"--model {model}")
    for flag in ("--lora_r", "--lora_alpha"):
        at = argv.index(flag)
        del argv[at : at + 2]
    at = argv.index("--lora_dropout")
    del argv[at : at + 2]
    refused(argv, "--overwrite would delete", str(model))
    assert (model / "adapter_model.safetensors").exists()


def test_an_adapter_of_the_embedding_is_continued_and_resumed(flags, tmp_path):
    """PEFT would store the frozen embedding beside such an adapter, and the checkpoints hold what is trained alone."""
    targets = "--lora_target_modules v_proj embed_tokens"
    assert train(flags(tmp_path / "run", DROPOUT, targets), stop_after=3) == 0
    assert train(flags(tmp_path / "run", DROPOUT, targets, "--resume auto")) == 0
    assert train(flags(tmp_path / "whole", DROPOUT, targets)) == 0
    assert_identical(tmp_path / "run", tmp_path / "whole")


def test_an_adapter_names_its_base_where_it_lay_last(flags, inputs, tmp_path):
    assert train(flags(tmp_path / "run", DROPOUT), stop_after=3) == 0
    shutil.copytree(inputs / "model", tmp_path / "moved")
    assert train(flags(tmp_path / "run", DROPOUT, f"--resume auto --run_name other --model {tmp_path}/moved")) == 0
    config = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "moved")


@pytest.mark.parametrize("name", ["output_dir", "model", "eval_file", "train_file", "probe_module"])
def test_an_empty_value_is_refused(flags, refused, tmp_path, name):
    """An empty --output_dir would be the folder that the user happens to be in."""
    refused([*flags(tmp_path), f"--{name}", ""], f"--{name} is empty")


def test_a_folder_that_cannot_be_made_is_named(flags, refused):
    """Root may write everywhere but in the kernel's own file systems."""
    refused(flags(Path("/proc/run")), "/proc/run", "could not be written")


def test_a_model_that_cannot_be_compiled_is_told_in_one_line(flags, refused, tmp_path, monkeypatch):
    def fail(graph, inputs):
        raise AttributeError("no such kernel")

    def compile_by_failing(module, **options):
        module._compiled_call_impl = torch.compile(module._call_impl, backend=fail)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_by_failing)
    refused(flags(tmp_path, "--compile"), "--compile", "no such kernel", "drop the flag")


def test_a_model_that_runs_but_cannot_be_trained_is_told_in_one_line(flags, refused, tmp_path):
    """Reformer's backward pass is its own and needs a trained embedding."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 512, "is_decoder": True}
    config = AutoConfig.for_model("reformer", **sizes, axial_pos_embds=False, max_position_embeddings=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    colm_data.demo_tokenizer().save_pretrained(tmp_path / "model")
    settings = ["--selection random", f"--model {tmp_path}/model"]
    refused(flags(tmp_path / "out", *settings), "can't be trained", "does not require grad")


def test_a_folder_beside_the_checkpoints_is_no_checkpoint(flags, tmp_path):
    assert train(flags(tmp_path, DROPOUT), stop_after=2) == 0
    shutil.copytree(tmp_path / "checkpoint-000002", tmp_path / "checkpoint-000002-backup")
    assert train(flags(tmp_path, DROPOUT, "--resume auto")) == 0
    assert (tmp_path / "checkpoint-000002-backup" / "state.pt").exists()


@pytest.mark.parametrize("text", ["", "--lora_r 0"])
def test_a_full_disk_leaves_the_last_checkpoint(flags, refused, tmp_path, text):
    """A small real file system that fills up at the second checkpoint, and again at the final model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    original = train_colm.on_main

    def fill_up_before(what: str):
        def on_main(run, write, name):
            if name == what:
                with suppress(OSError), open(folder / "ballast", "wb", buffering=0) as f:
                    while True:
                        f.write(bytes(4096))
                os.truncate(folder / "ballast", os.path.getsize(folder / "ballast") - 12288)  # some of it still fits
            return original(run, write, name)

        return mock.patch.object(train_colm, "on_main", on_main)

    settings = [DROPOUT, text]
    try:
        for what, saved in (("checkpoint of step 4", 2), ("final model", 6)):
            with fill_up_before(what):
                refused(flags(folder, *settings, "--resume auto"), what, "free space", "--resume auto")
            assert newest(folder) == saved and not (folder / "final").exists()
            assert not [*folder.glob("tmp-*")]
            (folder / "ballast").unlink()
        assert train(flags(folder, *settings, "--resume auto")) == 0
        assert train(flags(tmp_path / "whole", *settings)) == 0
        assert_identical(folder, tmp_path / "whole")
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("name", ["metrics.jsonl", "selection.jsonl", "eval.jsonl"])
def test_a_full_disk_while_logging_is_told(flags, refused, tmp_path, name):
    original = train_colm.append

    def append(path, record):
        original(path, record)
        if path.name == name and record["step"] == 2:
            path.unlink()
            path.symlink_to("/dev/full")

    with mock.patch.object(train_colm, "append", append):
        refused(flags(tmp_path, DROPOUT, "--eval_every 2"), "No space left", "free space in", "--resume auto")
    assert newest(tmp_path) == 2


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    def save(text: str) -> None:
        with train_colm.replacing(tmp_path / "final") as aside:
            aside.mkdir()
            (aside / "weights").write_text(text)

    save("old")
    save("new")
    assert (tmp_path / "final" / "weights").read_text() == "new"

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        save("newer")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "weights").read_text() == "new"


@pytest.mark.parametrize("probe", ["--probe spsa --num_directions 2", "--probe grad"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_examples_without_a_finite_probe_are_skipped_and_counted(flags, tmp_path, probe, value):
    original, bad_rows = train_colm.probe_pool, []

    def probe_pool(run, pool, probed, step):
        gradients = original(run, pool, probed, step)
        bad = probed & (pool % 3 == 0)
        gradients.values[bad, -1] = value
        bad_rows.append(set(run.train.numbers[pool[bad]].tolist()))
        return gradients

    with mock.patch.object(train_colm, "probe_pool", probe_pool):
        assert train(flags(tmp_path, probe)) == 0
    for metrics, record, bad in zip(steps(tmp_path), steps(tmp_path, "selection"), bad_rows, strict=True):
        assert metrics["skipped_probes"] == len(bad) > 0
        assert len(record["selected"]) == 10 and not bad & set(record["selected"])
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_running_out_of_gpu_memory_is_told_in_one_line(flags, refused, tmp_path):
    with mock.patch.object(
        train_colm, "accumulate_gradients", side_effect=torch.OutOfMemoryError("CUDA out of memory")
    ):
        refused(flags(tmp_path), "--max_tokens_per_micro_batch 600", "lower it", "--resume auto")


@pytest.mark.parametrize("saving", ["--save_every 2", "--save_every 0"])  # the checkpoint is there already, or is not
def test_a_loss_that_is_not_finite_stops_the_run_after_saving_what_was_good(whole, flags, refused, tmp_path, saving):
    original = train_colm.accumulate_gradients

    def broken_at_step_3(run, pool, choice, step):
        return original(run, pool, choice, step) * (float("nan") if step == 2 else 1)

    with mock.patch.object(train_colm, "accumulate_gradients", broken_at_step_3):
        words = "loss nan", "step 3", "--learning_rate", str(tmp_path / "checkpoint-000002")
        refused(flags(tmp_path, DROPOUT, saving), *words)
    assert len(losses(tmp_path)) == 2
    state = torch.load(tmp_path / "checkpoint-000002" / "state.pt", weights_only=True)
    assert state["moments"]["updates"] == 2 and len(state["taken"]) == 20  # nothing of the coreset that failed
    assert train(flags(tmp_path, DROPOUT, "--resume auto")) == 0
    assert_identical(tmp_path, whole)


@pytest.mark.parametrize("text", ["", "--keep_sources none", "--keep_sources none --probe grad", "--selection random"])
def test_weights_that_overflow_stop_the_run(flags, refused, tmp_path, text):
    refused(flags(tmp_path, "--learning_rate 1e30", text), "not finite", "lower --learning_rate")
    assert 1 <= len(losses(tmp_path)) < 5


def test_mixed_precision_in_fp16_is_refused(flags, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    AcceleratorState._reset_state(True)
    try:
        refused(flags(tmp_path), "fp16", "bf16")
    finally:
        AcceleratorState._reset_state(True)


def test_a_model_without_a_known_projection_is_refused_with_candidates(flags, refused, tmp_path):
    message = refused(flags(tmp_path, "--probe_module nowhere"), "--probe_module", "nowhere")
    assert "self_attn.v_proj" in message and not (tmp_path / "metrics.jsonl").exists()
    refused(flags(tmp_path, "--lora_target_modules nowhere"), "--lora_target_modules nowhere", "v_proj")


def test_rows_longer_than_the_model_has_positions_are_refused(flags, refused, tmp_path):
    from transformers import GPT2Config

    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 512}
    AutoModelForCausalLM.from_config(GPT2Config(**sizes)).save_pretrained(tmp_path / "short")
    colm_data.demo_tokenizer().save_pretrained(tmp_path / "short")
    refused(flags(tmp_path / "out", f"--model {tmp_path}/short"), "--max_length 128", "32")


# --------------------------------------------------------------------------- as a program: several runs in one launch


def run_all(argv: list[str]) -> None:
    for flags, stop_after in json.loads(Path(argv[0]).read_text()):
        assert train(flags, stop_after) == 0


if __name__ == "__main__":
    kind, file = sys.argv[1:]
    train_colm.Accelerator.end_training = lambda self: None  # keep the process group for the next run
    if kind == "ddp":
        run_all([file])
    else:
        train_colm.cli, sys.argv = run_all, [sys.argv[0], file]
        runpy.run_path(str(REPO / "tests" / "fsdp_cpu.py"))
    sys.stdout.flush()
    os._exit(0)  # as train_colm.py leaves: see its last lines

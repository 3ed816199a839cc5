"""Rows, tokenising, pools, micro-batch plans and flags of train_colm.py, and what it says to bad input."""

import gzip
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from transformers import PreTrainedTokenizerFast

import train_colm
from train_colm import UserError, draw_pool, parse_args, plan_micro_batches, read_rows

os.environ["ACCELERATE_USE_CPU"] = "true"
CONFIGS = sorted((Path(__file__).parent.parent / "accelerate_configs").glob("*.yaml"))
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ '<|end|>' if m['role'] == 'assistant' }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
ALPACA = [{"source": f"s{i % 3}", "instruction": f"say {i}", "output": f"it is {i}"} for i in range(12)]


def write(path: Path, rows: list) -> Path:
    """A file of rows in the format that its name asks for."""
    array = ".jsonl" not in path.name
    text = json.dumps(rows, indent=1) if array else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def tokenized(rows: list[dict], tokenizer, *flags: str, names=()):
    places = [f"data.json row {i + 1}" for i in range(len(rows))]
    return train_colm.tokenize(rows, places, tokenizer, parse_args([*flags]), list(names), show=False)


def texts(data, tokenizer, i: int = 0) -> tuple[str, str]:
    """Row i as the tokens without loss and those with loss."""
    ids, prompt = data.example(i)
    return tokenizer.decode(ids[:prompt]), tokenizer.decode(ids[prompt:])


@pytest.fixture(scope="module")
def demo_tokenizer():
    tokenizer = train_colm.demo_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def word_tokenizer(template: str | None = "<s> $A") -> PreTrainedTokenizerFast:
    """One token a word; `template` says which special tokens it adds by itself."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "?", *"abcdefghij", *"0123456789"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz", "rows.jsonl.gz"])
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    rows = [{"prompt": "naïve\u2028 line", "completion": "{[1]}"}, *ALPACA]
    path = write(tmp_path / name, rows)
    found, places = read_rows(str(path))
    assert found == rows
    assert places[2] == f"{path} {'line' if 'jsonl' in name else 'row'} 3"


def test_blank_lines_of_a_jsonl_file_count_as_lines_but_not_as_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": 1}\n\n  \n{"a": 2}')
    assert read_rows(str(path)) == ([{"a": 1}, {"a": 2}], [f"{path} line 2", f"{path} line 5"])


def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ALPACA), encoding="utf-8-sig")
    assert read_rows(str(path))[0] == ALPACA


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("no_input", [{}, {"input": ""}, {"input": None}])
def test_alpaca_rows_without_input(demo_tokenizer, no_input):
    data = tokenized([{"instruction": "Add 1 and 2.", "output": "3"} | no_input], demo_tokenizer)
    assert texts(data, demo_tokenizer) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:",
        "3<|end|>",
    )


def test_alpaca_rows_with_input(demo_tokenizer):
    data = tokenized([{"instruction": "Add.", "input": "1, 2", "output": "3"}], demo_tokenizer)
    assert texts(data, demo_tokenizer) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        "### Response:",
        "3<|end|>",
    )


def test_prompt_and_completion_rows_are_taken_as_they_are(demo_tokenizer):
    data = tokenized([{"prompt": " Q: ", "completion": " A\n", "output": "ignored"}], demo_tokenizer)
    assert texts(data, demo_tokenizer) == (" Q: ", " A\n<|end|>")


def test_messages_train_the_last_assistant_turn_and_one_eos(demo_tokenizer):
    turns = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "see you")]
    messages = [{"role": role, "content": content} for role, content in turns]
    data = tokenized([{"messages": messages}], demo_tokenizer)
    assert texts(data, demo_tokenizer) == (
        "[system] be kind\n[user] hi\n[assistant] hello<|end|>\n[user] bye\n[assistant] ",
        "see you<|end|>",
    )


def test_a_chat_template_that_writes_bos_does_not_get_a_second_one():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "<s> {% for m in messages %}{{ m['content'] }} {% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "1"}]}]
    assert texts(tokenized(rows, tokenizer), tokenizer) == ("<s> a b", "1 </s>")


def test_prompt_and_completion_are_tokenised_apart(demo_tokenizer):
    whole = demo_tokenizer("Below is")["input_ids"]
    ids, prompt = tokenized([{"prompt": "Bel", "completion": "ow is"}], demo_tokenizer).example(0)
    expected = demo_tokenizer("Bel")["input_ids"], demo_tokenizer("ow is")["input_ids"]
    assert (ids[:prompt].tolist(), ids[prompt:-1].tolist()) == expected
    assert ids[:-1].tolist() != whole  # one string would have merged across the border


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", None])
def test_special_tokens_stand_at_the_ends_only(template):
    data = tokenized([{"prompt": "a b", "completion": "1 2"}], word_tokenizer(template))
    bos = "<s> " if template else ""
    assert texts(data, word_tokenizer()) == (f"{bos}a b", "1 2 </s>")


@pytest.mark.parametrize("packed", [False, True])
def test_prompt_tokens_carry_no_loss_and_eos_does_even_as_the_pad_token(packed):
    tokenizer = word_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [{"prompt": "a b c", "completion": "1"}, {"prompt": "d", "completion": "2 3 4 5"}]
    data = tokenized(rows, tokenizer)
    examples = [data.example(0), data.example(1)]
    batch = train_colm.pack(examples, longest=8) if packed else train_colm.collate(examples, tokenizer.pad_token_id)
    assert tokenizer.decode(batch.targets) == "1 </s> 2 3 4 5 </s>"
    assert batch.rows.tolist() == [0, 0, 1, 1, 1, 1, 1] and batch.counts.tolist() == [2, 5]


# ------------------------------------------------------------------------------------------------- lengths and sources


def test_long_prompts_are_shortened_from_the_left_and_answers_kept_whole():
    rows = [
        {"prompt": "a b c d e", "completion": "1 2"},  # <s> and three tokens of the prompt fit beside 1 2 </s>
        {"prompt": "a b c", "completion": "1 2"},  # exactly fits
        {"prompt": "a b", "completion": "1 2 3 4"},  # one token of the prompt
        {"prompt": "a b", "completion": "1 2 3 4 5"},  # <s> alone would be left
        {"prompt": "a b", "completion": "1 2 3 4 5 6"},  # no room at all
        {"prompt": "", "completion": "1 2 3 4 5"},  # <s> is the whole prompt
    ]
    data = tokenized(rows, word_tokenizer(), "--max_length", "7")
    assert [texts(data, word_tokenizer(), i) for i in range(len(data))] == [
        ("<s> c d e", "1 2 </s>"),
        ("<s> a b c", "1 2 </s>"),
        ("<s> b", "1 2 3 4 </s>"),
        ("<s>", "1 2 3 4 5 </s>"),
    ]
    assert data.numbers.tolist() == [0, 1, 2, 5]
    assert (data.shortened, data.dropped) == (2, 2)
    assert all(data.length(i) <= 7 for i in range(len(data)))


def test_a_row_without_any_token_to_predict_from_is_dropped():
    data = tokenized([{"prompt": "", "completion": c} for c in ("", "1")], word_tokenizer(None))
    assert texts(data, word_tokenizer()) == ("", "1 </s>")
    assert (len(data), data.dropped, data.numbers.tolist()) == (1, 1, [1])


def test_sources_get_ids_in_order_of_appearance_and_keep_known_ones():
    rows = [{"prompt": "a", "completion": "1", "task": task} for task in ("web", 7, "web", "code")]
    data = tokenized(rows, word_tokenizer(), "--source_field", "task")
    assert (data.names, data.sources.tolist()) == (["web", "7", "code"], [0, 1, 0, 2])
    data = tokenized(rows, word_tokenizer(), "--source_field", "task", names=["code", "web"])
    assert (data.names, data.sources.tolist()) == (["code", "web", "7"], [1, 2, 1, 0])


def test_rows_without_sources_are_one_source():
    data = tokenized([{"prompt": "a", "completion": "1"}] * 3, word_tokenizer())
    assert (data.names, data.sources.tolist()) == (["all"], [0, 0, 0])


def test_small_sources_are_kept_automatically_by_name_or_not_at_all(tmp_path, demo_tokenizer):
    rows = [row | {"source": source} for source, n in (("big", 9), ("mid", 4), ("low", 2)) for row in ALPACA[:n]]
    file = str(write(tmp_path / "rows.jsonl", rows))

    def kept(*flags):
        args = parse_args(["--train_file", file, "--pool_size", "4", "--coreset_size", "2", *flags])
        train, _, keep = train_colm.load_data(args, demo_tokenizer, show=False)
        return {train.names[q] for q in keep}

    assert kept() == {"mid", "low"}  # the mean size is 5
    assert kept("--keep_sources", "none") == set()
    assert kept("--keep_sources", "big", "low") == {"big", "low"}


def test_the_fingerprint_tells_any_change_of_the_training_data(demo_tokenizer):
    def of(rows, *flags):
        return tokenized(rows, demo_tokenizer, *flags).fingerprint()

    variants = [
        of(ALPACA),
        of(ALPACA[:-1]),
        of(ALPACA[::-1]),
        of([*ALPACA[:-1], ALPACA[-1] | {"output": "it is 12"}]),
        of([*ALPACA[:-1], ALPACA[-1] | {"source": "s1"}]),
        of([*ALPACA[:-1], ALPACA[-1] | {"source": "s3"}]),
        of(ALPACA, "--max_length", "20"),
    ]
    assert len(set(variants)) == len(variants)
    assert of(list(ALPACA)) == variants[0]


# -------------------------------------------------------------------------------------------------- pools and batches


@pytest.mark.parametrize(("rows", "size"), [(10, 3), (12, 4), (5, 5), (1, 1)])
def test_pools_do_not_repeat_a_row_within_an_epoch(rows, size):
    per_epoch = rows // size
    for epoch in range(4):
        pools = [draw_pool(rows, size, 0, epoch * per_epoch + i) for i in range(per_epoch)]
        drawn = torch.cat(pools).tolist()
        assert all(len(pool) == size for pool in pools)
        assert len(set(drawn)) == len(drawn) and set(drawn) <= set(range(rows))


def test_a_pool_depends_on_seed_and_step_alone():
    torch.manual_seed(1)
    first = {(seed, step): draw_pool(1000, 8, seed, step).tolist() for seed in range(3) for step in range(200)}
    torch.manual_seed(2)
    assert first == {key: draw_pool(1000, 8, *key).tolist() for key in reversed(first)}
    assert len({tuple(pool) for pool in first.values()}) == len(first)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_micro_batches_hold_every_item_once_within_the_token_budget(packed, ranks):
    rng = random.Random(f"{packed} {ranks}")
    for trial in range(60):
        lengths = [rng.randint(1, 40) for _ in range(rng.choice([1, 2, 3, 7, 64, 123]))]
        budget = rng.choice([1, 30, 64, 200, 10_000])
        plans = plan_micro_batches(lengths, budget, ranks, packed)
        assert plans == plan_micro_batches(lengths, budget, ranks, packed)
        assert len(plans) == ranks and len({len(plan) for plan in plans}) == 1
        batches = [items for plan in plans for items in plan]
        assert sorted(item for items in batches for item in items) == [*range(len(lengths))]
        for items in filter(None, batches):
            held = [lengths[item] for item in items]
            tokens = sum(held) if packed else len(held) * max(held)
            assert tokens <= budget or len(held) == 1, (trial, held, budget)
        empty = [plan.count([]) for plan in plans]  # stand-ins
        if packed:
            assert sum(empty) == max(0, len(batches) - len(lengths)) < ranks
        else:
            assert min(empty) == 0
        assert len(lengths) < ranks or all(any(plan) for plan in plans)
        tokens = [sum(lengths[item] for items in plan for item in items) for plan in plans]
        assert max(tokens) - min(tokens) <= max(lengths) * (len(plans[0]) if packed else 1)


def test_a_budget_for_all_rows_makes_one_micro_batch_a_rank():
    for packed in (False, True):
        assert [len(plan) for plan in plan_micro_batches([5, 9, 2, 7], 1000, 2, packed)] == [1, 1]
        assert [len(plan) for plan in plan_micro_batches([5, 9, 2, 7], 1, 2, packed)] == [2, 2]


@pytest.fixture(scope="module")
def batch_run(tmp_path_factory):
    """A float64 run of the demo model on rows of very different lengths, and the plain-loop loss of its rows."""
    folder = tmp_path_factory.mktemp("batches")
    rows = [row | {"output": row["output"] * (1 + 3 * (i % 4))} for i, row in enumerate(ALPACA)]
    flags = ["--train_file", str(write(folder / "rows.json", rows)), "--output_dir", str(folder), "--max_steps", "1"]
    args = parse_args(
        [*flags, "--pool_size", "9", "--coreset_size", "9", "--lora_dropout", "0", "--packing", "--max_length", "160"]
    )
    tokenizer = train_colm.demo_tokenizer()
    train, _, keep = train_colm.load_data(args, tokenizer, show=False)
    accelerator = train_colm.make_accelerator(args)
    model = train_colm.load_model(args, accelerator, tokenizer).double()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p.data, std=0.1)
    return train_colm.build_run(args, accelerator, tokenizer, model, train, None, keep)


@pytest.mark.parametrize("weights", [[1.0] * 9, [3.0, 1, 1, 0, 2, 7, 1, 1, 1]])
def test_loss_and_gradient_do_not_depend_on_the_micro_batches(batch_run, weights):
    run, rows, weights = batch_run, torch.arange(9), torch.tensor(weights)

    def gradient() -> torch.Tensor:
        flat = torch.cat([p.grad.flatten() for p in run.trained])
        run.optimizer.zero_grad(set_to_none=True)
        return flat

    run.model.set_attn_implementation("sdpa")
    expected = 0.0
    for row, weight in zip(rows.tolist(), (weights / weights.sum()).tolist(), strict=True):
        ids, prompt = run.train.example(row)
        labels = ids.long().index_fill(0, torch.arange(prompt), -100)
        loss = run.model(input_ids=ids[None].long(), labels=labels[None]).loss * weight  # the model's own loss
        loss.backward()
        expected += loss.item()
    truth = gradient()
    for packing in (False, True):
        run.args.packing = packing
        run.model.set_attn_implementation("packed" if packing else "sdpa")
        for tokens in (60, 150, 400, 100_000):
            run.args.max_tokens_per_micro_batch = tokens
            loss = float(train_colm.train_on(run, rows, weights, 0))
            assert loss == pytest.approx(expected, rel=1e-6), (packing, tokens)
            torch.testing.assert_close(gradient(), truth, rtol=1e-6, atol=float(truth.abs().max()) * 1e-7)


# --------------------------------------------------------------------------------------------------------------- flags


def test_a_yaml_file_gives_flags_and_the_command_line_goes_first(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "pool_size: 32\ncoreset_size: 4\nlearning_rate: 1e-3\ncompile: true\npacking: false\nmax_steps:\n"
        "keep_sources: [web, code]\nmodel: some/model\n"
    )
    args = parse_args(["--config", str(file), "--coreset_size", "8"])
    assert (args.pool_size, args.coreset_size, args.learning_rate, args.max_steps) == (32, 8, 1e-3, None)
    assert (args.compile, args.packing, args.keep_sources, args.model) == (True, False, ["web", "code"], "some/model")
    assert args.lora_r == 128  # with a model, the paper's defaults


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["run.yaml", "No such file"]),
        ("pool_size: [1", ["run.yaml", "YAML"]),
        ("- pool_size", ["run.yaml", "not a mapping", "pool_size: 128"]),
        ("pool_sise: 3", ["--pool_sise", "unrecognized"]),
        ("pool_size: many", ["--pool_size", "'many'", "int"]),
        ("compile: 3", ["3"]),
        ("selection: best", ["--selection", "'best'", "random_keep"]),
    ],
)
def test_a_bad_yaml_file_is_refused(refused, tmp_path, text, words):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    refused(["--config", str(tmp_path / "run.yaml")], *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--pool_size 32 --coreset_size 60", ["--coreset_size 60 exceeds --pool_size 32: lower it to 32 or less"]),
        ("--pool", ["--pool", "unrecognized", "--help"]),
        ("--learning_rates 1", ["--learning_rates", "unrecognized", "--help"]),
        ("--pool_size", ["--pool_size", "expected one argument"]),
        ("--pool_size 1.5", ["--pool_size", "'1.5'", "int"]),
        ("--coreset_size 0", ["--coreset_size 0", "positive"]),
        ("--learning_rate nan", ["--learning_rate nan", "positive"]),
        ("--max_steps 0", ["--max_steps 0", "positive"]),
        ("--num_epochs -1", ["--num_epochs -1", "positive"]),
        ("--lora_r -1", ["--lora_r -1", "0 or more"]),
        ("--lora_dropout 1", ["--lora_dropout 1.0", "less than 1"]),
        ("--max_length 1", ["--max_length 1", "2 or more"]),
        ("--probe exact", ["--probe", "'exact'", "grad"]),
        ("--train_file no/such.json", ["no/such.json does not exist", ".jsonl"]),
        ("--eval_file no/such.json", ["no/such.json does not exist", ".jsonl"]),
        ("--model no/such/folder", ["--model no/such/folder", "config.json"]),
        ("--resume no/such/checkpoint", ["--resume no/such/checkpoint", "auto"]),
        ("--config no.yaml", ["--config no.yaml"]),
        ("--pool_size 2000", ["--pool_size 2000 exceeds the 1500 usable rows", "lower it to 1500"]),
        ("--keep_sources add nope", ["--keep_sources nope", "repeat", "add"]),
    ],
)
def test_bad_flags_are_refused_with_value_rule_and_remedy(refused, flags, words):
    refused(flags.split(), *words)


def test_a_missing_tracker_is_refused_with_the_command_that_installs_it(refused, monkeypatch):
    monkeypatch.setattr(train_colm.importlib.util, "find_spec", lambda name: None)
    refused(["--report_to", "wandb"], "--report_to wandb", "pip install wandb")


def test_a_hub_dataset_that_cannot_be_read_is_refused(refused):
    refused(["--train_file", "no-such-org/no-such-set"], "no-such-org/no-such-set")


# ------------------------------------------------------------------------------------------------------------ bad data


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Call with flags and the words that the message must have: the trainer stops before it loads a model."""
    monkeypatch.setattr(train_colm, "load_model", lambda *_: pytest.fail("a model was loaded"))

    def check(argv: list[str], *words: str, rows=None) -> str:
        if rows is not None:
            file = tmp_path / "rows.jsonl"
            if isinstance(rows, bytes):
                file.write_bytes(rows)
            else:
                write(file, rows)
            argv = ["--train_file", str(file), "--pool_size", "4", "--coreset_size", "2", *argv]
        with pytest.raises(SystemExit) as exit_:
            train_colm.cli(["--output_dir", str(tmp_path / "out"), *argv])
        lines = capsys.readouterr().err.splitlines()
        assert exit_.value.code == 2
        assert [line for line in lines if line.strip()][-1].startswith("error: ")
        messages = [line for line in lines if "error" in line.lower()]
        assert len(messages) == 1 and not any("Traceback" in line for line in lines)
        assert all(word in messages[0] for word in words), messages[0]
        assert not (tmp_path / "out").exists()
        return messages[0]

    return check


GOOD = b'{"instruction": "a", "output": "1", "source": "web"}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["rows.jsonl is empty"]),
        (b" \n\n", ["rows.jsonl is empty"]),
        (b"[]", ["rows.jsonl", "no row"]),
        (GOOD + b"\n{'instruction': 1}\n", ["rows.jsonl line 3", "broken JSON"]),
        (b'[{"instruction": "a",\n "output": "b"},\n {]', ["rows.jsonl line 3", "broken JSON"]),
        (b'{"instruction": "\xff"}', ["rows.jsonl can't be read", "UTF-8"]),
        (GOOD + b"[1, 2]\n", ["rows.jsonl line 2", "list", "object"]),
        (GOOD + b"null\n", ["rows.jsonl line 2", "object"]),
        (GOOD + b'{"instruction": "a", "source": "web"}', ["rows.jsonl line 2", "'output'", "prompt and completion"]),
        (GOOD + b'{"text": "a", "source": "web"}', ["rows.jsonl line 2", "'instruction'", "prompt and completion"]),
        (GOOD + b'{"prompt": "a", "source": "web"}', ["rows.jsonl line 2", "'completion'"]),
        (GOOD + b'{"prompt": "a", "completion": 5, "source": "w"}', ["line 2", "'completion' is a int", "string"]),
        (GOOD + b'{"prompt": null, "completion": "b", "source": "w"}', ["line 2", "'prompt'", "string"]),
        (GOOD + b'{"instruction": "a", "input": ["b"], "output": "c", "source": "w"}', ["line 2", "'input' is a list"]),
        (GOOD + b'{"instruction": "a", "output": "1"}', ["rows.jsonl line 2", "'source'"]),
        (GOOD + b'{"messages": "hi", "source": "w"}', ["rows.jsonl line 2", "messages must be a list"]),
        (GOOD + b'{"messages": [{"role": "user", "content": "a"}], "source": "w"}', ["line 2", "assistant"]),
        (
            GOOD + b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}], "source": "w"}',
            ["line 2", "role and content"],
        ),
        (
            GOOD + b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
            b'"source": "w"}',
            ["rows.jsonl line 2", "no chat template", "prompt and completion"],
        ),
        (GOOD + b'{"instruction": "\\ud800", "output": "1", "source": "web"}\n', ["rows.jsonl line 2"]),
        (GOOD * 3, ["--pool_size 4 exceeds the 3 usable rows", "lower it to 3"]),
    ],
)
def test_bad_rows_are_refused_with_file_line_and_remedy(refused, content, words):
    refused([], *words, rows=content)


def test_a_broken_gzip_file_is_refused(refused, tmp_path):
    path = write(tmp_path / "rows.jsonl.gz", ALPACA)
    path.write_bytes(path.read_bytes()[:-20])
    refused(["--train_file", str(path)], "rows.jsonl.gz can't be read")
    path.write_bytes(GOOD)
    refused(["--train_file", str(path)], "rows.jsonl.gz can't be read")


def test_a_folder_as_training_file_is_refused(refused, tmp_path):
    refused(["--train_file", str(tmp_path)], str(tmp_path), "can't be read")


def test_rows_without_source_are_refused_where_sources_matter(refused, tmp_path, demo_tokenizer):
    rows = [{"prompt": "a", "completion": "1"}] * 8
    for selection in ("colm", "random_keep"):
        refused(["--selection", selection], "'source'", "--source_field", "--keep_sources none", rows=rows)
    for way_on in (["--keep_sources", "none"], ["--selection", "random"], ["--selection", "full"]):
        file = str(tmp_path / "rows.jsonl")
        args = parse_args(["--train_file", file, "--pool_size", "4", "--coreset_size", "2", *way_on])
        assert len(train_colm.load_data(args, demo_tokenizer, show=False)[0]) == 8


def test_no_row_left_is_refused(refused):
    message = refused(["--max_length", "2"], "rows.jsonl", "no row", "--max_length", rows=ALPACA)
    assert "raise it" in message


def test_dropped_rows_count_against_the_pool(refused):
    rows = [*ALPACA[:3], *(row | {"output": "very " * 600} for row in ALPACA[3:])]
    refused([], "--pool_size 4 exceeds the 3 usable rows", "9 do not fit in --max_length 512", rows=rows)


def test_an_output_folder_that_cannot_be_one_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for path in ("file", "file/out"):
        refused(["--output_dir", str(tmp_path / path)], "--output_dir", str(tmp_path / path))


def test_every_host_prints_its_own_error(refused, monkeypatch):
    monkeypatch.setenv("RANK", "8")  # the first process of a second host
    monkeypatch.setenv("LOCAL_RANK", "0")
    refused(["--train_file", "no/such.json"], "no/such.json does not exist")


# --------------------------------------------------------------------------------------------------------- accelerate


def accelerator_of(monkeypatch, processes=1, precision="no", kind=DistributedType.NO, **plugin):
    """make_accelerator under settings that this machine can't have."""
    fake = SimpleNamespace(
        mixed_precision=precision,
        distributed_type=kind,
        num_processes=processes,
        device=torch.device("cpu"),
        state=SimpleNamespace(
            fsdp_plugin=SimpleNamespace(
                **{"fsdp_version": 2, "activation_checkpointing": False, "cpu_offload": OffloadPolicy()} | plugin
            )
        ),
    )
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(train_colm, "Accelerator", lambda **_: fake)
    return train_colm.make_accelerator(parse_args(["--pool_size", "8", "--coreset_size", "4"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": DistributedType.FSDP, "fsdp_version": 1}, "fsdp_version 1 .*fsdp_version: 2"),
        ({"kind": DistributedType.FSDP, "activation_checkpointing": True}, "fsdp_activation.*--gradient_checkpointing"),
        ({"kind": DistributedType.FSDP, "cpu_offload": CPUOffloadPolicy()}, "fsdp_offload_params .*set it to false"),
        ({"kind": DistributedType.DEEPSPEED}, "DEEPSPEED.*FSDP2"),
        ({"precision": "fp16"}, "fp16.*bf16"),
        ({"precision": "fp8"}, "fp8.*bf16"),
        ({"processes": 5}, "--coreset_size 4 is below the 5 processes: raise it to 5"),
    ],
)
def test_unsupported_launches_are_refused(monkeypatch, settings, words):
    with pytest.raises(UserError, match=words):
        accelerator_of(monkeypatch, **settings)


def test_supported_launches_are_not_refused(monkeypatch):
    for kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP):
        accelerator_of(monkeypatch, processes=4, kind=kind)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_configs_are_known_and_every_key_is_explained(path):
    settings = load_config_from_file(str(path))  # refuses keys that accelerate does not know
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(getattr(settings, "fsdp_config", {})) <= known
    for line in path.read_text().splitlines():
        assert line.lstrip().startswith("#") or " # " in line, f"{path.name}: {line} has no comment"


def test_the_accelerate_configs_are_the_promised_ones():
    settings = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS}
    assert set(settings) == {"cpu", "single_gpu", "ddp", "fsdp2", "fsdp2_multi_node"}
    assert settings["cpu"]["use_cpu"] and settings["cpu"]["mixed_precision"] == "no"
    assert {settings[name]["mixed_precision"] for name in settings.keys() - {"cpu"}} == {"bf16"}
    for name in ("fsdp2", "fsdp2_multi_node"):
        assert settings[name]["fsdp_config"]["fsdp_version"] == 2
        assert settings[name]["fsdp_config"]["fsdp_activation_checkpointing"] is False
    assert settings["fsdp2_multi_node"]["num_machines"] == 2

"""Files, rows, tokenising, pools, micro-batch plans and flags of train_colm.py, and what it says to bad input."""

import csv
import errno
import gzip
import json
import os
import pickle
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, TorchDynamoPlugin
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import colm_data
import train_colm
from colm_data import Text, UserError, chat_prompt, prompt_ids, read_rows
from train_colm import draw_pool, parse_args, plan_micro_batches

os.environ["ACCELERATE_USE_CPU"] = "true"
CONFIGS = sorted((Path(__file__).parent.parent / "accelerate_configs").glob("*.yaml"))
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ '<|end|>' if m['role'] == 'assistant' }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
ALPACA = [{"source": f"s{i % 3}", "instruction": f"say {i}", "output": f"it is {i}"} for i in range(12)]


def write(path: Path, rows: list) -> Path:
    """A file of rows in the format that its name asks for."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=5)
        return path
    if name.endswith((".csv", ".tsv")):
        with path.open("w", newline="", encoding="utf-8") as f:
            table = csv.DictWriter(f, rows[0], delimiter="," if name.endswith(".csv") else "\t")
            table.writeheader()
            table.writerows(rows)
        return path
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif name.startswith("data"):
        text = json.dumps({"version": 1, "data": rows}, indent=1 if "indent" in name else None)
    else:
        text = json.dumps(rows, indent=1, ensure_ascii=False)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def tokenized(rows: list[dict], tokenizer, *flags: str, names=()):
    places = [f"data.json row {i + 1}" for i in range(len(rows))]
    return train_colm.tokenize(rows, places, tokenizer, parse_args([*flags]), list(names), show=False)


def loaded(patterns, tokenizer, *flags: str, names=()):
    return colm_data.load_tokens(patterns, tokenizer, parse_args([*flags]), list(names), show=False)


def texts(data, tokenizer, i: int = 0) -> list[str]:
    """Row i as the texts between borders of the mask: without loss, with loss, without, ..."""
    parts, mask = [[]], False
    for token, supervised in zip(*(x.tolist() for x in data.example(i)), strict=True):
        if supervised != mask:
            parts.append([])
            mask = supervised
        parts[-1].append(token)
    return [tokenizer.decode(part) for part in parts]


@pytest.fixture(scope="module")
def demo_tokenizer():
    tokenizer = colm_data.demo_tokenizer()
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

NAMES = ["rows.json", "rows.jsonl", "rows.json.gz", "rows.jsonl.gz", "data.json", "data_indent.json", "rows.txt"]


@pytest.mark.parametrize("name", [*NAMES, "rows.csv", "rows.tsv", "rows.parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    rows = [{"source": "é", "instruction": 'naïve\u2028 "line"\n, 😀', "output": "{[1]}"}, *ALPACA]
    path = write(tmp_path / name, rows)
    found, places = read_rows(str(path))
    assert found == rows
    if "csv" in name or "tsv" in name:  # the header is a line, and the first row has a line end in a cell
        assert places[2] == f"{path} line 5"
    else:
        assert places[2] == f"{path} {'line' if 'jsonl' in name else 'row'} 3"


def test_blank_lines_of_a_jsonl_file_count_as_lines_but_not_as_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": 1}\r\n\n  \n{"a": 2}')
    assert read_rows(str(path)) == ([{"a": 1}, {"a": 2}], [f"{path} line 2", f"{path} line 5"])


def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ALPACA), encoding="utf-8-sig")
    assert read_rows(str(path))[0] == ALPACA


def test_a_json_array_is_read_through_a_window_whatever_the_lengths_of_its_rows(tmp_path):
    rng = random.Random(0)
    rows = [{"a": "x, ]}[{\n" * rng.choice([1, 10, 300_000 // 8, 3_000_000 // 8])} for _ in range(12)]
    for indent in (None, 1):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows, indent=indent))
        assert path.stat().st_size > 5 << 20
        assert read_rows(str(path))[0] == rows
    text = json.dumps(rows, indent=1)
    path.write_text(text[:-3] + ", {'a'}]")
    with pytest.raises(UserError, match=rf"rows.json line {text.count(chr(10))}: broken JSON"):
        read_rows(str(path))


def test_several_files_and_globs_are_read_in_order_and_give_the_sources_their_names(tmp_path, demo_tokenizer):
    plain = [{"instruction": row["instruction"], "output": row["output"]} for row in ALPACA]
    for name, part in (("web.jsonl", plain[:3]), ("code.json", plain[3:5]), ("own.csv", ALPACA[5:9])):
        write(tmp_path / name, part)
    write(tmp_path / "math.parquet", plain[9:])
    data = loaded([f"{tmp_path}/web.jsonl", f"{tmp_path}/[co]*", f"{tmp_path}/*.parquet"], demo_tokenizer)
    assert data.names == ["web", "code", "s2", "s0", "s1", "math"]  # own.csv has sources of its own
    assert data.numbers.tolist() == list(range(12))
    assert [texts(data, demo_tokenizer, i)[1] for i in range(12)] == [f"it is {i}<|end|>" for i in range(12)]
    assert data.place(0) == f"{tmp_path}/web.jsonl row 1" and data.place(4) == f"{tmp_path}/code.json row 2"
    assert data.place(8) == f"{tmp_path}/own.csv row 4" and data.place(11) == f"{tmp_path}/math.parquet row 3"


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path, demo_tokenizer):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "train.jsonl", [{"instruction": "a", "output": folder}] * 2)
    data = loaded(f"{tmp_path}/*/train.jsonl", demo_tokenizer)
    assert data.names == [f"{tmp_path}/a/train.jsonl", f"{tmp_path}/b/train.jsonl"]
    assert loaded(f"{tmp_path}/a/train.jsonl", demo_tokenizer).names == ["all"]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package datasets; returns what load_dataset was called with."""
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return list(ALPACA)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    colm_data.hub_dataset.cache_clear()
    yield calls
    colm_data.hub_dataset.cache_clear()


@pytest.mark.parametrize(
    ("path", "args", "kwargs"),
    [
        ("org/name", ("org/name",), {"split": "train", "streaming": False}),
        ("org/name.v1:test", ("org/name.v1",), {"split": "test", "streaming": False}),
        ("org/name:main:test", ("org/name", "main"), {"split": "test", "streaming": False}),
        ("org/name:main:train[:10%]", ("org/name", "main"), {"split": "train[:10%]", "streaming": False}),
        ("org/name:main:test:stream", ("org/name", "main"), {"split": "test", "streaming": True}),
        ("org/name:stream", ("org/name",), {"split": "train", "streaming": True}),
    ],
)
def test_a_hub_dataset_is_named_with_its_config_and_split(hub, path, args, kwargs):
    assert read_rows(path) == (ALPACA, [f"{path} row {i + 1}" for i in range(12)])
    assert hub == [(args, kwargs)]


def test_tokens_of_a_hub_dataset_are_kept_under_its_files(hub, demo_tokenizer, tmp_path, monkeypatch):
    class Kept(list):
        cache_files = [{"filename": str(write(tmp_path / "name-train.arrow", ALPACA))}]

    monkeypatch.setattr(colm_data, "SMALL", 100)
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *_, **__: Kept(ALPACA))
    first = loaded("org/name", demo_tokenizer, "--cache_dir", str(tmp_path / "cache"))
    monkeypatch.setattr(colm_data, "tokenize_files", never)
    assert same(first, loaded("org/name", demo_tokenizer, "--cache_dir", str(tmp_path / "cache")))
    write(tmp_path / "name-train.arrow", ALPACA[1:])
    with pytest.raises(AssertionError, match="tokenised again"):
        loaded("org/name", demo_tokenizer, "--cache_dir", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["rows.parquet", "org/name"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name):
    package = "pyarrow" if name == "rows.parquet" else "datasets"
    colm_data.hub_dataset.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    if package == "pyarrow":
        name = str(tmp_path / name)
        Path(name).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=f"pip install {package}"):
        read_rows(name)


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("no_input", [{}, {"input": ""}, {"input": None}])
def test_alpaca_rows_without_input(demo_tokenizer, no_input):
    data = tokenized([{"instruction": "Add 1 and 2.", "output": "3"} | no_input], demo_tokenizer)
    assert texts(data, demo_tokenizer) == [
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:",
        "3<|end|>",
    ]
    assert data.rendering == "alpaca"


def test_alpaca_rows_with_input(demo_tokenizer):
    data = tokenized([{"instruction": "Add.", "input": "1, 2", "output": "3"}], demo_tokenizer)
    assert texts(data, demo_tokenizer) == [
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        "### Response:",
        "3<|end|>",
    ]


def test_alpaca_rows_with_system_and_history(demo_tokenizer):
    row = {"instruction": "And 2?", "input": "", "output": "4", "system": "Double.", "history": [["1?", "2"]]}
    expected = ["Double.\n\n### Instruction:\n1?\n\n### Response:", "2<|end|>"]
    expected += ["\n\n### Instruction:\nAnd 2?\n\n### Response:", "4<|end|>"]
    assert texts(tokenized([row], demo_tokenizer), demo_tokenizer) == expected
    last = texts(tokenized([row], demo_tokenizer, "--train_on", "last"), demo_tokenizer)
    assert last == [
        "Double.\n\n### Instruction:\n1?\n\n### Response:2\n\n### Instruction:\nAnd 2?\n\n### Response:",
        "4<|end|>",
    ]
    written = row | {"history": json.dumps(row["history"])}  # as a table holds it
    assert texts(tokenized([written], demo_tokenizer), demo_tokenizer) == expected


def test_prompt_and_completion_rows_are_taken_as_they_are(demo_tokenizer):
    data = tokenized([{"prompt": " Q: ", "completion": " A\n", "output": "ignored"}], demo_tokenizer)
    assert texts(data, demo_tokenizer) == [" Q: ", " A\n<|end|>"]
    assert data.rendering == "text" and data.remarks == ["not used: the fields output"]


def test_the_form_of_most_rows_is_recorded_for_the_evaluations(demo_tokenizer):
    rows = [{"prompt": "a", "completion": "b"}, *[{"messages": [said("user", "a"), said("assistant", "b")]}] * 2]
    assert tokenized(rows, demo_tokenizer).rendering == "messages"


def test_prompt_and_completion_are_tokenised_apart(demo_tokenizer):
    whole = demo_tokenizer("Below is")["input_ids"]
    ids, mask = tokenized([{"prompt": "Bel", "completion": "ow is"}], demo_tokenizer).example(0)
    expected = demo_tokenizer("Bel")["input_ids"], demo_tokenizer("ow is")["input_ids"]
    assert (ids[~mask].tolist(), ids[mask][:-1].tolist()) == expected
    assert ids[:-1].tolist() != whole  # one string would have merged across the border


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "$A </s>", None])
def test_special_tokens_stand_at_the_ends_only(template):
    tokenizer = word_tokenizer(template)
    bos = "<s> " if template and "<s>" in template else ""
    for prompt in ("a b", f"{bos}a b"):  # rendered beforehand, a prompt gets no second BOS
        for completion in ("1 2", "1 2 </s>", "1 2</s>\n"):  # nor a completion a second EOS
            data = tokenized([{"prompt": prompt, "completion": completion}], tokenizer)
            assert texts(data, word_tokenizer()) == [f"{bos}a b", "1 2 </s>"]
            ids, mask = data.example(0)
            assert prompt_ids(tokenizer, prompt) == ids[~mask].tolist()  # no EOS after a prompt that is asked


@pytest.mark.parametrize("packed", [False, True])
def test_prompt_tokens_carry_no_loss_and_eos_does_even_as_the_pad_token(packed):
    tokenizer = word_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [{"prompt": "a b c", "completion": "1"}, {"prompt": "d", "completion": "2 3 4 5"}]
    data = tokenized(rows, tokenizer)
    examples = [data.example(0), data.example(1)]
    batch = train_colm.pack(examples, longest=8) if packed else train_colm.collate(examples, tokenizer.pad_token_id)
    assert tokenizer.decode(batch.targets) == "1 </s> 2 3 4 5 </s>"
    assert batch.owner.tolist() == [0, 0, 1, 1, 1, 1, 1] and batch.counts.tolist() == [2, 5]


# --------------------------------------------------------------------------------------------------------------- chats

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{% if messages[0].role == 'system' %}{% set date = strftime_now('%d %b %Y') %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date + '\n' }}"
    "{{ messages[0].content + '<|eot_id|>' }}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}"
    "{{ '<|eom_id|>' if m.tool_calls else '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (  # reasoning of the turns after the last question alone
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{%- set content = m.content %}{%- set reasoning = m.reasoning_content or '' %}"
    "{%- if '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
R1 = (  # cuts the reasoning of every turn, and asks for it
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set content = m['content'].split('</think>')[-1] %}"
    "{{ '<|Assistant|>' + content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
PHI3 = (  # EOS after a conversation that does not go on
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
VICUNA = (  # no special tokens, and no end of a turn but EOS
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ENDLESS = (  # nothing ends a turn
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LINES = ENDLESS.replace("': '", "':\n'").replace("assistant: ", "assistant:\n")  # nor does a token reach over a border
MARKERS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
MARKERS += ["<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Assistant|>", "<|user|>", "<|assistant|>", "<|end|>"]


def said(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content} | more


def chat_tokenizer(template: str):
    """The demo's byte-level tokenizer with the special tokens of many families and a chat template."""
    tokenizer = colm_data.demo_tokenizer()
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["[INST]", "[/INST]", *MARKERS]}
    )
    tokenizer.chat_template = template
    return tokenizer


THOUGHT = "<think>\nWe add.\n</think>\n\n"
PLAIN = [said("user", "hi"), said("assistant", "hello"), said("user", "1 + 2?"), said("assistant", "3")]
THINKING = [*PLAIN[:3], said("assistant", f"{THOUGHT}3")]
ALL_THINKING = [PLAIN[0], said("assistant", "<think>\nHm.\n</think>\n\nhello"), *THINKING[2:]]
Q, A = "<|im_start|>user\n", "<|im_start|>assistant\n"
H = "<|start_header_id|>{}<|end_header_id|>\n\n"

# template, conversation: the texts without and with loss in turn
SUPERVISED = [
    (CHATML, PLAIN, [f"{Q}hi<|im_end|>\n{A}", "hello<|im_end|>", f"\n{Q}1 + 2?<|im_end|>\n{A}", "3<|im_end|>"]),
    (
        CHATML,
        ALL_THINKING,
        [
            f"{Q}hi<|im_end|>\n{A}",
            "<think>\nHm.\n</think>\n\nhello<|im_end|>",
            f"\n{Q}1 + 2?<|im_end|>\n{A}",
            f"{THOUGHT}3<|im_end|>",
        ],
    ),
    (
        LLAMA3,
        PLAIN,
        [
            f"<s>{H.format('user')}hi<|eot_id|>{H.format('assistant')}",
            "hello<|eot_id|>",
            f"{H.format('user')}1 + 2?<|eot_id|>{H.format('assistant')}",
            "3<|eot_id|>",
        ],
    ),
    (MISTRAL, PLAIN, ["<s>[INST] hi [/INST]", " hello</s>", "[INST] 1 + 2? [/INST]", " 3</s>"]),
    (
        GEMMA,
        PLAIN,
        [
            "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
            "hello<end_of_turn>",
            "\n<start_of_turn>user\n1 + 2?<end_of_turn>\n<start_of_turn>model\n",
            "3<end_of_turn>",
        ],
    ),
    (  # the model has to write the empty block of thoughts; the template prints none in earlier turns
        QWEN3,
        PLAIN,
        [
            f"{Q}hi<|im_end|>\n{A}",
            "hello<|im_end|>",
            f"\n{Q}1 + 2?<|im_end|>\n{A}",
            "<think>\n\n</think>\n\n3<|im_end|>",
        ],
    ),
    (
        QWEN3,
        THINKING,
        [f"{Q}hi<|im_end|>\n{A}", "hello<|im_end|>", f"\n{Q}1 + 2?<|im_end|>\n{A}", f"{THOUGHT}3<|im_end|>"],
    ),
    # the first answer's thoughts are cut, so it is context
    (QWEN3, ALL_THINKING, [f"{Q}hi<|im_end|>\n{A}hello<|im_end|>\n{Q}1 + 2?<|im_end|>\n{A}", f"{THOUGHT}3<|im_end|>"]),
    (R1, PLAIN, ["<s><|User|>hi<|Assistant|>", "hello</s>", "<|User|>1 + 2?<|Assistant|>", "3</s>"]),
    (
        R1,
        THINKING,
        [
            "<s><|User|>hi<|Assistant|>",
            "hello</s>",
            "<|User|>1 + 2?<|Assistant|><think>\n",  # the generation prompt
            "We add.\n</think>\n\n3</s>",
        ],
    ),
    (
        R1,
        ALL_THINKING,
        ["<s><|User|>hi<|Assistant|>\n\nhello</s><|User|>1 + 2?<|Assistant|><think>\n", "We add.\n</think>\n\n3</s>"],
    ),
    (
        PHI3,
        PLAIN,
        [
            "<|user|>\nhi<|end|>\n<|assistant|>\n",
            "hello<|end|>",
            "\n<|user|>\n1 + 2?<|end|>\n<|assistant|>\n",
            "3<|end|>",
        ],
    ),
    (VICUNA, PLAIN, ["USER: hi ASSISTANT:", " hello</s>", "USER: 1 + 2? ASSISTANT:", " 3</s>"]),
    (ENDLESS, PLAIN, ["user: hi\nassistant: ", "hello", "\nuser: 1 + 2?\nassistant: ", "3</s>"]),
    (LINES, PLAIN, ["user:\nhi\nassistant:\n", "hello", "\nuser:\n1 + 2?\nassistant:\n", "3</s>"]),
]
TEMPLATES = {"CHATML": CHATML, "LLAMA3": LLAMA3, "MISTRAL": MISTRAL, "GEMMA": GEMMA, "QWEN3": QWEN3, "R1": R1}
TEMPLATES |= {"PHI3": PHI3, "VICUNA": VICUNA, "ENDLESS": ENDLESS, "LINES": LINES}
NAME_OF = {template: name for name, template in TEMPLATES.items()}
IDS = [f"{NAME_OF[case[0]]}-{i}" for i, case in enumerate(SUPERVISED)]


@pytest.mark.parametrize(("template", "messages", "expected"), SUPERVISED, ids=IDS)
def test_every_answer_and_the_token_that_ends_it_is_supervised(template, messages, expected):
    tokenizer = chat_tokenizer(template)
    assert texts(tokenized([{"messages": messages}], tokenizer), tokenizer) == expected
    last = texts(tokenized([{"messages": messages}], tokenizer, "--train_on", "last"), tokenizer)
    assert last == ["".join(expected[:-1]), expected[-1]]


@pytest.mark.parametrize(("template", "messages", "expected"), SUPERVISED, ids=IDS)
def test_a_chat_prompt_is_what_training_saw_before_the_answer(template, messages, expected):
    tokenizer = chat_tokenizer(template)
    ids, mask = tokenized([{"messages": messages}], tokenizer, "--train_on", "last").example(0)
    asked = chat_prompt(tokenizer, messages[:-1])
    if template == R1 and "think" not in messages[-1]["content"]:  # it always asks for thoughts; this row has none
        asked = asked[: -len(colm_data.encode(tokenizer, ["<think>\n"])[0])]
    assert ids[~mask].tolist() == asked
    assert int(ids[-1]) in colm_data.stop_ids(tokenizer)


@pytest.mark.parametrize("template", [CHATML, PHI3], ids=["CHATML", "PHI3"])
def test_generation_marks_of_a_template_give_the_same_mask_wherever_its_author_put_them(template):
    tokenizer = chat_tokenizer(template)
    expected = [x.tolist() for x in tokenized([{"messages": PLAIN}], tokenizer).example(0)]
    start, end = ("<|im_start|>", "") if template == CHATML else ("<|", "|>")
    stop = "<|im_end|>" if template == CHATML else "<|end|>"
    header, content, newline = f"{start}{{{{ m.role }}}}{end}", "{{ m.content }}", "{{ '\n' }}"
    tail = template[template.index("{% if add_generation_prompt") :]
    for turn in (
        f"{header}{newline}[{content}{stop}]{newline}",
        f"{header}{newline}[{content}]{stop}{newline}",  # the token that ends the turn is left out
        f"{header}{newline}[{content}{stop}{newline}]",  # the line end after it is taken in
        f"[{header}{newline}{content}{stop}]{newline}",  # the role's header is taken in
        f"{header}[{newline}{content}{stop}]{newline}",  # a part of it
        f"{header}{newline}[{content}][{stop}]{newline}",  # two marks
    ):
        marked = turn.replace("[", "{% generation %}").replace("]", "{% endgeneration %}")
        plain = turn.replace("[", "").replace("]", "")
        one = f"{{% if m.role == 'assistant' %}}{marked}{{% else %}}{plain}{{% endif %}}"
        tokenizer.chat_template = f"{{% for m in messages %}}{one}{{% endfor %}}{tail}"
        assert [x.tolist() for x in tokenized([{"messages": PLAIN}], tokenizer).example(0)] == expected, turn


def test_generation_marks_are_believed_where_they_cover_other_turns():
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.chat_template = CHATML.replace(
        "'\n' + m['content'] }}", "'\n' }}{% generation %}{{ m['content'] }}"
    ).replace("{{ '<|im_end|>' + '\n' }}", "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}")
    parts = texts(tokenized([{"messages": PLAIN}], tokenizer), tokenizer)
    assert parts[1::2] == ["hi<|im_end|>", "hello<|im_end|>", "1 + 2?<|im_end|>", "3<|im_end|>"]


CONVERSATION = [
    said("system", "Be kind."),
    said("user", "1 + 2?"),
    said("assistant", "", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]),
    said("tool", "3"),
    said("assistant", "It is 3."),
]
CALL = {
    "id": None,
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 1}'},
}  # OpenAI's way to write it
SHAREGPT = [
    {"from": "human", "value": "1 + 2?"},
    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    {"from": "observation", "value": "3"},
    {"from": "gpt", "value": "It is 3."},
]
PARTS = [said("system", [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]), *CONVERSATION[1:]]
FORMS = {
    "messages": {"messages": CONVERSATION},
    "in parts": {"messages": PARTS},
    "openai": {
        "messages": [*CONVERSATION[:2], {"role": "assistant", "content": None, "tool_calls": [CALL]}, *CONVERSATION[3:]]
    },
    "system field": {"messages": CONVERSATION[1:], "system": "Be kind."},
    "sharegpt": {"conversations": [{"from": "system", "value": "Be kind."}, *SHAREGPT]},
    "sharegpt, system field": {"conversations": SHAREGPT, "system": "Be kind."},
    "conversations with roles": {"conversations": CONVERSATION},
    "trl": {"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:]},
    "trl, last turn": {"prompt": CONVERSATION[:4], "completion": CONVERSATION[4:]},
    "json": {"messages": json.dumps(CONVERSATION), "tools": json.dumps(TOOLS)},
    "nulls": {"messages": [turn | {"name": None} for turn in CONVERSATION], "instruction": None, "prompt": None},
    "trailing turn": {"messages": [*CONVERSATION, said("user", "thanks")]},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_a_conversation_gives_the_same_tokens_in_every_form(row):
    tokenizer = chat_tokenizer(CHATML)
    data = tokenized([{"tools": TOOLS} | row], tokenizer)
    tools = json.dumps(TOOLS)
    assert texts(data, tokenizer) == [
        f"<|im_start|>system\n{tools}<|im_end|>\n<|im_start|>system\nBe kind.<|im_end|>\n{Q}1 + 2?<|im_end|>\n{A}",
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>',
        f"\n<|im_start|>tool\n3<|im_end|>\n{A}",
        "It is 3.<|im_end|>",
    ]
    assert data.remarks == [] and data.rendering == "messages"


def test_a_turn_may_end_with_another_token_than_most():
    tokenizer = chat_tokenizer(LLAMA3)
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    messages = [PLAIN[0], said("assistant", "add()", tool_calls=[call]), said("tool", "3"), said("assistant", "3")]
    parts = texts(tokenized([{"messages": messages}], tokenizer), tokenizer)
    assert parts[1::2] == ["add()<|eom_id|>", "3<|eot_id|>"]


def test_reasoning_in_a_field_of_its_own_is_trained():
    messages = [*PLAIN[2:3], said("assistant", "3", reasoning_content="We add.")]
    for template in (QWEN3, R1):
        tokenizer = chat_tokenizer(template)
        supervised = texts(tokenized([{"messages": messages}], tokenizer), tokenizer)[1]
        opened = "" if template == R1 else "<think>\n"  # R1's generation prompt has opened the thoughts
        ending = "</s>" if template == R1 else "<|im_end|>"
        assert supervised == f"{opened}We add.\n</think>\n\n3{ending}"
    with pytest.raises(UserError, match="does not print the last answer whole"):
        rows = [{"messages": [PLAIN[0], said("assistant", "", tool_calls=[CALL])]}]
        tokenized(rows, chat_tokenizer(MISTRAL))  # prints no calls


REWRITING = (  # Mistral's way with a system message: it stands in the last question
    "{% set ns = namespace(system='', last=0) %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content + ' ' %}{% elif m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (ns.system if loop.index0 == ns.last else '') + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused_or_trained_on_the_last():
    tokenizer = chat_tokenizer(REWRITING)
    row = {"messages": [said("system", "Be kind."), *PLAIN]}
    with pytest.raises(UserError, match="data.json row 1: .*rewrites earlier turns.*--train_on last"):
        tokenized([row], tokenizer)
    data = tokenized([row], tokenizer, "--train_on", "last")
    assert texts(data, tokenizer) == ["[INST] hi [/INST] hello</s>[INST] Be kind. 1 + 2? [/INST]", " 3</s>"]


@pytest.mark.parametrize("answer", ["3", ""])
def test_an_end_that_is_another_turns_is_refused(answer):
    """Turns that call tools end otherwise, and EOS after the last turn hides where: no mask would be right."""
    template = PHI3.replace("'<|end|>\n'", "('<|call|>' if m.tool_calls else '<|end|>') + '\n'")
    tokenizer = chat_tokenizer(template)
    messages = [PLAIN[0], said("assistant", "add()", tool_calls=[CALL | {"id": "1"}]), said("tool", answer)]
    messages += [said("assistant", "add() is 3"), said("user", "thanks"), said("assistant", "")]
    with pytest.raises(UserError, match="rewrites earlier turns"):
        tokenized([{"messages": messages}], tokenizer)
    parts = texts(tokenized([{"messages": messages[:4]}], tokenizer, "--train_on", "last"), tokenizer)
    assert parts[1] == "add() is 3<|end|>"
    printing = "m['content'] + (m.tool_calls | tojson if m.tool_calls else '')"
    tokenizer = chat_tokenizer(PHI3.replace("m['content']", printing))  # where they end as others do, all is well
    parts = texts(tokenized([{"messages": messages}], tokenizer), tokenizer)
    assert parts[1].startswith("add()[{") and parts[1].endswith('"id": "1"}]<|end|>')
    assert parts[3::2] == ["add() is 3<|end|>", "<|end|>"]


def test_turns_can_be_left_out_of_the_loss():
    tokenizer = chat_tokenizer(CHATML)
    for mark in ({"weight": 0}, {"train": False}):
        messages = [PLAIN[0], PLAIN[1] | mark, *PLAIN[2:]]
        assert texts(tokenized([{"messages": messages}], tokenizer), tokenizer)[1:] == ["3<|im_end|>"]


def test_an_answer_that_brings_its_own_end_gets_no_second_one():
    tokenizer = chat_tokenizer(CHATML)
    messages = [*PLAIN[:3], said("assistant", "3<|im_end|>\n")]
    expected = tokenized([{"messages": PLAIN}], tokenizer)
    assert torch.equal(tokenized([{"messages": messages}], tokenizer).ids, expected.ids)


def test_an_answer_that_speaks_of_the_token_that_ends_it_is_trained_whole():
    tokenizer = chat_tokenizer(CHATML)
    messages = [PLAIN[0], said("assistant", "<|im_end|> ends a turn"), *PLAIN[2:]]
    parts = texts(tokenized([{"messages": messages}], tokenizer), tokenizer)
    assert parts[1::2] == ["<|im_end|> ends a turn<|im_end|>", "3<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA])
def test_a_first_turn_of_the_assistant_is_context(template):
    tokenizer = chat_tokenizer(template)
    messages = [said("assistant", "welcome"), *PLAIN]
    parts = texts(tokenized([{"messages": messages}], tokenizer), tokenizer)
    assert "welcome" in parts[0] and [part[0] for part in parts[1::2]] == ["h", "3"]
    with pytest.raises(UserError, match="no row can be trained on.*1 row with no answer"):
        tokenized([{"messages": messages[:1]}], tokenizer)


def test_reasoning_is_not_put_back_into_a_conversation_that_then_changes():
    cut = "{% set content = m['content'].split('</think>')[-1] %}"
    assert cut in R1
    only_at_the_end = (
        "{% set content = m['content'] %}{% if loop.last or add_generation_prompt %}" + cut + "{% endif %}"
    )
    tokenizer = chat_tokenizer(R1.replace(cut, only_at_the_end))
    with pytest.raises(UserError, match="does not print the last answer whole"):
        tokenized([{"messages": ALL_THINKING}], tokenizer)


def test_a_token_across_an_answers_border_is_cut_there():
    tokenizer = colm_data.demo_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[assistant]Bel' if m.role == 'assistant' else '[' + m.role + ']' }}{{ m.content }}"
        "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}[assistant]Bel{% endif %}"
    )
    messages = [said("user", "hi"), said("assistant", "ow is"), said("user", "ho"), said("assistant", "ow is")]
    ids, mask = tokenized([{"messages": messages}], tokenizer).example(0)
    assert chat_prompt(tokenizer, messages[:1]) == ids[: int(mask.nonzero()[0])].tolist()
    answer = tokenizer("ow is<|end|>")["input_ids"]
    assert ids[-len(answer) :].tolist() == answer and mask.sum() == 2 * len(answer)
    ids, mask = tokenized([{"messages": messages}], tokenizer, "--train_on", "last").example(0)
    assert chat_prompt(tokenizer, messages[:3]) == ids[~mask].tolist()
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert ids.tolist() != tokenizer(whole)["input_ids"]  # one string would have merged across the border


def test_tokenizers_without_offsets_give_the_same_tokens(monkeypatch):
    tokenizer = chat_tokenizer(CHATML)
    rows = [{"messages": messages} for messages in (PLAIN, THINKING)]
    rows.insert(1, {"prompt": "a b", "completion": "c"})
    fast = tokenized(rows, tokenizer)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    slow = tokenized(rows, tokenizer)
    assert torch.equal(fast.ids, slow.ids) and torch.equal(fast.supervised, slow.supervised)


def test_truncation_and_padding_that_a_tokenizers_file_asks_for_are_not_applied():
    tokenizer = chat_tokenizer(CHATML)
    expected = chat_prompt(tokenizer, PLAIN[:3]), colm_data.encode(tokenizer, ["a", "b" * 9])
    chats = [Text("a b c", [colm_data.Answer(2, 3, False)], "messages")] * 2
    marked = colm_data.encode_chats(tokenizer, chats)
    for call, result in (
        (lambda: chat_prompt(tokenizer, PLAIN[:3]), expected[0]),
        (lambda: colm_data.encode(tokenizer, ["a", "b" * 9]), expected[1]),
        (lambda: colm_data.encode_chats(tokenizer, chats), marked),
    ):
        tokenizer.backend_tokenizer.enable_truncation(2)
        tokenizer.backend_tokenizer.enable_padding(length=64)
        assert call() == result


def test_a_template_that_prints_the_date_prints_a_fixed_one(monkeypatch):
    tokenizer = chat_tokenizer(LLAMA3)
    row = {"messages": [said("system", "Be kind."), *PLAIN]}
    parts = texts(tokenized([row], tokenizer), tokenizer)
    assert "Today Date: 26 Jul 2024\nBe kind." in parts[0]
    assert "26 Jul 2024" in tokenizer.decode(chat_prompt(tokenizer, row["messages"][:2]))
    tokenizer.chat_template = "{% set how = '%Y' %}{{ strftime_now(how) }}" + CHATML
    with pytest.raises(UserError, match="prints the time"):
        tokenized([row], tokenizer)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": "hi"}, "'messages' is a string that is not JSON"),
        ({"messages": ["hi"]}, "list of objects with role and content, not of str"),
        ({"messages": []}, "empty"),
        ({"messages": [{"role": "user"}, said("assistant", "a")]}, "role and content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image': only text"),
        ({"messages": [said("system", "a"), *PLAIN], "system": "b"}, "system message: keep one"),
        ({"messages": [said("assistant", "", tool_calls=["add"])]}, "tool call"),
        ({"messages": PLAIN, "tools": {"name": "add"}}, "'tools' is a dict"),
        (
            {"conversations": [{"from": "function_call", "value": "add(1)"}]},
            "function_call is a string that is not JSON",
        ),
        ({"prompt": PLAIN[:1], "completion": "a"}, "'prompt' is a list"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "'history' must be a list of"),
    ],
)
def test_bad_conversations_are_refused_with_their_place(row, words):
    with pytest.raises(UserError, match=rf"data.json row 2.*{words}"):
        tokenized([{"messages": PLAIN}, row], chat_tokenizer(CHATML))


def test_what_a_template_refuses_is_said_in_its_own_words():
    for template, words in ((GEMMA, "System role not supported"), (MISTRAL, "roles must alternate")):
        with pytest.raises(UserError, match=f"data.json row 1: the chat template refuses.*{words}"):
            tokenized([{"messages": [said("system", "Be kind."), *PLAIN]}], chat_tokenizer(template))


# ------------------------------------------------------------------------------------------- through the command line


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    """The folder of a tiny model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = chat_tokenizer(CHATML)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_one_file_of_each_kind_is_trained_through_the_command_line(tmp_path, chat_model, capsys):
    conversations = [[said("user", f"say {i}"), said("assistant", f"it is {i}")] for i in range(12)]
    sharegpt = [
        [{"from": "human", "value": q["content"]}, {"from": "gpt", "value": a["content"]}] for q, a in conversations
    ]
    kinds = {
        "messages.jsonl": [{"messages": turns} for turns in conversations],
        "sharegpt.json": [{"conversations": turns} for turns in sharegpt],
        "trl.jsonl.gz": [{"prompt": turns[:1], "completion": turns[1:]} for turns in conversations],
        "chat.parquet": [{"messages": turns} for turns in conversations],
        "chat.csv": [{"messages": json.dumps(turns)} for turns in conversations],
        "data.json": [{"messages": turns} for turns in conversations],
        "alpaca.parquet": ALPACA,
        "alpaca.csv": ALPACA,
        "alpaca.tsv": ALPACA,
        "alpaca.jsonl": ALPACA,
        "text.jsonl": [{"prompt": row["instruction"], "completion": row["output"]} for row in ALPACA],
    }
    losses = {}
    for name, rows in kinds.items():
        file, out = write(tmp_path / name, rows), tmp_path / f"out_{name}"
        flags = ["--model", str(chat_model), "--train_file", str(file), "--eval_file", str(file), "--save_every", "0"]
        flags += ["--output_dir", str(out), "--max_steps", "1", "--pool_size", "8", "--coreset_size", "4"]
        flags += ["--selection", "random", "--lora_r", "4", "--keep_sources", "none", "--no-packing"]
        train_colm.cli(flags)
        losses[name] = json.loads((out / "metrics.jsonl").read_text())["loss"]
    assert capsys.readouterr().err.count("error") == 0
    chats = [loss for name, loss in losses.items() if "alpaca" not in name and "text" not in name]
    alpacas = [loss for name, loss in losses.items() if "alpaca" in name]
    assert len(chats) == 6 and len(set(chats)) == 1  # the same conversations
    assert len(alpacas) == 4 and len(set(alpacas)) == 1
    assert len(set(losses.values())) == 3


# -------------------------------------------------------------------------------------------------- unusual rows, said


def test_what_is_done_with_unusual_rows_is_said_once_with_their_number():
    tokenizer = word_tokenizer()
    rows = [{"prompt": "a", "completion": "1", "source": "x", "id": i, "notes": None} for i in range(100)]
    rows[3] |= {"completion": ""}
    rows[5] |= {"completion": " "}
    rows[7] |= {"prompt": "a </s> b"}
    rows[9] |= {"prompt": "a " * 9}
    rows[11] |= {"completion": "1 " * 9}
    data = tokenized(rows, tokenizer, "--max_length", "8")
    assert data.remarks == [
        "not used: the fields id",
        "2 rows with an empty answer, which trains the model to end at once (first: data.json row 4)",
        "1 row with special tokens in its own text, which are read as these tokens (first: data.json row 8)",
        "1 row with text before the answer cut on the left to --max_length 8 (first: data.json row 10)",
        "1 row with a last answer that does not fit in --max_length 8, dropped (first: data.json row 12)",
    ]
    rows[13:20] = [rows[9]] * 7
    assert tokenized(rows, tokenizer, "--max_length", "8").remarks[-1] == (
        "9% of the rows do not fit: --max_length 12 keeps 99 % whole, 12 all"
    )


def test_what_is_done_with_unusual_conversations_is_said():
    def remarks(template, *rows):
        return tokenized(list(rows), chat_tokenizer(template)).remarks

    rows = [{"messages": turns, "tools": TOOLS} for turns in (PLAIN, PLAIN[:1], [*PLAIN[:3], said("assistant", "")])]
    rows += [{"messages": [said("user", "what is <end_of_turn>?"), PLAIN[1]]}, *[{"messages": PLAIN}] * 40]
    assert remarks(GEMMA, *rows) == [
        "2 rows with tools, which the chat template does not print (first: data.json row 1)",
        "1 row with an empty answer, which trains the model to end at once (first: data.json row 3)",
        "1 row with special tokens in its own text, which are read as these tokens (first: data.json row 4)",
        "1 row with no answer, dropped (first: data.json row 2)",
    ]
    cut = "an earlier answer that the chat template cuts: that answer carries no loss"
    assert remarks(QWEN3, {"messages": ALL_THINKING}) == [f"1 row with {cut} (first: data.json row 1)"]
    put_back = "reasoning in the last answer that the chat template cuts: it is put back"
    assert remarks(R1, {"messages": THINKING}) == [f"1 row with {put_back} (first: data.json row 1)"]


def test_the_trainer_says_it_before_the_first_step(tmp_path, demo_tokenizer, capsys):
    rows = [row | {"output": "very " * 300} if i == 2 else row for i, row in enumerate(ALPACA)]
    train, held_out = write(tmp_path / "rows.jsonl", ALPACA), write(tmp_path / "held_out.jsonl", rows)
    flags = ["--train_file", str(train), "--eval_file", str(held_out), "--pool_size", "4", "--coreset_size", "2"]
    train_colm.load_data(parse_args(flags), demo_tokenizer, show=True)
    said_first = capsys.readouterr().out.splitlines()[0]
    reason = "a last answer that does not fit in --max_length 512, dropped"
    assert said_first == f"held-out rows: 1 row with {reason} (first: {held_out} line 3)"
    train_colm.load_data(parse_args(flags), demo_tokenizer, show=False)
    assert capsys.readouterr().out == ""


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
        ["<s> c d e", "1 2 </s>"],
        ["<s> a b c", "1 2 </s>"],
        ["<s> b", "1 2 3 4 </s>"],
        ["<s>", "1 2 3 4 5 </s>"],
    ]
    assert data.numbers.tolist() == [0, 1, 2, 5]
    assert (data.shortened, data.dropped) == (2, 2)
    assert all(data.length(i) <= 7 for i in range(len(data)))


def test_long_conversations_lose_their_beginning_and_an_answer_cut_in_two_its_loss():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "<s> {% for m in messages %}{{ m.content + (' </s> ' if m.role == 'assistant' else ' ') }}{% endfor %}"
    )
    messages = [said("user", "a"), said("assistant", "1 2 3"), said("user", "b"), said("assistant", "4")]
    row = {"messages": messages}
    expected = {
        9: ["<s> a", "1 2 3 </s>", "b", "4 </s>"],
        8: ["<s>", "1 2 3 </s>", "b", "4 </s>"],
        7: ["<s> 2 3 </s> b", "4 </s>"],
        4: ["<s> b", "4 </s>"],
    }
    for length, parts in expected.items():
        assert texts(tokenized([row], tokenizer, "--max_length", str(length)), tokenizer) == parts, length
    with pytest.raises(UserError, match="no row can be trained on.*--max_length 3"):
        tokenized([row], tokenizer, "--max_length", "3")


def test_a_row_without_any_token_to_predict_from_is_dropped():
    data = tokenized([{"prompt": "", "completion": c} for c in ("", "1")], word_tokenizer(None))
    assert data.example(0).supervised.tolist() == [False, True]  # nothing predicts the first token
    assert word_tokenizer().decode(data.ids) == "1 </s>"
    assert (len(data), data.dropped, data.numbers.tolist()) == (1, 1, [1])


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_first_token_is_never_supervised_and_every_row_has_a_supervised_one(template):
    tokenizer, rng = chat_tokenizer(template), random.Random(0)
    for _ in range(40):
        turns = []
        for i in range(rng.randint(2, 7)):
            content = " ".join(rng.choices(["one", "two", "\n", "<think>\nx\n</think>\n\n", "3"], k=rng.randint(0, 6)))
            turns.append(said("assistant" if i % 2 else "user", content))
        try:
            data = tokenized([{"messages": turns}], tokenizer, "--max_length", str(rng.choice([20, 40, 400])))
        except UserError as error:
            assert "no row can be trained on" in str(error) or "does not print the last answer" in str(error)
            continue
        ids, mask = data.example(0)
        assert not mask[0] and mask.any() and mask[-1]
        markers = {tokenizer.convert_tokens_to_ids(m) for m in MARKERS if m not in ("<|im_end|>", "<|eot_id|>")}
        markers -= {tokenizer.convert_tokens_to_ids(m) for m in ("<end_of_turn>", "<|end|>")}
        assert not markers & set(ids[mask].tolist())  # no role's marker in the loss


def test_sources_get_ids_in_order_of_appearance_and_keep_known_ones():
    rows = [{"prompt": "a", "completion": "1", "task": task} for task in ("web", 7, "web", "code")]
    data = tokenized(rows, word_tokenizer(), "--source_field", "task")
    assert (data.names, data.sources.tolist()) == (["web", "7", "code"], [0, 1, 0, 2])
    data = tokenized(rows, word_tokenizer(), "--source_field", "task", names=["code", "web"])
    assert (data.names, data.sources.tolist()) == (["code", "web", "7"], [1, 2, 1, 0])


@pytest.mark.parametrize("source", [{}, {"source": None}, {"source": ""}, {"source": float("nan")}])
def test_rows_without_sources_are_one_source(source):
    data = tokenized([{"prompt": "a", "completion": "1"} | source] * 3, word_tokenizer())
    assert (data.names, data.sources.tolist()) == (["all"], [0, 0, 0])


@pytest.mark.parametrize("source", [{}, {"source": None}, {"source": ""}, {"source": float("nan")}])
@pytest.mark.parametrize("first", [True, False])
def test_some_rows_without_source_are_refused_with_their_number(source, first):
    bare = [{"prompt": "a", "completion": "1"} | source] * 3
    rows = [*bare, *ALPACA] if first else [*ALPACA[:2], *bare, *ALPACA]
    with pytest.raises(
        UserError, match=rf"data.json row {1 if first else 3} has .*'source'.*3 rows? have none|3 have none"
    ):
        tokenized(rows, word_tokenizer())


@pytest.mark.parametrize("source", [["web"], {"name": "web"}])
def test_a_source_that_is_no_name_is_refused(source):
    with pytest.raises(UserError, match="data.json row 13: field 'source' is a (list|dict)"):
        tokenized([*ALPACA, {"prompt": "a", "completion": "1", "source": source}], word_tokenizer())


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
        of([*ALPACA[:-1], ALPACA[-1] | {"history": [["a", "b"]]}]),
        of([*ALPACA[:-1], ALPACA[-1] | {"history": [["a", "b"]]}], "--train_on", "last"),
        of(ALPACA, "--max_length", "20"),
    ]
    assert len(set(variants)) == len(variants)
    assert of(list(ALPACA)) == variants[0]


# ------------------------------------------------------------------------------------------------ tokens kept on disk


@pytest.fixture
def big(tmp_path, monkeypatch):
    """A training file that counts as large, and flags with a cache folder."""
    monkeypatch.setattr(colm_data, "SMALL", 100)
    file = write(tmp_path / "rows.jsonl", [*ALPACA, {"instruction": "a", "output": "", "source": "s0"}])
    return str(file), ("--cache_dir", str(tmp_path / "cache"))


def never(*_):
    raise AssertionError("tokenised again")


def same(a, b) -> bool:
    tensors = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("ids", "supervised", "sources", "numbers"))
    rest = ("offsets", "names", "shortened", "dropped", "files", "forms", "remarks")
    return tensors and all(getattr(a, n) == getattr(b, n) for n in rest) and a.fingerprint() == b.fingerprint()


def test_tokens_are_kept_and_found_again(big, demo_tokenizer, tmp_path, monkeypatch):
    file, flags = big
    plain = loaded(file, demo_tokenizer, "--cache_dir", "")
    assert plain.remarks and not (tmp_path / "cache").exists()
    first = loaded(file, demo_tokenizer, *flags)
    monkeypatch.setattr(colm_data, "tokenize_files", never)
    assert same(first, plain) and same(loaded(file, demo_tokenizer, *flags), plain)
    found = [path.suffix for path in (tmp_path / "cache").iterdir()]
    assert sorted(found) == [".lock", ".safetensors"]


def test_whatever_shapes_the_tokens_is_part_of_their_key(big, demo_tokenizer, tmp_path):
    file, flags = big
    keys = []

    def load(*more, tokenizer=demo_tokenizer, names=()):
        data = loaded(file, tokenizer, *flags, *more, names=names)
        assert same(data, loaded(file, tokenizer, "--cache_dir", "", *more, names=names))
        keys.append(len([*(tmp_path / "cache").glob("*.safetensors")]))

    load()
    load("--max_length", "150")
    load("--train_on", "last")
    load("--source_field", "instruction")
    load(names=["s2"])
    load(tokenizer=chat_tokenizer(CHATML))
    load(tokenizer=chat_tokenizer(LLAMA3))
    write(Path(file), ALPACA[1:])
    load()
    assert keys == list(range(1, 9))
    load("--seed", "3", "--pool_size", "16", "--coreset_size", "8")
    assert keys[-1] == 8  # what does not shape them is not


def test_a_damaged_or_foreign_cache_file_is_made_again_and_runs_nothing(big, demo_tokenizer, tmp_path):
    file, flags = big
    plain = loaded(file, demo_tokenizer, *flags)
    cache = next((tmp_path / "cache").glob("*.safetensors"))
    good = cache.read_bytes()
    tensors = safetensors.torch.load_file(cache)
    with safetensors.safe_open(cache, "pt") as f:
        metadata = f.metadata()

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    def changed(meta=metadata, **values) -> bytes:
        return safetensors.torch.save({**tensors, **values}, meta)

    offsets = tensors["offsets"]
    for content in (
        b"",
        good[: len(good) // 2],
        good[:-1],
        pickle.dumps(Attack()),
        changed(meta={}),
        changed(meta={"values": "[]"}),
        changed(meta={"values": json.dumps(json.loads(metadata["values"]) | {"names": ["s0"]})}),
        changed(ids=tensors["ids"] + 512),
        changed(ids=tensors["ids"] - 512),
        changed(ids=tensors["ids"].long()),
        changed(ids=tensors["ids"][1:]),
        changed(offsets=offsets[:-1]),
        changed(offsets=offsets.flip(0)),
        changed(offsets=torch.zeros_like(offsets)),
        changed(sources=tensors["sources"] - 1),
        changed(supervised=~tensors["supervised"]),
        changed(sources=tensors["sources"][:-1]),
    ):
        cache.unlink()  # not in place: rows in use map the file
        cache.write_bytes(content)
        assert same(loaded(file, demo_tokenizer, *flags), plain)
        assert cache.read_bytes() == good
    assert not (tmp_path / "attacked").exists()


def test_a_cache_folder_that_cannot_be_used_is_said(big, demo_tokenizer, tmp_path):
    (tmp_path / "cache").write_text("a file")
    data = loaded(big[0], demo_tokenizer, *big[1])
    assert len(data) == 13 and f"--cache_dir {tmp_path}/cache can't be used" in data.remarks[-1]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_costs_the_kept_tokens_alone(big, demo_tokenizer, monkeypatch, error):
    make, begun = colm_data.tokenize_files, []

    def full(*_, **__):
        raise error

    def counted(*args):
        begun.append(1)
        return make(*args)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr(colm_data, "tokenize_files", counted)
    data = loaded(big[0], demo_tokenizer, *big[1])
    assert len(data) == 13 and "can't be used (No space left" in data.remarks[-1] and len(begun) == 1


def test_one_process_of_a_host_tokenises_for_all(big, monkeypatch):
    """Threads stand in for processes: each opens the lock's file itself, so the system keeps them apart as well."""
    make, begun, ready = colm_data.tokenize_files, [], threading.Barrier(3)

    def slow(*args):
        begun.append(1)
        time.sleep(0.5)
        return make(*args)

    def load(_):
        ready.wait()
        return loaded(big[0], colm_data.demo_tokenizer(), *big[1]).fingerprint()

    monkeypatch.setattr(colm_data, "tokenize_files", slow)
    with ThreadPoolExecutor(3) as pool:
        found = [*pool.map(load, range(3))]
    assert len(begun) == 1 and len(set(found)) == 1


def test_small_files_are_not_kept(demo_tokenizer, tmp_path):
    file = str(write(tmp_path / "rows.jsonl", ALPACA))
    loaded(file, demo_tokenizer, "--cache_dir", str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


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
    for row in rows[::3]:
        row |= {"system": "Go.", "history": [["say", "x"], ["more", "y z"]]}  # three answers with loss
    flags = ["--train_file", str(write(folder / "rows.json", rows)), "--output_dir", str(folder), "--max_steps", "1"]
    args = parse_args(
        [*flags, "--pool_size", "9", "--coreset_size", "9", "--lora_dropout", "0", "--packing", "--max_length", "160"]
    )
    tokenizer = colm_data.demo_tokenizer()
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
        ids, supervised = run.train.example(row)
        labels = ids.long().masked_fill(~supervised, -100)
        loss = run.model(input_ids=ids[None].long(), labels=labels[None]).loss * weight  # the model's own loss
        loss.backward()
        expected += loss.item()
    truth = gradient()
    for packing in (False, True):
        run.args.packing = packing
        run.model.set_attn_implementation("packed" if packing else "sdpa")
        for tokens in (60, 150, 400, 100_000):
            run.args.max_tokens_per_micro_batch = tokens
            choice = train_colm.Choice(rows, weights, rows < 0, run.moments)
            loss = float(train_colm.accumulate_gradients(run, rows, choice, 0))
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
        ("pool_sise: 3", ["--pool_sise=3 (did you mean --pool_size?)", "unrecognized"]),
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
        ("--learning_rates 1", ["--learning_rates 1 (did you mean --learning_rate?): see train_colm.py --help"]),
        ("--lr 1", ["unrecognized arguments: --lr 1: see train_colm.py --help"]),
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
        ("--model no/such/folder", ["--model no/such/folder: there is no such folder", "config.json"]),
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
        (b"[" + GOOD, ["rows.jsonl line 2", "broken JSON"]),
        (b'{"rows": [\n1]}', ["rows.jsonl is one JSON object", "data"]),
        (b"instruction,output\na,b\n", ["rows.jsonl starts with 'instruction,output', which is not JSON", ".csv"]),
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
        (
            GOOD + b'{"question": "a", "answer": "b", "source": "w"}',
            ["line 2", "'question', 'answer'", "conversations"],
        ),
        (GOOD + b'{"instruction": "a", "input": ["b"], "output": "c", "source": "w"}', ["line 2", "'input' is a list"]),
        (GOOD + b'{"instruction": "a", "output": "1"}', ["rows.jsonl line 2", "'source'"]),
        (GOOD + b'{"messages": "hi", "source": "w"}', ["rows.jsonl line 2", "'messages' is a string that is not JSON"]),
        (
            GOOD + b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}], "source": "w"}',
            ["line 2", "role and content"],
        ),
        (
            GOOD + b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
            b'"source": "w"}',
            ["rows.jsonl line 2", "no chat template", "take a --model with one", "prompt and completion"],
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
    refused(["--train_file", str(tmp_path)], str(tmp_path), "is a folder", "*.jsonl")


@pytest.mark.parametrize(
    "text", ["instruction,output\na,b,c\n", "instruction,output\na\n", 'instruction,output\n"a,b\n']
)
def test_a_broken_table_is_refused_with_its_line(refused, tmp_path, text):
    (tmp_path / "rows.csv").write_text(text)
    refused(["--train_file", str(tmp_path / "rows.csv")], "rows.csv line", "columns")


@pytest.mark.parametrize("content", [b"", b"PAR1 no parquet PAR1"])
def test_a_broken_parquet_file_is_refused(refused, tmp_path, content):
    (tmp_path / "rows.parquet").write_bytes(content)
    refused(["--train_file", str(tmp_path / "rows.parquet")], "rows.parquet can't be read", "Parquet")


def test_a_glob_without_files_is_refused(refused, tmp_path):
    refused(["--train_file", f"{tmp_path}/*.jsonl"], f"{tmp_path}/*.jsonl matches no file")


def test_rows_without_source_are_refused_where_sources_matter(refused, tmp_path, demo_tokenizer):
    rows = [{"prompt": "a", "completion": "1"}] * 8
    for selection in ("colm", "random_keep", "fresh"):
        refused(["--selection", selection], "'source'", "--source_field", "--keep_sources none", rows=rows)
    for way_on in (["--keep_sources", "none"], ["--selection", "random"], ["--selection", "full"]):
        file = str(tmp_path / "rows.jsonl")
        args = parse_args(["--train_file", file, "--pool_size", "4", "--coreset_size", "2", *way_on])
        assert len(train_colm.load_data(args, demo_tokenizer, show=False)[0]) == 8


def test_no_row_left_is_refused(refused):
    message = refused(["--max_length", "2"], "rows.jsonl", "no row", "--max_length", rows=ALPACA)
    assert "keeps 99 % whole" in message


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
            dynamo_plugin=TorchDynamoPlugin(backend="no"),
            fsdp_plugin=SimpleNamespace(
                **{"fsdp_version": 2, "activation_checkpointing": False, "cpu_offload": OffloadPolicy()} | plugin
            ),
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


def test_config_files_hold_empty_lists_and_negative_numbers(tmp_path):
    (tmp_path / "flags.yaml").write_text("report_to: []\nlearning_rate: -1e-3\nkeep_sources: [a, b]\ncache_dir: ''\n")
    expected = ["--learning_rate=-1e-3", "--keep_sources", "a", "b", "--cache_dir="]
    assert colm_data.config_flags(str(tmp_path / "flags.yaml")) == expected
    (tmp_path / "flags.yaml").write_text("config: other.yaml\n")
    with pytest.raises(colm_data.UserError, match="names another config"):
        colm_data.config_flags(str(tmp_path / "flags.yaml"))


def test_copies_are_dropped_and_the_others_keep_their_numbers_and_sources(demo_tokenizer, tmp_path, capsys):
    rows = [{"instruction": f"What is {i} + 1?", "output": str(i + 1), "source": "abc"[i % 3]} for i in range(6)]
    rows = [rows[0], rows[1], rows[0], rows[2], rows[1] | {"source": "d"}, *rows[2:], rows[0] | {"output": "2"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    flags = [*f"--train_file {path} --pool_size 2 --coreset_size 1 --keep_sources none".split(), "--cache_dir", ""]
    whole, _, _ = train_colm.load_data(parse_args(flags), demo_tokenizer, show=False)
    data, _, _ = train_colm.load_data(parse_args([*flags, "--drop_copies"]), demo_tokenizer, show=True)
    stays = [0, 1, 3, 6, 7, 8, 9]  # in order; another answer makes another row, another source does not
    assert data.numbers.tolist() == stays
    assert "3 rows are copies of rows before them, dropped" in capsys.readouterr().out
    for i, row in enumerate(stays):
        example, before = data.example(i), whole.example(row)
        assert torch.equal(example.ids, before.ids) and torch.equal(example.supervised, before.supervised)
        assert data.sources[i] == whole.sources[row]
    assert data.without_copies() is data


def test_a_source_of_copies_alone_is_no_source(demo_tokenizer, tmp_path, capsys):
    """Empty, it would count as a small source and lower the mean size, which is 6.5 here: c has 5 rows."""
    sources = "a" * 8 + "c" * 5
    rows = [{"instruction": f"What is {i} + 1?", "output": str(i + 1), "source": sources[i]} for i in range(13)]
    rows[4:4] = [row | {"source": "b"} for row in rows[:2]]
    rows += [row | {"source": "d"} for row in rows[:2]]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    flags = f"--train_file {path} --coreset_size 1 --drop_copies --cache_dir=".split()
    data, _, keep = train_colm.load_data(parse_args([*flags, "--pool_size", "2"]), demo_tokenizer, show=True)
    assert [data.names[q] for q in keep] == ["c"]
    assert [data.names[q] for q in data.sources.tolist()] == ["a"] * 8 + ["c"] * 5
    assert "no row is left of b, d" in capsys.readouterr().out
    args = parse_args([*flags, "--pool_size", "2"])
    run = SimpleNamespace(args=args, train=data, keep=keep, accelerator=SimpleNamespace(print=print))
    train_colm.announce(run)
    out = capsys.readouterr().out
    assert "13 rows of 2 sources" in out and "2 sources outnumber the 1 examples" in out
    with pytest.raises(colm_data.UserError, match="exceeds the 13 usable rows .* 4 are copies"):
        train_colm.load_data(parse_args([*flags, "--pool_size", "14"]), demo_tokenizer, show=False)


def test_rows_that_resemble_others_are_dropped(demo_tokenizer, tmp_path, capsys):
    """Questions of 60 letters: with one letter changed 57 of 61 pairs are common, others share the template alone."""
    letters = random.Random(0)
    texts = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=60)) for _ in range(12)]
    rows = [{"instruction": text, "output": "yes", "source": "a"} for text in texts]
    changed = texts[3][:30] + "#" + texts[3][31:]
    rows.insert(7, {"instruction": changed, "output": "yes", "source": "b"})
    rows.append(rows[0])
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    flags = f"--train_file {path} --pool_size 2 --coreset_size 1 --keep_sources none --cache_dir=".split()
    data, _, _ = train_colm.load_data(parse_args([*flags, "--drop_near_copies", "0.5"]), demo_tokenizer, show=True)
    assert data.numbers.tolist() == [i for i in range(13) if i != 7]
    out = capsys.readouterr().out
    assert "2 rows resemble rows before them, dropped" in out
    assert "no row is left of b: all resemble rows of other sources" in out
    whole, _, _ = train_colm.load_data(parse_args([*flags, "--drop_near_copies", "1"]), demo_tokenizer, show=False)
    assert whole.numbers.tolist() == list(range(13))  # the equal row alone is dropped
    for value in ("0", "1.5", "nan"):
        with pytest.raises(colm_data.UserError, match=f"--drop_near_copies {float(value)} is out of range"):
            parse_args([*flags, "--drop_near_copies", value])


def test_what_the_first_source_has_in_common_is_no_template(demo_tokenizer):
    """Else the others' short questions would be cut away, and rows with equal answers dropped."""
    rows = [{"instruction": f"Translate this sentence into French: {i}", "output": str(i)} for i in range(400)]
    rows += [{"instruction": f"Is {i} odd?", "output": "yes"} for i in range(1001, 1201, 2)]
    data = colm_data.tokenize(rows, ["row"] * 500, demo_tokenizer, parse_args([]), [], False)
    numbers = data.without_near_copies(0.95).numbers
    assert (numbers >= 400).sum() > 50


def test_what_a_row_is_compared_by(demo_tokenizer):
    """Pairs of neighbouring tokens of question and answer: no template, no pair across rows or across the two."""
    rows = [{"instruction": text, "output": "z", "source": "a"} for text in ("hi", "no")]
    args = parse_args(["--pool_size", "2", "--coreset_size", "1"])
    data = colm_data.tokenize(rows, ["row"] * 2, demo_tokenizer, args, [], False)
    examples = [data.example(i) for i in range(2)]
    head, tail = colm_data.template(examples)
    pairs, starts = colm_data.neighbours(examples, head, tail)
    for example, row in zip(examples, (pairs[: starts[1]], pairs[starts[1] :]), strict=True):
        prompt = colm_data.prompt_tokens(example)
        ids = [*example.ids[head : prompt - tail].tolist(), *example.ids[prompt:].tolist(), 0]
        assert len(ids) == 5 and row.tolist()[:4] == [(a << 32) | b for a, b in zip(ids, ids[1:], strict=False)]


def test_rows_of_the_same_tokens_that_supervise_others_are_no_copies(demo_tokenizer):
    rows = colm_data.demo_rows("train")[:1] * 3
    args = parse_args(["--pool_size", "2", "--coreset_size", "1"])
    data = colm_data.tokenize(rows, ["row"] * 3, demo_tokenizer, args, [], False)
    assert data.without_copies().numbers.tolist() == [0]
    data.supervised[data.offsets[2] - 1] = False  # the last token of the second row
    assert data.without_copies().numbers.tolist() == [0, 1]

"""eval_superglue.py: templates, metrics by hand, batched scores against one forward per candidate, whole runs."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from models import tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

import eval_superglue as sg
from colm_data import demo_tokenizer

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
MULTIRC = {
    "passage": {
        "text": "Ann has a cat. ",
        "questions": [
            {"question": "Who?", "answers": [{"text": "Ann", "label": 1}, {"text": "Bob", "label": 0}]},
            {"question": "What?", "answers": [{"text": "cat", "label": 1}, {"text": "dog", "label": 0}]},
        ],
    }
}
RECORD = {
    "passage": {
        "text": " Ann met Bob.\n@highlight\nThey spoke",
        "entities": [{"start": 1, "end": 3}, {"start": 9, "end": 11}],
    },
    "qas": [{"query": "Then @placeholder left Bob.", "answers": [{"start": 1, "end": 3, "text": "Ann"}]}],
}


def squad(contexts):
    """The answer to everything is "Cats" or "All cats"."""
    answers = [{"text": "Cats"}, {"text": "All cats"}]
    paragraphs = [{"context": x, "qas": [{"question": "Who purrs?", "answers": answers}]} for x in contexts]
    return {"data": [{"title": "Cats", "paragraphs": paragraphs}]}


SQUAD = squad(["Cats purr."])
NO_DATE = {"day": "", "month": "", "year": ""}
DROP = {
    "nfl_1": {
        "passage": "They scored 3 and 7.",
        "qa_pairs": [
            {"question": "How many?", "answer": {"number": "10", "spans": [], "date": NO_DATE}},
            {"question": "Who?", "answer": {"number": "", "spans": ["Al", "Bo"], "date": NO_DATE}},
            {
                "question": "When?",
                "answer": {"number": "", "spans": [], "date": {"day": "3", "month": "May", "year": "1990"}},
                "validated_answers": [{"number": "", "spans": ["May 1990"], "date": NO_DATE}],
            },
        ],
    }
}
YES_OR_NO = " Yes or No?\n"
ROWS = {  # task: a row of the file, prompts, completions
    "SST-2": ("sentence\tlabel\nit works . \t1\n", ["it works . It was"], [" great"]),
    "CB": (
        {"premise": "It rained.", "hypothesis": "it rained", "label": "neutral"},
        ['Suppose It rained. Can we infer that "it rained"? Yes, No, or Maybe?\n'],
        ["Maybe"],
    ),
    "RTE": (
        {"premise": "It rained.", "hypothesis": "It was wet.", "label": "not_entailment"},
        [f'It rained.\nDoes this mean that "It was wet." is true?{YES_OR_NO}'],
        ["No"],
    ),
    "BoolQ": (
        {"passage": "Tea -- Hot.", "question": "is tea hot", "label": True},
        ["Tea -- Hot. Is tea hot?\n"],  # the third of MeZO's templates, which its results use
        ["Yes"],
    ),
    "WiC": (
        {"word": "bank", "sentence1": "A bank.", "sentence2": "River banks.", "label": False},
        ['Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA bank.\nRiver banks.\n'],
        ["No"],
    ),
    "WSC": (
        {"text": "Al saw Bo and He waved.", "target": {"span1_text": "Al", "span2_text": "He"}, "label": True},
        [f'Al saw Bo and He waved.\nIn the previous sentence, does the pronoun "he" refer to Al?{YES_OR_NO}'],
        ["Yes"],
    ),
    "COPA": (
        {
            "premise": "It rained.",
            "choice1": "The lawn got wet.",
            "choice2": "I sang.",
            "question": "effect",
            "label": 0,
        },
        ["It rained so"],
        [" the lawn got wet."],
    ),
    "MultiRC": (
        MULTIRC,
        [
            f'Ann has a cat.\nQuestion: {q}\nI found this answer "{a}". Is that correct?{YES_OR_NO}'
            for q, a in (("Who?", "Ann"), ("Who?", "Bob"), ("What?", "cat"), ("What?", "dog"))
        ],
        ["Yes", "No", "Yes", "No"],
    ),
    "ReCoRD": (RECORD, ["Ann met Bob.\n- They spoke\n-"], [" Then Ann left Bob."]),
    "SQuAD": (SQUAD, ["Title: Cats\nContext: Cats purr.\nQuestion: Who purrs?\nAnswer:"], [" Cats"]),
    "DROP": (
        DROP,
        [f"Passage: They scored 3 and 7.\nQuestion: {q}\nAnswer:" for q in ("How many?", "Who?", "When?")],
        [" 10", " Al; Bo", " 3 May 1990"],
    ),
}


def write(path: Path, content) -> Path:
    rows = content if isinstance(content, list) else [content]
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("task", ROWS)
def test_templates(task, tmp_path):
    content, prompts, completions = ROWS[task]
    examples = sg.read_task(task, str(write(tmp_path / "f", content)))
    assert [e.prompt for e in examples] == prompts
    assert [sg.training_row(e, False)["completion"] for e in examples] == completions
    assert sg.training_row(examples[0], True)["source"] == task
    assert sg.training_row(examples[0], False).get("source") == ("nfl" if task == "DROP" else None)


def test_drop_files_of_many_lines(tmp_path):
    examples = sg.read_task("DROP", str(write(tmp_path / "f", json.dumps(DROP, indent=4))))
    assert [e.gold for e in examples] == [[["10"]], [["Al", "Bo"]], [["3 May 1990"], ["May 1990"]]]


def test_drop_questions_without_an_answer_are_left_out(tmp_path, capsys):
    silent = {"question": "Why?", "answer": {"number": "", "spans": [], "date": NO_DATE}}
    some = {"nfl_1": DROP["nfl_1"] | {"qa_pairs": [silent, *DROP["nfl_1"]["qa_pairs"]]}}
    examples = sg.read_task("DROP", str(write(tmp_path / "f", some)))
    assert [e.id for e in examples] == ["DROP 0.1", "DROP 0.2", "DROP 0.3"]
    assert capsys.readouterr().err == f"{tmp_path / 'f'}: 1 questions have no answer and are left out\n"
    with pytest.raises(sg.UserError, match="holds no question of DROP"):
        sg.read_task("DROP", str(write(tmp_path / "f", {"nfl_1": {"passage": "x", "qa_pairs": [silent]}})))


def test_limit_draws_passages_of_each_file(tmp_path):
    tasks = [f"MultiRC={write(tmp_path / 'm', [MULTIRC] * 5)}", f"SQuAD={write(tmp_path / 's', squad('abcdef'))}"]
    drawn = [sg.read_tasks(argparse.Namespace(command="score", tasks=tasks, limit=2, seed=seed)) for seed in (0, 0, 1)]
    ids = [[e.id for e in examples] for examples in drawn]
    assert ids[0] == ids[1] != ids[2] and [len(x) for x in ids] == [2 * 4 + 2] * 3


# ------------------------------------------------------------------------------------------------------------ the hub

NFL = {"section_id": "nfl_1", "passage": "They scored 3 and 7."}
NO_MORE = {"number": [], "date": [], "spans": [], "worker_id": []}
HUB_ROWS = {  # the rows of ROWS as the hub has them: integer labels, one question each
    "SST-2": [{"idx": 0, "sentence": "it works . ", "label": 1}],
    "CB": [{"premise": "It rained.", "hypothesis": "it rained", "idx": 0, "label": 2}],
    "RTE": [{"premise": "It rained.", "hypothesis": "It was wet.", "idx": 0, "label": 1}],
    "BoolQ": [{"question": "is tea hot", "passage": "Tea -- Hot.", "idx": 0, "label": 1}],
    "WiC": [ROWS["WiC"][0] | {"start1": 2, "start2": 6, "end1": 6, "end2": 11, "idx": 0, "label": 0}],
    "WSC": [{"text": "Al saw Bo and He waved.", "span1_text": "Al", "span2_text": "He", "idx": 0, "label": 1}],
    "COPA": [ROWS["COPA"][0] | {"idx": 0}],
    "MultiRC": [
        {
            "paragraph": "Ann has a cat. ",
            "question": question["question"],
            "answer": answer["text"],
            "idx": {"paragraph": 7, "question": q, "answer": a},
            "label": answer["label"],
        }
        for q, question in enumerate(MULTIRC["passage"]["questions"])
        for a, answer in enumerate(question["answers"])
    ],
    "ReCoRD": [
        {
            "passage": RECORD["passage"]["text"],
            "query": "Then @placeholder left Bob.",
            "entities": ["Ann", "Bob"],
            "answers": ["Ann"],
            "idx": {"passage": 0, "query": 0},
        }
    ],
    "SQuAD": [
        {
            "id": "x",
            "title": "Cats",
            "context": "Cats purr.",
            "question": "Who purrs?",
            "answers": {"text": ["Cats", "All cats"], "answer_start": [0, 0]},
        }
    ],
    "DROP": [
        NFL | {"question": x["question"], "answer": x["answer"], "validated_answers": NO_MORE}
        for x in DROP["nfl_1"]["qa_pairs"][:2]
    ]
    + [
        NFL
        | {
            "question": "When?",
            "answer": DROP["nfl_1"]["qa_pairs"][2]["answer"],
            "validated_answers": {"number": [""], "date": [NO_DATE], "spans": [["May 1990"]], "worker_id": ["1"]},
        }
    ],
}


class Hub(types.ModuleType):
    """A stand-in for the package `datasets`: what was asked for, and the rows of every dataset."""

    def __init__(self):
        super().__init__("datasets")
        self.asked, self.rows = [], None

    def load_dataset(self, path, config=None, split=None):
        self.asked.append((path, config, split))
        if self.rows is None:
            raise FileNotFoundError(f"{path}\nis not there")
        return self.rows


@pytest.fixture
def hub(monkeypatch):
    module = Hub()
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def read(*tasks, command="score"):
    return sg.read_tasks(argparse.Namespace(command=command, tasks=[str(task) for task in tasks], limit=None, seed=0))


def contents(examples):
    return [(e.prompt, list(e.options.values()), sg.training_row(e, False), e.gold) for e in examples]


@pytest.mark.parametrize("task", ROWS)
def test_the_hub_asks_the_same_as_the_release(task, hub, tmp_path):
    """From the hub itself, and from its rows saved as JSON lines."""
    released = read(f"{task}={write(tmp_path / 'f', ROWS[task][0])}")
    hub.rows = HUB_ROWS[task]
    found = read(task)
    assert contents(found) == contents(released) and [e.source for e in found] == [e.source for e in released]
    assert contents(read(f"{task}={write(tmp_path / 'rows.jsonl', HUB_ROWS[task])}")) == contents(released)
    read(task, command="prepare")
    path, config = sg.TASKS[task].hub.split(":")
    assert hub.asked == [(path, config, "validation"), (path, config, "train")]
    assert task in ("DROP", "ReCoRD", "SQuAD") or [e.id for e in found] == [e.id for e in released]


def test_answers_of_a_multirc_question_are_joined_wherever_they_stand(hub):
    first, second = ([row | {"idx": row["idx"] | {"paragraph": p}} for row in HUB_ROWS["MultiRC"]] for p in (3, 9))
    hub.rows = [row for pair in zip(first, second, strict=True) for row in pair]
    places = ["0.0.0", "0.0.1", "0.1.0", "0.1.1", "1.0.0", "1.0.1", "1.1.0", "1.1.1"]
    assert [e.id for e in read("MultiRC")] == [f"MultiRC {place}" for place in places]


def test_hub_ids(hub):
    hub.rows = [{"question": "is tea hot", "passage": "Hot.", "answer": True}]  # google/boolq's name for the label
    for where in ("google/boolq", "google/boolq:test", "google/boolq:default:train"):
        assert [e.gold for e in read(f"BoolQ={where}")] == [[True]]
    splits = [(None, "validation"), (None, "test"), ("default", "train")]
    assert hub.asked == [("google/boolq", *split) for split in splits]
    hub.rows = [HUB_ROWS["DROP"][0] | {"validated_answers": [{"number": "7", "date": NO_DATE, "spans": []}]}]
    assert [e.gold for e in read("DROP")] == [[["10"], ["7"]]]  # a list of dicts, as newer copies may have it


def test_hub_errors(hub, tmp_path, monkeypatch, capsys):
    def error(task):
        message = refused(capsys, "prepare", task, "--output", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return message

    reason = "FileNotFoundError: aps/super_glue is not there"
    assert f"aps/super_glue:cb:train can't be read from the hub ({reason}): give CB=FILE" in error("CB")
    hub.rows = [NFL | {"question": "Who?", "answers_spans": {"spans": ["Al"], "types": ["span"]}}]
    assert "use EleutherAI/drop" in error("DROP=ucinlp/drop")
    hub.rows = [HUB_ROWS["DROP"][0] | {"validated_answers": {"number": ["1"], "date": [], "spans": []}}]
    assert "EleutherAI/drop:default:train row 1 can't be read as DROP (zip() argument 2 is shorter" in error("DROP")
    hub.rows = [{"paragraph": "x", "question": "y"}]
    assert "no field 'idx'" in error("MultiRC")
    assert "CB/val.jsonl does not exist" in error("CB=CB/val.jsonl")  # a path, though it looks like an id
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs a package: pip install datasets, or give RTE=FILE" in error("RTE")


# ------------------------------------------------------------------------------------------------------------ metrics


def example(task, id="0", gold=("x",), prompt_ids=(), option_ids=()):
    options = dict(enumerate(option_ids))
    return sg.Example(f"{task} {id}", task, "", options, list(gold), None, list(prompt_ids), list(option_ids))


def test_multirc_metrics():
    gold_and_prediction = {
        "0.0.0": (1, True),
        "0.0.1": (0, True),
        "0.1.0": (1, True),
        "0.1.1": (0, False),
        "0.2.0": (1, False),
    }
    pairs = [(example("MultiRC", id, [gold]), p) for id, (gold, p) in gold_and_prediction.items()]
    found = sg.metrics_of("MultiRC", pairs)
    assert found["accuracy"]["score"] == pytest.approx(60)
    assert found["em"]["score"] == pytest.approx(100 / 3) and found["em"]["count"] == 3
    assert found["f1a"]["score"] == pytest.approx(200 / 3)  # 2 hits, 3 predicted, 3 right
    low, high = found["f1a"]["interval"]
    assert 0 <= low < 200 / 3 < high <= 100


def test_cb_macro_f1():
    gold = ["entailment", "entailment", "contradiction", "neutral"]
    said = ["entailment", "contradiction", "contradiction", "contradiction"]
    pairs = [(example("CB", str(i), [g]), p) for i, (g, p) in enumerate(zip(gold, said, strict=True))]
    assert sg.metrics_of("CB", pairs)["macro_f1"]["score"] == pytest.approx(100 * (2 / 3 + 2 / 4 + 0) / 3)


def test_intervals():
    assert sg.accuracy([1] * 8 + [0] * 2) == {
        "score": 80,
        "interval": pytest.approx([49.02, 94.33], abs=0.01),
        "count": 10,
    }
    assert sg.accuracy([0] * 5)["interval"][0] == 0 and sg.accuracy([1] * 5)["interval"][1] == 100
    found = sg.bootstrap([0.0, 1.0] * 200, torch.mean)  # that of an accuracy over 400: 1.96 * 0.5 / 20
    assert found["score"] == 50 and found["interval"] == pytest.approx([45.1, 54.9], abs=0.6)
    assert found == sg.bootstrap([0.0, 1.0] * 200, torch.mean)


@pytest.mark.parametrize(
    "said, gold, em, f1",
    [
        ("The cat!", ["cat"], 1, 1),
        ("a black cat", ["cat", "black dog"], 0, 2 / 3),
        ("cat cat", ["cat"], 0, 2 / 3),
        ("dog", ["cat"], 0, 0),
        ("", ["cat"], 0, 0),
    ],
)
def test_squad_scores(said, gold, em, f1):
    assert sg.text_scores(said, gold) == pytest.approx((em, f1))


@pytest.mark.parametrize(
    "said, gold, em, f1",
    [
        ("10", [["10.0"]], 1, 1),
        ("10 yards", [["10"]], 0, 0.67),
        ("9 yards", [["10 yards"]], 0, 0),  # a gold number must be met
        ("Bo; Al", [["Al", "Bo"]], 1, 1),
        ("Al", [["Al", "Bo"]], 0, 0.5),
        ("Al Smith; Bo", [["Bo", "Al"]], 0, 0.83),  # the mean of 2/3 and 1, rounded as officially
        ("the 49-yard goal", [["49 yard goal"]], 1, 1),
        ("Carol", [["3 May 1990"], ["Carol"]], 1, 1),
        ("1,000", [["1000"]], 1, 1),
    ],
)
def test_drop_scores(said, gold, em, f1):
    assert sg.drop_scores(said, gold) == pytest.approx((em, f1))


def test_align_is_optimal():
    """In order, {a, c} would take the {a} that only {a} can meet."""
    assert sg.align([{"a", "c"}, {"a"}], [{"a"}, {"c"}]) == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize("task", ROWS)
def test_gold_scores_full_marks(task, tmp_path):
    examples = sg.read_task(task, str(write(tmp_path / "f", ROWS[task][0])))
    said = [sg.training_row(e, False)["completion"].strip() if not e.options else e.gold[0] for e in examples]
    assert all(m["score"] == 100 for m in sg.metrics_of(task, list(zip(examples, said, strict=True))).values())


# ------------------------------------------------------------------------------------------------------------ scoring


class Tokenizer:
    eos_token_id, bos_token_id = 2, 1

    def __len__(self):
        return 97

    def batch_decode(self, rows, skip_special_tokens=False):
        return [" ".join(map(str, row)) for row in rows]

    def decode(self, row):
        return " ".join(map(str, row))

    def __call__(self, texts, add_special_tokens=True, verbose=True):
        if isinstance(texts, str):
            return {"input_ids": self([texts], add_special_tokens)["input_ids"][0]}
        return {"input_ids": [[1] * add_special_tokens + [3 + ord(c) % 90 for c in text] for text in texts]}


def arguments(**given):
    defaults = dict(option_score="sum", max_length=60, max_new_tokens=4, max_tokens_per_batch=60, chat_template=None)
    return argparse.Namespace(**defaults | given)


def random_examples() -> list[sg.Example]:
    """Four passages of three questions: options of one token on two of them, of one to six on the others."""
    draw = random.Random(0)

    def ids(n):
        return [draw.randrange(3, 97) for _ in range(n)]

    examples = []
    for passage in range(4):
        head = ids(3 + 4 * passage)
        for question in range(3):
            options = [ids(1) for _ in range(2)] if passage % 2 else [ids(draw.randint(1, 6)) for _ in range(3)]
            prompt = head + ids(draw.randint(1, 5))
            examples.append(example("T", f"{passage}.{question}", prompt_ids=prompt, option_ids=options))
    return examples


def one_forward_per_candidate(model, e: sg.Example) -> list[float]:
    scores = []
    for option in e.option_ids:
        logp = model(input_ids=torch.tensor([e.prompt_ids + option])).logits[0].log_softmax(-1)
        first = len(e.prompt_ids) - 1
        scores.append(sum(logp[first + i, token].item() for i, token in enumerate(option)))
    return scores


@pytest.mark.parametrize("option_score", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "phi", "phi3", "gpt2", "gpt_neox"])
def test_batched_scores_are_those_of_one_forward_per_candidate(kind, option_score):
    model, examples, args = tiny_model(kind, lora=False), random_examples(), arguments(option_score=option_score)
    batches = sg.batches_of(examples, args)
    assert len(batches) > 1 and all(len(group) == 3 for batch in batches for group in batch)
    found = {record["id"]: record for batch in batches for record in sg.score_options(model, batch, args)}
    assert len(found) == len(examples)
    for e in examples:
        wanted = one_forward_per_candidate(model, e)
        if option_score == "mean":
            wanted = [score / len(option) for score, option in zip(wanted, e.option_ids, strict=True)]
        assert found[e.id]["scores"] == pytest.approx(wanted, abs=1e-4)
        assert found[e.id]["prediction"] == wanted.index(max(wanted))


def test_prompt_is_encoded_once():
    """Tokens through the model: every passage once, then each question's rest."""
    model, examples, args = tiny_model("llama", lora=False), random_examples(), arguments(max_tokens_per_batch=10**6)
    seen = []
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    sg.score_options(model, [examples[:3]], args)
    rows = {(e.id, *option[:-1]) for e in examples[:3] for option in e.option_ids}
    assert [n for n, _ in seen] == [1, len(rows)] and len(rows) < 9 and seen[0][1] >= 3
    (single := examples[3]).shortened = True
    seen.clear()
    sg.score_options(model, [[single]], args)
    assert seen == [(1, len(single.prompt_ids) - 1), (1, 1)]  # options of one token are read from one position
    sizes = [len(group) for batch in sg.batches_of(examples, args) for group in batch]
    assert sorted(sizes) == [1, 2, 3, 3, 3]  # a prompt that was cut is alone


def test_batches_keep_to_the_budget():
    args = arguments(max_tokens_per_batch=60, max_new_tokens=5)
    examples = [example("T", str(i), prompt_ids=[3] * i, option_ids=[[4], [4] * 3]) for i in range(2, 30)]
    examples += [example("G", str(i), prompt_ids=[3] * i) for i in range(2, 80, 9)]
    batches = sg.batches_of(examples, args)
    assert sorted(e.id for batch in batches for (e,) in batch) == sorted(e.id for e in examples)
    for batch in batches:
        widths = [len(e.prompt_ids) + (3 if e.options else 5) for (e,) in batch]
        assert len({e.task for (e,) in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(widths) <= 60


def test_generation_in_a_batch_is_generation_alone():
    model, tokenizer = tiny_model("llama", lora=False), Tokenizer()
    model.generation_config = sg.greedy(tokenizer, arguments())
    examples = [example("G", e.id, prompt_ids=e.prompt_ids) for e in random_examples()]
    alone = [sg.generate(model, tokenizer, [[e]])[0]["prediction"] for e in examples]
    together = sg.generate(model, tokenizer, [[e] for e in examples])
    assert [x["prediction"] for x in together] == alone and len(set(alone)) > 1


def test_left_truncation_keeps_bos_and_options():
    def asked_in(max_length):
        asked = sg.Example("CB 0", "CB", "abcdefghij", {0: "yes", 1: "maybe"}, [0], None)
        sg.encode([asked], Tokenizer(), arguments(max_length=max_length))
        return asked

    tokens = Tokenizer()(["abcdefghij"], True, False)["input_ids"][0]
    cut = asked_in(12)
    assert cut.prompt_ids == [1, *tokens[-6:]] and cut.shortened  # 12 - 5 of the longest option, BOS among them
    assert [len(option) for option in cut.option_ids] == [3, 5]
    assert asked_in(16).prompt_ids == tokens and not asked_in(16).shortened
    with pytest.raises(sg.UserError, match="--max_length 6 leaves CB 0 no prompt before 5 tokens"):
        asked_in(6)


def with_start_and_end():
    """A tokenizer that puts a start token before and an end token behind every text."""
    tokenizer = demo_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    ids = [("<|start|>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|start|> $A <|end|>", special_tokens=ids)
    return tokenizer


def encoded(tokenizer, prompt="Is it so?", **flags) -> sg.Example:
    asked = sg.Example("CB 0", "CB", prompt, {0: " Yes", 1: " No"}, [0], None)
    sg.encode([asked], tokenizer, arguments(**{"max_length": 500} | flags))
    return asked


def test_prompts_do_not_end_in_eos():
    tokenizer = with_start_and_end()
    assert tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id
    text = tokenizer("Is it so?", add_special_tokens=False)["input_ids"]
    asked = encoded(tokenizer)
    assert asked.prompt_ids == [tokenizer.bos_token_id, *text]
    assert encoded(tokenizer, "<|start|>Is it so?").prompt_ids == asked.prompt_ids  # rendered beforehand
    assert tokenizer.batch_decode(asked.option_ids) == [" Yes", " No"]
    cut = encoded(tokenizer, "Is it so? " * 9, max_length=30)
    assert cut.shortened and cut.prompt_ids[0] == tokenizer.bos_token_id and cut.prompt_ids.count(text[-1]) > 1


CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
EMPTY_THOUGHT = CHATML.replace(  # the generation prompt leaves the thought to the model, a finished turn has none
    "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
)
OPEN_THOUGHT = (  # the generation prompt opens a thought, which a finished turn leaves out
    "{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}{% else %}<Assistant>"
    "{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)


@pytest.mark.parametrize(
    "template, before, blanks, after",
    [
        (CHATML, "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>"),
        (INST, "<|start|>[INST] Is it so? [/INST]", " ", "<|end|>"),
        (
            EMPTY_THOUGHT,
            "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "",
            "<|im_end|>",
        ),
        (OPEN_THOUGHT, "<User>Is it so?<Assistant>", "", "<|end|>"),
    ],
)
def test_chat_template(template, before, blanks, after):
    """Prompt and option are what a chat with that answer has, up to the answer's end."""
    tokenizer = with_start_and_end()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    asked = encoded(tokenizer, "Is it so?\n", chat_template=True)
    assert tokenizer.decode(asked.prompt_ids) == before
    assert tokenizer.batch_decode(asked.option_ids) == [blanks + "Yes", blanks + "No"]
    row = sg.training_row(asked, mixture=False, chat=True)
    chat = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert chat.startswith(tokenizer.decode(asked.prompt_ids + asked.option_ids[0]) + after)
    stop = sg.greedy(tokenizer, arguments(chat_template=True)).eos_token_id
    assert tokenizer.convert_tokens_to_ids(after) in stop and tokenizer.eos_token_id in stop
    assert asked.prompt_ids.count(tokenizer.bos_token_id) == before.count("<|start|>")


def test_chat_template_is_the_default_after_training_on_chats(tmp_path):
    def chosen(**flags):
        args = arguments(model=str(tmp_path), **flags)
        sg.choose_defaults(args, types.SimpleNamespace(config=LlamaConfig()), tokenizer)
        return args.chat_template

    tokenizer = demo_tokenizer()
    assert not chosen()
    with pytest.raises(sg.UserError, match="--chat_template: the tokenizer of .* has none"):
        chosen(chat_template=True)
    tokenizer.chat_template = CHATML
    assert chosen(chat_template=True) and not chosen()
    (tmp_path / "colm_prompts.json").write_text('{"chat_template": true}')
    assert chosen() and not chosen(chat_template=False)
    tokenizer.chat_template = "{{ raise_exception('no chats') }}"
    with pytest.raises(sg.UserError, match="refuses a question and an answer .no chats"):
        encoded(tokenizer, chat_template=True)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(sg.UserError, match="leaves out the assistant's answer"):
        encoded(tokenizer, chat_template=True)


def test_max_length_is_the_official_one_where_the_model_has_room():
    def chosen(positions, given=None):
        args = arguments(max_length=given, model="")
        sg.choose_defaults(args, types.SimpleNamespace(config=LlamaConfig(max_position_embeddings=positions)), None)
        return args.max_length

    assert [chosen(n) for n in (1024, 2048, 4096, -1)] == [1024, 2048, 2048, 2048]
    assert chosen(4096, 3000) == 3000 and chosen(-1, 3000) == 3000
    with pytest.raises(sg.UserError, match="--max_length 1025 exceeds the model's 1024 positions: lower it"):
        chosen(1024, 1025)


def test_other_prompts_are_another_run(tmp_path):
    """A chat template that prints today's date asks something else tomorrow."""
    args = argparse.Namespace(model=str(tmp_path), output_dir=str(tmp_path))
    asked = [example("CB", prompt_ids=[3, 4], option_ids=[[5]])]
    sg.open_folder(tmp_path, sg.settings_of(args, asked), overwrite=False)
    sg.open_folder(tmp_path, sg.settings_of(args, asked), overwrite=False)
    asked[0].prompt_ids = [3, 6]
    with pytest.raises(sg.UserError, match="files of the data and the model is .*, but .* holds a run with"):
        sg.open_folder(tmp_path, sg.settings_of(args, asked), overwrite=False)


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, and files of four tasks."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = demo_tokenizer()
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, bos_token_id=0, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words, draw = ["ant", "bee", "cat", "dog", "elk"], random.Random(0)

    def text():
        return " ".join(draw.choices(words, k=draw.randint(3, 9)))

    copa = [dict(premise=text(), choice1=text(), choice2=text(), question="cause", label=i % 2) for i in range(60)]
    cb = [dict(premise=text(), hypothesis=text(), label=draw.choice([*sg.TASKS["CB"].options])) for _ in range(20)]
    for name, rows in {
        "COPA": copa,
        "CB": cb,
        "SQuAD": squad([text() for _ in range(20)]),
        "MultiRC": [MULTIRC] * 3,
    }.items():
        write(folder / name, rows)
    return folder


def command(world, output, *more, launch=("-m", "eval_superglue")):
    tasks = [f"{name}={world / name}" for name in ("COPA", "CB", "SQuAD", "MultiRC")]
    flags = ["--model", world / "model", "--output_dir", output, "--max_new_tokens", 5, "--max_tokens_per_batch", 200]
    return [sys.executable, *launch, "score", *tasks, *map(str, flags), *map(str, more)]


@pytest.fixture(scope="module")
def finished(world):
    done = subprocess.run(command(world, world / "one"), cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "macro_f1" in done.stdout and "f1a" in done.stdout
    return world / "one"


def test_results(finished):
    saved = json.loads((finished / "results.json").read_text())
    assert {task: x["questions"] for task, x in saved["results"].items()} == {
        "COPA": 60,
        "CB": 20,
        "SQuAD": 20,
        "MultiRC": 12,
    }
    assert saved["settings"]["--max_new_tokens"] == 5 and {"torch", "transformers"} <= set(saved["versions"])
    x = saved["results"]["COPA"]["accuracy"]
    assert x["interval"][0] < x["score"] < x["interval"][1] and x["count"] == 60
    assert len((finished / "predictions.jsonl").read_text().splitlines()) == 112


def test_two_processes_and_a_kill_change_nothing(world, finished):
    """Killed under way and continued by two processes: the same results, the same predictions to the last bit."""
    output = world / "killed"
    run = subprocess.Popen(
        command(world, output), cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    path, limit = output / "predictions.jsonl", time.time() + 60
    while not (path.exists() and path.read_text().count("\n") > 5) and time.time() < limit:
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    lines = path.read_text().splitlines()[:-1]
    assert 5 <= len(lines) < 112 and not (output / "results.json").exists()
    path.write_text("\n".join(lines) + "\n" + lines[0][:9])  # a line cut short
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "eval_superglue")
    done = subprocess.run(command(world, output, launch=launch), cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("results.json", "predictions.jsonl"):
        assert (output / name).read_text() == (finished / name).read_text()
    assert sorted(p.name for p in output.iterdir()) == ["predictions.jsonl", "results.json", "settings.json"]


def test_prepared_rows_train_and_the_adapter_is_scored(world):
    rows, output = world / "rows.jsonl", world / "trained"
    sg.cli(["prepare", f"CB={world / 'CB'}", f"COPA={world / 'COPA'}", "--output", str(rows), "--limit", "16"])
    assert len(rows.read_text().splitlines()) == 32
    flags = {"--train_file": rows, "--output_dir": output, "--max_steps": 2, "--pool_size": 8, "--coreset_size": 4}
    flags |= {"--keep_sources": "COPA", "--eval_every": 0}
    train = [sys.executable, "train_colm.py", *(str(x) for flag in flags.items() for x in flag)]
    done = subprocess.run(train, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    score = ["score", f"CB={world / 'CB'}", "--model", str(output / "final"), "--output_dir", str(world / "scored")]
    sg.cli(score)
    sg.cli([*score[:-1], str(world / "base"), "--base_model", str(output / "base")])
    demo_tokenizer().save_pretrained(output / "base")
    sg.cli([*score[:2], "--model", str(output / "base"), "--output_dir", str(world / "untrained")])
    names = ("scored", "base", "untrained")
    adapter, moved, untrained = ((world / name / "predictions.jsonl").read_text() for name in names)
    assert adapter == moved != untrained and adapter.count("\n") == untrained.count("\n") == 20


# ---------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        sg.cli([str(x) for x in argv])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and message.startswith("error: ")
    return message


@pytest.mark.parametrize(
    "task, content, wanted",
    [
        ("CB", None, "does not exist: give a file, or CB alone for the hub's aps/super_glue:cb"),
        ("CB", ['{"premise": "a"', "{}"], "line 2: broken JSON"),
        ("CB", ["[1]"], "row 1 can't be read as CB"),
        ("CB", {"premise": "a", "hypothesis": "b"}, "line 1 has no field 'label': give a labelled file"),
        ("CB", {"premise": "a", "hypothesis": "b", "label": "yes"}, "['yes'] is not one of 'entailment'"),
        ("RTE", {"premise": "a", "label": "entailment"}, "line 1 has no field 'hypothesis'"),
        (
            "RTE",
            {"premise": 3, "hypothesis": "b", "label": "entailment"},
            "line 1 can't be read as RTE (field 'premise' is a int",
        ),
        ("SST-2", "index\tsentence\n0\tgood", "line 2 has no field 'label'"),
        ("SST-2", "sentence\tlabel\ngood 1", "line 2: [None] is not one of '1', '0'"),
        ("SQuAD", '{"data": [\n}', "line 2 column 1"),
        ("SQuAD", None, "does not exist: give a file, or SQuAD alone for the hub's rajpurkar/squad:plain_text"),
        ("SQuAD", "[1]", "can't be read as SQuAD"),
        (
            "SQuAD",
            json.dumps(SQUAD).replace('{"text": "Cats"}, {"text": "All cats"}', ""),
            "article 0: [] is not an answer",
        ),
        ("DROP", {"p": {"passage": "x", "qa_pairs": [{"question": "q"}]}}, "passage p has no field 'answer'"),
        ("MultiRC", {"passage": {"text": "x"}}, "has no field 'questions'"),
        ("WSC", {"text": "x", "target": {"span1_text": "x"}, "label": True}, "'span2_text'"),
        ("CB", {"premise": "a", "hypothesis": "b", "label": -1}, "[-1] is not one of 'entailment'"),  # of a test split
        ("CB", {"premise": "a", "hypothesis": "b", "label": 3}, "[3] is not one of 'entailment'"),
        ("BoolQA", {}, "write TASK or TASK=FILE, with a task of SST-2, CB"),
    ],
)
def test_bad_files(task, content, wanted, tmp_path, capsys):
    path = tmp_path / ("f" if task in ("SST-2", "SQuAD", "DROP") else "f.jsonl")
    if content is not None:
        write(path, content)
    message = refused(capsys, "prepare", f"{task}={path}", "--output", tmp_path / "out")
    assert wanted in message and not (tmp_path / "out").exists()


def test_bad_settings(world, finished, tmp_path, capsys):
    score = ["score", f"CB={world / 'CB'}", "--output_dir", tmp_path / "out", "--model"]
    assert "--max_length 9999 exceeds the model's 2048" in refused(
        capsys, *score, world / "model", "--max_length", "9999"
    )
    assert "leaves CB 0 no prompt" in refused(capsys, *score, world / "model", "--max_length", "3")
    assert "--limit: 0 is out of range" in refused(capsys, *score, world / "model", "--limit", "0")
    assert "required: {prepare,score}: see" in refused(capsys)
    assert "--limits 3 (did you mean --limit?): see" in refused(capsys, *score, world / "model", "--limits", "3")
    assert "give a causal LM" in refused(capsys, *score, tmp_path / "nothing")
    assert "each task once" in refused(capsys, "score", f"CB={world / 'CB'}", *score[1:], world / "model")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "gone"), "peft_type": "LORA"})
    )
    message = refused(capsys, *score, adapter)
    assert str(tmp_path / "gone") in message and "--base_model" in message
    again = [str(x) for x in command(world, finished)[3:]]
    assert "--option_score is sum, but" in refused(capsys, *again, "--option_score", "sum")
    assert (finished / "results.json").exists()


def test_a_gpu_that_is_too_small_is_one_line(world, tmp_path, monkeypatch, capsys):
    def score_options(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(sg, "score_options", score_options)
    score = ["score", f"CB={world / 'CB'}", "--output_dir", tmp_path / "out", "--model", world / "model"]
    assert "--max_tokens_per_batch 16384 takes more memory than the GPU has free: lower" in refused(capsys, *score)

"""train_colm.py against its twin in naive.py: flags go in, the files of a run come out, and the formulas say the same.

The trainer is used as its users use it, by flags, metrics.jsonl, selection.jsonl, eval.jsonl and OUTPUT/final. What
these tests know of its inside is how a seed is made of (seed, purpose, step), which naive.py writes out.
"""

import json
import os
import random
import signal
from types import SimpleNamespace

import naive
import peft
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import train_colm

os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}

WORDS = [f"w{i}" for i in range(40)]
SIZES = {"a": 60, "b": 44, "c": 34, "d": 8, "e": 6}  # 152 rows; below the mean of 30.4: d and e
HELD_OUT = {"a": 3, "b": 1, "c": 2, "d": 1}
LAYERS = 2

# The run works in float32, whose rounding is 6e-8; over 20 seeds losses were off by at most 2e-7 and gradient norms by
# 1e-6, of their own size. Weights are compared by how they changed: Adam divides by the gradient's own size, so a
# gradient that is nearly 0 turns its rounding into a step. That costs up to 2e-4 of a matrix's change, usually 2e-6.
# A fault moves them by 1e-2 or more.
TOLERANCES = {"loss": 2e-6, "lr": 1e-12, "grad_norm": 1e-5}
WEIGHTS_TOLERANCE = 2e-3

# The flags' defaults, as README and --help give them.
DEFAULTS = {
    "pool_size": 128,
    "coreset_size": 64,
    "selection": "colm",
    "keep_sources": ["auto"],
    "keep_share": 1.0,
    "example_weights": "uniform",
    "source_field": "source",
    "probe": "spsa",
    "num_directions": 1,
    "direction": "step",
    "spsa_eps": 1e-3,
    "spsa_wide_tail": True,
    "probe_module": "v_proj",
    "sparsify_dims": 2560,
    "similarity": "l1",
    "medoid_weights": "uniform",
    "lora_r": 128,
    "lora_alpha": 512.0,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "learning_rate": 2e-5,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_steps": 0,
    "num_epochs": 1.0,
    "max_length": 512,
    "max_tokens_per_micro_batch": 4096,
    "packing": False,
    "gradient_checkpointing": False,
    "eval_every": 100,
    "report_to": [],
    "seed": 0,
    "alike": 0.8,  # no flags, but what --selection fresh goes by
    "lately": 4096,
}

# Adam does not see a constant factor on its gradients: a run that clips every step ends where one that clips none does.
# So these runs clip no step, and a variant clips some, each by another factor.
COMMON = "--pool_size 24 --coreset_size 11 --lora_r 4 --lora_alpha 8 --lora_dropout 0 --sparsify_dims 12 "
COMMON += "--learning_rate 1e-2 --warmup_ratio 0 --max_grad_norm 1000 --lora_target_modules q_proj v_proj "
BASES = {
    "spsa": COMMON + "--max_steps 3 --num_directions 2",
    "grad": COMMON + "--max_steps 3 --probe grad",
    "long": COMMON + "--max_steps 6 --probe grad --seed 1",
}

SHAPING = [  # flags that shape the result: the base of the run, and what is added to it
    ("spsa", "--num_directions 1"),
    ("spsa", "--num_directions 3"),
    ("spsa", "--direction run"),
    ("spsa", "--spsa_eps 3"),  # far from a derivative: the difference itself must be the formula's
    ("spsa", "--probe_module k_proj"),
    ("spsa", "--probe grad --num_directions 1"),
    ("spsa", "--seed 5 --lora_r 3"),
    ("spsa", "--max_steps 6"),
    ("grad", "--similarity l2"),
    ("grad", "--similarity cosine"),
    ("grad", "--sparsify_dims 3"),
    ("grad", "--medoid_weights cluster"),
    ("grad", "--example_weights sqrt"),
    ("grad", "--example_weights tokens"),
    ("grad", "--example_weights tokens --medoid_weights cluster"),
    ("grad", "--example_weights sqrt --selection full"),
    ("grad", "--keep_sources none"),
    ("grad", "--keep_sources c e"),
    ("grad", "--keep_sources a b"),  # more rows than K
    ("grad", "--keep_sources c --keep_share 0.5"),
    ("grad", "--keep_sources c --keep_share 0"),
    ("grad", "--selection random"),
    ("grad", "--selection random_keep"),
    ("grad", "--selection random_keep --keep_sources c --keep_share 0.25"),
    ("grad", "--selection fresh"),
    ("grad", "--selection fresh --keep_sources c --keep_share 0.25 --example_weights sqrt"),
    ("grad", "--selection full"),
    ("grad", "--pool_size 20"),
    ("grad", "--coreset_size 7"),
    ("grad", "--source_field half"),
    ("grad", "--max_length 9"),
    ("grad", "--lora_alpha 16"),
    ("grad", "--lora_target_modules q_proj k_proj v_proj o_proj"),
    ("grad", "--lora_r 0 --learning_rate 1e-3"),
    ("grad", "--probe_module k_proj"),  # without an adapter: its weight W is probed
    ("grad", "--probe_module k_proj --lora_target_modules k_proj v_proj"),
    ("grad", "--probe_module up_proj"),
    ("grad", "--learning_rate 3e-3"),
    ("long", "--lr_scheduler linear"),
    ("long", "--lr_scheduler constant"),
    ("long", "--warmup_ratio 0.4"),  # 2.4 of 6 steps are 3
    ("long", "--warmup_ratio 0.4 --lr_scheduler linear"),
    ("long", "--warmup_ratio 0.4 --lr_scheduler constant"),
    ("long", "--weight_decay 0.5"),
    ("long", "--max_grad_norm 1"),  # norms lie between 0.8 and 1.4
]
SPEED = [  # flags of speed, memory and records, and one that --max_steps overrides
    ("spsa", "--max_tokens_per_micro_batch 30"),
    ("spsa", "--packing"),
    ("spsa", "--gradient_checkpointing"),
    ("grad", "--max_tokens_per_micro_batch 30 --medoid_weights cluster"),
    ("grad", "--packing"),
    ("grad", "--gradient_checkpointing"),
    ("grad", "--num_epochs 9"),
    ("grad", "--report_to tensorboard"),
]


def settings_of(text):
    """The flags of a command line with the trainer's defaults; of a flag given twice the last counts."""
    settings = dict(DEFAULTS)
    for part in f" {text}".split(" --")[1:]:
        name, *values = part.split()
        if not values:
            settings[name.removeprefix("no-")] = not name.startswith("no-")
        elif isinstance(DEFAULTS[name], list):
            settings[name] = values
        else:
            settings[name] = type(DEFAULTS[name])(values[0])
    return SimpleNamespace(**settings)


# ------------------------------------------------------------------------------------------------ inputs and real runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a tiny Llama, its tokenizer, a training mixture and a few held-out rows."""
    folder = tmp_path_factory.mktemp("inputs")
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        initializer_range=0.3,  # gradients that differ from row to row
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    for name, sizes in (("train", SIZES), ("eval", HELD_OUT)):
        rows = []
        for source, size in sizes.items():
            for _ in range(size):
                prompt = " ".join(rng.choices(WORDS, k=rng.randint(2, 8)))
                completion = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
                half = rng.choice(["left", "left", "right"])  # another way to divide the rows
                rows.append({"source": source, "half": half, "prompt": prompt, "completion": completion})
        rng.shuffle(rows)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """Train with the flags of a text, once for each text; the output folder."""
    folders = {}

    def train(text, *more):
        key = (text, *more)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("run")
            argv = ["--model", inputs / "model", "--train_file", inputs / "train.jsonl", "--output_dir", folders[key]]
            handler = signal.getsignal(signal.SIGTERM)
            train_colm.main([*map(str, argv), *text.split(), *map(str, more)])
            signal.signal(signal.SIGTERM, handler)
        return folders[key]

    return train


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def final_weights(folder, inputs, lora=True):
    """Trained weights in OUTPUT/final by name, in float64."""
    if lora:
        base = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, folder / "final", is_trainable=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "final", dtype=torch.float32)
    return {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------- the twin of a run


def tokens_of(row, max_length):
    """<s>, the prompt cut from the left, the completion and </s>; and how many of them carry no loss."""
    number = {word: 3 + i for i, word in enumerate(WORDS)}
    prompt, completion = ([number[word] for word in row[key].split()] for key in ("prompt", "completion"))
    room = max_length - 2 - len(completion)
    prompt = prompt[max(0, len(prompt) - room) :]
    return [0, *prompt, *completion, 1], 1 + len(prompt)


def rms_norm(module):
    """Zhang and Sennrich 2019, Equation 4, in float64: Transformers' own works in float32 whatever comes in."""
    return lambda x: module.weight * x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()


def float64_model(inputs, settings):
    """The model as it is before a run's first step, without dropout."""
    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    if settings.lora_r:
        adapters = peft.LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            target_modules=settings.lora_target_modules,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(settings.seed)  # --seed makes the adapters
        model = peft.get_peft_model(model, adapters)
    model = model.double().eval()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = rms_norm(module)
    return model


def probed_name(settings):
    """The probed parameter: B of the projection's adapter, or its weight where it has none."""
    block = "mlp" if settings.probe_module == "up_proj" else "self_attn"
    name = f"model.layers.{LAYERS - 1}.{block}.{settings.probe_module}"
    if not settings.lora_r:
        return f"{name}.weight"
    if settings.probe_module in settings.lora_target_modules:
        return f"base_model.model.{name}.lora_B.default.weight"
    return f"base_model.model.{name}.weight"


def twin_of(inputs, settings):
    """The twin of a run before its first step."""
    rows = read(inputs / "train.jsonl")
    examples = [tokens_of(row, settings.max_length) for row in rows]
    sources = [row[settings.source_field] for row in rows]
    keep = set(settings.keep_sources) - {"none"}
    if keep == {"auto"}:
        keep = naive.small_sources({source: sources.count(source) for source in sources})
    model = float64_model(inputs, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    weight = model.get_parameter(probed_name(settings)).requires_grad_()  # probed even where it is not trained
    steps = settings.max_steps or max(1, int(settings.num_epochs * (len(rows) // settings.pool_size)))
    return naive.Steps(model, trained, weight, examples, sources, keep, settings, steps)


def differences(folder, inputs, text):
    """What the run in `folder` says otherwise than the twin with the flags `text`; [] where they agree.

    Pools and what else is drawn at random are read from the folder's selection.jsonl (naive.Steps checks the draws).
    """
    settings, found = settings_of(text), []
    metrics, selection = read(folder / "metrics.jsonl"), read(folder / "selection.jsonl")
    final = final_weights(folder, inputs, lora=settings.lora_r > 0)
    twin = twin_of(inputs, settings)
    before = {name: twin.model.get_parameter(name).detach().clone() for name in final}
    assert len(metrics) == len(selection) == twin.steps and len(final) == len(twin.trained)
    for step, (metric, chosen) in enumerate(zip(metrics, selection, strict=True), 1):
        assert metric["step"] == chosen["step"] == step and len(chosen["pool"]) == len(set(chosen["pool"]))
        expected = twin.step(chosen)
        for key, tolerance in TOLERANCES.items():
            if metric[key] != pytest.approx(expected[key], rel=tolerance, abs=0):
                found.append(f"step {step}: {key} is {metric[key]}, the twin's {expected[key]}")
        for key in ("kept", "selected"):
            if sorted(chosen[key]) != expected[key] or metric[key] != len(expected[key]):
                found.append(f"step {step}: {key} is {sorted(chosen[key])}, the twin's {expected[key]}")
        probed = []
        if settings.selection == "colm" and len(expected["kept"]) < settings.coreset_size:
            probed = [row for row in chosen["pool"] if twin.sources[row] not in twin.keep]
        counts = {
            "pool": settings.pool_size,
            "tokens": sum(len(twin.examples[row][0]) for row in expected["selected"]),
            "probe_tokens": sum(len(twin.examples[row][0]) for row in probed),
        }
        for key, count in counts.items():
            if metric[key] != count:
                found.append(f"step {step}: {key} is {metric[key]}, the twin's {count}")
    for name, start in before.items():
        after = twin.model.get_parameter(name).detach()
        change, off = (after - start).norm().item(), (final[name] - after).norm().item()
        if not off <= WEIGHTS_TOLERANCE * change:
            found.append(f"{name}: changes by {change:.2e}, but ends {off:.2e} from the twin's")
    return found


def tell_apart(a, b):
    """Do two runs differ in a coreset, or in a loss, learning rate or gradient norm by more than 100 tolerances?"""
    chosen = [[record["selected"] for record in read(folder / "selection.jsonl")] for folder in (a, b)]
    if chosen[0] != chosen[1]:
        return True
    for one, other in zip(read(a / "metrics.jsonl"), read(b / "metrics.jsonl"), strict=True):
        for key, tolerance in TOLERANCES.items():
            if one[key] != pytest.approx(other[key], rel=100 * tolerance):
                return True
    return False


# -------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("base", BASES)
def test_steps_are_what_the_formulas_say(run, inputs, base):
    assert differences(run(BASES[base]), inputs, BASES[base]) == []


@pytest.mark.parametrize(("base", "flags"), SHAPING)
def test_a_flag_does_what_its_formula_says(run, inputs, base, flags):
    text = f"{BASES[base]} {flags}"
    assert differences(run(text), inputs, text) == []
    assert tell_apart(run(text), run(BASES[base])), f"{flags} changes nothing here: this case can't fail"


@pytest.mark.parametrize(("base", "flags"), SPEED)
def test_flags_of_speed_change_no_result(run, inputs, base, flags):
    text = f"{BASES[base]} {flags}"
    assert differences(run(text), inputs, text) == []


def test_defaults_are_the_documented_ones(run, inputs):
    """Only sizes that a tiny data set needs are given, and no dropout, which the twin has not."""
    text = "--pool_size 24 --coreset_size 11 --lora_dropout 0 --max_steps 4"
    assert differences(run(text), inputs, text) == []


def test_spsa_wide_tail_is_for_differences_that_float32_loses(run, inputs):
    tiny, large = (f"{BASES['spsa']} --spsa_eps {eps}" for eps in (1e-8, 0.5))
    assert differences(run(tiny), inputs, tiny) == []
    narrow = differences(run(f"{tiny} --no-spsa_wide_tail"), inputs, f"{tiny} --no-spsa_wide_tail")
    assert [line for line in narrow if "selected" in line], "float32 must lose differences of 1e-8"
    assert differences(run(f"{large} --no-spsa_wide_tail"), inputs, f"{large} --no-spsa_wide_tail") == []


@pytest.mark.parametrize(("epochs", "steps"), [(0.1, 1), (0.5, 3), (1.4, 8)])  # 152 rows are 6 pools of 24
def test_num_epochs_counts_pools(run, inputs, epochs, steps):
    text = f"{COMMON} --probe grad --num_epochs {epochs}"
    assert len(read(run(text) / "metrics.jsonl")) == steps
    assert differences(run(text), inputs, text) == []


def test_pools_are_drawn_without_replacement(run):
    text = f"{COMMON} --selection random --max_steps 12"
    pools = [record["pool"] for record in read(run(text) / "selection.jsonl")]
    first, second = ([row for pool in pools[start : start + 6] for row in pool] for start in (0, 6))
    for epoch in (first, second):
        assert len(set(epoch)) == 6 * 24 and set(epoch) <= set(range(152))
    assert first != second and first != sorted(first)
    other = [record["pool"] for record in read(run(f"{text} --seed 5") / "selection.jsonl")]
    assert all(a != b for a, b in zip(pools, other, strict=True))


def test_random_coresets_are_no_fixed_part_of_a_pool(run):
    for selection in ("random", "random_keep"):
        places = []
        for record in read(run(f"{COMMON} --selection {selection} --max_steps 12") / "selection.jsonl"):
            places.append({record["pool"].index(row) for row in record["selected"]})
        assert set.union(*places) == set(range(24))  # each position has its turn: (13 / 24)^12 = 0.06 % miss theirs
        assert len({tuple(sorted(one)) for one in places}) == 12


@pytest.mark.parametrize("flags", ["", "--keep_sources a --keep_share 0", "--keep_sources a b"])
def test_fresh_passes_over_rows_like_those_taken_lately(run, inputs, monkeypatch, flags):
    """Random rows resemble each other less than copies do, so a lower cosine counts here, and fewer rows are lately."""
    monkeypatch.setattr(train_colm, "ALIKE", 0.45)
    monkeypatch.setattr(train_colm, "LATELY", 25)
    text = f"{COMMON} {flags} --max_steps 8"
    fresh, random_keep = run(f"{text} --selection fresh"), run(f"{text} --selection random_keep")
    monkeypatch.setitem(DEFAULTS, "alike", 0.45)
    monkeypatch.setitem(DEFAULTS, "lately", 25)
    assert differences(fresh, inputs, f"{text} --selection fresh") == []
    monkeypatch.setitem(DEFAULTS, "lately", 4096)
    assert differences(fresh, inputs, f"{text} --selection fresh") != [], "what is forgotten must make a difference"

    source_of = [row["source"] for row in read(inputs / "train.jsonl")]
    records = zip(read(fresh / "selection.jsonl"), read(random_keep / "selection.jsonl"), strict=True)
    for metric, (one, other) in zip(read(fresh / "metrics.jsonl"), records, strict=True):
        mixtures = [sorted(source_of[row] for row in record["selected"]) for record in (one, other)]
        assert mixtures[0] == mixtures[1] and one["pool"] == other["pool"]
        assert metric["passed_over"] == len(set(other["selected"]) - set(one["selected"]))
    assert sum(metric["passed_over"] for metric in read(fresh / "metrics.jsonl")) > 8


@pytest.fixture(scope="module")
def reported(run, inputs):
    """A run with dropout, evaluations and event files."""
    flags = f"{BASES['grad']} --lora_dropout 0.5 --eval_every 2 --report_to tensorboard"
    return run(flags, "--eval_file", inputs / "eval.jsonl")


def test_dropout_changes_gradients_and_no_first_loss(run, reported):
    """B is 0 at first: dropout changes no loss of step 1, but its gradient."""
    plain, dropped = (read(folder / "metrics.jsonl") for folder in (run(BASES["grad"]), reported))
    assert dropped[0]["loss"] == pytest.approx(plain[0]["loss"], rel=TOLERANCES["loss"])
    assert abs(dropped[0]["grad_norm"] / plain[0]["grad_norm"] - 1) > 0.05
    assert abs(dropped[1]["loss"] / plain[1]["loss"] - 1) > 1e-3


@pytest.mark.parametrize("probe", ["--probe grad", "--probe spsa"])
def test_the_probe_sees_no_dropout(run, inputs, probe):
    """The second coreset is the twin's, who has no dropout, at the weights that one step with dropout leaves.

    The large learning rate makes adapters that weigh as much as the model.
    """
    text = f"{COMMON} {probe} --lora_dropout 0.5 --learning_rate 0.3 --lr_scheduler constant"
    after_one = final_weights(run(f"{text} --max_steps 1"), inputs)
    first, second = read(run(f"{text} --max_steps 2") / "selection.jsonl")
    twin = twin_of(inputs, settings_of(f"{text} --max_steps 2"))
    assert twin.step(first)["selected"] == sorted(first["selected"])
    twin.model.load_state_dict(after_one, strict=False)
    assert twin.step(second)["selected"] == sorted(second["selected"])


def test_evaluation_is_the_mean_loss_of_the_held_out_rows(reported, inputs):
    """Before the first step and after the last, without dropout: by rows, by sources and by tokens."""
    rows = read(inputs / "eval.jsonl")
    examples = [tokens_of(row, 512) for row in rows]
    records = read(reported / "eval.jsonl")
    assert [record["step"] for record in records] == [0, 2, 3]
    model = float64_model(inputs, settings_of(BASES["grad"]))
    for record in (records[0], records[-1]):
        losses = [naive.example_loss(model, example).item() for example in examples]
        tokens = [len(ids) - prompt for ids, prompt in examples]
        of = {}
        for row, loss in zip(rows, losses, strict=True):
            of.setdefault(row["source"], []).append(loss)
        of = {source: sum(values) / len(values) for source, values in of.items()}
        per_token = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
        assert record["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=2e-6)
        assert record["eval_loss_source_mean"] == pytest.approx(sum(of.values()) / len(of), rel=2e-6)
        assert record["eval_loss_per_token"] == pytest.approx(per_token, rel=2e-6)
        assert record["eval_loss_of"] == pytest.approx(of, rel=2e-6)
        model.load_state_dict(final_weights(reported, inputs), strict=False)
    assert records[-1]["eval_loss"] != records[0]["eval_loss"]


def test_event_files_hold_what_the_records_hold(reported):
    events = EventAccumulator(str(next(reported.rglob("events.out.tfevents*")).parent))
    events.Reload()
    expected = {}
    for record in read(reported / "metrics.jsonl") + read(reported / "eval.jsonl"):
        step = record.pop("step")
        per_source = record.pop("eval_loss_of", {})
        values = record | {f"eval_loss/{source}": loss for source, loss in per_source.items()}
        for name, value in values.items():
            expected.setdefault(name, {})[step] = value
    assert {"loss", "lr", "grad_norm", "selected", "step_s", "eval_loss", "eval_loss/a"} <= expected.keys()
    for name, by_step in expected.items():
        written = {event.step: event.value for event in events.Scalars(name)}
        assert written == pytest.approx(by_step, rel=1e-6), name  # they are written in float32

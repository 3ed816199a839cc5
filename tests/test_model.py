"""Models that a user may bring: what is trained is right, and what can't be is refused in one line.

The check before training (packed rows, causal models, rows that run), LoRA targets, adapters to continue from, and what
a resumed run compares of its weights. Models are tiny, random and of many architectures.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))

import train_colm  # noqa: E402
from colm_batches import LabelledLogits, pack, packed_attention  # noqa: E402
from colm_data import Example, UserError, demo_rows, demo_tokenizer  # noqa: E402

os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}  # for subprocesses too
FLAGS = "--selection random --pool_size 12 --coreset_size 6 --lora_r 4 --lora_alpha 8 --lora_dropout 0 --max_steps 2 "
FLAGS += "--max_length 90 --learning_rate 1e-2 --warmup_ratio 0 --keep_sources none "

SIZES = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
SIZES |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 128, "initializer_range": 0.2, "num_key_value_heads": 2}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
LATENT |= {"first_k_dense_replace": 2, "num_key_value_heads": 4}
MAMBA = {"mamba_d_head": 16, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
KINDS = {  # name: Transformers' model type and its own options
    "llama": ("llama", {}),
    "window": ("mistral", {"sliding_window": 8}),
    "latent": ("deepseek_v3", LATENT),
    "wide heads": ("gemma", {"head_dim": 20}),
    "convolution": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "recurrent state": ("bamba", {"attn_layer_indices": [1], **MAMBA}),
    "window in the mask": ("phimoe", {"sliding_window": 8, **MOE}),
    "positions from 2": ("roberta", {"is_decoder": True, "pad_token_id": 1}),
    "its own attention": ("bloom", {"n_layer": 2, "n_head": 4}),
    "soft cap": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 512}),
    "sinks": ("gpt_oss", {"head_dim": 8, "sliding_window": 64, **MOE}),
}


@pytest.fixture(autouse=True)
def another_accelerator():
    """Accelerate keeps its precision and backend for a whole process."""
    yield
    reset_accelerate()


def reset_accelerate() -> None:
    for state in (AcceleratorState, PartialState):
        state._reset_state()


def make_model(kind: str, **options):
    model_type, own = KINDS.get(kind, (kind, {}))
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **own, **options})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(std=0.7 / p.shape[-1] ** 0.5)  # as large as trained weights, whatever the architecture's rule
    return model


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A folder with rows to train on and a saved Llama."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, part in (("train", demo_rows("train")), ("eval", demo_rows("eval")[::9])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    save(make_model("llama"), folder / "model")
    return folder


def save(model, folder: Path, tokenizer=None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or demo_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def flags(inputs, tmp_path):
    def of(*texts, model: Path | None = None, out: str = "out") -> list[str]:
        files = ["--model", model or inputs / "model", "--train_file", inputs / "train.jsonl"]
        files += ["--eval_file", inputs / "eval.jsonl", "--output_dir", tmp_path / out]
        return [*map(str, files), *" ".join([FLAGS, *texts]).split()]

    return of


def train(argv: list[str]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        train_colm.main(argv)
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def refused(capsys):
    """Run in this process; the trainer must end with exit code 2 and one line that has all the words."""

    def check(argv: list[str], *words: str) -> str:
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as exit_:
            train_colm.cli(argv)
        signal.signal(signal.SIGTERM, handler)
        captured = capsys.readouterr()
        messages = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert exit_.value.code == 2 and len(messages) == 1 and "Traceback" not in captured.err, captured.err
        assert all(word in messages[0] for word in words), messages[0]
        return messages[0]

    return check


def records(folder: Path, name: str = "metrics") -> list[dict]:
    return train_colm.read_records(folder / f"{name}.jsonl")


# -------------------------------------------------------------------------------------------- the check before training


class RandomRows:
    """Rows of random tokens with the given lengths, as the check reads them."""

    def __init__(self, *lengths: int):
        generator = torch.Generator().manual_seed(sum(lengths))
        self.rows = [torch.randint(1, 512, (n,), generator=generator) for n in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def length(self, i: int) -> int:
        return len(self.rows[i])

    def example(self, i: int) -> Example:
        return Example(self.rows[i], torch.ones(len(self.rows[i]), dtype=torch.bool))


def check(kind: str, precision: str = "no", packing: bool | None = None, **options) -> bool:
    """What `check_model` decides for a model with new adapters, where packing is the default."""
    reset_accelerate()
    accelerator = Accelerator(mixed_precision=precision)
    args = train_colm.build_parser().parse_args(["--model", kind, "--lora_r", "4", "--max_length", "90"])
    args.packing = packing
    model = make_model(kind, **options)
    model = train_colm.add_lora(model.bfloat16() if precision == "bf16" else model, args)
    data = [RandomRows(20, 7, 31, 60, 3, 11, 16, 25, 9), RandomRows(62, 5)]
    before = model.config._attn_implementation
    with mock.patch.object(train_colm, "packs_by_default", lambda *_: True):
        packs = train_colm.check_model(args, accelerator, model, LabelledLogits(model), data)
    assert model.config._attn_implementation == ("packed" if packs else before)
    return packs


SOUND = ["llama", "window", "latent", "wide heads"]
LEAKING = [kind for kind in KINDS if kind not in SOUND]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", SOUND)
def test_models_whose_attention_can_be_packed_are_packed(kind, precision, capsys):
    assert check(kind, precision)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "kind, precision",
    # in bf16 those whose fault could hide in the rounding
    [*((kind, "no") for kind in LEAKING), *((kind, "bf16") for kind in LEAKING[:4])],
)
def test_models_that_would_mix_packed_examples_are_padded_with_a_word(kind, precision, capsys):
    assert not check(kind, precision)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"padding, not packing: {kind}")


@pytest.mark.parametrize("kind", ["convolution", "soft cap"])  # other losses, and a traceback
def test_an_explicit_packing_flag_is_refused_where_it_would_mix_examples(kind):
    with pytest.raises(UserError, match="--packing: .* can't keep packed examples apart .*: use --no-packing"):
        check(kind, packing=True)
    assert check(kind, packing=False) is False


def test_a_window_shows_only_on_rows_that_are_longer(capsys):
    assert check("phimoe", sliding_window=62, **MOE)  # as long as the longest row
    assert not check("phimoe", sliding_window=40, **MOE)


@pytest.mark.parametrize("kind, precision", [("bert", "no"), ("bert", "bf16"), ("electra", "no")])
def test_models_that_look_ahead_are_refused(kind, precision):
    with pytest.raises(UserError, match="not causal.*is_decoder: true"):
        check(kind, precision, is_decoder=False)
    check(kind, precision, is_decoder=True)


def test_a_model_that_looks_ahead_is_refused_by_the_trainer(flags, refused, tmp_path):
    model = save(make_model("bert", is_decoder=False), tmp_path / "model")
    refused(flags(model=model), "--model", "not causal", "is_decoder")


def test_the_check_pads_and_training_goes_on_as_with_no_packing(flags, tmp_path, capsys):
    model = save(make_model("soft cap"), tmp_path / "model")
    with mock.patch.object(train_colm, "packs_by_default", lambda *_: True):
        train(flags(model=model, out="checked"))
    assert capsys.readouterr().out.count("padding, not packing") == 1
    train(flags("--no-packing", model=model, out="padded"))
    assert [r["loss"] for r in records(tmp_path / "checked")] == [r["loss"] for r in records(tmp_path / "padded")]


def test_rows_that_the_model_cannot_run_are_told_in_one_line(flags, refused, tmp_path, inputs):
    model = save(make_model("positions from 2", max_position_embeddings=89), tmp_path / "model")  # room for 87
    rows = long_rows(tmp_path, tokens=88)
    refused(flags(f"--train_file {rows}", model=model), "can't run a row of 88 tokens", "index")


def test_losses_that_are_not_finite_are_told_before_training(flags, refused, tmp_path):
    model = make_model("llama")
    model.lm_head.weight.data[7] = torch.nan
    refused(flags(model=save(model, tmp_path / "model")), "--model", "not finite before training")


def test_a_model_that_writes_minus_one_for_its_positions_has_no_limit(flags, tmp_path):
    set_config(save(make_model("llama"), tmp_path / "model"), max_position_embeddings=-1)
    train(flags(model=tmp_path / "model"))
    assert len(records(tmp_path / "out")) == 2


def set_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def long_rows(folder: Path, tokens: int) -> Path:
    """A file of rows, of which the longest has `tokens` tokens, EOS included."""
    word = " ant"
    assert len(demo_tokenizer()(word * 9)["input_ids"]) == 9
    rows = [{"source": "add", "prompt": word, "completion": word * (n - 2)} for n in [tokens, *range(5, 30)]]
    path = folder / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_token_beyond_the_embedding_is_refused_only_where_a_row_uses_it(flags, refused, tmp_path):
    tokenizer = demo_tokenizer()
    known = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert len(tokenizer) == known + 1
    folder = save(make_model("llama", vocab_size=known), tmp_path / "model", tokenizer)
    train(flags(model=folder))
    rows = [{"source": "add", "prompt": " ant", "completion": " bee" * n} for n in range(2, 20)]
    rows[5]["completion"] += "[PAD]"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (f"{known} tokens", f"token {known}", "[PAD]", "resize its embedding")
    refused(flags(f"--train_file {tmp_path}/rows.jsonl", model=folder, out="other"), *words)


# ------------------------------------------------------------------------------------------------ attention, packed row


@pytest.mark.parametrize("window", [None, 100, 70, 5])
@pytest.mark.parametrize("kv_heads, d_head, d_v", [(4, 8, 8), (2, 12, 5), (1, 6, 10)])
def test_packed_attention_is_causal_attention_of_each_example(window, kv_heads, d_head, d_v):
    """Also with windows between the examples' lengths and that of the filling, which is one more example."""
    lengths, longest = [50, 1, 7, 30, 45], 50
    examples = [(torch.arange(n), torch.ones(n, dtype=torch.bool)) for n in lengths]
    batch = pack(examples, longest)
    total = batch.input_ids.shape[1]
    assert total == 256 and batch.longest == 123  # the filling: longer than any example and than the windows
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, total, width, generator=generator, dtype=torch.float64)
        for heads, width in ((4, d_head), (kv_heads, d_head), (kv_heads, d_v))
    )
    kwargs = {"cu_seq_lens_q": batch.offsets, "max_length_q": batch.longest, "sliding_window": window}
    out, _ = packed_attention(None, q, k, v, None, **kwargs)  # [1, T, heads, d_v]
    assert out.shape == (1, total, 4, d_v)
    start = 0
    for n in lengths:
        for head in range(4):
            rows = slice(start, start + n)
            key, value = k[0, head * kv_heads // 4, rows], v[0, head * kv_heads // 4, rows]
            for t in range(n):
                first = 0 if window is None else max(0, t + 1 - window)
                weight = (key[first : t + 1] @ q[0, head, start + t] * d_head**-0.5).softmax(0)
                expected = weight @ value[first : t + 1]
                torch.testing.assert_close(out[0, start + t, head], expected)
        start += n


# --------------------------------------------------------------------------------------------------------- LoRA targets


def targets(model, *names: str) -> set[str]:
    """The ends of the names of the modules that get adapters."""
    args = train_colm.build_parser().parse_args(["--model", "x", "--lora_r", "4"])
    args.lora_target_modules = [*names] or None
    model = train_colm.add_lora(model, args)
    found = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    return {".".join(name.split(".")[-2:]) for name in found}


def attention(*names: str, parent: str = "self_attn") -> set[str]:
    return {f"{parent}.{name}" for name in names}


QKV = ("q_proj", "k_proj", "v_proj")
DEFAULTS = {  # the paper's; q, k, v and the output under its own name; PEFT's; all of an attention of another make; all
    "phi": attention(*QKV) | {"mlp.fc1", "mlp.fc2"},
    "llama": attention(*QKV, "o_proj"),
    "phi3": attention("qkv_proj", "o_proj"),
    "gpt_neox": attention("query_key_value", "dense", parent="attention"),
    "opt": attention(*QKV, "out_proj"),
    "gptj": attention(*QKV, "out_proj", parent="attn"),
    "lfm2": attention(*QKV, "out_proj"),  # not the convolution's out_proj
    "bamba": attention(*QKV, "o_proj"),  # not the mixer's, whose kernels pass adapters by
    "bart": attention(*QKV, "out_proj"),  # not the attention to an encoder that is not there
    "gpt2": attention("c_attn", parent="attn"),
    "bloom": attention("query_key_value", parent="self_attention"),
    "mpt": attention("Wqkv", parent="attn"),
    "deepseek_v3": attention("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    "persimmon": attention("query_key_value", "dense"),
    "mamba": attention("in_proj", parent="mixer"),
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_default_targets(kind):
    options = {"deepseek_v3": LATENT, "lfm2": {"layer_types": ["conv", "full_attention"]}}
    options["bamba"] = {"attn_layer_indices": [1], **MAMBA}
    options |= {"gptj": {"rotary_dim": 4}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}}
    options |= {"mpt": {"n_layers": 2, "n_heads": 4, "d_model": 32}, "persimmon": {"num_key_value_heads": 4}}
    options |= {"bart": {"d_model": 32, "decoder_layers": 2, "encoder_layers": 2}}
    assert targets(make_model(kind, **options.get(kind, {}))) == DEFAULTS[kind]


def with_tower(kind: str, **modules: torch.nn.Module):
    """A model with another part that rows of text never run, as vision-language models have."""
    model = make_model(kind)
    for name, module in modules.items():
        model.add_module(name, module)
    return model


def test_towers_for_images_and_sound_get_no_adapters():
    tower = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8), "own": torch.nn.Linear(8, 8)})
    expected = attention(*QKV, "o_proj")
    assert targets(with_tower("llama", vision_tower=tower)) == expected
    assert targets(with_tower("llama", audio_tower=tower), "q_proj") == {"self_attn.q_proj"}
    everything = expected | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert targets(with_tower("llama", vision_tower=tower), "all-linear") == everything
    assert targets(make_model("llama"), "all-linear", "lm_head") == everything | {"model.lm_head"}
    with pytest.raises(UserError, match="--lora_target_modules own is only in vision_tower.own.*choose from q_proj"):
        targets(with_tower("llama", vision_tower=tower), "q_proj", "own")


def test_adapters_that_no_row_runs_are_refused(flags, refused, tmp_path):
    """Whatever its name: found by running, not by a list of names."""
    original = AutoModelForCausalLM.from_pretrained

    def load(*args, **kwargs):
        model = original(*args, **kwargs)
        model.add_module("side", torch.nn.ModuleDict({"never": torch.nn.Linear(8, 8)}))
        return model

    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", load):
        refused(flags("--lora_target_modules never"), "no adapter runs on text", "side.never")


def test_a_named_target_that_matches_nothing_is_refused_by_name(flags, refused):
    words = ("--lora_target_modules fc9 is not in the model", "choose from q_proj, k_proj, v_proj, o_proj, gate_proj")
    refused(flags("--lora_target_modules q_proj fc9"), *words)


def test_a_target_that_peft_cannot_adapt_is_refused_with_its_reason(flags, refused):
    refused(flags("--lora_target_modules input_layernorm"), "is not supported", "choose from q_proj")


def test_models_that_cannot_checkpoint_activations_are_refused(flags, refused, tmp_path):
    model = make_model("ctrl", n_embd=32, dff=48, n_layer=2, n_head=4)
    folder = save(model, tmp_path / "model")
    refused(flags("--gradient_checkpointing --no-packing", model=folder), "--gradient_checkpointing", "drop the flag")


# -------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(("method", "package"), [("gptq", "optimum"), ("awq", "gptqmodel"), ("hqq", "HQQ")])
def test_quantised_weights_without_their_package_are_refused(flags, refused, tmp_path, method, package):
    folder = save(make_model("llama"), tmp_path / "model")
    how = {"quant_method": method, "bits": 4, "group_size": 128, "zero_point": True}
    set_config(folder, quantization_config=how)
    refused(flags(model=folder), "--model", package, "install it")


@pytest.mark.parametrize("damage", ["no config", "no weights", "cut weights", "foreign config"])
def test_a_model_that_cannot_be_loaded_is_refused(flags, refused, tmp_path, damage):
    folder = save(make_model("llama"), tmp_path / "model")
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "cut weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    else:
        set_config(folder, hidden_size="wide")
    refused(flags(model=folder), "model")


def test_a_routers_auxiliary_loss_is_said_to_be_left_out(tmp_path, capsys):
    for wanted in (True, False):
        folder = save(make_model("mixtral", output_router_logits=wanted, **MOE), tmp_path / str(wanted))
        args = train_colm.build_parser().parse_args(["--model", str(folder), "--lora_r", "4"])
        train_colm.load_model(args, mock.Mock(mixed_precision="no"), demo_tokenizer())
        assert ("router's auxiliary loss" in capsys.readouterr().out) == wanted


def test_accelerates_dynamo_backend_is_refused(flags, refused, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    refused(flags("--selection colm --probe grad"), "dynamo_backend INDUCTOR", "--compile")


# -------------------------------------------------------------------------------------------- adapters to continue from


@pytest.fixture(scope="session")
def adapter(inputs, tmp_path_factory) -> Path:
    """The output folder of a run whose LoRA settings are not the defaults."""
    folder = tmp_path_factory.mktemp("first")
    files = ["--model", inputs / "model", "--train_file", inputs / "train.jsonl", "--eval_file", inputs / "eval.jsonl"]
    own = "--lora_r 3 --lora_alpha 9 --lora_dropout 0.1 --lora_target_modules q_proj v_proj down_proj"
    train([*map(str, files), "--output_dir", str(folder), *f"{FLAGS} {own}".split()])
    return folder


NO_LORA_FLAGS = " ".join(FLAGS.split("--lora_r 4 --lora_alpha 8 --lora_dropout 0 "))


@pytest.fixture
def go_on(inputs, adapter, tmp_path):
    def of(*texts, model: Path = adapter / "final", out: str = "second") -> list[str]:
        files = ["--model", model, "--train_file", inputs / "train.jsonl", "--eval_file", inputs / "eval.jsonl"]
        return [*map(str, files), "--output_dir", str(tmp_path / out), *" ".join([NO_LORA_FLAGS, *texts]).split()]

    return of


def test_training_goes_on_from_an_adapter(go_on, adapter, inputs, tmp_path):
    train(go_on())
    evals = records(tmp_path / "second", "eval")
    assert evals[0]["eval_loss"] == pytest.approx(records(adapter, "eval")[-1]["eval_loss"], rel=1e-6)
    assert evals[-1]["eval_loss"] < evals[0]["eval_loss"]
    config = peft.PeftConfig.from_pretrained(tmp_path / "second" / "final")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 9, 0.1)
    assert config.target_modules == {"q_proj", "v_proj", "down_proj"}
    assert config.base_model_name_or_path == str(inputs / "model")
    before, after = (load_file(f / "final" / "adapter_model.safetensors") for f in (adapter, tmp_path / "second"))
    assert before.keys() == after.keys() and not any(torch.equal(before[k], after[k]) for k in before)
    assert all(weight.dtype == torch.float32 for weight in after.values())


def test_a_run_from_an_adapter_is_resumed(go_on, tmp_path):
    train(go_on("--max_steps 4 --lr_scheduler constant", out="whole"))
    with mock.patch.object(train_colm, "train_loop", side_effect=stop_after(2)):
        train(go_on("--max_steps 4 --lr_scheduler constant --save_every 2", out="parts"))
    shutil.rmtree(tmp_path / "parts" / "final")
    train(go_on("--max_steps 4 --lr_scheduler constant --save_every 2 --resume auto", out="parts"))
    losses = [[r["loss"] for r in records(tmp_path / out)] for out in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def stop_after(steps: int):
    original = train_colm.train_loop

    def part(run, start):
        wanted, run.args.max_steps = run.args.max_steps, steps
        original(run, start)
        run.args.max_steps = wanted

    return part


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--lora_r 4", "has 3"),
        ("--lora_r 0", "has 3"),
        ("--lora_alpha 512", "has 9"),  # the flag's default, but given
        ("--lora_dropout 0.05", "has 0.1"),
        ("--lora_target_modules q_proj", "has down_proj q_proj v_proj"),
    ],
)
def test_flags_that_contradict_the_adapter_are_refused(go_on, refused, flag, value):
    refused(go_on(flag), flag, value, "drop the flag")


def test_flags_that_agree_with_the_adapter_are_accepted(go_on):
    argv = go_on("--lora_r 3 --lora_target_modules v_proj q_proj down_proj")
    args = train_colm.parse_args(argv)
    assert (args.lora_r, args.lora_alpha, args.lora_dropout) == (3, 9, 0.1)
    assert args.lora_target_modules == ["down_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize("damage", ["base moved", "no base", "weights missing", "other kind", "other shape", "dora"])
def test_adapters_that_cannot_be_trained_on_are_refused(go_on, refused, adapter, tmp_path, damage):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter / "final", folder)
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config, tensors = json.loads(path.read_text()), load_file(weights)
    words = [str(folder)]
    if damage == "base moved":
        config["base_model_name_or_path"] = str(tmp_path / "nowhere")
        words += ["nowhere"]
    elif damage == "no base":
        config["base_model_name_or_path"] = None
        words += ["base_model_name_or_path"]
    elif damage == "weights missing":
        missing = sorted(tensors)[0]
        save_file({k: v for k, v in tensors.items() if k != missing}, weights)
        words += ["lacks 1 weights", missing]
    elif damage == "other kind":
        config = {"peft_type": "IA3", "base_model_name_or_path": config["base_model_name_or_path"]}
        words += ["IA3", "only LoRA"]
    elif damage == "other shape":
        save_file({k: torch.cat([v, v]) for k, v in tensors.items()}, weights)
        words += ["size mismatch"]
    else:
        base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
        options = peft.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
        peft.get_peft_model(base, options).save_pretrained(folder)
        config = json.loads(path.read_text())
        words += ["DoRA"]
    path.write_text(json.dumps(config))
    refused(go_on(model=folder), *words)


# ------------------------------------------------------------------------------------------ what a resumed run compares


def fingerprint(folder: Path, precision: str = "no") -> str:
    args = train_colm.build_parser().parse_args(["--model", str(folder)])
    with mock.patch.dict(os.environ, {"ACCELERATE_MIXED_PRECISION": precision}):
        return train_colm.model_fingerprint(args)


def test_the_fingerprint_tells_weights_and_precision_but_not_where_they_lie(inputs, adapter, tmp_path):
    known = fingerprint(inputs / "model")
    shutil.copytree(inputs / "model", tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") == known
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    save(model, tmp_path / "split")
    (tmp_path / "split" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert len([*(tmp_path / "split").glob("*.safetensors")]) > 1 and fingerprint(tmp_path / "split") == known
    different = {fingerprint(inputs / "model", "bf16"), known}
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)  # one matrix, as an adapter merged into it
    different.add(fingerprint(save(model, tmp_path / "other")))
    different.add(fingerprint(adapter / "final"))
    tensors = load_file(adapter / "final" / "adapter_model.safetensors")
    shutil.copytree(adapter / "final", tmp_path / "adapter")
    save_file({k: v * 1.01 for k, v in tensors.items()}, tmp_path / "adapter" / "adapter_model.safetensors")
    different.add(fingerprint(tmp_path / "adapter"))
    assert len(different) == 5


def test_pickled_weights_have_a_fingerprint_too(inputs, tmp_path):
    known = set()
    for factor in (1.0, 1.0, 1.01):
        folder = tmp_path / "pickled"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(inputs / "model", folder)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save({k: v * factor for k, v in tensors.items()}, folder / "pytorch_model.bin")
        known.add(fingerprint(folder))
    assert len(known) == 2


def test_a_run_of_other_weights_or_precision_is_not_resumed(flags, refused, tmp_path, monkeypatch):
    folder = save(make_model("llama"), tmp_path / "model")
    train(flags("--save_every 1", model=folder))
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.01)
    save(model, tmp_path / "other")
    refused(flags("--save_every 1 --resume auto", model=tmp_path / "other"), "--model is llama", "was made with llama")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    refused(flags("--save_every 1 --resume auto", model=folder), "mixed_precision bf16", "mixed_precision no")


# ------------------------------------------------------------------------------------------------------------ two ranks

TWO_RANKS = """
import sys
sys.path[:0] = {repo!r}, {tests!r}
import train_colm
train_colm.packs_by_default = lambda *_: True
sys.argv[1:] = {argv!r}
import fsdp_cpu
"""


def test_two_sharding_ranks_take_the_same_decision_and_train(flags, tmp_path):
    """After a traceback in the middle of a sharded model's packed forward, too."""
    folder = save(make_model("soft cap"), tmp_path / "model")
    train(flags("--no-packing", model=folder, out="one"))
    script = tmp_path / "script.py"
    argv = flags(model=folder, out="two")
    script.write_text(TWO_RANKS.format(repo=str(REPO), tests=str(REPO / "tests"), argv=argv))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("padding, not packing") == 1
    losses = [[r["loss"] for r in records(tmp_path / out)] for out in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5) and len(losses[0]) == 2


def free_port() -> str:
    """Below the range that the kernel hands out by itself."""
    while True:
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", random.randint(15000, 30000)))
            except OSError:
                continue
            return str(s.getsockname()[1])

"""A frozen base in 4 bits (--base_precision nf4), or a checkpoint that is quantised already, by any package.

What is computed is compared with a model of plain layers that hold the same weights, dequantised.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, MixtralConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))

import colm_data  # noqa: E402
import eval_math  # noqa: E402
import eval_superglue  # noqa: E402
import train_colm  # noqa: E402
from colm_core import VProjectionProbe, example_losses, find_v_projection  # noqa: E402
from train_colm import read_records  # noqa: E402

os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}  # for subprocesses too
TOKENS, HIDDEN, HEADS = 512, 64, 4
FLAGS = "--pool_size 16 --coreset_size 8 --lora_r 4 --lora_alpha 8 --sparsify_dims 40 --max_steps 4 --warmup_ratio 0 "
FLAGS += "--max_length 128 --learning_rate 1e-2 --probe grad --max_tokens_per_micro_batch 600"


@pytest.fixture(autouse=True)
def another_accelerator():
    """Accelerate keeps its precision and backend for a whole process."""
    yield
    for state in (AcceleratorState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a tiny model, a mixture, and the same model with 4-bit and 8-bit weights."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = colm_data.demo_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": HEADS}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.1, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    half = {"bnb_4bit_compute_dtype": torch.float16, "bnb_4bit_quant_type": "fp4"}
    for name, how in (
        ("4 bits", BitsAndBytesConfig(load_in_4bit=True, **half)),
        ("8 bits", BitsAndBytesConfig(load_in_8bit=True)),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16, quantization_config=how)
        model.save_pretrained(folder / name)
    for name in ("model", "4 bits", "8 bits"):
        tokenizer.save_pretrained(folder / name)
    for name, rows in (("train", colm_data.demo_rows("train")), ("eval", colm_data.demo_rows("eval")[::4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(inputs: Path, out: Path, text: str = "--base_precision nf4", model: str | Path = "model") -> list[str]:
    files = ["--model", inputs / model, "--train_file", inputs / "train.jsonl", "--output_dir", out]
    files += ["--eval_file", inputs / "eval.jsonl"]
    return [*map(str, files), *FLAGS.split(), *text.split()]


def train(arguments: list[str]) -> Path:
    train_colm.main(arguments)
    return Path(arguments[arguments.index("--output_dir") + 1])


def with_lora(inputs: Path, dtype: torch.dtype, model: str = "model", text: str = "--base_precision nf4"):
    """The model as the trainer loads it, with adapters whose B is not zero."""
    args = train_colm.parse_args(flags(inputs, inputs / "unused", text, model))
    model = train_colm.add_lora(train_colm.load_base(args.model, args, dtype), args)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def dequantised(model, weights: dict | None = None) -> torch.nn.Module:
    """The same model of plain float64 layers, adapters merged; `weights` are those that are not bitsandbytes'."""
    twin = AutoModelForCausalLM.from_config(model.config).double().eval()
    modules = dict(model.get_base_model().named_modules())
    with torch.no_grad():
        for name, module in twin.named_modules():
            if not isinstance(getattr(module, "weight", None), torch.nn.Parameter):
                continue
            adapted = modules[name]
            if weights and f"{name}.weight" in weights:
                weight = weights[f"{name}.weight"]
            else:
                weight = getattr(adapted, "base_layer", adapted).weight
            if isinstance(weight, bnb.nn.Params4bit):
                weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            weight = weight.double()
            if hasattr(adapted, "lora_A"):
                a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
                weight = weight + adapted.scaling["default"] * b.double() @ a.double()
            module.weight.copy_(weight)
    return twin


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 200, (4, 21), generator=generator)
    return {"input_ids": ids, "labels": ids}


def expected_gradients(model, twin) -> torch.Tensor:
    """Gradients of every example's loss for the last V projection's lora_B, from the twin's dense weight, [4, D]."""
    lora = model.get_base_model().model.layers[-1].self_attn.v_proj
    into_b = lora.scaling["default"] * lora.lora_A["default"].weight.double().T  # W = W0 + scaling B A
    weight, rows = twin.model.layers[-1].self_attn.v_proj.weight, []
    for loss in example_losses(twin, batch())[0]:
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        rows.append((gradient @ into_b).flatten())
    return torch.stack(rows)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found.double() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize(("model", "text"), [("model", "--base_precision nf4"), ("4 bits", "")])
def test_probe_and_training_gradient_are_those_of_the_quantised_weights(inputs, model, text):
    model = with_lora(inputs, torch.float32, model, text)
    assert type(model.get_base_model().model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    twin = dequantised(model)
    expected = expected_gradients(model, twin)
    probe = VProjectionProbe(model)
    model.eval()  # the trainer evaluates and probes before it trains
    assert relative_error(example_losses(model, batch())[0], example_losses(twin, batch())[0]) < 1e-5
    found = probe.gradients(lambda: example_losses(model, batch()))
    assert relative_error(found, expected) < 1e-4
    z = torch.randn(3, *probe.shape, generator=torch.Generator().manual_seed(0))
    derivatives = probe.spsa(lambda: example_losses(model, batch()), z)
    assert relative_error(derivatives, expected @ z.double().flatten(1).T) < 1e-2  # no float64 in 4-bit kernels
    assert not probe.found.cautions
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    example_losses(model, batch()).mean().backward()
    lora = model.get_base_model().model.layers[-1].self_attn.v_proj
    assert relative_error(lora.lora_B["default"].weight.grad.flatten(), expected.mean(0)) < 1e-4


@pytest.mark.parametrize(("folder", "text"), [("model", "--base_precision nf4"), ("4 bits", "")])
def test_in_bf16_spsa_runs_in_wider_precision_and_attention_in_bf16(inputs, folder, text, monkeypatch):
    args = train_colm.parse_args(flags(inputs, inputs / "unused", text, folder))
    base = train_colm.load_base(args.model, args, torch.bfloat16)
    # FSDP2 shares out floating point alone; a checkpoint's bits stay as they were saved.
    assert base.model.layers[0].mlp.up_proj.weight.dtype == (torch.bfloat16 if folder == "model" else torch.uint8)
    # Where autocast gives a layer float32, as behind the norms of a GPU, it computes and answers in bf16 all the same.
    assert base.model.layers[0].mlp.up_proj(torch.randn(1, 3, HIDDEN)).dtype == torch.bfloat16
    model = train_colm.add_lora(base, args).eval()
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def attention(query, *rest, **options):
        seen.append(query.dtype)
        return original(query, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    with torch.autocast("cpu", torch.bfloat16):
        example_losses(model, batch())
    assert seen == [torch.bfloat16] * 3
    seen.clear()
    probe = VProjectionProbe(model)
    assert probe.found.wide and not probe.found.cautions
    z = torch.randn(1, *probe.shape, generator=torch.Generator().manual_seed(0))
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        derivatives = probe.spsa(lambda: example_losses(model, batch()), z)[:, 0]
        exact = probe.gradients(lambda: example_losses(model, batch())).float()
    assert seen[:4] == [torch.bfloat16] * 2 + [torch.float32] * 2  # the last layer, once for either sign
    assert relative_error(derivatives, (exact @ z.flatten()).double()) < 0.1


def test_a_run_resumes_bit_for_bit_and_its_adapter_is_evaluated_on_4_bits(inputs, tmp_path, capsys):
    text = "--base_precision nf4 --gradient_checkpointing --packing --lora_dropout 0.1 --lr_scheduler constant"
    whole = train(flags(inputs, tmp_path / "whole", text))
    parts = train(flags(inputs, tmp_path / "parts", text + " --max_steps 2"))
    train(flags(inputs, parts, text + " --resume auto"))
    assert (parts / "selection.jsonl").read_text() == (whole / "selection.jsonl").read_text()
    assert read_records(parts / "eval.jsonl")[-1] == read_records(whole / "eval.jsonl")[-1]
    adapters = [folder / "final/adapter_model.safetensors" for folder in (parts, whole)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    losses = [record["eval_loss"] for record in read_records(whole / "eval.jsonl")]
    assert losses[-1] < losses[0]

    capsys.readouterr()
    with pytest.raises(SystemExit):
        train_colm.cli(flags(inputs, parts, text + " --base_precision compute --resume auto"))
    assert "--base_precision is compute" in capsys.readouterr().err

    final = str(whole / "final")
    files = ["--tasks", str(tmp_path / "task.jsonl"), "--output_dir", str(tmp_path / "scores")]
    (tmp_path / "task.jsonl").write_text('{"question": "add 2 3", "answer": "5"}\n')
    eval_math.main(["--model", final, *files, "--max_new_tokens", "8"])
    assert json.loads((tmp_path / "scores/settings.json").read_text())["base_precision"] == "nf4"
    args = eval_math.parse_args(["--model", final, *files])
    logits = {}
    for precision in ("nf4", "compute"):
        args.base_precision = precision
        model, _, _ = eval_math.load(args, torch.device("cpu"))
        logits[precision] = model(input_ids=batch()["input_ids"]).logits
        layer = model.model.layers[0].self_attn.q_proj
        assert hasattr(layer, "lora_A") == (precision == "nf4")  # merged only where that is exact
    args.base_precision, args.dtype = "nf4", "bfloat16"
    model, _, _ = eval_math.load(args, torch.device("cpu"))
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    in_bf16 = model(input_ids=batch()["input_ids"]).logits
    trained = train_colm.parse_args(flags(inputs, tmp_path / "unused", "--base_precision nf4", final))
    base = train_colm.load_base(str(inputs / "model"), trained, torch.float32)
    model = train_colm.add_lora(base, trained, final).eval()
    expected = model(input_ids=batch()["input_ids"]).logits
    assert torch.equal(logits["nf4"], expected)
    assert relative_error(in_bf16, expected.double()) < 0.1
    assert not torch.allclose(logits["compute"], expected, rtol=1e-2)


def test_compiled_layers_compute_the_same(inputs, tmp_path):
    text = "--base_precision nf4 --lora_dropout 0 --max_steps 2"
    eager = train(flags(inputs, tmp_path / "eager", text))
    compiled = train(flags(inputs, tmp_path / "compiled", text + " --compile"))
    losses = [[record["loss"] for record in read_records(folder / "metrics.jsonl")] for folder in (eager, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (eager / "selection.jsonl").read_text() == (compiled / "selection.jsonl").read_text()


def torchrun(script: Path, *arguments: str, **environment: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("script", "precision"), [("train_colm.py", "no"), ("tests/fsdp_cpu.py", "no"), ("tests/fsdp_cpu.py", "bf16")]
)
def test_two_ranks_train_as_one_process(inputs, tmp_path, monkeypatch, script, precision):
    """DDP, and FSDP2 that shares out the packed bits as float32 or bf16 numbers."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    text = "--base_precision nf4 --lora_dropout 0"
    one = train(flags(inputs, tmp_path / "one", text))
    torchrun(REPO / script, *flags(inputs, tmp_path / "two", text))
    two = tmp_path / "two"
    tolerance = 2e-5 if precision == "no" else 2e-2
    for name, key in (("metrics", "loss"), ("eval", "eval_loss")):
        values = [[record[key] for record in read_records(folder / f"{name}.jsonl")] for folder in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=tolerance)
    if precision == "no":
        chosen = [read_records(folder / "selection.jsonl") for folder in (one, two)]
        for a, b in zip(*chosen, strict=True):
            assert sorted(a["selected"]) == sorted(b["selected"])


@pytest.mark.parametrize(
    ("model", "text", "says"),
    [
        ("4 bits", "--base_precision nf4", ["is quantised already", "use --base_precision compute"]),
        ("8 bits", "", ["8-bit layers of bitsandbytes", "give other weights"]),
        ("4 bits", "--lora_r 0", ["--lora_r 0 would train", "give 1 or more"]),
        ("model", "--base_precision nf4 --lora_r 0", ["--lora_r 0 would train", "give 1 or more"]),
    ],
)
def test_what_cannot_be_quantised_is_refused(inputs, tmp_path, capsys, model, text, says):
    with pytest.raises(SystemExit) as refused:
        train_colm.cli(flags(inputs, tmp_path / "out", text, model))
    assert refused.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    for words in says:
        assert words in line
    assert not (tmp_path / "out").exists()


def test_without_bitsandbytes_the_package_is_named(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_colm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as refused:
        train_colm.cli(flags(inputs, tmp_path / "out"))
    assert refused.value.code == 2
    assert "pip install bitsandbytes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_colm.cli(["--base_precision", "nf4"])
    assert "no effect on the demo" in capsys.readouterr().err


def test_an_adapter_goes_on_in_the_precision_it_was_trained_in(inputs, tmp_path):
    first = train(flags(inputs, tmp_path / "first", "--base_precision nf4 --max_steps 1"))
    final = str(first / "final")
    again = train(flags(inputs, tmp_path / "again", "--max_steps 1", final))
    assert json.loads((again / "final/settings.json").read_text())["base_precision"] == "nf4"
    losses = [read_records(folder / "eval.jsonl") for folder in (first, again)]
    assert losses[1][0]["eval_loss"] == losses[0][-1]["eval_loss"]  # it begins where the other ended
    args = train_colm.parse_args(flags(inputs, tmp_path / "other", "--base_precision compute", final))
    assert args.base_precision == "compute"  # as asked


@pytest.mark.parametrize("name", ["settings.json", "colm_prompts.json"])
@pytest.mark.parametrize("content", [b'{"base_precision', b"[1]", b"\xff\xfe", b'{"base_precision": "int7"}'])
def test_damaged_notes_beside_an_adapter_are_told_in_one_line(inputs, tmp_path, capsys, name, content):
    """By the trainer and both evaluations; a flag in their place is enough."""
    args = train_colm.parse_args(flags(inputs, tmp_path / "unused"))
    model = train_colm.add_lora(train_colm.load_base(args.model, args, torch.float32), args)
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    colm_data.demo_tokenizer().save_pretrained(adapter)
    (adapter / name).write_bytes(content)
    (tmp_path / "task.jsonl").write_text('{"question": "add 2 3", "answer": "5"}\n')
    (tmp_path / "cb.jsonl").write_text('{"premise": "a", "hypothesis": "b", "label": 0, "idx": 0}\n')
    task, out = str(tmp_path / "task.jsonl"), str(tmp_path / "out")
    runs = [(eval_math.cli, ["--model", str(adapter), "--tasks", task, "--output_dir", out, "--max_new_tokens=2"])]
    score = ["score", f"CB={tmp_path}/cb.jsonl", "--model", str(adapter), "--output_dir", out + "2"]
    runs.append((eval_superglue.cli, score))
    runs.append((train_colm.cli, flags(inputs, tmp_path / "unused", "", adapter)))
    remedy = {"settings.json": "--base_precision=compute", "colm_prompts.json": "--no-chat_template"}[name]
    for cli, arguments in runs:
        prompts_matter = cli is not train_colm.cli and b"int7" not in content
        if name == "settings.json" or prompts_matter:
            capsys.readouterr()
            with pytest.raises(SystemExit) as refused:
                cli(arguments)
            assert refused.value.code == 2
            [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
            assert str(adapter / name) in line
        if cli is not train_colm.cli:
            cli([*arguments, remedy])
    assert not (tmp_path / "unused").exists()


def test_evaluations_name_the_package_of_quantised_weights(inputs, tmp_path, capsys, monkeypatch):
    def missing(*args, **options):
        raise ImportError("4-bit quantization requires bitsandbytes: `pip install bitsandbytes`")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", missing)
    (tmp_path / "task.jsonl").write_text('{"question": "add 2 3", "answer": "5"}\n')
    files = ["--tasks", str(tmp_path / "task.jsonl"), "--output_dir", str(tmp_path / "scores")]
    with pytest.raises(SystemExit):
        eval_math.cli(["--model", str(inputs / "4 bits"), *files])
    assert "pip install bitsandbytes`: install it, or give another model" in capsys.readouterr().err


def test_libraries_do_not_warn_about_one_another(inputs, tmp_path):
    """Nobody who runs a script can do anything about the names that PEFT asks transformers for."""
    command = [sys.executable, str(REPO / "train_colm.py")]
    command += flags(inputs, tmp_path / "out", "--base_precision nf4 --max_steps 1 --gradient_checkpointing")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr and "Failed to load" not in done.stderr


def test_a_model_of_which_little_takes_4_bits_is_told(tmp_path, capsys):
    """The experts of a mixture are no linear layers."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=TOKENS, **sizes, **experts)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    args = train_colm.parse_args(["--model", str(tmp_path), "--base_precision", "nf4"])
    base = train_colm.load_base(args.model, args, torch.float32)
    packed = 0
    for name, p in model.named_parameters():
        if isinstance(base.get_parameter(name), bnb.nn.Params4bit):
            packed += p.numel()
    assert f"only {packed / model.num_parameters():.0%} of the weights take 4 bits" in capsys.readouterr().out


# ---------------------------------------------------------------------------- checkpoints that other packages quantised


class PackedLinear(torch.nn.Module):
    """As GPTQ's and AWQ's layers on a CPU: an evaluation that comes first ends its backward pass for good."""

    weight = "int8, for example"  # some have nothing of this name, some keep facts about their weights there

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(self.out_features, self.in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.zeros(self.out_features, 1))
        self.linear_mode = None

    def forward(self, x):
        if self.linear_mode is None:
            self.linear_mode = "train" if self.training or x.requires_grad else "inference"
        out = x @ (self.qweight * self.scales).to(x.dtype).T
        return out.detach() if self.linear_mode == "inference" else out


@register_quantization_config("toy")
class ToyConfig(QuantizationConfigMixin):
    def __init__(self, plain=(), trainable=True, **options):
        self.quant_method, self.plain, self.trainable = "toy", plain, trainable


@register_quantizer("toy")
class ToyQuantizer(HfQuantizer):
    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **options):
        for name, module in [*model.named_modules()]:
            if name.endswith("_proj") and not name.endswith(tuple(self.quantization_config.plain)):
                model.set_submodule(name, PackedLinear(module))

    @property
    def is_trainable(self):
        return self.quantization_config.trainable

    def is_serializable(self):
        return True


def nibbles(numbers: torch.Tensor, dim: int, order=range(8)) -> torch.Tensor:
    """Eight 4-bit numbers along `dim` in one int32; the lowest bits hold the number that `order` names first."""
    numbers = numbers.to(torch.int64).movedim(dim, -1).unflatten(-1, (-1, 8))
    packed = sum(numbers[..., which] << 4 * place for place, which in enumerate(order))
    packed = torch.where(packed >= 2**31, packed - 2**32, packed)
    return packed.to(torch.int32).movedim(-1, dim).contiguous()


def packed_tensors(method: str, name: str, weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """A weight [out, in] as a checkpoint of this method holds it, and what it then stands for."""
    out, size = weight.shape
    if method == "toy":
        scales = weight.abs().amax(1, keepdim=True) / 127
        packed = (weight / scales).round().to(torch.int8)
        return {f"{name}.qweight": packed, f"{name}.scales": scales}, packed * scales
    groups = weight.view(out, -1, 32)
    if method == "fp8":  # blocks of 32 by 32
        blocks = weight.view(out // 32, 32, size // 32, 32)
        scales = blocks.abs().amax((1, 3)) / 448
        packed = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        stored = {f"{name}.weight": packed.view(out, size), f"{name}.weight_scale_inv": scales}
        return stored, (packed.float() * scales[:, None, :, None]).view(out, size)
    if method == "compressed-tensors":
        scales = weight.abs().amax(1, keepdim=True) / 127
        packed = (weight / scales).round().to(torch.int8)
        return {f"{name}.weight": packed, f"{name}.weight_scale": scales}, packed * scales
    scales = (groups.abs().amax(-1) / 7).half()  # [out, groups]
    numbers = (groups / scales[..., None].float()).round().clamp(-8, 7) + 8
    stands_for = ((numbers - 8).half() * scales[..., None]).view(
        out, size
    )  # products in fp16, as the kernels have them
    numbers, zeros = numbers.view(out, size).T, torch.full((size // 32, out), 8)
    stored = {f"{name}.scales": scales.T.contiguous()}
    if method == "gptq":  # its zeros are stored less one
        stored |= {f"{name}.qweight": nibbles(numbers, 0), f"{name}.qzeros": nibbles(zeros - 1, 1)}
        stored[f"{name}.g_idx"] = torch.arange(size, dtype=torch.int32) // 32
    else:
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        stored |= {f"{name}.qweight": nibbles(numbers, 1, order), f"{name}.qzeros": nibbles(zeros, 1, order)}
    return stored, stands_for


SECTIONS = {
    "toy": {"plain": ["v_proj"]},  # PEFT adapts plain layers and those of packages that it knows
    "fp8": {"weight_block_size": [32, 32], "activation_scheme": "dynamic", "fmt": "e4m3"},
    "gptq": {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "checkpoint_format": "gptq"},
    "awq": {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "compressed-tensors": {  # W8A8: activations would be rounded as well
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
                "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
            }
        },
    },
}


def write_quantised(inputs: Path, folder: Path, method: str, **section) -> dict:
    """The tiny model quantised by `method`; returns the weights that its layers stand for."""
    section = {"quant_method": method, **SECTIONS.get(method, {}), **section}
    config = json.loads((inputs / "model/config.json").read_text()) | {"quantization_config": section}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stored, weights = {}, {}
    for name, weight in load_file(inputs / "model/model.safetensors").items():
        layer = name.removesuffix(".weight")
        if method not in SECTIONS or not layer.endswith("_proj") or layer.endswith(tuple(section.get("plain", ()))):
            stored[name] = weight
            continue
        packed, weights[name] = packed_tensors(method, layer, weight)
        stored |= packed
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    colm_data.demo_tokenizer().save_pretrained(folder)
    return weights


def needs_package(method: str) -> None:
    packages = {"gptq": ["gptqmodel", "optimum"], "awq": ["gptqmodel"], "compressed-tensors": ["compressed_tensors"]}
    for package in packages.get(method, []):
        pytest.importorskip(package)


def test_transformers_is_asked_for_layers_that_pass_gradients():
    """Needs none of the packages."""
    for method in ("fp8", "mxfp4"):
        section = {"quant_method": method}
        assert not train_colm.stays_packed(section)
        assert section["dequantize"]
    for method in ("gptq", "awq"):
        section = {"quant_method": method, **SECTIONS[method]}
        assert train_colm.stays_packed(section)
        assert section["backend"] == "auto_trainable"


@pytest.mark.parametrize("method", SECTIONS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_pass_through_layers_of_other_packages(inputs, tmp_path, method, precision):
    """After an evaluation, too; in bf16 as far as its rounding allows."""
    needs_package(method)
    weights = write_quantised(inputs, tmp_path / "base", method)
    text = "--lora_dropout 0"
    if method == "toy":
        text += " --lora_target_modules v_proj"
    args = train_colm.parse_args(flags(inputs, tmp_path / "unused", text, tmp_path / "base"))
    dtype = getattr(torch, precision)
    close = 1e-4 if precision == "float32" else 0.05
    model = train_colm.add_lora(train_colm.load_base(args.model, args, dtype), args).eval()
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    twin = dequantised(model, weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        with torch.no_grad():
            losses = example_losses(model, batch())[0]
        assert relative_error(losses, example_losses(twin.double(), batch())[0]) < close
        probe = VProjectionProbe(model)
        assert not probe.found.cautions
        with torch.autocast("cpu", enabled=False):
            expected = expected_gradients(model, twin)
        assert relative_error(probe.gradients(lambda: example_losses(model, batch())), expected) < close
        z = torch.randn(3, *probe.shape, generator=torch.Generator().manual_seed(0))
        derivatives = probe.spsa(lambda: example_losses(model, batch()), z)
        assert relative_error(derivatives, expected @ z.double().flatten(1).T) < max(close, 1e-2)
        model.train()
        example_losses(model, batch())[0].mean().backward()
    for layer in (0, 2):  # behind packed layers, and before them
        lora = model.get_base_model().model.layers[layer].self_attn.v_proj
        weight = twin.model.layers[layer].self_attn.v_proj.weight
        (gradient,) = torch.autograd.grad(example_losses(twin, batch())[0].mean(), weight)
        into_b = lora.scaling["default"] * lora.lora_A["default"].weight.double().T
        assert relative_error(lora.lora_B["default"].weight.grad, gradient @ into_b) < close


def test_layers_without_a_weight_are_linear_layers_all_the_same(inputs, tmp_path):
    write_quantised(inputs, tmp_path, "toy", plain=[])
    args = train_colm.parse_args(flags(inputs, tmp_path / "unused", "", tmp_path))
    base = train_colm.load_base(args.model, args, torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(inputs / "model")
    assert train_colm.linear_modules(base) == train_colm.linear_modules(plain)
    assert train_colm.default_targets(base) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    found = find_v_projection(base)
    assert (found.name, found.rows) == ("model.layers.2.self_attn.v_proj", tuple(range(32)))
    assert base.model.layers[0].mlp.up_proj(torch.randn(1, 3, HIDDEN)).dtype == torch.bfloat16


@pytest.mark.parametrize("method", SECTIONS)
def test_a_run_over_another_packages_base_resumes_and_is_evaluated(inputs, tmp_path, method):
    needs_package(method)
    write_quantised(inputs, tmp_path / "base", method)
    text = (
        "--gradient_checkpointing --packing --lora_dropout 0.1 --lr_scheduler constant --num_directions 4 --probe spsa"
    )
    if method == "toy":
        text += " --lora_target_modules v_proj"
    whole = train(flags(inputs, tmp_path / "whole", text + " --max_steps 3", tmp_path / "base"))
    parts = train(flags(inputs, tmp_path / "parts", text + " --max_steps 2", tmp_path / "base"))
    train(flags(inputs, parts, text + " --max_steps 3 --resume auto", tmp_path / "base"))
    adapters = [folder / "final/adapter_model.safetensors" for folder in (parts, whole)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    losses = [record["eval_loss"] for record in read_records(whole / "eval.jsonl")]
    assert losses[-1] < losses[0]
    (tmp_path / "task.jsonl").write_text('{"question": "add 2 3", "answer": "5"}\n')
    files = ["--tasks", str(tmp_path / "task.jsonl"), "--output_dir", str(tmp_path / "scores")]
    args = eval_math.parse_args(["--model", str(whole / "final"), *files])
    model, _, _ = eval_math.load(args, torch.device("cpu"))
    trained = train_colm.parse_args(flags(inputs, tmp_path / "unused", "", whole / "final"))
    base = train_colm.load_base(tmp_path / "base", trained, torch.float32)
    expected = train_colm.add_lora(base, trained, whole / "final").eval()
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, expected(**batch()).logits)


# Where transformers asks for a package: it is missing here, installed or not.
ASKED = {
    "gptq": ("quantizers.quantizer_gptq.is_optimum_available", "pip install optimum"),
    "awq": ("quantizers.quantizer_awq.is_gptqmodel_available", "pip install gptqmodel"),
    "compressed-tensors": (
        "utils.quantization_config.is_compressed_tensors_available",
        "pip install compressed-tensors",
    ),
}


UNUSABLE = list(itertools.product([*ASKED, "exl2"], ["train", "adapter", "maths", "superglue"]))
UNUSABLE += [("untrainable", "train"), ("untrainable", "adapter")]  # it can be evaluated


@pytest.mark.parametrize(("method", "program"), UNUSABLE)
def test_a_base_that_cannot_be_used_is_told_in_one_line(inputs, tmp_path, capsys, monkeypatch, method, program):
    base = tmp_path / "base"
    if method in ASKED:
        monkeypatch.setattr(f"transformers.{ASKED[method][0]}", lambda *versions: False)
        says = [ASKED[method][1], "install it, or give another model"]
        write_quantised(inputs, base, method)
    elif method == "exl2":  # transformers alone would only warn, and go on with new weights
        write_quantised(inputs, base, method)
        says = ["Unknown quantization type, got exl2"]
    else:
        write_quantised(inputs, base, "toy", trainable=False)
        says = ["is quantised by toy", "no gradient", "give other weights"]
    out, model = str(tmp_path / "out"), base
    if program in ("adapter", "maths"):
        args = train_colm.parse_args(flags(inputs, tmp_path / "unused"))
        adapted = train_colm.add_lora(AutoModelForCausalLM.from_pretrained(inputs / "model"), args)
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        model = tmp_path / "adapter"
        adapted.save_pretrained(model)
        colm_data.demo_tokenizer().save_pretrained(model)
    (tmp_path / "task.jsonl").write_text('{"question": "add 2 3", "answer": "5"}\n')
    (tmp_path / "cb.jsonl").write_text('{"premise": "a", "hypothesis": "b", "label": 0, "idx": 0}\n')
    if program == "maths":
        command = ["--model", str(model), "--tasks", str(tmp_path / "task.jsonl"), "--output_dir", out]
        cli = eval_math.cli
    elif program == "superglue":
        command = ["score", f"CB={tmp_path}/cb.jsonl", "--model", str(model), "--output_dir", out]
        cli = eval_superglue.cli
    else:
        command, cli = flags(inputs, tmp_path / "out", "", model), train_colm.cli
    capsys.readouterr()
    with pytest.raises(SystemExit) as refused:
        cli(command)
    assert refused.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    for words in says:
        assert words in line
    if cli is not train_colm.cli:
        return
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        cli([*command, "--base_precision", "nf4"])
    assert "is quantised already: use --base_precision compute" in capsys.readouterr().err


def test_what_fsdp2_cannot_share_out_is_told_in_one_line(inputs, tmp_path, capsys, monkeypatch):
    def prepare(*args):
        raise NotImplementedError("aten.split of packed numbers")

    write_quantised(inputs, tmp_path / "base", "toy")
    monkeypatch.setattr(train_colm.Accelerator, "prepare", prepare)
    text = "--lora_target_modules v_proj"
    with pytest.raises(SystemExit) as refused:
        train_colm.cli(flags(inputs, tmp_path / "out", text, tmp_path / "base"))
    assert refused.value.code == 2
    assert "its packed weights can't be shared out (NotImplementedError" in capsys.readouterr().err
    with pytest.raises(NotImplementedError):  # nothing of this hides a fault of plain weights
        train_colm.cli(flags(inputs, tmp_path / "out", text, "model"))

"""Every causal family of the installed transformers, as a tiny random model, through loss, probes and training.

    python benchmarks/families.py                        # all; a few minutes on one core
    python benchmarks/families.py --only llama mixtral   # some, with what went wrong in full
    python benchmarks/families.py --markdown > families.md

Each family's default configuration is shrunk by the names of its fields, gets random weights and the adapters that
`train_colm.py` would give it with default flags. Then everything that a step computes is compared with a plain float64
forward of one example at a time: losses, training gradients, the probed matrix's gradients, SPSA's derivatives. The
worst relative error counts. A family

    passes                 all four agree, with default flags
    passes with a note     the same, and the trainer says something (what SPSA can't do here, LoRA targets to name)
    is refused             in one line that says why
    is not built           by transformers, from its default configuration or this script's small one
    fails                  a wrong value, or a traceback

The last column is what the trainer's check before training decides where rows would be packed: `packed`, or padded for
what packing raises, or because losses depart from padded ones or leak between neighbours (in units of rounding noise).
"""

from __future__ import annotations

import argparse
import copy
import os
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

import train_colm  # noqa: E402
from colm_batches import LabelledLogits, PackingCheck, check_rows, collate, micro_batch_losses  # noqa: E402
from colm_core import VProjection, VProjectionProbe  # noqa: E402
from colm_data import UserError  # noqa: E402

VOCAB = 101
TOLERANCE = 2e-3  # relative: float32 against float64 through two layers is 1e-6, one wrong row 1e-1
SIZES = [(9, 3), (5, 1), (14, 6), (7, 2)]  # (tokens, prompt) of the examples

# ------------------------------------------------------------------------------------------------- tiny configurations

SMALL = {
    VOCAB: "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    64: "ffn_dim dff dim_ff intermediate_size moe_intermediate_size decoder_ffn_dim encoder_ffn_dim d_inner mlp_dim "
    "shared_expert_intermediate_size ffn_hidden_size expert_ffn_hidden_size shared_intermediate_size feed_forward_size "
    "dense_intermediate_size intermediate_size_mlp shared_experts_intermediate_size adapter_out_dim prompt_mid_dim "
    "moe_shared_expert_intermediate_size mamba_d_ssm audio_vocab_size codebook_size n_inner max_position_embeddings "
    "n_positions n_ctx max_seq_len model_max_length max_target_positions context_length moe_latent_size",
    32: "hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim lru_width "
    "attention_hidden_size input_embedding_size output_embedding_size pronunciation_embed_dim shape_embed_dim "
    "out_hidden_size vision_output_dim projector_input_dim projector_output_dim adapter_input_size "
    "adapter_in_dim backbone_hidden_size hidden_size_global embed_dim hidden_size_per_layer "
    "ple_embed_dim dim cross_hidden_size",
    16: "kv_lora_rank q_lora_rank o_lora_rank hc_lowrank laurel_rank adapter_rank gated_norm_rank loop_gate_rank "
    "time_step_rank mamba_dt_rank router_hidden_size chunk_size mamba_chunk_size d_rel rel_extent block_multiple_of "
    "hidden_size_per_layer_input codebook_dim shape_vocab_size pronunciation_vocab_size",
    8: "sliding_window attention_chunk_size local_attention attention_window_size sliding_window_size window_size "
    "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim rotary_dim kv_channels d_head dim_head d_kv "
    "attention_head_dim attention_head_size swa_head_dim index_head_dim linear_key_head_dim linear_value_head_dim "
    "linear_head_dim mamba_d_head mamba_head_dim mamba_headdim mamba_d_state state_size ssm_state_size index_topk "
    "global_head_dim swa_v_head_dim lightning_head_dim cope_dim compressor_head_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "swa_num_attention_heads num_query_groups num_encoder_attention_heads num_decoder_attention_heads index_n_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts linear_num_key_heads linear_num_value_heads "
    "linear_num_heads mamba_n_heads mamba_num_heads n_mamba_heads attention_head_count conf_num_attention_heads "
    "zero_expert_num",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks depth "
    "num_encoder_layers num_decoder_layers num_key_value_heads kv_n_heads num_kv_heads swa_num_key_value_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts n_input_layers "
    "n_recurrent_layers n_output_layers attn_layer_period layer_group_size num_layers_per_stack "
    "conf_num_hidden_layers num_global_layers num_global_key_value_heads index_topk_blocks hc_mult o_groups",
    1: "attn_layer_offset n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups "
    "first_k_dense_replace num_dense_layers num_kv_shared_layers num_nextn_predict_layers moe_layer_start_index",
}
SMALL = {name: value for value, names in SMALL.items() for name in names.split()}
LAYERS = [name for name, value in SMALL.items() if value == 2 and "layer" in name] + ["depth", "num_blocks"]
MOST_LAYERS = 8

# what a family's own rules between its fields ask for
MAMBA = {"mamba_d_head": 16, "mamba_n_heads": 4}  # heads x width = expand x hidden size
ROPE = {"rope_type": "default", "rope_theta": 1e4}
QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64}
QWEN4 |= {"indexer_compress_ratio": 2, "ngram_vocab_size_base": 101, "split_ngram_parts": 4}
OWN: dict[str, dict] = {
    "bamba": MAMBA | {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "granitemoehybrid": MAMBA | {"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"]},
    "falcon_h1": {"mamba_d_head": 16, "mamba_n_heads": 4, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "attention_hidden_size": 64}
    | {
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
    "zamba2": {"num_hidden_layers": 4, "hybrid_layer_ids": [1, 3], "n_mamba_heads": 4, "mamba_headdim": 16}
    | {"num_key_value_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16}
    | {"layer_types": ["linear_attention", "hybrid"] * 2},
    "jamba": {"num_hidden_layers": 3},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "dory": {"num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2}
    | {"layer_types": None},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "num_key_value_heads": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "longcat_flash": {"qk_head_dim": 16},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "pad_token_id": 0},
    "xmod": {"default_language": "en_XX"},
    "xlm": {"n_layers": 2, "n_heads": 4, "emb_dim": 32, "causal": True},
    "qwen4_exp_text": QWEN4,
    "qwen4_exp": {"text_config": QWEN4},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"num_kv_shared_layers": 2, "intermediate_size": 64, "activation_sparsity_pattern": [0.5, 0.0] * 2},
    "cohere_compass_text": {"rope_parameters": {kind: ROPE for kind in ("full_attention", "sliding_attention")}},
    "dots3_note_text": {"head_dim": 16},
    "dots3_note": {"text_config": {"head_dim": 16}, "vision_config": {"adapter_out_dim": 32}}
    | {"audio_config": {"adapter_out_dim": 32}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
}


def shrunk(config: dict, own: dict) -> dict:
    """The fields of a configuration with small values; lists with an entry for each layer keep one of each kind."""
    config = dict(config)
    layers = next((config[name] for name in LAYERS if isinstance(config.get(name), int)), None)
    lists = {k: v for k, v in config.items() if isinstance(v, list) and layers and len(v) == layers > 2}
    keep = 2
    for values in lists.values():
        kinds = {repr(value) for value in values}
        first = max(min(i for i, v in enumerate(values) if repr(v) == kind) for kind in kinds)
        if first < MOST_LAYERS:
            keep = max(keep, first + 1)
    for name, value in config.items():
        if name == "per_layer_config" and value:  # by the number of the layer
            fields_of = {layer: fields for layer, fields in value.items() if int(layer) < keep}
            config[name] = {layer: shrunk(fields, {}) for layer, fields in fields_of.items()}
        elif isinstance(value, dict) and name.endswith("config"):
            config[name] = shrunk(value, own.get(name, {}))
        elif name in lists:
            config[name] = value[:keep]
        elif name in LAYERS and isinstance(value, int):
            config[name] = keep if layers == value else 2
        elif name == "num_key_value_heads" and "qk_nope_head_dim" in config:
            config[name] = SMALL["num_attention_heads"]  # latent attention has no groups
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            config[name] = min(SMALL[name], value) if value > 0 else value
        elif name.endswith(("token_id", "token_index")):
            config[name] = 0 if name == "pad_token_id" else 2
        elif "dropout" in name or name.endswith(("pdrop", "_drop", "layerdrop")):
            config[name] = 0.0 if isinstance(value, float) else value
        elif name == "is_decoder":
            config[name] = True
    return config | {k: v for k, v in own.items() if not k.endswith("config") or k not in config}


def tiny_model(family: str, **own) -> nn.Module:
    """A float32 model of the family in evaluation mode, with random weights and biases like a trained model's."""
    config_class = transformers.CONFIG_MAPPING[family]
    own = OWN.get(family, {}) | own
    config = config_class.from_dict(shrunk(config_class().to_dict(), own))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2 and "conv" not in name:
                p.normal_(std=0.7 / max(p.shape[-1], 1) ** 0.5)
            elif p.is_floating_point():
                p.add_(torch.randn_like(p), alpha=0.02)
    return model.eval()


# ------------------------------------------------------------------------------------ one example at a time, in float64


class InFloat64(TorchFunctionMode):
    """Asked for float32, gives float64: norms and softmax work in float32 whatever comes in."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widened(x):
            return torch.float64 if x is torch.float32 else x

        if func is Tensor.float:
            func = Tensor.double
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm"):
            func = grouped_product
        out = func(*map(widened, args), **{name: widened(x) for name, x in (kwargs or {}).items()})
        return out.double() if isinstance(out, Tensor) and out.dtype == torch.float32 else out


def grouped_product(x: Tensor, weights: Tensor, offs: Tensor, **_) -> Tensor:
    ends = [0, *offs.tolist()]
    parts = [x[a:b] @ w for a, b, w in zip(ends, ends[1:], weights, strict=False)]
    return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], weights.shape[-1])])


class Reference:
    """Losses and gradients of a float64 copy of a model, from full logits of single examples."""

    def __init__(self, model: nn.Module, found):
        self.model = copy.deepcopy(model).double().eval()
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        module = self.model.get_submodule(found.name)
        self.probed = module.lora_B["default"].weight if "default" in getattr(module, "lora_B", ()) else module.weight
        self.probed.requires_grad_()
        self.transposed = type(module).__name__ == "Conv1D"
        self.rows = list(found.rows)

    def loss(self, ids: Tensor, supervised: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        try:
            with InFloat64():
                logits = self.model(input_ids=ids[None], use_cache=False).logits[0]  # [T, V]
        finally:
            torch.set_default_dtype(torch.float32)
        token_losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
        return token_losses[supervised[1:]].mean()

    def probe_gradients(self, examples) -> Tensor:
        rows = []
        for example in examples:
            (g,) = torch.autograd.grad(self.loss(*example), self.probed)
            rows.append((g.T if self.transposed else g)[self.rows].flatten())
        return torch.stack(rows)  # [n, D]

    @torch.no_grad()
    def differences(self, examples, z: Tensor, eps: float) -> Tensor:
        """[L(w + eps z) - L(w - eps z)] / (2 eps) with the weight overwritten, [n, directions] (Eq. 5)."""
        original, columns = self.probed.clone(), []
        for direction in z.double():
            losses = {}
            for sign in (1, -1):
                self.probed.copy_(original)
                target = self.probed.T if self.transposed else self.probed
                target[self.rows] += sign * eps * direction
                losses[sign] = torch.stack([self.loss(*example) for example in examples])
            columns.append((losses[1] - losses[-1]) / (2 * eps))
        self.probed.copy_(original)
        return torch.stack(columns, 1)

    def training_gradients(self, examples) -> dict[str, Tensor]:
        loss = torch.stack([self.loss(*example) for example in examples]).mean()
        gradients = torch.autograd.grad(loss, [*self.trained.values()], allow_unused=True)
        return dict(zip(self.trained, gradients, strict=True))


# ------------------------------------------------------------------------------------------------------ one family


@dataclass
class Result:
    family: str
    verdict: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    found: VProjection | None = None
    packing: str = ""
    trace: str = ""

    def worst(self) -> float:
        return max(self.errors.values(), default=float("nan"))


def examples() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for tokens, prompt in SIZES:
        ids = torch.randint(5, VOCAB, (tokens,), generator=generator)
        rows.append((ids, torch.arange(tokens) >= prompt))
    return rows


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-12))


def default_adapters(model: nn.Module, result: Result) -> nn.Module:
    """The adapters of default flags; where these are refused, those of --lora_target_modules all-linear."""
    args = train_colm.build_parser().parse_args(["--model", "x", "--lora_r", "4", "--lora_alpha", "8"])
    args.lora_dropout = 0.0
    try:
        model = train_colm.add_lora(model, args)
    except UserError as refusal:
        result.notes.append(f"LoRA: {refusal}"[:160])
        args.lora_target_modules = ["all-linear"]
        model = train_colm.add_lora(model, args)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)  # as if some steps had been made: from 0 the adapters' A would get no gradient
    return model.eval()


def check(result: Result, model: nn.Module) -> None:
    """Fill `result`: every value against the reference."""
    model = default_adapters(model, result)
    probe = VProjectionProbe(model)
    result.found = probe.found
    result.notes += probe.found.cautions
    hook, rows, truth = LabelledLogits(model), examples(), Reference(model, probe.found)
    check_before_training(model, hook)
    batch = collate(rows)

    def losses(batch=batch) -> Tensor:
        return micro_batch_losses(model, hook, batch)

    with torch.no_grad():
        padded = losses()[0]
        result.errors["loss"] = error(padded, torch.stack([truth.loss(*row) for row in rows]))
    expected = truth.probe_gradients(rows)
    result.errors["exact probe"] = error(probe.gradients(losses), expected)
    z = torch.randn(2, *probe.shape, generator=torch.Generator().manual_seed(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are the cautions noted above
        derivatives = probe.spsa(losses, z, 1e-3)
    differences = truth.differences(rows, z, 1e-3)
    result.errors["SPSA"] = error(derivatives, differences)
    departs = error(differences, expected @ z.double().flatten(1).T)
    if departs > 0.05:
        result.notes.append(f"the true difference is {departs:.0%} off the derivative")
    losses()[0].mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {name: g for name, g in truth.training_gradients(rows).items() if g is not None}
    missing = expected.keys() - gradients.keys()
    if missing:
        raise RuntimeError(f"no training gradient for {sorted(missing)[0]}")
    together = [torch.cat([g[name].double().flatten() for name in expected]) for g in (gradients, expected)]
    result.errors["training"] = error(*together)
    result.packing = how_rows_share(model, hook)


class Rows(list):
    """Token ids of rows, as the trainer's check before training reads them."""

    def length(self, i: int) -> int:
        return len(self[i])

    def example(self, i: int) -> SimpleNamespace:
        return SimpleNamespace(ids=self[i])


def trainer_flags(model: nn.Module) -> tuple:
    args = train_colm.build_parser().parse_args(["--model", model.config.model_type, "--max_length", "48"])
    generator = torch.Generator().manual_seed(5)
    rows = Rows(torch.randint(5, VOCAB, (n,), generator=generator) for n in (40, 27, 25, 22, 12, 9, 7))
    return args, Accelerator(cpu=True), [rows]


def check_before_training(model: nn.Module, hook: LabelledLogits) -> None:
    """The trainer's own check: a UserError if the model can't be trained."""
    args, accelerator, data = trainer_flags(model)
    train_colm.check_model(args, accelerator, model, hook, data)


def how_rows_share(model: nn.Module, hook: LabelledLogits) -> str:
    """What the trainer's check says of packed rows: `packed`, or `padded` and why. The attention stays packed."""
    args, accelerator, data = trainer_flags(model)
    own_check = PackingCheck(
        model, hook, accelerator.autocast, args.max_tokens_per_micro_batch, args.max_length, torch.float32
    )
    found = own_check.differences(check_rows(data), packed=True)
    if found.problem:
        return f"padded ({found.problem})"
    if found.apart > train_colm.APART or found.leaks > train_colm.LEAKS:
        return f"padded (losses depart {found.apart:.0f}, leak {found.leaks:.0f} times the rounding noise)"
    return "packed"


class TooSlow(Exception):
    pass


def run_family(family: str, seconds: int, **own) -> Result:
    """The result of one family; `own` are fields of its configuration."""
    result = Result(family)

    def give_up(*_):
        raise TooSlow(f"no answer in {seconds} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        model = tiny_model(family, **own)
    except Exception as problem:
        signal.alarm(0)
        result.verdict, result.trace = "not built", traceback.format_exc()
        result.notes.append(first_line(problem))
        return result
    try:
        check(result, model)
    except (UserError, ValueError) as refusal:
        own = isinstance(refusal, UserError) or "probe_module" in str(refusal) or "name a proj" in str(refusal)
        result.verdict = "refused" if own else "fails"
        result.notes.append(first_line(refusal))
        result.trace = traceback.format_exc()
    except Exception as problem:
        result.verdict = "fails"
        result.notes.append(first_line(problem))
        result.trace = traceback.format_exc()
    else:
        wrong = [name for name, value in result.errors.items() if not value < TOLERANCE]
        result.verdict = "fails" if wrong else ("passes with a note" if result.notes else "passes")
        if wrong:
            result.notes.append("wrong: " + ", ".join(f"{name} {result.errors[name]:.1e}" for name in wrong))
    finally:
        signal.alarm(0)
    return result


def first_line(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}"[:200]


# ------------------------------------------------------------------------------------------------------------ the table


def table_row(cells: list[str], markdown: bool) -> str:
    if markdown:
        return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
    return "  ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", help="these families, with tracebacks")
    parser.add_argument("--markdown", action="store_true", help="a table for a document")
    parser.add_argument("--seconds", type=int, default=60, help="for one family")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    families = args.only or [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    results = []
    header = ["family".ljust(28), "verdict".ljust(18), "worst".ljust(7), "rows".ljust(8), "notes"]
    print(table_row(header, args.markdown))
    if args.markdown:
        print("|---|---|---|---|---|")
    for family in families:
        result = run_family(family, args.seconds)
        results.append(result)
        worst = f"{result.worst():.0e}" if result.errors else "-"
        rows, _, why = result.packing.partition(" ")
        notes = [*result.notes, *([f"padded: {why.strip('()')}"] if why else [])]
        cells = [family.ljust(28), result.verdict.ljust(18), worst.ljust(7), rows.ljust(8), "; ".join(notes)]
        print(table_row(cells, args.markdown), flush=True)
        if args.only and result.trace:
            print("".join(result.trace.splitlines(keepends=True)[-12:]))
    counts = {verdict: sum(r.verdict == verdict for r in results) for verdict in VERDICTS}
    print(
        f"\ntransformers {transformers.__version__}, torch {torch.__version__}: {len(results)} families, "
        + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    )


VERDICTS = ("passes", "passes with a note", "refused", "not built", "fails")

if __name__ == "__main__":
    main()

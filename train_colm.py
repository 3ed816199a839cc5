"""Fine-tune a causal language model with CoLM: draw a large pool, train on a coreset of it.

Nguyen et al., "Mini-batch Coresets for Memory-efficient Language Model Training on Data Mixtures", ICLR 2025,
arXiv 2407.19580v4. The mathematics is in colm_core.py; this file wires it to Accelerate.

    python train_colm.py                                             # a tiny model on a generated mixture, offline
    accelerate launch --config_file accelerate_configs/single_gpu.yaml train_colm.py \\
        --model microsoft/phi-2 --train_file MathInstruct.json --output_dir out

Implementation details worth knowing:
 1. All ranks draw the same pool from (seed, epoch) and know the whole coreset: ranks exchange scalars, features and
    indices, never examples. A resumed run needs no sampler state.
 2. Rows are sorted by length and packed into micro-batches of at most --max_tokens_per_micro_batch padded tokens. Every
    rank gets an even share of the tokens and the same number of micro-batches, or FSDP's collectives would hang.
 3. The loss is sum_i w_i L_i / sum_i w_i over the whole coreset, L_i the mean token loss of example i, whatever the
    micro-batches and the number of ranks.
 4. Pools, directions, dropout and random picks have generators of their own, each seeded by (seed, purpose, step).
"""

from __future__ import annotations

import argparse
import errno
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from colm_batches import (
    LabelledLogits,
    LossKernels,
    collate,
    mean_hidden_states,
    micro_batch_losses,
    pack,
    packed_attention,
    plan_micro_batches,
)
from colm_core import (
    AdamMoments,
    PoolGradients,
    VProjectionProbe,
    k_means,
    select_coreset,
    small_sources,
    sparse_features,
)
from colm_data import (
    Parser,
    TokenizedRows,
    UserError,
    config_flags,
    demo_rows,
    load_tokenizer,
    read_rows,
    remove,
    replacing,
    tokenize,
)

# ------------------------------------------------------------------------------------------------------------- flags

DEMO = {  # without --model: learn something visible in a minute on two CPU cores
    "pool_size": 64,
    "coreset_size": 32,
    "lora_r": 16,
    "lora_alpha": 32.0,
    "learning_rate": 1e-2,
    "max_steps": 40,
    "eval_every": 20,
    "sparsify_dims": 256,
}
FREE_ON_RESUME = {  # settings that may differ when a run goes on; every other one shapes the result
    *("config", "output_dir", "overwrite", "resume", "save_every", "keep_checkpoints", "eval_file", "eval_every"),
    *("report_to", "trust_remote_code", "train_file"),  # paths may move; the data is compared
    *("packing", "compile", "gradient_checkpointing", "max_tokens_per_micro_batch"),  # speed and memory alone
}


def build_parser() -> Parser:
    parser = Parser("train_colm.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--config", help="YAML file of flags; the command line goes first")
    add("--model", help="folder or hub id of a causal LM; without it a tiny random model")
    add("--trust_remote_code", action=flag, default=False, help="run Python code that the model's repository ships")
    add("--train_file", help=".json, .jsonl (also .gz) or a hub dataset id, as org/name or org/name:split")
    add("--eval_file", help="held-out rows in the same formats")
    add("--source_field", default="source", help="the field that names a row's source")
    add("--output_dir", default="colm_output")
    add("--overwrite", action=flag, default=False, help="delete the run that --output_dir holds")
    # the method
    add("--pool_size", type=int, default=128, help="N, examples drawn at each step")
    add("--coreset_size", type=int, default=64, help="K, examples trained on")
    add("--selection", choices=["colm", "random", "random_keep", "full"], default="colm")
    add("--keep_sources", nargs="+", default=["auto"], help="auto (below the mean size), none, or source names")
    add("--keep_share", type=float, default=1.0, help="1 keeps small sources whole, 0 at their part of the pool")
    add("--example_weights", choices=[*TOKEN_POWER], default="uniform", help="loss weight by completion tokens")
    add("--cluster_sources", type=int, default=0, help="k-means clusters of hidden states that stand in for sources")
    add("--cluster_warmup", type=int, default=20, help="steps on random coresets before the first clustering")
    add("--cluster_updates", type=int, default=4, help="clusterings after the first, evenly over the rest of the run")
    add("--probe", choices=["spsa", "grad"], default="spsa", help="zeroth-order (the paper) or exact gradients")
    add("--num_directions", type=int, default=1, help="SPSA directions; each runs the last layer and head twice")
    add("--direction", choices=["step", "run"], default="step", help="redraw the directions each step, or once")
    add("--spsa_eps", type=float, default=1e-3)
    add("--spsa_wide_tail", action=flag, default=True, help="run SPSA's perturbed tail in the next wider precision")
    add("--probe_module", help="the last V projection, where it can't be found by name")
    add("--sparsify_dims", type=int, default=2560, help="h, coordinates kept of each source's features")
    add("--similarity", choices=["l1", "l2", "cosine"], default="l1")
    add("--medoid_weights", choices=["uniform", "cluster"], default="uniform", help="cluster: by cluster size")
    # the model and its optimisation
    add("--lora_r", type=int, default=128, help="0 trains all weights")
    add("--lora_alpha", type=float, default=512.0)
    add("--lora_dropout", type=float, default=0.05)
    add("--lora_target_modules", nargs="+", help="default: the paper's for the architecture")
    add("--learning_rate", type=float, default=2e-5)
    add("--lr_scheduler", choices=["cosine", "linear", "constant"], default="cosine")  # DIFFERS 14
    add("--warmup_ratio", type=float, default=0.03)
    add("--weight_decay", type=float, default=0.0)
    add("--max_grad_norm", type=float, default=1.0)
    add("--max_steps", type=int, help="optimizer steps; goes before --num_epochs")
    add("--num_epochs", type=float, default=1.0, help="passes of the pools over the data")
    add("--max_length", type=int, default=512, help="tokens; longer prompts are shortened from the left")
    add("--max_tokens_per_micro_batch", type=int, default=4096)
    add("--packing", action=flag, help="examples end to end in one row instead of padded; default: on a GPU in bf16")
    add("--gradient_checkpointing", action=flag, default=False)
    add("--compile", action=flag, default=False, help="compile the decoder layers")
    # the run
    add("--save_every", type=int, default=100, help="steps between checkpoints, 0: none")
    add("--keep_checkpoints", type=int, default=2)
    add("--resume", help="auto (the newest checkpoint, if any) or a checkpoint folder")
    add("--eval_every", type=int, default=100, help="steps between evaluations of --eval_file")
    add("--report_to", nargs="+", choices=["tensorboard", "wandb"], default=[])
    add("--seed", type=int, default=0)
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    config = Parser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    if path := config.parse_known_args(argv)[0].config:
        argv = config_flags(path) + argv
    if parser.parse_args(argv).model is None:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    adopt_adapter(args, flags_given(argv))
    check_args(args)
    return args


def flags_given(argv: list[str]) -> set[str]:
    """Names of the flags that stand in `argv`, rather than having their default."""
    parser, absent = build_parser(), object()
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args([])), absent))
    return {name for name, value in vars(parser.parse_args(argv)).items() if value is not absent}


def check_args(args: argparse.Namespace) -> None:
    """Rules that need no data."""
    positive = ["pool_size", "coreset_size", "num_directions", "spsa_eps", "sparsify_dims", "lora_alpha"]
    positive += ["learning_rate", "max_grad_norm", "num_epochs", "max_tokens_per_micro_batch", "keep_checkpoints"]
    for name in positive + (["max_steps"] if args.max_steps is not None else []):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)} is out of range: give a positive number")
    at_least_0 = ["lora_r", "warmup_ratio", "weight_decay", "save_every", "eval_every", "lora_dropout"]
    for name in at_least_0 + ["cluster_sources", "cluster_warmup", "cluster_updates"]:
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)} is out of range: give 0 or more")
    if not 0 <= args.keep_share <= 1:
        raise UserError(f"--keep_share {args.keep_share} is out of range: give 0 to 1")
    if args.keep_share < 1 and args.selection not in ("colm", "random_keep"):
        raise UserError(f"--keep_share has no effect with --selection {args.selection}: drop one")
    for name in ("lora_dropout", "warmup_ratio"):
        if getattr(args, name) >= 1:
            raise UserError(f"--{name} {getattr(args, name)} is out of range: give less than 1")
    if args.coreset_size > args.pool_size:
        raise UserError(
            f"--coreset_size {args.coreset_size} exceeds --pool_size {args.pool_size}: "
            f"lower it to {args.pool_size} or less"
        )
    if args.cluster_sources and args.keep_sources != ["auto"]:
        raise UserError("--cluster_sources makes sources that have no names: leave --keep_sources at auto")
    if args.cluster_sources and args.selection not in ("colm", "random_keep"):
        raise UserError(f"--cluster_sources has no effect with --selection {args.selection}: drop one")
    if args.max_length < 2:
        raise UserError(f"--max_length {args.max_length} leaves no room for a completion: give 2 or more")
    for package in args.report_to:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--report_to {package} needs a package: pip install {package}")


# -------------------------------------------------------------------------------------------------------------- rows

# ------------------------------------------------------------------------------------------------- model and adapters

LORA_TARGETS = {  # where the paper (Appendix C) names them, or its q, k, v and o are one fused matrix and another
    "phi": ["q_proj", "k_proj", "v_proj", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj"],
    "gpt_neox": ["query_key_value", "dense"],
}
# Parts of a model where an adapter would never get a gradient from text, by the names that Transformers gives them:
# towers for images and sound, what joins them to the text, attention to an encoder, and what only picks positions.
NOT_TEXT = r".*(vision|visual|image|audio|speech|video|multi_?modal|cross_?att|encoder_attn|indexer|pooler).*"


def load_model(args, accelerator: Accelerator, tokenizer):
    """The causal LM with fp32 adapters over a base in the compute precision, or all of it in fp32 (--lora_r 0)."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(args.seed)
    if args.model is None:
        sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
        config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.1, **sizes)
        config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
        model = AutoModelForCausalLM.from_config(config)
        base = Path(args.output_dir).absolute() / "base"  # what the adapter will name as its base model
        if args.lora_r and accelerator.is_main_process:
            model.save_pretrained(base)
        model.name_or_path = str(base)
        return add_lora(model, args)
    base, remedy = args.model, "give a causal LM"
    if is_adapter(args.model):
        base = adapter_config(args.model).base_model_name_or_path
        remedy = "name its base model in base_model_name_or_path of its adapter_config.json"
    half = accelerator.mixed_precision == "bf16" and args.lora_r > 0
    dtype = torch.bfloat16 if half else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=args.trust_remote_code)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the hub, configs, quantisers without their package and remote code raise many kinds
        where = args.model if base == args.model else f"{args.model}: base model {base}"
        raise UserError(f"--model {where}: {one_line(error)}: {remedy}") from None
    if not args.lora_r and getattr(model, "is_quantized", False):
        raise UserError(f"--lora_r 0 would train the weights of {args.model}, which are quantised: give 1 or more")
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        say("the model's config asks for its router's auxiliary loss: it is not added to the loss of the examples")
    return add_lora(model, args)


def one_line(error: Exception) -> str:
    """An exception's kind and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def say(text: str) -> None:
    """Print on the first rank, also before there is an Accelerator."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def is_adapter(model: str | None) -> bool:
    """Is --model the folder of a PEFT adapter?"""
    return model is not None and Path(model, "adapter_config.json").is_file()


def adapter_config(folder: str):
    """The LoRA settings of an adapter's folder."""
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--model {folder}: adapter_config.json: {one_line(error)}: give a LoRA adapter") from None
    if not isinstance(config, peft.LoraConfig):
        raise UserError(f"--model {folder} is an adapter of type {config.peft_type.value}: only LoRA is trained")
    if not config.base_model_name_or_path:
        raise UserError(f"--model {folder}: adapter_config.json names no base_model_name_or_path: add it")
    return config


def adopt_adapter(args, given: set[str]) -> None:
    """Where --model is an adapter's folder, its LoRA settings are the run's; `given` flags may not contradict them."""
    if not is_adapter(args.model):
        return
    config = adapter_config(args.model)
    targets = config.target_modules or []
    if isinstance(targets, str):  # a regular expression
        targets = [targets]
    own = {
        "lora_r": config.r,
        "lora_alpha": float(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "lora_target_modules": sorted(targets),
    }
    for name, value in own.items():
        wanted = getattr(args, name)
        if name == "lora_target_modules" and wanted:
            wanted = sorted(wanted)
        if name in given and wanted != value:
            if name == "lora_target_modules":
                wanted, value = " ".join(wanted), " ".join(value)
            raise UserError(f"--{name} {wanted}, but the adapter in {args.model} has {value}: drop the flag")
        setattr(args, name, value)


def add_lora(model, args):
    """The model with --gradient_checkpointing and LoRA adapters: new ones as the flags ask, or those of --model."""
    if args.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()  # or no gradient would reach a checkpointed layer of a frozen base
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"--gradient_checkpointing: {one_line(error)}: drop the flag") from None
    if not args.lora_r:
        return model
    import peft

    torch.manual_seed(args.seed)  # the same adapters on every rank
    if is_adapter(args.model):
        model = load_adapter(model, args.model)
    else:
        targets, excluded = lora_targets(model, args.lora_target_modules)
        config = peft.LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=targets,
            exclude_modules=excluded,
            task_type="CAUSAL_LM",
        )
        try:
            model = peft.get_peft_model(model, config)
        except ValueError as error:
            raise UserError(
                f"--lora_target_modules {' '.join(targets)}: {one_line(error)}: choose from {linear_names(model)}"
            ) from None
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # autocast casts the small adapters, not the large activations
        if getattr(module, "lora_variant", None):
            raise UserError(f"--model {args.model}: DoRA and other variants of LoRA are not supported: give plain LoRA")
    return model


def load_adapter(model, folder: str):
    """The adapter in `folder` over its base, to be trained on, in fp32."""
    import peft

    try:
        model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True, torch_device="cpu")
        saved = peft.load_peft_weights(folder, device="cpu").keys()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # PEFT, torch and safetensors each raise their own kinds
        raise UserError(f"--model {folder}: {one_line(error)}: give an adapter of this base model") from None
    missing = sorted(peft.get_peft_model_state_dict(model).keys() - saved)
    if missing:  # PEFT only warns, and would train on from new weights
        raise UserError(
            f"--model {folder}: {len(missing)} of its weights are not in the file, such as {missing[0]}: "
            "give an adapter of this base model"
        )
    return model


def linear_modules(model) -> list[str]:
    """Names of the linear layers that a row of text runs and PEFT can adapt, without the output embedding."""
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        if not isinstance(module, (torch.nn.Linear, Conv1D)) or re.fullmatch(NOT_TEXT, name):
            continue
        if module is model.get_output_embeddings():
            continue
        if "Group" in type(module).__name__:  # DeepSeek-V4's product by groups, which PEFT would take for a plain one
            continue
        parent, _, leaf = name.rpartition(".")
        if leaf in ("x_proj", "dt_proj", "out_proj") and hasattr(modules[parent], "conv1d"):
            continue  # the kernels of state-space mixers read these weights themselves, past any adapter
        found.append(name)
    return found


def linear_names(model) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear_modules(model)))


def default_targets(model) -> list[str]:
    """LoRA targets where the user names none.

    The paper adapts q, k, v and o unless it names others (Appendix C); o goes by other names in some architectures.
    Where there are no such four, PEFT's own choice for the architecture; else all that projects inside attention; else
    all linear layers.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS

    kind = model.config.model_type
    if kind in LORA_TARGETS:
        return LORA_TARGETS[kind]
    linear = linear_modules(model)
    latent = any(name.endswith("kv_b_proj") for name in linear)  # such attention has no four, in some or all layers
    for name in linear:
        parent, _, leaf = name.rpartition(".")
        if leaf != "v_proj" or f"{parent}.q_proj" not in linear or f"{parent}.k_proj" not in linear or latent:
            continue
        for output in ("o_proj", "out_proj", "dense", "Wo"):
            if f"{parent}.{output}" not in linear:
                continue
            if output != "o_proj":  # other parts of a model may have an out_proj too
                output = f"{parent.rpartition('.')[2]}.{output}"
            return ["q_proj", "k_proj", "v_proj", output]
    if isinstance(PEFT_TARGETS.get(kind), list):
        return PEFT_TARGETS[kind]
    modules = dict(model.named_modules())
    attention = [name for name, module in modules.items() if re.search("Attention|MLA", type(module).__name__)]
    inside = [name for name in linear if any(name.startswith(f"{parent}.") for parent in attention)]
    return inside or linear  # whole names: PEFT stores them shortened to their ends


def lora_targets(model, wanted: list[str] | None) -> tuple[list[str], str | None]:
    """PEFT's target_modules and exclude_modules for --lora_target_modules; every name must stand for a module."""
    if wanted == ["all-linear"]:
        return linear_modules(model), None
    targets = wanted or default_targets(model)
    names = [name for name, _ in model.named_modules()]
    outside = False
    for target in targets:
        matched = [name for name in names if name == target or name.endswith("." + target)]
        text = [name for name in matched if not re.fullmatch(NOT_TEXT, name)]
        if not text:
            where = f"is only in {matched[0]}, which text never runs" if matched else "is not in the model"
            raise UserError(f"--lora_target_modules {target} {where}: choose from {linear_names(model)}")
        outside = outside or len(text) < len(matched)
    return targets, NOT_TEXT if outside else None


# ------------------------------------------------------------------------------- does the model do what training needs?


def check_fits(args, model, tokenizer, data: list[TokenizedRows]) -> None:
    """Refuse rows with more tokens than the model has positions, or with tokens that its embedding does not have."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(rows.length(i) for rows in data for i in range(len(rows)))
    if positions is not None and 0 < positions < longest:  # some models write -1 for no limit
        raise UserError(
            f"--max_length {args.max_length} exceeds the model's {positions} positions: lower it to {positions}"
        )
    known = model.get_input_embeddings().weight.shape[0]
    largest = max(int(rows.ids.max()) for rows in data)
    if largest >= known:  # a tokenizer may have more, such as an added [PAD], as long as no row uses them
        raise UserError(
            f"--model {args.model}: its embedding has {known} tokens, but the rows use token {largest}, "
            f"{tokenizer.convert_ids_to_tokens(largest)!r}: give the model its own tokenizer, or resize its embedding"
        )


class Differences(NamedTuple):
    """Mean differences of a few rows' token losses, in units of the precision's own noise; all should be small."""

    ahead: float  # padded, with other tokens at the rows' ends: what earlier tokens see of them
    apart: float = 0.0  # packed instead of padded: windows, positions, kernels
    leaks: float = 0.0  # packed, with another neighbour before them: state and attention that pass a row's end
    problem: str = ""  # what packing raised


# Where a difference counts. Over 180 families of transformers 5.24, tiny and random, on a CPU: sound ones have 0.0, 0.2
# and 0.0 at most. Of the others, `ahead` is 4 and more, and `apart` or `leaks` 60 and more in float32. In bf16 much of
# a fault hides in the rounding (`apart` 0.2 and more): `leaks`, which compares equal shapes, then still shows 0.06.
# On a GPU packed rows run another kernel than padded ones, so that `apart` is about 1 for sound models.
AHEAD, APART, LEAKS = 3.0, 3.0, 0.05


def check_model(args, accelerator: Accelerator, model, labelled_logits: LabelledLogits, data) -> bool:
    """Run a few rows before training; returns whether examples can share packed rows.

    A model that can't be packed is padded instead, or refused with an explicit --packing; one that looks ahead is
    refused, and so is one that can't run the rows. `model` is the prepared one, DDP's inner. Every rank runs the same
    rows, and the first one's figures decide for all.
    """
    packed = packs_by_default(accelerator, model) if args.packing is None else args.packing
    configs = attention_configs(model)
    model.eval()
    found = measure(args, accelerator, model, labelled_logits, check_rows(data), packed)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # without a backward pass the outermost weights stay whole: no checkpoint could be loaded
    figures = torch.tensor(found[:3], device=accelerator.device)
    ahead, apart, leaks = broadcast(figures).tolist() if accelerator.num_processes > 1 else figures.tolist()
    if not ahead <= AHEAD:
        raise UserError(
            f"--model {args.model} is not causal: later tokens change earlier losses ({ahead:.3g} times the rounding "
            "noise): give a causal LM (encoders such as BERT need is_decoder: true in config.json)"
        )
    if packed and not (apart <= APART and leaks <= LEAKS):
        figures = f"losses change by {max(apart, leaks):.2g} times the rounding noise"
        problem = f"{args.model} can't keep packed examples apart ({found.problem or figures})"
        if args.packing:
            raise UserError(f"--packing: {problem}: use --no-packing")
        accelerator.print(f"padding, not packing: {problem}")
        for config, implementation in configs:
            config._attn_implementation_internal = implementation
        packed = False
    return packed


def packs_by_default(accelerator: Accelerator, model) -> bool:
    """On a GPU in half precision, where the variable-length kernel is; elsewhere padding is as fast."""
    half = accelerator.mixed_precision == "bf16"
    return accelerator.device.type == "cuda" and half and getattr(model, "_supports_flash_attn", False)


def check_rows(data: list[TokenizedRows]) -> list[Tensor]:
    """Token ids of seven rows: the longest, where windows and positions show, three of middle length, the shortest."""
    places = [(rows.length(i), part, i) for part, rows in enumerate(data) for i in range(len(rows))]
    places.sort()
    middle = max(0, len(places) // 2 - 1)
    chosen = [places[-1], *places[middle : middle + 3], *places[:3]]
    chosen = (chosen * 7)[:7]  # where there are fewer rows
    return [data[part].example(i).ids.long() for _, part, i in chosen]


def measure(args, accelerator, model, labelled_logits, rows: list[Tensor], packed: bool) -> Differences:
    """How much the losses of `rows` depend on what they must not depend on: four forwards of a few rows, or seven."""
    import transformers

    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32

    def losses(rows: list[Tensor], packed: bool = False, together: bool = False) -> list[Tensor]:
        return token_losses(args, accelerator, model, labelled_logits, rows, packed, together)

    other_ends, early = [], []  # rows whose last quarter is another, and how many watched losses come before that
    for ids in rows:
        kept = max(2, len(ids) * 3 // 4)
        other_ends.append(torch.cat([ids[:kept], ids[: len(ids) - kept]]))
        early.append(int(watched(len(ids))[:kept].sum()))
    try:
        with running_adapters(model) as ran:
            padded = losses(rows)
        changed = losses(other_ends)
        rounded = []
        for number in range(2):
            with rounding_errors(model, dtype, args.seed, number):
                rounded.append(losses(rows))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model of any architecture may raise
        raise UserError(
            f"--model {args.model} can't run a row of {len(rows[0])} tokens ({one_line(error)}): "
            "install what it asks for, or give another causal LM"
        ) from None
    if ran and not any(ran.values()):
        raise UserError(f"--lora_target_modules: no adapter runs on text, such as {next(iter(ran))}: name others")
    if not torch.cat(padded).isfinite().all():
        raise UserError(f"--model {args.model} gives losses that are not finite before training: give other weights")

    def in_noise(a: list[Tensor], b: list[Tensor], part: slice) -> float:
        """Mean difference of some rows' losses, by that of the losses that were rounded otherwise."""
        reference = padded[part]
        noise = sum(mean_difference(reference, other[part]) for other in rounded) / len(rounded)
        floor = torch.finfo(torch.float32).eps * float(torch.cat(reference).mean())  # losses are float32
        return mean_difference(a[part], b[part]) / max(noise, floor, 1e-30)

    every, longest, others = slice(None), slice(1), slice(1, None)
    before_the_ends = [values[:n] for values, n in zip(padded, early, strict=True)]
    ahead = in_noise(before_the_ends, [values[:n] for values, n in zip(changed, early, strict=True)], every)
    if not packed:
        return Differences(ahead)
    room = max(2, args.max_tokens_per_micro_batch // len(rows))
    short = [ids[:room] for ids in rows]
    swapped = len(short) // 2
    neighbour = [*short]
    neighbour[swapped] = short[swapped].flip(0)
    try:
        transformers.AttentionInterface.register("packed", packed_attention)
        accelerator.unwrap_model(model).set_attn_implementation("packed")
        alone = losses(rows, packed=True)
        first, second = (losses(x, packed=True, together=True) for x in (short, neighbour))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        labelled_logits.announced = None  # the output embedding may not have been reached
        return Differences(ahead, math.inf, math.inf, one_line(error))
    apart = max(in_noise(padded, alone, longest), in_noise(padded, alone, others))
    # What a change does to the rows before it is numerical: experts that are handed other numbers of tokens.
    before, after = slice(swapped), slice(swapped + 1, None)
    coupling = in_noise(first, second, before)
    leaks = in_noise(first, second, after)
    return Differences(ahead, apart, 0.0 if leaks <= 3 * coupling else leaks)


FIRST, LAST = 32, 96  # tokens of a row whose losses are compared: leaks show at its beginning, windows at its end


def watched(tokens: int) -> Tensor:
    """Which tokens of a row have a loss in the check, [tokens] bool."""
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[1 : 1 + FIRST] = True
    mask[max(1, tokens - LAST) :] = True
    return mask


@torch.no_grad()
def token_losses(args, accelerator, model, labelled_logits, rows, packed: bool, together: bool) -> list[Tensor]:
    """Losses of the watched tokens of each row, [watched] float32 on the host for each.

    The rows are padded, packed, or packed `together` into one row in their order.
    """
    plan = [list(range(len(rows)))]
    if not together:
        lengths = [len(ids) for ids in rows]
        plan = plan_micro_batches(lengths, args.max_tokens_per_micro_batch, 1, packed)[0]
    losses: list[Tensor] = [torch.zeros(0)] * len(rows)
    for items in plan:
        examples = [(rows[i], watched(len(rows[i]))) for i in items]
        batch = pack(examples, args.max_length) if packed else collate(examples)
        owner = batch.owner
        # every token is made an example of its own: a mean over a row would hide a leak at its beginning
        batch = batch._replace(owner=torch.arange(len(owner)), counts=torch.ones_like(owner))
        with accelerator.autocast():
            values = micro_batch_losses(model, labelled_logits, batch.to(accelerator.device))[0].float().cpu()
        for place, i in enumerate(items):
            losses[i] = values[owner == place]
    return losses


def mean_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return float((torch.cat(a) - torch.cat(b)).abs().mean())


@contextmanager
def rounding_errors(model, dtype: torch.dtype, *seed: int):
    """Embeddings off by one rounding error of `dtype` each, in a random direction: all later roundings fall anew.

    Two batches of the same rows would not do: a GPU often gives them the same bits.
    """

    def shift(module, args, output):
        generator = generator_of(*seed, "rounding", device=output.device)
        up = torch.randint(0, 2, output.shape, generator=generator, device=output.device)
        return output * (1 + (2 * up - 1) * torch.finfo(dtype).eps / 2).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(shift)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def running_adapters(model):
    """Counts, by module name, how often each LoRA module runs."""
    ran, handles = {}, []
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        ran[name] = 0

        def count(module, args, output, name=name):
            ran[name] += 1

        handles.append(module.register_forward_hook(count))
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def attention_configs(model) -> list[tuple]:
    """The configs of a model and its parts, each with the name of its attention function."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation_internal")]


# --------------------------------------------------------------------------------------------------------------- plans


def seed_of(*parts) -> int:
    """A seed for one purpose at one step: no generator needs saving, and none disturbs another.   # DIFFERS 13"""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def generator_of(*parts, device="cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed_of(*parts))


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(rows, generator=generator_of(seed, "pool", epoch))


def draw_pool(rows: int, size: int, seed: int, step: int) -> Tensor:
    """The large mini-batch M_t^L: rows [N] of step `step`, without replacement within an epoch of rows // N pools."""
    epoch, position = divmod(step, rows // size)
    order = epoch_order(rows, seed, epoch)
    return order[position * size : (position + 1) * size]


# ------------------------------------------------------------------------------------------ a run, and its collectives


@dataclass
class Run:
    args: argparse.Namespace
    accelerator: Accelerator
    tokenizer: object
    train: TokenizedRows
    evaluation: TokenizedRows | None
    keep: set[int]  # ids of the small sources: kept whole, or by --keep_share
    model: torch.nn.Module  # as prepared: what training calls
    optimizer: torch.optim.Optimizer
    scheduler: object
    probe: VProjectionProbe
    labelled_logits: LabelledLogits
    moments: AdamMoments
    trained: list[torch.nn.Parameter]
    modules: list[torch.nn.Module]
    settings: dict = field(default_factory=dict)  # what a run that goes on must have in common with this one
    comm_bytes: int = 0  # what this rank handed to the collectives below; the wrappers' own gradients are not in it
    saved: Path | None = None  # the newest checkpoint
    stop: bool = False  # SIGTERM came

    @property
    def inner(self) -> torch.nn.Module:
        """What probing and evaluation call: DDP's own forward would arm its reducer; FSDP2's gathers the weights."""
        return self.model.module if isinstance(self.model, torch.nn.parallel.DistributedDataParallel) else self.model

    def micro_batches(self, data: TokenizedRows, rows: list[int], max_tokens: int):
        """This rank's micro-batches: (item numbers into `rows`, batch on the device, is it the last?).

        No items mark a stand-in. Each is collated while the device works on the one before.
        """
        lengths = [data.length(row) for row in rows]
        shortest = lengths.index(min(lengths))
        plan = plan_micro_batches(lengths, max_tokens, self.ranks, self.args.packing)[self.accelerator.process_index]
        for i, items in enumerate(plan):
            examples = [data.example(rows[i]) for i in items or [shortest]]
            batch = pack(examples, self.args.max_length) if self.args.packing else collate(examples)
            batch = batch.pin() if self.device.type == "cuda" else batch
            yield items, batch.to(self.device), i + 1 == len(plan)

    def mode(self, training: bool) -> None:
        """Switch dropout on or off: what `model.train(training)` does, less its walk that costs milliseconds."""
        for module in self.modules:
            vars(module)["training"] = training

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    # the collectives: only main's wait for all ranks stands elsewhere

    @property
    def ranks(self) -> int:
        return self.accelerator.num_processes

    def add_up(self, tensor: Tensor) -> Tensor:
        self.comm_bytes += tensor.nbytes if self.ranks > 1 else 0
        return self.accelerator.reduce(tensor, "sum") if self.ranks > 1 else tensor

    def from_main(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor on every rank."""
        self.comm_bytes += tensor.nbytes if self.ranks > 1 else 0
        return broadcast(tensor.to(self.device)).cpu() if self.ranks > 1 else tensor

    def clip(self) -> Tensor:
        """Clip the gradients to --max_grad_norm; returns the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.args.max_grad_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def state(self) -> dict:
        """Trained weights and optimizer state, whole and on the host, on every rank."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        model = get_model_state_dict(self.model, options=options)
        return {"model": model, "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=options)}


# ------------------------------------------------------------------------------- one step: pool, probe, select, train


@dataclass
class Choice:
    """The coreset of one step, as positions in the pool."""

    index: Tensor  # [K]
    weight: Tensor  # [K] of the examples' losses
    kept: Tensor  # positions of the small sources' rows
    probe_tokens: int = 0
    skipped_probes: int = 0
    history: tuple = ()  # sum of g, sum of g^2, count of the selected big-source examples


TOKEN_POWER = {"uniform": 0.0, "sqrt": 0.5, "tokens": 1.0}  # --example_weights: a loss weighs its tokens to this power


def choose_coreset(run: Run, pool: Tensor, step: int, clock: Clock) -> Choice:
    """The coreset of one pool by --selection, and the weights of its losses."""
    places = candidates(run, pool, step)  # [n <= N]
    choice = pick_coreset(run, pool[places], step, clock)
    weight = choice.weight.float() if run.args.medoid_weights == "cluster" else torch.ones(len(choice.index))
    index = places[choice.index]
    return replace(choice, index=index, weight=weight * token_weights(run, pool[index]), kept=places[choice.kept])


def token_weights(run: Run, rows: Tensor) -> Tensor:
    """Weights of the losses of dataset `rows` by --example_weights, [n]."""
    return run.train.supervised_tokens(rows) ** TOKEN_POWER[run.args.example_weights]


def candidates(run: Run, pool: Tensor, step: int) -> Tensor:
    """Positions in the pool that a coreset may take, [n]: all, unless --keep_share thins the small sources at random.

    A share s leaves ceil(n_s (s + (1 - s) K / N)) of their n_s examples.
    """
    args, n = run.args, len(pool)
    if args.keep_share == 1:
        return torch.arange(n)
    share = args.keep_share + (1 - args.keep_share) * min(args.coreset_size, n) / n
    small = torch.isin(run.train.sources[pool], torch.tensor(sorted(run.keep), dtype=torch.long)).nonzero()[:, 0]
    shuffled = small[torch.randperm(len(small), generator=generator_of(args.seed, "thin", step))]
    may = torch.ones(n, dtype=torch.bool)
    may[shuffled[math.ceil(share * len(small)) :]] = False
    return may.nonzero()[:, 0]


def pick_coreset(run: Run, pool: Tensor, step: int, clock: Clock) -> Choice:
    """Kept examples, then medoids of the others or a random part of them (Algorithm 1)."""
    args, sources = run.args, run.train.sources[pool]
    k = min(args.coreset_size, len(pool))
    generator = generator_of(args.seed, "pick", step)
    is_kept = torch.isin(sources, torch.tensor(sorted(run.keep), dtype=sources.dtype))
    selection = "random" if args.cluster_sources and step < args.cluster_warmup else args.selection
    if args.selection == "full":
        return Choice(torch.arange(len(pool)), torch.ones(len(pool)), is_kept.nonzero()[:, 0])
    if selection == "random":
        is_kept = torch.zeros_like(is_kept)
    kept = is_kept.nonzero()[:, 0]
    if selection != "colm" or len(kept) >= k:
        shuffled = torch.randperm(len(pool), generator=generator)
        shuffled = shuffled[is_kept[shuffled].sort(descending=True, stable=True).indices]  # kept ones first
        return Choice(shuffled[:k], torch.ones(k), kept)

    probed = (~is_kept).nonzero()[:, 0]  # DIFFERS 11: kept examples need no probe
    tokens = sum(run.train.length(row) for row in pool[probed].tolist())
    gradients, mine = probe_pool(run, pool[probed], step)
    clock.mark("probe")
    # SPSA: every rank holds all derivatives and does the rest alone. Exact gradients: each rank holds its own rows.
    add_up = run.add_up if args.probe == "grad" else lambda tensor: tensor
    present, local = sources[probed].unique(return_inverse=True)
    device = run.device
    own = sparse_features(gradients, local[mine], len(present), run.moments, args.sparsify_dims, device, add_up)
    features = own.new_zeros(len(pool), own.shape[1])
    features[probed[mine].to(device, non_blocking=True)] = own
    features = add_up(features)
    skipped = (~features.isfinite().all(1)).sum()  # read when the selection has waited for the device
    coreset = select_coreset(features, sources, k, run.keep, args.sparsify_dims, args.similarity)
    if not len(coreset.index):  # nothing kept, no probe finite: the loss will tell whether training can go on
        return Choice(torch.randperm(len(pool), generator=generator)[:k], torch.ones(k), kept, skipped_probes=len(pool))
    index, weight = run.from_main(torch.stack(coreset))  # [K], [K]
    chosen = torch.isin(probed, index)  # [n] the medoids among the probed
    skipped = int(skipped)
    history = (*map(add_up, gradients.sums(chosen[mine], device)), int(chosen.sum()))
    return Choice(index, weight, kept, tokens, skipped, history)


def clustering_steps(args) -> set[int]:
    """Steps that begin with a clustering: after the warm-up, then evenly over the rest of the run (5.4)."""
    rest = max(0, args.max_steps - args.cluster_warmup)
    return {args.cluster_warmup + rest * i // (args.cluster_updates + 1) for i in range(args.cluster_updates + 1)}


def cluster_rows(run: Run, step: int) -> None:
    """Sources from k-means over the training rows' mean hidden states; clusters below the mean size are kept whole."""
    run.mode(training=False)
    features, mine = [], []
    batches = run.micro_batches(run.train, list(range(len(run.train))), probe_budget(run.args))
    for items, batch, _ in tqdm(batches, "clustering", disable=not run.accelerator.is_main_process, leave=False):
        with run.accelerator.autocast():
            features.append(mean_hidden_states(run.inner, batch)[: len(items)])
        mine += items
    generator = generator_of(run.args.seed, "clusters", step)
    mine = torch.tensor(mine, device=run.device)
    clusters = k_means(torch.cat(features), mine, len(run.train), run.args.cluster_sources, generator, run.add_up)
    use_clusters(run, clusters.cpu())


def use_clusters(run: Run, clusters: Tensor) -> None:
    run.train.sources, run.train.names = clusters, [f"cluster {c}" for c in range(run.args.cluster_sources)]
    sizes = torch.bincount(clusters, minlength=run.args.cluster_sources).tolist()
    run.keep = small_sources({c: size for c, size in enumerate(sizes) if size})


def probe_budget(args) -> int:
    """Tokens of a micro-batch without backward: twice as many, unless memory is short."""
    return args.max_tokens_per_micro_batch * (1 if args.gradient_checkpointing else 2)


def probe_pool(run: Run, rows: Tensor, step: int) -> tuple[PoolGradients, Tensor]:
    """Zeroth-order or exact gradients of the last V projection for dataset `rows`; which of them this rank holds."""
    args, probe, device = run.args, run.probe, run.device
    run.mode(training=False)
    gradients, mine, derivatives = PoolGradients(probe.dims), [], None
    budget = probe_budget(args)
    if args.probe == "spsa":
        gradients.z = directions(args, probe, step, device)
        gradients.derivatives = derivatives = torch.zeros(len(rows), args.num_directions, device=device)
        budget = max(1, budget // args.num_directions)  # the head sees 2 copies of a row for each direction
    for items, batch, _ in run.micro_batches(run.train, rows.tolist(), budget):

        def losses(batch=batch):
            with run.accelerator.autocast():
                return micro_batch_losses(run.inner, run.labelled_logits, batch)

        if args.probe == "spsa":
            values = probe.spsa(losses, gradients.z, args.spsa_eps, args.spsa_wide_tail)  # [B, directions]
            derivatives[torch.tensor(items).long().to(device, non_blocking=True)] = values[: len(items)].float()
        else:
            values = probe.gradients(losses, batch.per_example)  # [B, D]
            gradients.add(values[: len(items)])
        mine += items
    if args.probe == "spsa":
        gradients.derivatives = run.add_up(derivatives)
        mine = range(len(rows))
    return gradients, torch.tensor(mine, dtype=torch.long)


def directions(args, probe: VProjectionProbe, step: int, device) -> Tensor:
    """z ~ N(0, I), [directions, d_v, r], the same on every rank (Eq. 5); new at each step.   # DIFFERS 9"""
    generator = generator_of(args.seed, "direction", step if args.direction == "step" else "run", device=device)
    return torch.randn(args.num_directions, *probe.shape, generator=generator, device=device)


def train_on(run: Run, rows: Tensor, weights: Tensor, step: int) -> Tensor:
    """Gradient of the coreset loss sum_i w_i L_i / sum_i w_i into .grad; returns the loss."""
    torch.manual_seed(seed_of(run.args.seed, "dropout", step, run.accelerator.process_index))
    share = (weights.double() / weights.double().sum()).float()  # [K], sums to 1
    run.mode(training=True)
    total = torch.zeros((), device=run.device)
    for items, batch, last in run.micro_batches(run.train, rows.tolist(), run.args.max_tokens_per_micro_batch):
        with nullcontext() if last else run.accelerator.no_sync(run.model):
            with run.accelerator.autocast():
                losses = micro_batch_losses(run.model, run.labelled_logits, batch)[0]  # [B]
            loss = (losses * share[items].to(run.device, non_blocking=True)).sum() if items else losses.sum() * 0
            (loss * run.ranks).backward()  # DDP and FSDP take the mean over ranks
        total += loss.detach()
    return run.add_up(total)


def update(run: Run, choice: Choice, loss: Tensor) -> float | None:
    """Clip, step the optimizer and the probe's history; returns the norm, None where it or the loss is not finite."""
    norm = run.clip()
    broken = (~torch.stack([loss, norm]).isfinite().all()).float()
    run.optimizer.found_inf = broken  # if 1, fused AdamW changes neither weights nor moments
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    moments = copy(run.moments)
    if choice.history:
        moments.update_from_sums(*choice.history)
    broken, norm = torch.stack([broken, norm]).tolist()  # the first wait for the device since the selection
    if broken:
        return None
    run.moments = moments
    return norm


@torch.no_grad()
def evaluate(run: Run) -> dict:
    """Held-out loss: mean over examples, mean over sources, per token, and per source."""
    data, device = run.evaluation, run.device
    sums = torch.zeros(len(data.names), 4, dtype=torch.float64, device=device)  # loss, examples, token loss, tokens
    run.mode(training=False)
    for items, batch, _ in run.micro_batches(data, list(range(len(data))), run.args.max_tokens_per_micro_batch):
        with run.accelerator.autocast():
            losses = micro_batch_losses(run.inner, run.labelled_logits, batch)[0].double()
        values = torch.stack([losses, torch.ones_like(losses), losses * batch.counts, batch.counts.double()], 1)
        sums.index_add_(0, data.sources[items].to(device), values[: len(items)])
    sums = run.add_up(sums).cpu()
    seen = (sums[:, 1] > 0).nonzero()[:, 0].tolist()
    per_source = {data.names[q]: (sums[q, 0] / sums[q, 1]).item() for q in seen}
    loss, examples, token_loss, tokens = sums.sum(0).tolist()
    return {
        "eval_loss": loss / examples,
        "eval_loss_source_mean": sum(per_source.values()) / len(per_source),
        "eval_loss_per_token": token_loss / tokens,
        "eval_loss_of": per_source,
    }


# ------------------------------------------------------------------------------------------------- clocks and records


class Clock:
    """Seconds and peak memory of the phases of a step, read once at its end so that the device never waits."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple] = []
        self.mark("start")

    def mark(self, name: str) -> None:
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
            peak = torch.cuda.memory.memory_stats_as_nested_dict()["allocated_bytes"]["all"]["peak"]
            torch.cuda.reset_peak_memory_stats()
        else:
            now, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.marks.append((name, now, peak / 1e9))

    def read(self) -> dict:
        """{phase}_s and {phase}_gb since the mark before, step_s and peak_gb over all."""
        if self.cuda:
            torch.cuda.synchronize()

        def seconds(a, b):
            return a.elapsed_time(b) / 1e3 if self.cuda else b - a

        record = {f"{name}_{unit}": 0.0 for name in ("probe", "select", "train") for unit in ("s", "gb")}
        for (_, before, _), (name, now, peak) in itertools.pairwise(self.marks):
            record |= {f"{name}_s": seconds(before, now), f"{name}_gb": peak}
        record["step_s"] = seconds(self.marks[0][1], self.marks[-1][1])
        record["peak_gb"] = max(peak for _, _, peak in self.marks[1:])
        return {key: round(value, 6) for key, value in record.items()}


def append(path: Path, record: dict) -> None:
    try:
        with open(path, "a") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror}): free space in {path.parent}, then go on from the last "
            "checkpoint with --resume auto"
        ) from None


def read_records(path: Path, last_step: float = math.inf) -> list[dict]:
    """Records up to `last_step`; a line that a kill cut short ends them."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= last_step:
            records.append(record)
    return records


def rewind(folder: Path, step: int) -> None:
    """Drop the records that a resumed run will write again."""
    for name in ("metrics.jsonl", "selection.jsonl", "eval.jsonl"):
        records = read_records(folder / name, step)
        with replacing(folder / name) as aside:
            aside.write_text("".join(json.dumps(record) + "\n" for record in records))


# -------------------------------------------------------------------------------------------------------- checkpoints


def checkpoints(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("checkpoint-*") if p.name[11:].isdecimal()), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def save_checkpoint(run: Run, step: int) -> Path:
    """State after `step` optimizer steps. Every rank takes part in gathering it; rank 0 writes."""
    if run.saved and step_of(run.saved) == step:  # resumed from it, or saved a moment ago
        return run.saved
    state = run.state() | {"scheduler": run.scheduler.state_dict(), "moments": run.moments.state_dict(), "step": step}
    state["clusters"] = run.train.sources if run.args.cluster_sources and step > run.args.cluster_warmup else None
    path = Path(run.args.output_dir) / f"checkpoint-{step:06d}"

    def write():
        with replacing(path) as aside:
            remove(aside)
            aside.mkdir()
            (aside / "settings.json").write_text(json.dumps(run.settings, indent=1))
            torch.save(state, aside / "state.pt")
        for old in checkpoints(path.parent)[: -run.args.keep_checkpoints]:
            shutil.rmtree(old)

    on_main(run, write, f"checkpoint of step {step}")
    run.saved = path
    return path


def on_main(run: Run, write, what: str) -> None:
    """Rank 0 writes; all ranks learn whether it could."""
    problem = None
    if run.accelerator.is_main_process:
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has many names
            problem = error
    if run.add_up(torch.tensor(float(problem is not None), device=run.device)):
        raise UserError(
            f"the {what} could not be written ({' '.join(str(problem).split())[:160]}): free space in "
            f"{run.args.output_dir}, then go on from the last checkpoint with --resume auto"
        )


def check_agreement(run: Run, start: int) -> None:
    """Ranks never exchange rows, so all must see the same data, flags and checkpoint."""
    mine = torch.tensor([start, seed_of(run.settings)])
    if run.add_up((run.from_main(mine) != mine).any().float().to(run.device)):
        raise UserError("the hosts differ in data, flags or checkpoint: give all the same, and a shared --output_dir")


def settings_of(args, train: TokenizedRows) -> dict:
    settings = {k: v for k, v in vars(args).items() if k not in FREE_ON_RESUME}
    return settings | {"model": model_fingerprint(args), "training data": train.fingerprint()}


def model_fingerprint(args) -> str:
    """Equal for the same weights in the same precision, wherever they lie.

    Cheap: of every tensor its name, shape and a few bytes count, of files in other formats a few bytes all over. A hub
    id stands for its commit. An adapter counts beside its base.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # what accelerate launch hands over
    if args.model is None:
        return f"the demo's, mixed_precision {precision}"
    from transformers import AutoConfig

    base, adapter = args.model, ""
    if is_adapter(args.model):
        base, adapter = adapter_config(args.model).base_model_name_or_path, f" adapter {weights_digest(args.model)}"
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # the hub, configs and remote code each raise their own kinds
        raise UserError(f"--model {args.model}: {one_line(error)}: give a causal LM") from None
    shape = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version", "dtype")}
    shape = hashlib.sha256(repr(sorted(shape.items())).encode()).hexdigest()[:16]
    weights = weights_digest(base) if Path(base).is_dir() else f"commit {getattr(config, '_commit_hash', None)}"
    return f"{config.model_type} {shape} weights {weights}{adapter}, mixed_precision {precision}"


def weights_digest(folder: str) -> str:
    """A hash of sizes and some bytes of all weights in a folder; how they are split over files does not matter."""
    parts = []
    for path in sorted(Path(folder).iterdir()):
        if path.suffix == ".safetensors":
            parts += tensor_samples(path)
        elif path.suffix in (".bin", ".pt", ".pth"):
            size = path.stat().st_size
            with open(path, "rb") as f:
                parts.append((path.name, size, samples(f, 0, size, 256)))
    return hashlib.sha256(repr(sorted(parts)).encode()).hexdigest()[:16]


def tensor_samples(path: Path) -> list[tuple]:
    """(name, type, shape, some bytes) of every tensor of a safetensors file.

    The format: the header's length in 8 bytes, the header as JSON, then the data at offsets that the header tells.
    """
    with open(path, "rb") as f:
        try:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
            entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
            parts = []
            for name, entry in entries:
                start, end = entry["data_offsets"]
                content = samples(f, 8 + length + start, end - start, 4)
                parts.append((name, entry["dtype"], entry["shape"], content))
        except (ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise UserError(f"{path} is no safetensors file ({type(error).__name__}): copy it again") from None
    return parts


def samples(file, start: int, size: int, pieces: int, piece: int = 1024) -> bytes:
    """Up to `pieces` pieces of a file, evenly over `size` bytes from `start`, its last ones included."""
    content = b""
    for i in range(pieces):
        file.seek(start + max(0, size - piece) * i // max(1, pieces - 1))
        content += file.read(min(piece, size))
    return content


def find_checkpoint(args, folder: Path) -> Path | None:
    """The checkpoint to resume from, after checking that the output folder may be used."""
    if args.resume not in (None, "auto"):
        path = Path(args.resume)
        if not (path / "state.pt").exists() or not (path / "settings.json").exists():
            raise UserError(f"--resume {path} is no checkpoint: give auto or a folder named checkpoint-...")
        own = path.resolve().parent == folder.resolve()
        if args.overwrite or (not own and (checkpoints(folder) or (folder / "metrics.jsonl").exists())):
            raise UserError(f"--resume {path} would delete what --output_dir {folder} holds: choose another folder")
        return path
    if args.resume and args.overwrite:
        raise UserError("--resume auto and --overwrite exclude each other: drop one")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--output_dir {folder}: {existing} is a file: choose another folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"--output_dir {folder}: {existing} is not writable: choose another folder")
    found = checkpoints(folder)
    if args.resume is None and not args.overwrite and (found or (folder / "metrics.jsonl").exists()):
        raise UserError(f"--output_dir {folder} holds another run: add --resume auto or --overwrite, or choose another")
    return found[-1] if found and args.resume == "auto" else None


def check_settings(settings: dict, checkpoint: Path) -> None:
    try:
        saved = json.loads((checkpoint / "settings.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{checkpoint}/settings.json can't be read: resume from another checkpoint") from None
    for name, value in settings.items():
        if saved.get(name) != value:
            name = name if " " in name else f"--{name}"
            raise UserError(
                f"{name} is {value}, but {checkpoint} was made with {saved.get(name.removeprefix('--'))}: "
                "use the same, or start another --output_dir"
            )


def load_checkpoint(run: Run, path: Path) -> int:
    """Restore everything; returns the number of steps done."""
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # a cut or foreign file fails in many ways
        raise UserError(f"{path}/state.pt can't be read ({type(error).__name__}): use another checkpoint") from None
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(run.model, state["model"], options=options)
    if state["optimizer"]["state"]:  # else setting it would make a step: no update had been made
        set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"], options=options)
    run.scheduler.load_state_dict(state["scheduler"])
    moments = {k: v.to(run.device) if isinstance(v, Tensor) else v for k, v in state["moments"].items()}
    run.moments.load_state_dict(moments)
    if state["clusters"] is not None:
        use_clusters(run, state["clusters"])
    run.saved = path
    return state["step"]


def save_final(run: Run) -> Path:
    """A PEFT adapter, or the whole model, with its tokenizer."""
    weights = run.state()["model"]
    model = run.accelerator.unwrap_model(run.model)
    folder = Path(run.args.output_dir)

    def write():
        with replacing(folder / "final") as aside:
            remove(aside)
            model.save_pretrained(aside, state_dict=weights)
            run.tokenizer.save_pretrained(aside)

    on_main(run, write, "final model")
    return folder / "final"


# ------------------------------------------------------------------------------------------------------------- set-up


def load_data(args, tokenizer, show: bool) -> tuple[TokenizedRows, TokenizedRows | None, set[int]]:
    """Training rows, held-out rows and the ids of the sources that are kept whole."""
    rows, places = read_rows(args.train_file) if args.train_file else (demo_rows("train", 10), None)
    train = tokenize(rows, places or [f"demo row {i + 1}" for i in range(len(rows))], tokenizer, args, [], show)
    if len(train) < args.pool_size:
        raise UserError(
            f"--pool_size {args.pool_size} exceeds the {len(train)} usable rows ({train.dropped} do not fit in "
            f"--max_length {args.max_length}): lower it to {len(train)} or less"
        )
    counts = dict(enumerate(torch.bincount(train.sources).tolist()))
    if args.cluster_sources > len(train):
        raise UserError(f"--cluster_sources {args.cluster_sources} exceeds the {len(train)} usable rows: lower it")
    keep = set()
    if args.keep_sources == ["auto"] and not args.cluster_sources:
        if train.names == ["all"] and args.selection in ("colm", "random_keep"):
            raise UserError(
                f"no row has a field {args.source_field!r}, which --keep_sources auto needs: name the field with "
                "--source_field, cluster the rows with --cluster_sources, or treat them alike with --keep_sources none"
            )
        keep = small_sources(counts)
    elif args.keep_sources not in (["auto"], ["none"]):
        for name in args.keep_sources:
            if name not in train.names:
                raise UserError(f"--keep_sources {name} is no source: choose auto, none or of {', '.join(train.names)}")
        keep = {train.names.index(name) for name in args.keep_sources}
    held_out = None
    if args.eval_file or not args.train_file:
        rows, places = read_rows(args.eval_file) if args.eval_file else (demo_rows("eval"), None)
        places = places or [f"demo row {i + 1}" for i in range(len(rows))]
        held_out = tokenize(rows, places, tokenizer, args, train.names, show)
    return train, held_out, keep


def make_accelerator(args) -> Accelerator:
    accelerator = Accelerator(log_with=args.report_to or None, project_dir=args.output_dir)
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"mixed_precision {accelerator.mixed_precision} is not supported: use bf16 or no")
    backend = accelerator.state.dynamo_plugin.backend.value
    if backend != "NO":
        raise UserError(
            f"dynamo_backend {backend} compiles the model past the probe's hooks: set it to no, and use --compile"
        )
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, 50 ms a time; flash attention does not
    torch.backends.cuda.matmul.allow_tf32 = accelerator.mixed_precision == "bf16"  # for SPSA's float32 tail
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise UserError(f"fsdp_version {plugin.fsdp_version} is not supported: set fsdp_version: 2")
        if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy":
            raise UserError("fsdp_offload_params is not supported: set it to false")
        if plugin.activation_checkpointing:
            raise UserError(
                "fsdp_activation_checkpointing redraws LoRA's dropout: use --gradient_checkpointing instead"
            )
        if accelerator.mixed_precision == "bf16":
            from torch.distributed.fsdp import MixedPrecisionPolicy

            # gather in bf16, but add gradients of the fp32 adapters up in fp32
            plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    elif accelerator.distributed_type.name not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise UserError(f"{accelerator.distributed_type} is not supported: use one device, DDP or FSDP2")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise UserError(f"{launched} processes were launched, but no GPU was found: set ACCELERATE_USE_CPU=true")
    if args.coreset_size < accelerator.num_processes:
        raise UserError(
            f"--coreset_size {args.coreset_size} is below the {accelerator.num_processes} processes: raise it to "
            f"{accelerator.num_processes} or more"
        )
    return accelerator


def build_run(args, accelerator, tokenizer, model, train, held_out, keep) -> Run:
    """Wrap the model for its devices and put probe, optimizer and schedule around it."""
    import transformers

    try:
        VProjectionProbe(model, args.probe_module)  # before anything is wrapped or written
    except ValueError as error:
        raise UserError(str(error)) from None
    data = [rows for rows in (train, held_out) if rows]
    check_fits(args, model, tokenizer, data)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # we enter autocast ourselves; logits stay in bf16
    optimizer = optimizer.optimizer
    warmup = math.ceil(args.warmup_ratio * args.max_steps)
    schedule = "constant_with_warmup" if args.lr_scheduler == "constant" else args.lr_scheduler
    scheduler = transformers.get_scheduler(schedule, optimizer, warmup, args.max_steps)
    labelled_logits = LabelledLogits(accelerator.unwrap_model(model))
    inner = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    args.packing = check_model(args, accelerator, inner, labelled_logits, data)
    run = Run(
        *(args, accelerator, tokenizer, train, held_out, keep, model, optimizer, scheduler),
        probe=VProjectionProbe(accelerator.unwrap_model(model), args.probe_module),
        labelled_logits=labelled_logits,
        moments=AdamMoments(optimizer.defaults["betas"]),
        trained=[p for p in model.parameters() if p.requires_grad],
        modules=list(model.modules()),
    )
    gc.freeze()  # a million objects of models and libraries that no collection need visit again
    if accelerator.device.type == "cuda":
        torch.set_num_threads(1)  # the host handles tiny tensors only, and waking threads takes longer than the work
    if args.compile:
        compile_layers(run)
    return run


def compile_layers(run: Run) -> None:
    """Compile the decoder layers and the loss. While it probes, the last layer runs as written."""
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor import inductor_prims
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch.utils.checkpoint import CheckpointPolicy

    class SameDropout(CustomGraphPass):
        """Backward may compute a dropout mask again, but must not draw it anew: seeds are saved.

        With a memory budget PyTorch does draw anew (seen in 2.13), and gradients are wrong without a word.
        """

        def __call__(self, graph):
            for node in graph.nodes:
                if node.target in (inductor_prims.seed, inductor_prims.seeds):
                    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

        def uuid(self):
            return "dropout seeds are saved"

    torch._inductor.config.joint_custom_post_pass = SameDropout()
    # 0.5: norms, activations and dropout are computed again in backward, half the memory for 3 % of the time. Beside
    # checkpointing, which runs whole layers again, nothing is left to save; a budget near 0 instead took more memory.
    torch._functorch.config.activation_memory_budget = 1.0 if run.args.gradient_checkpointing else 0.5
    run.labelled_logits.kernels = LossKernels.compiled()
    for layer in run.probe.layers:
        layer.compile(dynamic=True)


# --------------------------------------------------------------------------------------------------------------- loop


def train_loop(run: Run, start: int) -> None:
    """The hand-rolled loop, from `start` steps done to --max_steps."""
    args, accelerator, folder = run.args, run.accelerator, Path(run.args.output_dir)
    device = accelerator.device
    if run.evaluation is not None and not run.saved:
        log_evaluation(run, 0)
    quiet = not accelerator.is_main_process
    for step in (bar := tqdm(range(start, args.max_steps), initial=start, total=args.max_steps, disable=quiet)):
        if args.cluster_sources and step in clustering_steps(args):
            cluster_rows(run, step)
        clock, run.comm_bytes = Clock(device), 0
        pool = draw_pool(len(run.train), args.pool_size, args.seed, step)
        choice = choose_coreset(run, pool, step, clock)
        clock.mark("select")

        rows = pool[choice.index]
        loss = train_on(run, rows, choice.weight, step)
        lr = run.scheduler.get_last_lr()[0]
        norm = update(run, choice, loss)
        if norm is None:
            path = save_checkpoint(run, step)
            raise UserError(
                f"the loss {loss.item()} or its gradient at step {step + 1} is not finite: lower --learning_rate; "
                f"the state before this step is in {path}"
            )
        run.scheduler.step()
        clock.mark("train")

        done = step + 1
        record = {"step": done, "loss": loss.item(), "lr": lr, "grad_norm": norm, "pool": len(pool)}
        record |= {"kept": len(choice.kept), "selected": len(rows), "skipped_probes": choice.skipped_probes}
        record |= {"tokens": sum(map(run.train.length, rows.tolist())), "probe_tokens": choice.probe_tokens}
        record |= clock.read() | {"comm_bytes": run.comm_bytes}
        bar.set_postfix(loss=f"{record['loss']:.4f}")
        if accelerator.is_main_process:
            number = run.train.numbers
            picked = {"pool": pool, "kept": pool[choice.kept], "selected": rows}
            append(folder / "metrics.jsonl", record)
            append(folder / "selection.jsonl", {"step": done} | {k: number[v].tolist() for k, v in picked.items()})
        if args.report_to:
            accelerator.log(record, step=done)
        last = done == args.max_steps
        if run.evaluation is not None and (last or (args.eval_every and done % args.eval_every == 0)):
            log_evaluation(run, done)
        stop = bool(run.add_up(torch.tensor(float(run.stop), device=device)))
        if stop or (args.save_every and (last or done % args.save_every == 0)):
            path = save_checkpoint(run, done)
        if stop and not last:
            accelerator.print(f"stopped by SIGTERM after step {done}: go on from {path} with --resume auto")
            raise SystemExit(0)


def log_evaluation(run: Run, step: int) -> None:
    record = {"step": step} | evaluate(run)
    if run.accelerator.is_main_process:
        append(Path(run.args.output_dir) / "eval.jsonl", record)
    if run.args.report_to:
        flat = {k: v for k, v in record.items() if isinstance(v, float)}
        run.accelerator.log(flat | {f"eval_loss/{k}": v for k, v in record["eval_loss_of"].items()}, step=step)


def kept_how(args) -> str:
    return "kept whole" if args.keep_share == 1 else "kept in part"


def summary(run: Run, final: Path) -> str:
    """What a reader wants to know at the end of a run."""
    folder, data = Path(run.args.output_dir), run.train
    evals, metrics = read_records(folder / "eval.jsonl"), read_records(folder / "metrics.jsonl")
    if evals:
        before, after, what = evals[0]["eval_loss"], evals[-1]["eval_loss"], "held-out loss"
    else:
        tenth = max(1, len(metrics) // 10)
        before = sum(r["loss"] for r in metrics[:tenth]) / tenth
        after, what = sum(r["loss"] for r in metrics[-tenth:]) / tenth, "training loss, first and last tenth"
    source_of = dict(zip(data.numbers.tolist(), data.sources.tolist(), strict=True))
    counts = {key: [0] * len(data.names) for key in ("pool", "kept", "selected")}
    for record in read_records(folder / "selection.jsonl"):
        for key, tally in counts.items():
            for row in record[key]:
                tally[source_of[row]] += 1
    sizes = torch.bincount(data.sources, minlength=len(data.names)).tolist()
    lines = [f"\n{what}: {before:.4f} -> {after:.4f} in {len(metrics)} steps"]
    if run.args.cluster_sources:
        lines += ["sources as clustered last:"]
    lines += [f"{'source':<32} {'rows':>8} {'seen':>8} {'kept':>8} {'selected':>8}"]
    for q, name in enumerate(data.names):
        small = f"  ({kept_how(run.args)})" if q in run.keep else ""
        lines += [f"{name[:32]:<32} {sizes[q]:>8} " + " ".join(f"{counts[k][q]:>8}" for k in counts) + small]
    if data.shortened or data.dropped:
        lines += [f"{data.shortened} prompts were shortened and {data.dropped} rows dropped to fit --max_length"]
    kind = "adapter" if run.args.lora_r else "model"
    return "\n".join([*lines, f"{kind}: {final}"])


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    folder = Path(args.output_dir)
    checkpoint = find_checkpoint(args, folder)
    tokenizer = load_tokenizer(args)
    is_main = os.environ.get("RANK", "0") == "0"
    train, held_out, keep = load_data(args, tokenizer, show=is_main)
    args.max_steps = args.max_steps or max(1, int(args.num_epochs * (len(train) // args.pool_size)))
    if args.cluster_sources and args.cluster_warmup >= args.max_steps:
        raise UserError(
            f"--cluster_warmup {args.cluster_warmup} reaches the last step: lower it below {args.max_steps}"
        )
    settings = settings_of(args, train)
    if checkpoint:
        check_settings(settings, checkpoint)
    accelerator = make_accelerator(args)
    model = load_model(args, accelerator, tokenizer)
    run = build_run(args, accelerator, tokenizer, model, train, held_out, keep)
    run.settings = settings
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stop", True))
    start = load_checkpoint(run, checkpoint) if checkpoint else 0
    check_agreement(run, start)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        stale = [path for path in checkpoints(folder) if args.overwrite or step_of(path) > start]
        for leftover in [*folder.glob("tmp-*"), *stale, *([folder / "final"] if args.overwrite else [])]:
            remove(leftover)
        rewind(folder, start if checkpoint else -1)
    accelerator.wait_for_everyone()
    if args.report_to:
        plain = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in vars(args).items()}
        accelerator.init_trackers("colm", config=plain)
    small = ", ".join(train.names[q] for q in sorted(keep)) or "none"
    accelerator.print(f"{len(train)} rows of {len(train.names)} sources; {kept_how(args)}: {small}")
    share = sum(torch.bincount(train.sources)[sorted(keep)].tolist()) / len(train)
    share *= args.keep_share + (1 - args.keep_share) * args.coreset_size / args.pool_size
    if args.selection in ("colm", "random_keep") and share * args.pool_size > args.coreset_size:
        accelerator.print(f"they fill {share:.0%} of a pool: most coresets will be a random part of them alone")
    train_loop(run, start)
    final = save_final(run)
    accelerator.print(summary(run, final) if accelerator.is_main_process else "")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def cli(argv: list[str]) -> None:
    """Run, and turn what the user can mend into one line and exit code 2."""
    try:
        main(argv)
    except torch.OutOfMemoryError:  # of this process, whichever it is
        size = f"--max_tokens_per_micro_batch {parse_args(argv).max_tokens_per_micro_batch}"
        print(
            f"error: {size} takes more memory than the GPU has free: lower it, or add --gradient_checkpointing or "
            "--compile, then go on from the last checkpoint with --resume auto",
            file=sys.stderr,
        )
        sys.exit(2)
    except (UserError, OSError, RuntimeError) as error:
        full_disk = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if not (isinstance(error, UserError) or full_disk or "--no-packing" in str(error)):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line a host: another host may have other files
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli(sys.argv[1:])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # a gloo thread that wants the closing interpreter would abort it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

"""Fine-tune a causal language model with CoLM: draw a large pool, train on a coreset of it.

Nguyen et al., "Mini-batch Coresets for Memory-efficient Language Model Training on Data Mixtures", ICLR 2025,
arXiv 2407.19580v4. The mathematics is in colm_core.py; this file wires it to Accelerate.

    python train_colm.py                                             # a tiny model on a generated mixture, offline
    accelerate launch --config_file accelerate_configs/single_gpu.yaml train_colm.py \\
        --model microsoft/phi-2 --train_file MathInstruct.json --output_dir out

Where to read: `train_loop` is the loop; each step calls `draw_pool`, `choose_coreset` (the method, with `probe_pool`
for the gradients), `accumulate_gradients` and `update`, which stand in this order before it. Details worth knowing:
 1. Everything about a pool is a tensor or a mask over its N positions. `pool[position]` is a row of the training data.
 2. All ranks draw the same pool from (seed, epoch) and know the whole coreset: ranks exchange scalars, features and
    indices, never examples. A resumed run needs no sampler state.
 3. Rows are sorted by length and put into micro-batches of at most --max_tokens_per_micro_batch tokens. Every rank gets
    an even share of the tokens and the same number of micro-batches, or FSDP's collectives would hang.
 4. The loss is sum_i w_i L_i / sum_i w_i over the whole coreset, L_i the mean token loss of example i, whatever the
    micro-batches and the number of ranks.
 5. Pools, directions, dropout and random picks have generators of their own, each seeded by (seed, purpose, step).
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
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
import uuid
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast, broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from colm_batches import (
    LabelledLogits,
    LossKernels,
    PackingCheck,
    attention_configs,
    check_rows,
    collate,
    mean_hidden_states,
    micro_batch_losses,
    pack,
    plan_micro_batches,
)
from colm_core import (
    AdamMoments,
    Bags,
    VProjection,
    VProjectionProbe,
    cosines,
    find_v_projection,
    fresh_first,
    has_packed_weights,
    k_means,
    one_process,
    select_coreset,
    small_sources,
    sparsify,
    spsa_gradients,
    tf_idf,
)
from colm_data import (
    Parser,
    TokenizedRows,
    UserError,
    config_flags,
    default_cache_dir,
    demo_rows,
    hush_libraries,
    load_tokenizer,
    load_tokens,
    one_line,
    remove,
    replacing,
    tokenize,
)

# ---------------------------------------------------------------------------------------------------------------- flags

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
BASE_PRECISIONS = ["compute", "nf4"]
KEEPING = ("colm", "random_keep", "fresh")  # values of --selection that keep small sources


def build_parser() -> Parser:
    parser = Parser("train_colm.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--config", help="YAML file of flags; the command line overrides it")
    add("--model", help="folder or hub id of a causal LM, or folder of an adapter; default: a tiny random model")
    add("--trust_remote_code", action=flag, default=False, help="run Python code that the model's repository ships")
    add("--train_file", nargs="+", help="files (.json, .jsonl, .csv, .parquet), globs or hub ids org/name:config:split")
    add("--eval_file", nargs="+", help="held-out rows in the same formats")
    add("--train_on", choices=["all", "last"], default="all", help="every answer of a conversation, or the last alone")
    add("--drop_copies", action=flag, default=False, help="leave out rows whose tokens are those of a row before")
    add("--drop_near_copies", type=float, help="leave out rows that resemble a row before by so much, 0 to 1, as 0.5")
    add("--cache_dir", default=default_cache_dir(), help="where tokens of large files are kept; '' keeps none")
    add("--source_field", default="source", help="the field that names a row's source")
    add("--output_dir", default="colm_output")
    add("--overwrite", action=flag, default=False, help="delete the run that --output_dir holds")
    # the method
    add("--pool_size", type=int, default=128, help="N, examples drawn at each step")
    add("--coreset_size", type=int, default=64, help="K, examples trained on")
    add("--selection", choices=[*KEEPING, "random", "full"], default="colm")
    add("--keep_sources", nargs="+", default=["auto"], help="auto (below the mean size), none, or source names")
    add("--keep_share", type=float, default=1.0, help="1 keeps small sources whole, 0 at their part of the pool")
    add("--example_weights", choices=[*TOKEN_POWER], default="uniform", help="loss weight by supervised tokens")
    add("--cluster_sources", type=int, default=0, help="k-means clusters of hidden states that stand in for sources")
    add("--cluster_warmup", type=int, default=20, help="steps on random coresets before the first clustering")
    add("--cluster_updates", type=int, default=4, help="clusterings after the first, evenly over the rest of the run")
    add("--probe", choices=["spsa", "grad"], default="spsa", help="zeroth-order (the paper) or exact gradients")
    add("--num_directions", type=int, default=1, help="SPSA directions; each runs the last layer and head twice")
    add("--direction", choices=["step", "run"], default="step", help="redraw the directions each step, or once")
    add("--spsa_eps", type=float, default=1e-3)
    add("--spsa_wide_tail", action=flag, default=True, help="run SPSA's perturbed tail in the next wider precision")
    add("--probe_module", help="name of the last V projection, where none is found by running the model")
    add("--sparsify_dims", type=int, default=2560, help="h, coordinates kept of each source's features")
    add("--similarity", choices=["l1", "l2", "cosine"], default="l1")
    add("--medoid_weights", choices=["uniform", "cluster"], default="uniform", help="cluster: by cluster size")
    # the model and its optimisation
    add("--lora_r", type=int, default=128, help="0 trains all weights")
    add("--lora_alpha", type=float, default=512.0)
    add("--lora_dropout", type=float, default=0.05)
    add("--lora_target_modules", nargs="+", help="default: the paper's for the architecture, or PEFT's")
    add("--learning_rate", type=float, default=2e-5)
    add("--lr_scheduler", choices=["cosine", "linear", "constant"], default="cosine")  # DIFFERS 14
    add("--warmup_ratio", type=float, default=0.03)
    add("--weight_decay", type=float, default=0.0)
    add("--max_grad_norm", type=float, default=1.0)
    add("--max_steps", type=int, help="optimizer steps; overrides --num_epochs")
    add("--num_epochs", type=float, default=1.0, help="passes of the pools over the data")
    add("--max_length", type=int, default=512, help="tokens; longer prompts are shortened from the left")
    add("--max_tokens_per_micro_batch", type=int, default=4096)
    add("--packing", action=flag, help="examples end to end in one row instead of padded; default: on a GPU in bf16")
    add("--gradient_checkpointing", action=flag, default=False)
    add("--compile", action=flag, default=False, help="compile the decoder layers")
    add("--base_precision", choices=BASE_PRECISIONS, default="compute", help="nf4: frozen weights in 4 bits")
    # the run
    add("--save_every", type=int, default=100, help="steps between checkpoints, 0: none")
    add("--keep_checkpoints", type=int, default=2)
    add("--resume", help="auto (the newest checkpoint, if any) or a checkpoint folder")
    add("--eval_every", type=int, default=100, help="steps between evaluations of --eval_file")
    add("--report_to", nargs="+", choices=["png", "tensorboard", "wandb"], default=[], help="png: OUTPUT/run.png")
    add("--run_name", help="the run's name in wandb; default: the name of --output_dir")
    add("--seed", type=int, default=0)
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    config = Parser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    if path := config.parse_known_args(argv)[0].config:
        argv = config_flags(path) + argv  # the last of two equal flags counts: the command line overrides the file
    # Whether there is a model decides over the defaults, so the flags are parsed again with those of the demo.
    if parser.parse_args(argv).model is None:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    adopt_adapter(args, flags_given(argv))
    check_args(args)
    return args


def flags_given(argv: list[str]) -> set[str]:
    """Names of the flags that stand in `argv`, rather than having their default."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # what is not given does not appear
    return set(vars(parser.parse_args(argv)))


def check_args(args: argparse.Namespace) -> None:
    """Rules that need no data."""
    for name, value in vars(args).items():
        if value in ("", [""]) and name != "cache_dir":
            raise UserError(f"--{name} is empty, as an unset shell variable makes it: give a value or drop the flag")
    positive = ["pool_size", "coreset_size", "num_directions", "spsa_eps", "sparsify_dims", "lora_alpha"]
    positive += ["learning_rate", "max_grad_norm", "num_epochs", "max_tokens_per_micro_batch", "keep_checkpoints"]
    if args.max_steps is not None:
        positive.append("max_steps")
    for name in positive:
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)} is out of range: give a positive number")
    at_least_0 = ["lora_r", "warmup_ratio", "weight_decay", "save_every", "eval_every", "lora_dropout"]
    for name in at_least_0 + ["cluster_sources", "cluster_warmup", "cluster_updates"]:
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)} is out of range: give 0 or more")
    if not 0 <= args.keep_share <= 1:
        raise UserError(f"--keep_share {args.keep_share} is out of range: give 0 to 1")
    if args.drop_near_copies is not None and not 0 < args.drop_near_copies <= 1:
        raise UserError(
            f"--drop_near_copies {args.drop_near_copies} is out of range: give a similarity above 0, up to 1, as 0.5"
        )
    if args.num_directions > 1 and args.probe == "grad":
        raise UserError(f"--num_directions {args.num_directions} has no effect with --probe grad: drop one")
    if args.keep_share < 1 and args.selection not in KEEPING:
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
    if args.cluster_sources and args.selection not in KEEPING:
        raise UserError(f"--cluster_sources has no effect with --selection {args.selection}: drop one")
    if args.max_length < 2:
        raise UserError(f"--max_length {args.max_length} leaves no room for a completion: give 2 or more")
    if args.base_precision == "nf4" and args.model is None:
        raise UserError("--base_precision nf4 has no effect on the demo, whose weights are random: give a --model")
    optional = {"nf4": "bitsandbytes", "png": "matplotlib", "tensorboard": "tensorboard", "wandb": "wandb"}
    for flag, values in (("base_precision", [args.base_precision]), ("report_to", args.report_to)):
        for value in values:
            if value in optional and importlib.util.find_spec(optional[value]) is None:
                raise UserError(f"--{flag} {value} needs a package: pip install {optional[value]}")


# ------------------------------------------------------------------------------------------------------- random numbers


def seed_of(*parts) -> int:
    """A seed for one purpose at one step: no generator needs saving, and none disturbs another.

    A hash, because sums such as seed + step would give step 1 of seed 0 and step 0 of seed 1 the same numbers.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()  # DIFFERS 13: not one global generator for everything
    return int.from_bytes(digest[:7], "big")  # 56 bits: an int64 holds them, as broadcast needs


def generator_of(*parts, device="cpu") -> torch.Generator:
    """A generator for one purpose at one step: (seed, "pool", epoch), (seed, "pick", step), ..."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


# ------------------------------------------------------------------------------------------- a run, and its collectives


@dataclass
class Run:
    """What a run consists of; its methods are everything that depends on the number of ranks."""

    args: argparse.Namespace
    accelerator: Accelerator
    tokenizer: object
    train: TokenizedRows
    held_out: TokenizedRows | None
    keep: set[int]  # ids of the small sources: kept whole, or by --keep_share
    model: torch.nn.Module  # as prepared: what training calls
    optimizer: torch.optim.Optimizer
    scheduler: object
    probe: VProjectionProbe | None  # None where --selection needs none
    labelled_logits: LabelledLogits
    moments: AdamMoments
    bags: Bags | None  # of the training rows, on the main process, for --selection fresh
    trained: list[torch.nn.Parameter]  # the adapters, or all weights with --lora_r 0
    modules: list[torch.nn.Module]  # all of the model's, for `set_training`
    settings: dict = field(default_factory=dict)  # what a run that resumes must have in common with this one
    taken: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # the last rows trained on
    comm_bytes: int = 0  # what this rank gave to the collectives below; the wrappers' own gradients are not in it
    saved: Path | None = None  # the newest checkpoint
    stop: str | None = None  # the signal that asked the run to end

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def ranks(self) -> int:
        return self.accelerator.num_processes

    @property
    def inner(self) -> torch.nn.Module:
        """What probing and evaluation call: DDP's own forward would arm its reducer; FSDP2's gathers the weights."""
        if isinstance(self.model, torch.nn.parallel.DistributedDataParallel):
            return self.model.module
        return self.model

    def set_training(self, training: bool) -> None:
        """Switch dropout on or off: what `model.train(training)` does, less its recursion, 3 ms of a 600 ms step."""
        for module in self.modules:
            vars(module)["training"] = training

    def micro_batches(self, data: TokenizedRows, rows: Tensor, max_tokens: int, only: Tensor | None = None):
        """This rank's share of `rows` [N] of `data`, or of those at the positions `only`, in micro-batches.

        Yields (positions in `rows` [B], MicroBatch on the device, is it the last?). Without positions the batch is a
        stand-in that keeps this rank's collectives in step with the others'; its results count for nothing. Each batch
        is put together while the device works on the one before.
        """
        if only is None:
            only = torch.arange(len(rows))
        lengths = [data.length(row) for row in rows[only].tolist()]
        plan = plan_micro_batches(lengths, max_tokens, self.ranks, self.args.packing)[self.accelerator.process_index]
        for i, members in enumerate(plan):
            positions = only[members]  # [B]; the plan numbers the examples by their place in `only`
            run_these = positions
            if len(positions) == 0:  # other ranks have one micro-batch more: run the cheapest row beside them
                run_these = only[[lengths.index(min(lengths))]]
            examples = [data.example(row) for row in rows[run_these].tolist()]
            batch = pack(examples, self.args.max_length) if self.args.packing else collate(examples)
            if self.device.type == "cuda":
                batch = batch.pin()  # only pinned memory is copied without waiting for the device
            yield positions, batch.to(self.device), i + 1 == len(plan)

    # The collectives of CoLM stand here, and nowhere in the method. What runs once outside the steps has its own:
    # `find_projection`, `check_model`, and the wait for all ranks at the end of `main`.

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on every rank."""
        if self.ranks == 1:
            return tensor
        self.comm_bytes += tensor.nbytes
        return self.accelerator.reduce(tensor, "sum")

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The main process' tensor on every rank, on the host."""
        if self.ranks == 1:
            return tensor
        self.comm_bytes += tensor.nbytes
        return broadcast(tensor.to(self.device)).cpu()

    def clip_gradients(self) -> Tensor:
        """Clip to --max_grad_norm; returns the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.args.max_grad_norm)
        if hasattr(norm, "full_tensor"):  # FSDP2's is in parts, one on each rank
            norm = norm.full_tensor()
        return norm

    def trained_state(self) -> tuple[dict, dict]:
        """Trained weights and optimizer state, whole and on the host, on every rank."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        weights = get_model_state_dict(self.model, options=options)
        return weights, get_optimizer_state_dict(self.model, self.optimizer, options=options)


# --------------------------------------------------------------------------------- one step: pool, probe, select, train


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """The rows of the training data in an epoch's order, [rows]; cached, as one epoch serves many steps."""
    return torch.randperm(rows, generator=generator_of(seed, "pool", epoch))


def draw_pool(rows: int, size: int, seed: int, step: int) -> Tensor:
    """The large mini-batch M_t^L: rows [N] of step `step`, without replacement within an epoch of rows // N pools."""
    epoch, pool_of_epoch = divmod(step, rows // size)  # the rows left over wait for another epoch's order
    order = epoch_order(rows, seed, epoch)
    return order[pool_of_epoch * size : (pool_of_epoch + 1) * size]


@dataclass
class Choice:
    """The coreset of one step, by positions in the pool."""

    index: Tensor  # [K] positions, kept ones first
    weight: Tensor  # [N] of the examples' losses, 0 outside the coreset
    kept: Tensor  # [N] bool: examples of small sources, which are chosen before all others
    moments: AdamMoments  # the history that includes this coreset; current once the step has succeeded
    probe_tokens: int = 0  # tokens of the probed examples, for the log
    skipped_probes: int = 0  # examples with a probe that is not finite
    passed_over: int = 0  # examples that a random draw would have, and --selection fresh left for others


TOKEN_POWER = {"uniform": 0.0, "sqrt": 0.5, "tokens": 1.0}  # --example_weights: a loss weighs its tokens to this power


def choose_coreset(run: Run, pool: Tensor, step: int, clock: Clock) -> Choice:
    """The coreset of `pool` [N] by --selection, and the weights of its losses (Algorithm 1)."""
    args = run.args
    k = min(args.coreset_size, len(pool))
    generator = generator_of(args.seed, "pick", step)
    sources = run.train.sources[pool]  # [N]
    selection = args.selection
    if args.cluster_sources and step < args.cluster_warmup:
        selection = "random"  # there are no clusters yet (5.4)

    # 1. Examples of small sources are kept (4.1), unless --keep_share leaves some of them out.
    small = torch.isin(sources, torch.tensor(sorted(run.keep), dtype=sources.dtype))  # [N]
    kept = thinned(run, small, step)  # [N]
    left_out = small & ~kept  # [N]

    # 2. Choices without a probe: the whole pool, or a uniform draw in which kept examples come first.
    if selection == "full":
        return uniform_choice(run, pool, torch.arange(len(pool)), kept)
    if selection == "fresh":
        return fresh_choice(run, pool, small, kept, k, generator)
    if selection == "random":
        kept = torch.zeros_like(kept)
    small_fill_it = int(kept.sum()) >= k  # DIFFERS 4: then a uniform draw of their rows, and nothing to probe
    if selection in ("random", "random_keep") or small_fill_it:
        return uniform_choice(run, pool, draw_uniformly(~left_out, kept, k, generator), kept)

    # 3. Per-example gradients of the last V projection (Eq. 5-6), of this rank's share of the big sources' examples.
    probed = ~small  # [N]  DIFFERS 11: kept examples need no probe
    gradients = probe_pool(run, pool, probed, step)
    clock.mark("probe")
    all_reduce = run.all_reduce  # every rank holds the exact gradients of its own examples
    if args.probe == "spsa":
        all_reduce = one_process  # every rank knows the derivatives of all examples and does the rest alone

    # 4. Adam normalisation (Eq. 3-4), then the h largest coordinates of each source (Table 4). `select_coreset` would
    #    sparsify as well; here it comes before the exchange, so that ranks send h numbers for an example and not D.
    h = min(args.sparsify_dims, run.probe.dims)
    features = torch.zeros(len(pool), h, device=run.device)  # [N, h]
    for source in sources[probed].unique().tolist():
        of_source = probed & (sources == source)  # [N]
        normalized = run.moments.normalize(gradients.of(of_source))  # [n, D]
        features[of_source & gradients.held] = sparsify(normalized, h, all_reduce).float()  # [n, h]
    features = all_reduce(features)  # each row is 0 on all ranks but the one that holds it

    # 5. Medoids of every big source within its budget (Eq. 8). Examples that --keep_share leaves out are not kept, as
    #    -1 is not in `keep`, and are no candidates, as their features are not finite.
    features[left_out] = math.nan
    their_sources = sources.masked_fill(left_out, -1)
    coreset = select_coreset(features, their_sources, k, run.keep, h, args.similarity, generator)
    finite = features.isfinite().all(1).cpu()  # [N]
    skipped = int((probed & ~finite).sum())  # DIFFERS 3: counted and left aside
    if len(coreset.index) == 0:  # nothing kept, no probe finite: the loss will tell whether training can continue
        return uniform_choice(run, pool, draw_uniformly(~left_out, kept, k, generator), kept, skipped_probes=skipped)
    # Ranks compute the same coreset, up to rounding on unlike devices: the main process' is the one that counts.
    index, cluster_size = run.broadcast(torch.stack(coreset))  # [K] each

    # 6. The history becomes the mean over the selected examples of big sources (Eq. 3-4), in a copy: the step may yet
    #    fail, and then the history must stay as it was. `update` makes the copy current.
    medoids = torch.zeros_like(probed)
    medoids[index] = True
    medoids &= probed  # [N]
    moments = copy(run.moments)
    moments.update(gradients.of(medoids), all_reduce, count=int(medoids.sum()))

    # 7. Weights of the losses: uniform; weighting by cluster size was worse in the paper.
    if args.medoid_weights == "uniform":
        cluster_size = torch.ones_like(cluster_size)
    weight = loss_weights(run, pool, index, cluster_size)
    tokens = sum(map(run.train.length, pool[probed].tolist()))
    return Choice(index, weight, kept, moments, probe_tokens=tokens, skipped_probes=skipped)


def uniform_choice(run: Run, pool: Tensor, index: Tensor, kept: Tensor, skipped_probes: int = 0) -> Choice:
    """The positions `index` as a coreset that no gradient chose: the history stays."""
    weight = loss_weights(run, pool, index, torch.ones_like(index))
    return Choice(index, weight, kept, run.moments, skipped_probes=skipped_probes)


ALIKE = 0.8  # rows resemble each other from this cosine on: near copies do, and few other rows
LATELY = 4096  # rows remembered: comparing with them takes 9 ms on one core; a copy of an older row counts as new


def fresh_choice(run: Run, pool: Tensor, small: Tensor, kept: Tensor, k: int, generator: torch.Generator) -> Choice:
    """The draw of random_keep, in which rows that resemble rows taken lately give way to others of their source.

    Not the paper's; measured in benchmarks/RESULTS.md.
    """
    left_out = small & ~kept  # by --keep_share: they may stand in for rows of their source
    order = draw_uniformly(~left_out, kept, len(pool), generator)
    order = torch.cat([order, left_out.nonzero()[:, 0]])  # [N]; a pool is in a random order
    index = torch.zeros(k, dtype=torch.long)
    if run.bags is not None:  # on the main process: unlike processors might round to other choices
        others = torch.cat([run.taken, pool])
        alike = cosines(run.bags, pool, others) >= ALIKE  # [N, taken + N]
        alike &= pool[:, None] != others  # in a later epoch a row is no copy of itself
        alike_to_taken, alike_in_pool = alike.split([len(run.taken), len(pool)], 1)
        index = fresh_first(order, run.train.sources[pool], k, alike_to_taken.any(1), alike_in_pool)
    index = run.broadcast(index)
    choice = uniform_choice(run, pool, index, kept)
    choice.kept = small & (choice.weight > 0)  # those that stood in are among them
    choice.passed_over = int((choice.weight[order[:k]] == 0).sum())
    return choice


def draw_uniformly(candidates: Tensor, first: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Positions [k] of a uniform draw from the mask `candidates` [N] in which those of the mask `first` come first."""
    shuffled = torch.randperm(len(candidates), generator=generator)
    shuffled = shuffled[candidates[shuffled]]
    comes_first = first[shuffled]
    return torch.cat([shuffled[comes_first], shuffled[~comes_first]])[:k]


def loss_weights(run: Run, pool: Tensor, index: Tensor, examples: Tensor) -> Tensor:
    """Weights [N] of the losses, 0 outside the positions `index` [K].

    A weight is how many `examples` [K] the position stands for, times its supervised tokens to the power that
    --example_weights gives.
    """
    tokens = run.train.supervised_tokens(pool[index])  # [K]
    weight = torch.zeros(len(pool))
    weight[index] = examples * tokens ** TOKEN_POWER[run.args.example_weights]
    return weight


def thinned(run: Run, small: Tensor, step: int) -> Tensor:
    """The examples of small sources that --keep_share keeps, a mask [N].

    A share s keeps ceil(n (s + (1 - s) K / N)) of their n examples, drawn at random: 1 keeps them all, 0 as many as a
    uniform draw of K from N would take.
    """
    args = run.args
    if args.keep_share == 1:
        return small
    share = args.keep_share + (1 - args.keep_share) * min(args.coreset_size, len(small)) / len(small)
    positions = small.nonzero()[:, 0]  # [n]
    shuffled = positions[torch.randperm(len(positions), generator=generator_of(args.seed, "thin", step))]
    kept = torch.zeros_like(small)
    number = math.ceil(share * len(positions) - 1e-9)  # 0.07 * 100 is a little more than 7 in floating point
    kept[shuffled[:number]] = True
    return kept


@dataclass
class PoolGradients:
    """Per-example gradients of a pool as far as this rank holds them: exact ones, or SPSA's derivatives and z."""

    values: Tensor  # [N, D], or derivatives [N, directions]
    held: Tensor  # [N] bool, on the host: rows of `values` that mean something here
    z: Tensor | None  # [directions, d_v, r]

    def of(self, wanted: Tensor) -> Tensor:
        """The gradients of the held examples among the mask `wanted` [N], in pool order, [m, D]."""
        positions = (wanted & self.held).nonzero()[:, 0]
        values = self.values[positions.to(self.values.device, non_blocking=True)]
        if self.z is None:
            return values
        # With SPSA the [m, D] gradients are made of derivatives and z where they are needed: [N, D] would be large.
        return spsa_gradients(values, self.z)


def probe_pool(run: Run, pool: Tensor, probed: Tensor, step: int) -> PoolGradients:
    """Zeroth-order or exact gradients of the last V projection for the examples of the mask `probed` [N] (Eq. 5-6)."""
    args, probe = run.args, run.probe
    run.set_training(False)  # dropout would be noise in the signal
    max_tokens = probe_budget(args)
    z = None
    if args.probe == "spsa":
        z = directions(args, probe, step, run.device)
        max_tokens = max(1, max_tokens // args.num_directions)  # the head sees two copies of a row for each direction
    values = None  # its width is known after the first micro-batch
    held = torch.zeros_like(probed)
    for positions, batch, _ in run.micro_batches(run.train, pool, max_tokens, only=probed.nonzero()[:, 0]):

        def losses(batch=batch):  # the probe calls it under its hooks, more than once for some models
            with run.accelerator.autocast():
                return micro_batch_losses(run.inner, run.labelled_logits, batch)

        if args.probe == "spsa":
            rows = probe.spsa(losses, z, args.spsa_eps, args.spsa_wide_tail).float()  # [B, directions]
        else:
            rows = probe.gradients(losses, batch.per_example)  # [B, D]
        if values is None:
            values = rows.new_zeros(len(pool), rows.shape[1])  # [N, D] or [N, directions]
        values[positions.to(run.device, non_blocking=True)] = rows[: len(positions)]  # none of a stand-in's
        held[positions] = True
    if args.probe == "spsa":  # a few numbers for each example: every rank gets them all
        values, held = run.all_reduce(values), probed
    return PoolGradients(values, held, z)


def probe_budget(args) -> int:
    """Tokens of a micro-batch without backward: twice as many, unless memory is short.

    Without backward no layer keeps its activations, so twice the tokens fit where a training micro-batch does. Under
    --gradient_checkpointing training keeps hardly more than this does.
    """
    if args.gradient_checkpointing:
        return args.max_tokens_per_micro_batch
    return 2 * args.max_tokens_per_micro_batch


def directions(args, probe: VProjectionProbe, step: int, device) -> Tensor:
    """z ~ N(0, I), [directions, d_v, r], the same on every rank (Eq. 5)."""
    drawn_for = step  # DIFFERS 9: new directions at each step, unless asked otherwise
    if args.direction == "run":
        drawn_for = "run"
    generator = generator_of(args.seed, "direction", drawn_for, device=device)
    return torch.randn(args.num_directions, *probe.shape, generator=generator, device=device)


def accumulate_gradients(run: Run, pool: Tensor, choice: Choice, step: int) -> Tensor:
    """Gradient of the coreset loss sum_i w_i L_i / sum_i w_i into .grad; returns the loss."""
    torch.manual_seed(seed_of(run.args.seed, "dropout", step, run.accelerator.process_index))  # each rank its own
    # With shares of the whole coreset's weight, what micro-batches and ranks compute can simply be added up.
    weight = choice.weight.double()
    share = (weight / weight.sum()).float()  # [N]   DIFFERS 10: sums to 1 over the coreset, not over a micro-batch
    max_tokens = run.args.max_tokens_per_micro_batch
    run.set_training(True)
    total = torch.zeros((), device=run.device)
    for positions, batch, last in run.micro_batches(run.train, pool, max_tokens, only=choice.index):
        # Ranks add up their gradients once, in the backward pass of the last micro-batch.
        synchronisation = nullcontext() if last else run.accelerator.no_sync(run.model)
        with synchronisation:
            with run.accelerator.autocast():
                losses = micro_batch_losses(run.model, run.labelled_logits, batch)[0]  # [B]
            if len(positions) == 0:
                loss = losses.sum() * 0  # a stand-in: its backward pass serves FSDP's collectives alone
            else:
                loss = (losses * share[positions].to(run.device, non_blocking=True)).sum()
            (loss * run.ranks).backward()  # DDP and FSDP2 take the mean over ranks, and the sum is wanted
        total += loss.detach()
    return run.all_reduce(total)


def update(run: Run, pool: Tensor, choice: Choice, loss: Tensor) -> float | None:
    """Clip, step the optimizer and the history; returns the norm, None where it or the loss is not finite."""
    norm = run.clip_gradients()
    broken = (~torch.stack([loss, norm]).isfinite().all()).float()
    # Reading `broken` here would have the host wait for the whole step. Fused AdamW reads it on the device instead, as
    # from a gradient scaler: where it is 1, the step changes neither weights nor Adam's state.
    run.optimizer.found_inf = broken
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    broken, norm = torch.stack([broken, norm]).tolist()  # the first wait for the device since the selection
    if broken:
        return None
    run.moments = choice.moments  # the step succeeded, so its coreset belongs to the history (Eq. 3-4)
    run.taken = torch.cat([run.taken, pool[choice.index]])[-LATELY:]
    return norm


# ----------------------------------------------------------------------------------------------------------------- loop


def train_loop(run: Run, start: int) -> None:
    """All steps of Algorithm 1, from the first that is not among the `start` done to --max_steps."""
    args, accelerator = run.args, run.accelerator
    if run.held_out is not None and not run.saved:
        log_evaluation(run, 0)  # the loss before training; a resumed run has it already
    quiet = not accelerator.is_main_process
    bar = tqdm(range(start, args.max_steps), initial=start, total=args.max_steps, disable=quiet)
    for step in bar:
        # Clusters stand in for sources where there are none (5.4).
        if args.cluster_sources and step in clustering_steps(args):
            cluster_rows(run, step)
        clock = Clock(run.device)
        run.comm_bytes = 0

        # A large random pool M_t^L, the same on every rank.
        pool = draw_pool(len(run.train), args.pool_size, args.seed, step)  # [N] rows of the training data

        # Its coreset S_t: small sources whole, medoids of the big ones.
        choice = choose_coreset(run, pool, step, clock)
        clock.mark("select")

        # One optimizer update on the coreset alone.
        with untrainable_in_one_line(args) if step == start else nullcontext():
            loss = accumulate_gradients(run, pool, choice, step)
        lr = run.scheduler.get_last_lr()[0]
        norm = update(run, pool, choice, loss)
        if norm is None:
            path = save_checkpoint(run, step)
            raise UserError(
                f"the loss {loss.item()} or its gradient at step {step + 1} is not finite: lower --learning_rate; "
                f"the state before this step is in {path}"
            )
        run.scheduler.step()
        clock.mark("train")

        # Records, held-out loss, checkpoints.
        done = step + 1  # what is written counts steps from 1
        last = done == args.max_steps
        log_step(run, done, pool, choice, clock, loss=loss.item(), lr=lr, grad_norm=norm)
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if run.held_out is not None and (last or (args.eval_every and done % args.eval_every == 0)):
            log_evaluation(run, done)
        # A signal may reach one rank alone, and a checkpoint takes all of them.
        stop = bool(run.all_reduce(torch.tensor(float(run.stop is not None), device=run.device)))
        if stop or (args.save_every and (last or done % args.save_every == 0)):
            path = save_checkpoint(run, done)
        if stop and not last:
            reason = run.stop or "a signal to another process"
            accelerator.print(f"stopped by {reason} after step {done}: resume from {path} with --resume auto")
            raise SystemExit(0)


@contextmanager
def untrainable_in_one_line(args):
    """For the first step: a model may train on other rows than it evaluates, or have no backward pass for adapters."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model of any architecture may raise
        if is_compiler_error(error):
            raise
        raise UserError(
            f"--model {args.model} can't be trained, its first step fails ({one_line(error)}): give another causal LM, "
            "or change the flags that this names"
        ) from error


def log_step(run: Run, done: int, pool: Tensor, choice: Choice, clock: Clock, **values: float) -> None:
    """One line in metrics.jsonl, one in selection.jsonl, and the same for --report_to."""
    rows = pool[choice.index]  # [K] rows of the training data
    record = {"step": done, **values, "pool": len(pool), "kept": int(choice.kept.sum()), "selected": len(rows)}
    record |= {"passed_over": choice.passed_over}
    record |= {"skipped_probes": choice.skipped_probes, "probe_tokens": choice.probe_tokens}
    record |= {"tokens": sum(map(run.train.length, rows.tolist()))}
    record |= clock.read() | {"comm_bytes": run.comm_bytes}
    if run.accelerator.is_main_process:
        folder = Path(run.args.output_dir)
        append(folder / "metrics.jsonl", record)
        number = run.train.numbers  # rows as the files count them, dropped ones included
        selection = {"step": done, "pool": number[pool].tolist(), "kept": number[pool[choice.kept]].tolist()}
        append(folder / "selection.jsonl", selection | {"selected": number[rows].tolist()})
    run.accelerator.log(record, step=done)  # nothing without trackers


# -------------------------------------------------------------------------------------------------------- held-out loss


@torch.no_grad()
def evaluate(run: Run) -> dict:
    """Held-out loss: mean over examples, mean over sources, per token, and per source."""
    data, device = run.held_out, run.device
    rows = torch.arange(len(data))
    sums = torch.zeros(len(data.names), 4, dtype=torch.float64, device=device)  # loss, examples, token loss, tokens
    run.set_training(False)
    for positions, batch, _ in run.micro_batches(data, rows, run.args.max_tokens_per_micro_batch):
        with run.accelerator.autocast():
            losses = micro_batch_losses(run.inner, run.labelled_logits, batch)[0].double()  # [B]
        values = torch.stack([losses, torch.ones_like(losses), losses * batch.counts, batch.counts.double()], 1)
        sums.index_add_(0, data.sources[positions].to(device), values[: len(positions)])  # none of a stand-in's
    sums = run.all_reduce(sums).cpu()
    per_source = {}
    for name, (loss, examples, _, _) in zip(data.names, sums.tolist(), strict=True):
        if examples:  # a source of the training rows may have none here
            per_source[name] = loss / examples
    loss, examples, token_loss, tokens = sums.sum(0).tolist()
    return {
        "eval_loss": loss / examples,
        "eval_loss_source_mean": sum(per_source.values()) / len(per_source),
        "eval_loss_per_token": token_loss / tokens,
        "eval_loss_of": per_source,
    }


def log_evaluation(run: Run, step: int) -> None:
    """One line in eval.jsonl, and the same for --report_to."""
    losses = evaluate(run)
    if run.accelerator.is_main_process:
        append(Path(run.args.output_dir) / "eval.jsonl", {"step": step} | losses)
        if "png" in run.args.report_to and step > 0:  # before the first step there is nothing to draw
            draw_run(run)
    flat = dict(losses)  # trackers take numbers alone, one curve each
    for source, value in flat.pop("eval_loss_of").items():
        flat[f"eval_loss/{source}"] = value
    run.accelerator.log(flat, step=step)


# ----------------------------------------------------------------------------------- sources where there are none (5.4)


def clustering_steps(args) -> set[int]:
    """Steps that begin with a clustering: after the warm-up, then evenly over the rest of the run."""
    rest = max(0, args.max_steps - args.cluster_warmup)
    clusterings = args.cluster_updates + 1  # the first one and its updates
    steps = set()
    for i in range(clusterings):
        steps.add(args.cluster_warmup + rest * i // clusterings)
    return steps


def cluster_rows(run: Run, step: int) -> None:
    """Sources from k-means over the training rows' mean hidden states; clusters below the mean size are kept whole.

    Each rank runs its share of the rows and keeps their hidden states: ranks exchange centres, and a number for each
    row.
    """
    run.set_training(False)
    rows = torch.arange(len(run.train))
    features, mine = [], []  # this rank's hidden states, and the rows that they belong to
    batches = run.micro_batches(run.train, rows, probe_budget(run.args))
    for positions, batch, _ in tqdm(batches, "clustering", disable=not run.accelerator.is_main_process, leave=False):
        with run.accelerator.autocast():
            features.append(mean_hidden_states(run.inner, batch)[: len(positions)])  # none of a stand-in's
        mine.append(positions)
    features = torch.cat(features)  # [n, d]
    mine = torch.cat(mine).to(run.device)  # [n]
    generator = generator_of(run.args.seed, "clusters", step)
    clusters = k_means(features, mine, len(rows), run.args.cluster_sources, generator, run.all_reduce)  # [rows]
    use_clusters(run, clusters.cpu())


def use_clusters(run: Run, clusters: Tensor) -> None:
    """Make the clusters [rows] the sources of the training rows."""
    run.train.sources = clusters
    run.train.names = [f"cluster {number}" for number in range(run.args.cluster_sources)]
    run.keep = small_sources(dict(enumerate(torch.bincount(clusters).tolist())))


# --------------------------------------------------------------------------------------------------- model and adapters

# Default targets by model_type: where the paper names them (Appendix C), and where q, k and v are one fused matrix.
LORA_TARGETS = {
    "phi": ["q_proj", "k_proj", "v_proj", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj"],
    "gpt_neox": ["query_key_value", "dense"],
}
# Parts of a model where an adapter would never get a gradient from text, by the names that Transformers gives them:
# towers for images and sound, what joins them to the text, attention to an encoder, and what only picks positions.
NOT_TEXT = r".*(vision|visual|image|audio|speech|video|multi_?modal|cross_?att|encoder_attn|indexer|pooler).*"


def load_model(args, accelerator: Accelerator, tokenizer, checkpoint: Path | None = None):
    """The causal LM with fp32 adapters over a base in the compute precision, or all of it in fp32 (--lora_r 0)."""
    torch.manual_seed(args.seed)  # new weights of a head are random
    adapter = args.model if is_adapter(args.model) else None
    whole = None
    if checkpoint and args.lora_r:
        adapter = checkpoint  # a resumed run continues with the adapter that it saved,
    elif checkpoint:
        whole = checkpoint  # or with the whole model
    if args.model is None and whole is None:
        model = demo_model(args, tokenizer)
        return add_lora(model, args, adapter)
    base, remedy = whole or args.model, "give a causal LM"
    if is_adapter(args.model):
        base = adapter_config(args.model).base_model_name_or_path
        remedy = "name its base model in base_model_name_or_path of its adapter_config.json"
    # A frozen base only needs the precision that it computes in; trained weights need float32, since updates at a rate
    # of 2e-5 lie below bf16's rounding.
    half = accelerator.mixed_precision == "bf16" and args.lora_r > 0
    dtype = torch.bfloat16 if half else torch.float32
    try:
        model = load_base(base, args, dtype, accelerator.device)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the hub, configs, quantisers without their package and remote code raise many kinds
        if base != args.model:
            remedy = f"{remedy}, or use another checkpoint" if whole else f"{remedy} of {args.model}"
        raise UserError(f"--model {base}: {one_line(error)}: {remedy}") from None
    if not args.lora_r and getattr(model, "is_quantized", False):
        raise UserError(f"--lora_r 0 would train the weights of {args.model}, which are quantised: give 1 or more")
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None and not quantiser.is_trainable:
        method = model.config.quantization_config.quant_method
        raise UserError(f"{base} is quantised by {method}, through which no gradient passes: give other weights of it")
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        say("the model's config asks for its router's auxiliary loss: it is not added to the loss of the examples")
    return add_lora(model, args, adapter)


def load_base(base: str | Path, args, dtype: torch.dtype, device: torch.device | str = "cpu"):
    """A causal LM that computes in `dtype`, its linear layers in 4 bits if --base_precision is nf4.

    Weights that are packed already are loaded for `device`, other ones on the CPU, or wherever bitsandbytes packs them.
    nf4 is QLoRA's format (Dettmers et al. 2023): NormalFloat4, a scale for each 64 weights, and the scales in 8 bits.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    options = {"trust_remote_code": args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(base, **options)
        section = quantisation_section(config)
        if section is not None and args.base_precision == "nf4":
            raise UserError(f"--base_precision nf4: {base} is quantised already: use --base_precision compute")
        if section is not None:
            options["config"] = config
            if stays_packed(section):
                options["device_map"] = {"": device}  # where a kernel is chosen for it, once and for all
            else:
                say(f"{base}: {section['quant_method']} weights are unpacked: they take the memory of plain ones")
        elif args.base_precision == "nf4":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_quant_storage=dtype,  # the bits as if they were such numbers: FSDP2 shares out no integers
            )
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options)
    except ImportError as error:  # of the package that reads the weights of a quantised model, or of remote code
        raise UserError(f"--model {base}: {one_line(error)}: install it, or give another model") from None
    if getattr(model, "is_loaded_in_8bit", False):
        raise UserError(f"{base} has 8-bit layers of bitsandbytes, which are not supported: give other weights of it")
    if getattr(model, "is_quantized", False):
        compute_in(model, dtype)
    return model


def quantisation_section(config) -> dict | None:
    """The section of a config.json that says how the weights are packed."""
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None):
            return part.quantization_config
    return None


def stays_packed(section: dict) -> bool:
    """Complete a config's quantisation section, in place, so that gradients pass through the layers that it makes.

    Returns whether these layers keep their weights packed, or transformers unpacks them while it loads.
    """
    from transformers import GPTQConfig
    from transformers.quantizers import AutoQuantizationConfig

    known = AutoQuantizationConfig.from_dict(section)  # refuses methods at which transformers would draw new weights
    if hasattr(known, "dequantize"):
        # fp8, mxfp4, compressed-tensors: layers that round their inputs, too, pass no gradient on to the layers below.
        section["dequantize"] = True
        return False
    if isinstance(known, GPTQConfig):  # that of AWQ is one, too
        section["backend"] = "auto_trainable"  # the fastest kernels have no backward pass
    return True


def compute_in(model, dtype: torch.dtype) -> None:
    """Have a quantised model compute in `dtype`, whatever its checkpoint's settings and weights say."""
    for p in model.parameters():
        if type(p) is torch.nn.Parameter and p.dtype in (torch.float16, torch.bfloat16):  # packed ones are subclasses
            p.data = p.data.to(dtype)

    def cast_input(layer, args):
        # Autocast leaves norms in float32 and knows nothing of these layers, whose output has the type of the input:
        # attention would run in float32.
        return (args[0].to(dtype), *args[1:])

    in_4_bits = getattr(model, "is_loaded_in_4bit", False)  # by bitsandbytes
    packed = 0
    for layer in model.modules():
        if has_packed_weights(layer):
            layer.register_forward_pre_hook(cast_input)
            if hasattr(layer, "linear_mode"):  # the first evaluation on a CPU would give up the backward pass for good
                layer.linear_mode = "train"
        elif type(layer).__name__ == "Linear4bit":  # of bitsandbytes, which may not be installed
            layer.register_forward_pre_hook(cast_input)
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            layer.weight.quant_state.dtype = dtype  # of the weights in the backward pass
            # On some CPUs the first evaluation would change to a bf16 kernel that has no backward pass.
            layer.support_avx512bf16_for_cpu = False
            packed += layer.weight.quant_state.shape.numel()
    share = packed / model.num_parameters()
    if in_4_bits and share < 0.5:  # as in mixtures of experts
        say(f"only {share:.0%} of the weights take 4 bits: bitsandbytes packs nothing but linear layers")


def demo_model(args, tokenizer):
    """A tiny random Llama, the same for the same seed; an adapter names OUTPUT/base as its base model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(args.seed)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.1, **sizes)
    config.bos_token_id = tokenizer.eos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config)
    model.name_or_path = str(Path(args.output_dir).absolute() / "base")
    return model


def is_compiler_error(error: Exception) -> bool:
    """Does it come from torch.compile? Its errors have a common class, which takes a second to import."""
    return "TorchDynamoException" in [kind.__name__ for kind in type(error).__mro__]


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
    if args.lora_target_modules:
        args.lora_target_modules.sort()  # their order means nothing
    of_adapter = {
        "lora_r": config.r,
        "lora_alpha": float(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "lora_target_modules": sorted(targets),
    }
    for name, value in of_adapter.items():
        wanted = getattr(args, name)
        if name in given and wanted != value:
            if isinstance(value, list):
                wanted, value = " ".join(wanted), " ".join(value)
            raise UserError(f"--{name} {wanted}, but the adapter in {args.model} has {value}: drop the flag")
        setattr(args, name, value)
    if "base_precision" not in given:
        args.base_precision = trained_precision(Path(args.model, "settings.json"))


def noted(path: str | Path | None) -> dict:
    """What `save_model` wrote beside a model, in settings.json or colm_prompts.json; {} where there is no such file."""
    if path is None or not Path(path).is_file():
        return {}
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        remedy = "copy it again, or remove it and give the flags that it held"
        raise UserError(f"{path} can't be read ({one_line(error)}): {remedy}") from None


def trained_precision(settings: str | Path | None) -> str:
    """The --base_precision that an adapter was trained with, from the settings.json beside it."""
    precision = noted(settings).get("base_precision", "compute")
    if precision not in BASE_PRECISIONS:
        raise UserError(f"{settings} says base_precision {precision}: choose one with --base_precision")
    return precision


def add_lora(model, args, adapter: Path | str | None = None):
    """The model with LoRA adapters, unless --lora_r is 0: new ones as the flags ask, or those of a folder."""
    if not args.lora_r:
        return model
    import peft

    torch.manual_seed(args.seed)  # the same adapters on every rank
    if adapter is not None:
        model = load_adapter(model, adapter)
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


def load_adapter(model, folder: Path | str):
    """The adapter in `folder` over its base, to be trained further, in fp32."""
    import peft

    base = model.name_or_path
    try:
        model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True, torch_device="cpu")
        saved = peft.load_peft_weights(str(folder), device="cpu").keys()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # PEFT, torch and safetensors each raise their own kinds
        raise UserError(
            f"{folder}/adapter_model.safetensors can't be read ({one_line(error)}): "
            "give another adapter of this base model"
        ) from None
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)  # their frozen weights are the base's
    missing = sorted(expected.keys() - saved)
    if missing:  # PEFT only warns, and would continue with new weights
        raise UserError(
            f"{folder}/adapter_model.safetensors lacks {len(missing)} weights, such as {missing[0]}: "
            "give another adapter of this base model"
        )
    model.peft_config["default"].base_model_name_or_path = base  # it may have moved since the folder was written
    return model


def linear_modules(model) -> list[str]:
    """Names of the linear layers that a row of text runs and PEFT can adapt, without the output embedding."""
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        linear = isinstance(module, (torch.nn.Linear, Conv1D)) or has_packed_weights(module)
        if not linear or re.fullmatch(NOT_TEXT, name):
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
    """The last parts of these names, each once, for messages: "q_proj, k_proj, ..."."""
    last_parts = {}  # a dictionary keeps the model's order
    for name in linear_modules(model):
        last_parts[name.rpartition(".")[2]] = True
    return ", ".join(last_parts)


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
        if latent or leaf != "v_proj":
            continue
        if f"{parent}.q_proj" not in linear or f"{parent}.k_proj" not in linear:
            continue
        for output in ("o_proj", "out_proj", "dense", "Wo"):
            if f"{parent}.{output}" not in linear:
                continue
            if output != "o_proj":  # other parts of a model may have an out_proj too
                output = f"{parent.rpartition('.')[2]}.{output}"
            return ["q_proj", "k_proj", "v_proj", output]
    if isinstance(PEFT_TARGETS.get(kind), list):
        return PEFT_TARGETS[kind]
    attention = []
    for name, module in model.named_modules():
        if re.search("Attention|MLA", type(module).__name__):
            attention.append(f"{name}.")
    inside = [name for name in linear if name.startswith(tuple(attention))]
    return inside or linear  # whole names: PEFT stores them shortened to their ends


def lora_targets(model, wanted: list[str] | None) -> tuple[list[str], str | None]:
    """PEFT's target_modules and exclude_modules for --lora_target_modules; every name must stand for a module."""
    targets = []
    for name in wanted or default_targets(model):
        if name == "all-linear":
            targets += linear_modules(model)
        else:
            targets.append(name)
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


def check_fits(args, model, tokenizer, data: list[TokenizedRows]) -> None:
    """Refuse rows with more tokens than the model has positions, or with tokens that its embedding does not have."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(rows.length(i) for rows in data for i in range(len(rows)))
    if positions is not None and 0 < positions < longest:  # some models write -1 for no limit
        raise UserError(
            f"--max_length {args.max_length} exceeds the model's {positions} positions: lower it to {positions}"
        )
    known = model.get_input_embeddings().weight.shape[0]  # tokens with an embedding
    largest = max(int(rows.ids.max()) for rows in data)
    if largest >= known:  # a tokenizer may have more, such as an added [PAD], as long as no row uses them
        raise UserError(
            f"--model {args.model}: its embedding has {known} tokens, but the rows use token {largest}, "
            f"{tokenizer.convert_ids_to_tokens(largest)!r}: give the model its own tokenizer, or resize its embedding"
        )


# Where a difference counts. Over 180 families of transformers 5.24, tiny and random, on a CPU: sound ones have 0.0, 0.2
# and 0.0 at most. Of the others, `ahead` is about 3 and more, and `apart` or `leaks` 60 and more in float32. In bf16
# much of a fault hides in the rounding (`apart` 0.2 and more): `leaks`, which compares equal shapes, then still shows
# 0.06. On a GPU packed rows run another kernel than padded ones, so that `apart` is about 1 for sound models.
AHEAD, APART, LEAKS = 2.0, 3.0, 0.05


def check_model(args, accelerator: Accelerator, model, labelled_logits: LabelledLogits, data) -> bool:
    """Run a few rows before training; returns whether examples can share packed rows.

    A model that can't be packed is padded instead, or refused with an explicit --packing; one that looks ahead is
    refused, and so is one that can't run the rows. `model` is the prepared one, DDP's inner. Every rank runs the same
    rows, and the first one's figures decide for all.
    """
    packed = args.packing
    if packed is None:  # neither --packing nor --no-packing was given
        packed = packs_by_default(accelerator, model)
    configs = attention_configs(model)  # the check switches the attention function: to be able to switch back
    model.eval()
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    check = PackingCheck(
        model, labelled_logits, accelerator.autocast, args.max_tokens_per_micro_batch, args.max_length, dtype
    )
    rows = check_rows(data)
    try:
        found = check.differences(rows, packed)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model of any architecture may raise
        raise UserError(
            f"--model {args.model} can't run a row of {len(rows[0])} tokens ({one_line(error)}): "
            "install what it asks for, or give another causal LM"
        ) from None
    if found.idle_adapter:
        raise UserError(f"--lora_target_modules: no adapter runs on text, such as {found.idle_adapter}: name others")
    if math.isnan(found.ahead):
        raise UserError(f"--model {args.model} gives losses that are not finite before training: give other weights")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # without a backward pass the outermost weights stay whole: no checkpoint could be loaded
    figures = torch.tensor([found.ahead, found.apart, found.leaks], device=accelerator.device)
    ahead, apart, leaks = broadcast(figures).tolist()
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


def model_fingerprint(args) -> str:
    """Equal for the same weights in the same precision, wherever they lie.

    Cheap: of every tensor its name, shape and a few bytes count, of files in other formats a few bytes all over. A hub
    id stands for its commit. An adapter counts beside its base.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # set by `accelerate launch`
    if args.model is None:
        return f"the demo's, mixed_precision {precision}"
    from transformers import AutoConfig

    base, adapter, remedy = args.model, "", "give a causal LM"
    if is_adapter(args.model):
        base, adapter = adapter_config(args.model).base_model_name_or_path, f" adapter {weights_digest(args.model)}"
        remedy = f"name its base model in base_model_name_or_path of {args.model}/adapter_config.json"
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # the hub, configs and remote code each raise their own kinds
        raise UserError(f"--model {args.model}: {one_line(error)}: {remedy}") from None
    shape = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype"):  # where it lies and what wrote it changes no result
        shape.pop(name, None)
    shape = hashlib.sha256(repr(sorted(shape.items())).encode()).hexdigest()[:16]
    weights = f"commit {getattr(config, '_commit_hash', None)}"
    if Path(base).is_dir():
        weights = weights_digest(base)
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
            header.pop("__metadata__", None)  # free text, not a tensor
            parts = []
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                content = samples(f, 8 + length + start, end - start, 4)
                parts.append((name, entry["dtype"], entry["shape"], content))
        except (ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise UserError(f"{path} is not a safetensors file ({type(error).__name__}): copy it again") from None
    return parts


def samples(file, start: int, size: int, pieces: int, piece: int = 1024) -> bytes:
    """Up to `pieces` pieces of a file, evenly over `size` bytes from `start`, its last ones included."""
    content = b""
    for i in range(pieces):
        # from the first byte to `piece` before the last; max(1, ...) where there is one piece alone
        file.seek(start + max(0, size - piece) * i // max(1, pieces - 1))
        content += file.read(min(piece, size))
    return content


# --------------------------------------------------------------------------------------------------------------- set-up


def load_data(args, tokenizer, show: bool) -> tuple[TokenizedRows, TokenizedRows | None, set[int]]:
    """Training rows, held-out rows and the ids of the sources that are kept whole."""
    if args.train_file:
        train = load_tokens(args.train_file, tokenizer, args, [], show)
    else:
        rows = demo_rows("train", 10)
        train = tokenize(rows, ["demo"] * len(rows), tokenizer, args, [], show)
    with_copies = len(train)
    if args.drop_copies:
        train = train.without_copies()
    if args.drop_near_copies is not None:
        train = train.without_near_copies(args.drop_near_copies, show)
    if len(train) < args.pool_size:
        raise UserError(
            f"--pool_size {args.pool_size} exceeds the {len(train)} usable rows ({train.dropped} do not fit in "
            f"--max_length {args.max_length} or have no answer, {with_copies - len(train)} are copies of others or "
            f"resemble them): lower it to {len(train)} or less"
        )
    if args.cluster_sources > len(train):
        raise UserError(f"--cluster_sources {args.cluster_sources} exceeds the {len(train)} usable rows: lower it")
    keep = set()
    if args.keep_sources == ["auto"] and not args.cluster_sources:
        if train.names == ["all"] and args.selection in KEEPING:
            raise UserError(
                f"no row has a field {args.source_field!r}, which --keep_sources auto needs: name the field with "
                "--source_field, cluster the rows with --cluster_sources, or treat them alike with --keep_sources none"
            )
        keep = small_sources(dict(enumerate(torch.bincount(train.sources).tolist())))
    elif args.keep_sources not in (["auto"], ["none"]):
        for name in args.keep_sources:
            if name not in train.names:
                raise UserError(
                    f"--keep_sources {name} is not a source: choose auto, none or of {', '.join(train.names)}"
                )
        keep = set(map(train.names.index, args.keep_sources))
    if args.eval_file:
        held_out = load_tokens(args.eval_file, tokenizer, args, train.names, show)
    elif not args.train_file:
        rows = demo_rows("eval")
        held_out = tokenize(rows, ["demo"] * len(rows), tokenizer, args, train.names, show)
    else:
        held_out = None
    for what, data in (("training", train), ("held-out", held_out)):
        if data is None or not show:
            continue
        for line in data.remarks:
            print(f"{what} rows: {line}")
    return train, held_out, keep


def make_accelerator(args) -> Accelerator:
    """The launch's Accelerator, after refusing what would give wrong results or fail later."""
    trackers = [name for name in args.report_to if name != "png"]
    folders = ProjectConfiguration(args.output_dir, logging_dir=os.path.join(args.output_dir, "tensorboard"))
    accelerator = Accelerator(log_with=trackers or None, project_config=folders)
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"mixed_precision {accelerator.mixed_precision} is not supported: use bf16 or no")
    backend = accelerator.state.dynamo_plugin.backend.value
    if backend != "NO":
        raise UserError(
            f"dynamo_backend {backend} compiles the model past the probe's hooks: set it to no, and use --compile"
        )
    # it makes a plan for each new shape, 50 ms a time; flash attention does not
    torch.backends.cuda.enable_cudnn_sdp(False)
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


def find_projection(args, accelerator: Accelerator, model) -> VProjection | None:
    """The last V projection, as the main process finds it: under FSDP2 the others may hold no weights yet."""
    if args.selection != "colm":
        return None
    found, problem = None, None
    if accelerator.is_main_process:
        try:
            found = find_v_projection(model, args.probe_module)
        except ValueError as error:
            problem = str(error)
    found, problem = broadcast_object_list([found, problem])
    if problem:
        raise UserError(problem)
    return found


def build_run(args, accelerator, tokenizer, model, train, held_out, keep) -> Run:
    """Wrap the model for its devices and put probe, optimizer and schedule around it."""
    import transformers

    if accelerator.distributed_type != DistributedType.FSDP:  # which shards the model on its way to the device
        model.to(accelerator.device)
    found = find_projection(args, accelerator, model)  # before the model is wrapped: FSDP2 would share the weights out
    data = [train] if held_out is None else [train, held_out]
    check_fits(args, model, tokenizer, data)
    if args.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"--gradient_checkpointing: {one_line(error)}: drop the flag") from None
    if args.gradient_checkpointing or args.compile:
        require_input_gradients(model)

    # FSDP2 puts parameters of its own in the place of these: `prepare` hands them to the optimizer, and they are
    # collected again below.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    quantised = getattr(model, "is_quantized", False)
    try:
        model, optimizer = accelerator.prepare(model, optimizer)
    except Exception as error:  # FSDP2 knows plain tensors and those of bitsandbytes, not every package's
        if isinstance(error, torch.OutOfMemoryError) or not quantised:
            raise
        remedy = "set fsdp_cpu_ram_efficient_loading to false, or use DDP"
        raise UserError(
            f"--model {args.model}: its packed weights can't be shared out ({one_line(error)}): {remedy}"
        ) from None
    inner = accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # we enter autocast ourselves; logits stay in bf16
    optimizer = optimizer.optimizer  # without accelerate's wrapper, which handles scaling and accumulation

    warmup = math.ceil(args.warmup_ratio * args.max_steps)
    schedule = args.lr_scheduler
    if schedule == "constant":
        schedule = "constant_with_warmup"
    scheduler = transformers.get_scheduler(schedule, optimizer, warmup, args.max_steps)
    probe = None
    if found is not None:
        probe = VProjectionProbe(inner, found=found)
    bags = None
    if args.selection == "fresh" and accelerator.is_main_process:  # which chooses for all
        bags = tf_idf(train.ids, torch.tensor(train.offsets))  # 2 s for 262,000 rows
    run = Run(
        args=args,
        accelerator=accelerator,
        tokenizer=tokenizer,
        train=train,
        held_out=held_out,
        keep=keep,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        probe=probe,
        labelled_logits=LabelledLogits(inner),
        moments=AdamMoments(optimizer.defaults["betas"]),  # the optimizer's own betas (4.2)
        bags=bags,
        trained=[p for p in model.parameters() if p.requires_grad],
        modules=list(model.modules()),
    )
    args.packing = check_model(args, accelerator, run.inner, run.labelled_logits, data)
    gc.freeze()  # a million objects of models and libraries that no collection need visit again
    if accelerator.device.type == "cuda":
        torch.set_num_threads(1)  # the host handles tiny tensors only, and waking threads takes longer than the work
    if args.compile:
        compile_layers(run)
    return run


def require_input_gradients(model) -> None:
    """Have embedded tokens ask for a gradient in training, although the base is frozen.

    Without it no gradient would reach a checkpointed layer, and the first layer would be compiled on its own.
    """

    def ask(module, args, output):
        if torch.is_grad_enabled() and not output.requires_grad:
            return output.requires_grad_().clone()  # some models write into it, and nobody may write into a leaf
        return None

    model.disable_input_require_grads()  # transformers' own hook asks while probing, too: one more graph to compile
    model.get_input_embeddings().register_forward_hook(ask)


def compile_layers(run: Run) -> None:
    """Compile the decoder layers and the loss. While it probes, the last layer runs as written."""
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    # Dropout that is no module (`HashedDropout` replaces those that are) is drawn by PyTorch's own kernels, and its
    # masks are kept. The compiler's would be drawn again in backward, others than in forward, where a memory budget has
    # them computed again (seen in 2.11 and 2.13): gradients would be wrong without a warning.
    torch._inductor.config.fallback_random = True
    # 0.5: norms, activations and dropout are computed again in backward, half the memory for 3 % of the time. Beside
    # checkpointing, which runs whole layers again, nothing is left to save; a budget near 0 instead took more memory.
    torch._functorch.config.activation_memory_budget = 1.0 if run.args.gradient_checkpointing else 0.5
    # Numbers such as LoRA's scale are compiled in. As arguments they would have every graph traced twice.
    torch._dynamo.config.specialize_float = True
    run.labelled_logits.kernels = LossKernels.compiled()
    layers = decoder_layers(run)
    hash_dropout(run, layers)
    for layer in layers:
        layer.compile(dynamic=True)
    run.accelerator.print(f"--compile: the first steps wait for the compiler, once: {cache_dir()} keeps what it makes")


class HashedDropout(torch.nn.Dropout):
    """Dropout for compiled layers: an element is dropped by a hash of its number and two seeds.

    Compiled, `torch.nn.Dropout` draws every element's number from Philox, which takes three times as long as reading
    and writing the elements (H200). The hash below is short enough to hide behind these, and since the mask follows
    from the seeds, the backward pass may compute it again.
    """

    seed: Tensor  # [2] int32, of the micro-batch: one tensor for all modules
    own_seed: Tensor  # [2] int32, of this module

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        number = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
        # Products with large odd numbers, which wrap around, and shifts that drop the copies of the sign: MurmurHash3's
        # last steps, behind one more product that lets the second half of the seeds enter.
        h = (number ^ self.seed[0] ^ self.own_seed[0]) * -0x61C88647 + (self.seed[1] ^ self.own_seed[1])
        h = h ^ ((h >> 16) & 0xFFFF)
        h = h * -0x7A143595
        h = h ^ ((h >> 13) & 0x7FFFF)
        h = h * -0x3D4D51CB
        h = h ^ ((h >> 16) & 0xFFFF)
        dropped = (h & 0x7FFFFFFF) < round(self.p * 2**31)  # the lowest 31 bits as a number
        return torch.where(dropped, 0.0, x / (1 - self.p))


def hash_dropout(run: Run, layers: torch.nn.ModuleList) -> None:
    """Turn all dropout modules of the layers into `HashedDropout`, with new seeds for every micro-batch."""
    seed = torch.zeros(2, dtype=torch.int32, device=run.device)
    generator = generator_of(run.args.seed, "dropout modules")
    for module in layers.modules():
        if type(module) is torch.nn.Dropout and module.p > 0:
            module.__class__ = HashedDropout  # in its place: its parent and `run.modules` go on holding it
            module.seed = seed
            module.own_seed = torch.randint(2**31 - 1, (2,), generator=generator, dtype=torch.int32).to(run.device)

    def draw_seed(model, args):
        if model.training:
            seed.random_()  # from the generator that draws all other dropout

    run.inner.register_forward_pre_hook(draw_seed)


def decoder_layers(run: Run) -> torch.nn.ModuleList:
    """The list of a model's decoder layers."""
    if run.probe is not None:
        return run.probe.layers
    count = run.inner.config.get_text_config().num_hidden_layers
    for module in run.modules:  # the outermost comes first: experts have lists of their own
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"--compile finds no list of {count} decoder layers in this model: drop the flag")


# --------------------------------------------------------------------------------------------------- clocks and records


class Clock:
    """Seconds and peak memory of the phases of a step, read once at its end so that the device never waits."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple] = []
        self.mark("start")

    def mark(self, name: str) -> None:
        """End the phase `name`."""
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
            return a.elapsed_time(b) / 1e3 if self.cuda else b - a  # events count milliseconds

        record = {}
        for phase in ("probe", "select", "train"):  # one that a step does not have took no time
            record |= {f"{phase}_s": 0.0, f"{phase}_gb": 0.0}
        highest = 0.0
        for (_, before, _), (phase, now, peak) in itertools.pairwise(self.marks):
            record |= {f"{phase}_s": round(seconds(before, now), 6), f"{phase}_gb": round(peak, 6)}
            highest = max(highest, peak)
        record["step_s"] = round(seconds(self.marks[0][1], self.marks[-1][1]), 6)
        record["peak_gb"] = round(highest, 6)
        return record


def append(path: Path, record: dict) -> None:
    """One more line of a .jsonl file."""
    try:
        with open(path, "a") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}): {remedy(path.parent, error)}") from None


def remedy(folder: Path, error: Exception) -> str:
    """What to do when nothing could be written: a full disk has many names, and other causes are not about space."""
    little = 100 << 20  # bytes; most checkpoints are larger
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if folder.exists():  # it may be what could not be made
        full = full or shutil.disk_usage(folder).free < little
    if full:
        step = f"free space in {folder}"
    else:
        step = f"make {folder} writable"
    return f"{step}, then resume from the last checkpoint with --resume auto"


def read_records(path: Path, last_step: float = math.inf) -> list[dict]:
    """Records up to `last_step`; a line that a kill cut short ends them."""
    records = []
    if not path.exists():
        return records
    for line in path.read_text().splitlines():
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
        with replacing(folder / name) as aside, open(aside, "w") as f:
            for record in records:
                f.write(json.dumps(record) + "\n")


def rows_by_source(run: Run) -> dict[str, list[int]]:
    """How many rows of each source were drawn, kept and selected so far, from selection.jsonl."""
    data = run.train
    source_of = dict(zip(data.numbers.tolist(), data.sources.tolist(), strict=True))
    counts = {}
    for key in ("pool", "kept", "selected"):
        counts[key] = [0] * len(data.names)
    for record in read_records(Path(run.args.output_dir) / "selection.jsonl"):
        for key, of_source in counts.items():
            for row in record[key]:
                of_source[source_of[row]] += 1
    return counts


def draw_run(run: Run) -> None:
    """OUTPUT/run.png: loss, schedule, selection, time and memory of the run so far, for --report_to png."""
    from matplotlib.figure import Figure

    folder = Path(run.args.output_dir)
    metrics, evals = read_records(folder / "metrics.jsonl"), read_records(folder / "eval.jsonl")

    def column(name: str, records=metrics) -> list[float]:
        return [record[name] for record in records]

    steps = column("step")

    figure = Figure(figsize=(16, 9), layout="constrained")
    (losses, per_source, schedule), (selection, seconds, memory) = figure.subplots(2, 3)

    losses.plot(steps, column("loss"), color="0.7", label="coreset")
    for name, label in (("eval_loss", "held out, per example"), ("eval_loss_source_mean", "mean over sources")):
        losses.plot(column("step", evals), column(name, evals), marker="o", label=label)
    losses.set_title("loss, nats a token")

    evaluated = {}  # held-out rows may have other sources than clustered training rows; a dictionary keeps the order
    for record in evals:
        evaluated |= record["eval_loss_of"]
    for source in [*evaluated][:20]:  # more lines than that can't be told apart
        seen = [record for record in evals if source in record["eval_loss_of"]]
        values = [record["eval_loss_of"][source] for record in seen]
        per_source.plot(column("step", seen), values, marker=".", label=source)
    per_source.set_title("held-out loss of each source")

    schedule.plot(steps, column("grad_norm"), color="0.7", label="gradient norm, before clipping")
    schedule.set_yscale("log")
    rate = schedule.twinx()
    rate.plot(steps, column("lr"), color="C1")
    rate.set_ylabel("learning rate", color="C1")
    schedule.set_title("gradient norm and learning rate")

    counts = rows_by_source(run)
    places = torch.arange(len(run.train.names))
    for key, label, offset in (("pool", "of pools", -0.2), ("selected", "of coresets", 0.2)):
        count = torch.tensor(counts[key])  # [sources]
        share = 100 * count / count.sum()
        selection.barh((places + offset).tolist(), share.tolist(), 0.4, label=label)
    if len(places) <= 30:  # more names than that overlap
        selection.set_yticks(places.tolist(), [name[:24] for name in run.train.names], fontsize="small")
    selection.invert_yaxis()
    selection.set_title("share of each source, %")

    phases = ("probe", "select", "train")
    seconds.stackplot(steps, [column(f"{phase}_s") for phase in phases], labels=phases)
    seconds.set_ylim(0, 2 * sorted(column("step_s"))[len(steps) // 2])  # a first step that compiles is off the scale
    seconds.set_title("seconds of a step")

    memory.plot(steps, column("peak_gb"))
    memory.set_ylim(0, 1.1 * max(column("peak_gb")))
    memory.set_title("peak memory, GB")

    for axes in (losses, per_source, schedule, selection, seconds):
        if axes.get_legend_handles_labels()[1]:  # without held-out rows one has no curve
            axes.legend(fontsize="small")
    for axes in (losses, per_source, schedule, seconds, memory):
        axes.set_xlabel("step")
    figure.suptitle(run.args.run_name or folder.absolute().name)
    with replacing(folder / "run.png") as aside:
        figure.savefig(aside, format="png", dpi=100)


# ---------------------------------------------------------------------------------------------------------- checkpoints

# Settings that may differ when a run resumes; every other one shapes the result.
FREE_ON_RESUME = {"config", "output_dir", "overwrite", "resume", "save_every", "keep_checkpoints"}
FREE_ON_RESUME |= {"eval_file", "eval_every", "trust_remote_code"}
FREE_ON_RESUME |= {"report_to", "run_name"}  # what is shown of it
FREE_ON_RESUME |= {"train_file", "cache_dir"}  # paths may move: the data itself is compared
FREE_ON_RESUME |= {"packing", "compile", "gradient_checkpointing", "max_tokens_per_micro_batch"}  # speed and memory


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in an output folder, oldest first."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if path.name.removeprefix("checkpoint-").isdecimal():  # a checkpoint-best was not written by this file
            found.append(path)
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The steps done when a checkpoint was written, from its name."""
    return int(path.name.rpartition("-")[2])


def save_model(run: Run, folder: Path, weights: dict) -> None:
    """A PEFT adapter or a whole model, its tokenizer, and the settings it was trained with."""
    remove(folder)
    run.accelerator.unwrap_model(run.model).save_pretrained(folder, state_dict=weights)
    run.tokenizer.save_pretrained(folder)
    (folder / "settings.json").write_text(json.dumps(run.settings, indent=1))
    chat = {"chat_template": run.train.rendering == "messages"}  # how an evaluation should ask
    (folder / "colm_prompts.json").write_text(json.dumps(chat))


def save_checkpoint(run: Run, step: int) -> Path:
    """The model after `step` optimizer steps, with what a resumed run needs besides it in state.pt."""
    if run.saved and step_of(run.saved) == step:  # resumed from it, or saved a moment ago
        return run.saved
    weights, optimizer = run.trained_state()  # every rank takes part in gathering them; the main process writes
    state = {"step": step, "optimizer": optimizer, "scheduler": run.scheduler.state_dict()}
    state["moments"], state["taken"] = run.moments.state_dict(), run.taken
    # The clustering is kept, since the next one may be far away. At the end of the warm-up there is none yet.
    state["clusters"] = None
    if run.args.cluster_sources and step > run.args.cluster_warmup:
        state["clusters"] = run.train.sources
    path = Path(run.args.output_dir) / f"checkpoint-{step:06d}"

    def write():
        with replacing(path) as aside:
            save_model(run, aside, weights)
            torch.save(state, aside / "state.pt")
        for old in checkpoints(path.parent)[: -run.args.keep_checkpoints]:
            shutil.rmtree(old)

    on_main(run, write, f"checkpoint of step {step}")
    run.saved = path
    return path


def save_final(run: Run) -> Path:
    """The trained adapter or model in OUTPUT/final."""
    weights, _ = run.trained_state()
    path = Path(run.args.output_dir) / "final"

    def write():
        with replacing(path) as aside:
            save_model(run, aside, weights)

    on_main(run, write, "final model")
    return path


def on_main(run: Run, action, what: str) -> None:
    """The main process does `action`, which takes no argument; all ranks learn whether it could.

    If only the main process knew of a failure, the others would wait for it for ever.
    """
    problem = None
    if run.accelerator.is_main_process:
        try:
            action()
        except UserError as error:
            problem = str(error)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has many names
            what_to_do = remedy(Path(run.args.output_dir), error)
            problem = f"the {what} could not be written ({one_line(error)}): {what_to_do}"
    if run.all_reduce(torch.tensor(float(problem is not None), device=run.device)):
        raise UserError(problem or f"the main process could not write the {what}")


def settings_of(args, train: TokenizedRows) -> dict:
    """What shapes the result of a run: flags, model and data."""
    settings = {}
    for name, value in vars(args).items():
        if name not in FREE_ON_RESUME:
            settings[name] = value
    return settings | {"model": model_fingerprint(args), "training data": train.fingerprint()}


def find_checkpoint(args, folder: Path) -> Path | None:
    """The checkpoint to resume from, after checking that the output folder may be used."""
    holds_a_run = bool(checkpoints(folder)) or (folder / "metrics.jsonl").exists()
    if args.resume not in (None, "auto"):
        path = Path(args.resume)
        if not (path / "state.pt").exists() or not (path / "settings.json").exists():
            raise UserError(f"--resume {path} is not a checkpoint: give auto or a folder named checkpoint-...")
        of_this_run = path.resolve().parent == folder.resolve()
        if args.overwrite or (not of_this_run and holds_a_run):
            raise UserError(f"--resume {path} would delete what --output_dir {folder} holds: choose another folder")
        return path
    if args.resume and args.overwrite:
        raise UserError("--resume auto and --overwrite exclude each other: drop one")
    for path in [*checkpoints(folder), folder / "final"]:
        if args.overwrite and args.model and path.resolve() == Path(args.model).resolve():
            raise UserError(f"--overwrite would delete --model {args.model}: choose another --output_dir")
    for path in (folder, folder / "final"):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist: remove the link")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--output_dir {folder}: {existing} is a file: choose another folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"--output_dir {folder}: {existing} is not writable: choose another folder")
    if args.resume is None and not args.overwrite and holds_a_run:
        raise UserError(f"--output_dir {folder} holds another run: add --resume auto or --overwrite, or choose another")
    if args.resume == "auto" and checkpoints(folder):
        return checkpoints(folder)[-1]
    return None


def check_settings(args, settings: dict, checkpoint: Path) -> None:
    """A resumed run must compute what the run that it resumes would have computed."""
    try:
        saved = json.loads((checkpoint / "settings.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{checkpoint}/settings.json can't be read: resume from another checkpoint") from None
    for name, value in settings.items():
        before = saved.get(name)
        if before == value:
            continue
        if name == "max_steps" and before is not None and value > before:
            check_extension(args, before, step_of(checkpoint))
            continue
        flag = name if " " in name else f"--{name}"  # "training data" is no flag
        raise UserError(
            f"{flag} is {value}, but {checkpoint} was made with {before}: use the same, or start another --output_dir"
        )


def check_extension(args, before: int, done: int) -> None:
    """A run can be made longer where its length no longer matters: at a constant rate, past the warm-up."""
    if args.lr_scheduler != "constant":
        raise UserError(
            f"--max_steps {args.max_steps} is more than the {before} of the run, whose {args.lr_scheduler} schedule "
            "ends there: only --lr_scheduler constant can be extended"
        )
    if args.cluster_sources:
        raise UserError(
            f"--max_steps {args.max_steps} is more than the {before} of the run, over which --cluster_updates are "
            "spread: a run with --cluster_sources can't be extended"
        )
    if math.ceil(args.warmup_ratio * args.max_steps) > done:
        raise UserError(
            f"--max_steps {args.max_steps} lengthens the warm-up beyond the {done} steps done: lower it, or resume "
            "from a later checkpoint"
        )


def load_checkpoint(run: Run, path: Path) -> int:
    """Restore everything but the model's weights, which `load_model` has read; returns the number of steps done."""
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # a cut or foreign file fails in many ways
        raise UserError(f"{path}/state.pt can't be read ({type(error).__name__}): use another checkpoint") from None
    if state["optimizer"]["state"]:  # else setting it would make a step: no update had been made
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"], options=options)
    run.scheduler.load_state_dict(state["scheduler"])
    moments = state["moments"]
    for name in ("m", "v"):
        if moments[name] is not None:
            moments[name] = moments[name].to(run.device)
    run.moments.load_state_dict(moments)
    run.taken = state.get("taken", run.taken)  # older checkpoints have none
    if state["clusters"] is not None:
        use_clusters(run, state["clusters"])
    run.saved = path
    return state["step"]


def check_agreement(run: Run, start: int) -> None:
    """Ranks never exchange rows, so all must see the same data, flags and checkpoint."""
    mine = torch.tensor([start, seed_of(run.settings)])
    differs = (run.broadcast(mine) != mine).any()
    if run.all_reduce(differs.float().to(run.device)):
        raise UserError("the hosts differ in data, flags or checkpoint: give all the same, and a shared --output_dir")


@contextmanager
def open_output(run: Run, checkpoint: Path | None, start: int):
    """Hold the output folder for the duration of a block, cleared of what this run will write again.

    The system gives the lock up when the process ends, however it ends: none is ever stale.
    """
    folder = Path(run.args.output_dir)
    lock = None

    def prepare():
        nonlocal lock
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_WRONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output_dir {folder} is in use by another process: choose another folder") from None
        except OSError:
            pass  # a file system without locks
        if find_checkpoint(run.args, folder) != checkpoint:  # written to since this run looked
            raise UserError(f"--output_dir {folder} has been written to by another run: start again")
        stale = [path for path in checkpoints(folder) if run.args.overwrite or step_of(path) > start]
        if run.args.overwrite:
            stale += [folder / "final", folder / "tensorboard", folder / "wandb_id", folder / "run.png"]
        for path in [*folder.glob("tmp-*"), *stale]:
            remove(path)
        keep_up_to = start if checkpoint else -1  # -1: a new run writes the evaluation before step 1, too
        rewind(folder, keep_up_to)
        if run.args.model is None and run.args.lora_r:
            demo_model(run.args, run.tokenizer).save_pretrained(folder / "base")

    try:
        on_main(run, prepare, "output folder")
        yield
    finally:
        if lock is not None:
            os.close(lock)


# ---------------------------------------------------------------------------------------------------------------- a run


def kept_how(args) -> str:
    """What happens to small sources, in the words of the log."""
    return "kept whole" if args.keep_share == 1 else "kept in part"


def announce(run: Run) -> None:
    """What a reader wants to know before the first step."""
    args, data = run.args, run.train
    counts = torch.bincount(data.sources, minlength=len(data.names))
    sources = int(counts.count_nonzero())  # --drop_copies and --drop_near_copies may leave some without rows
    small = ", ".join(data.names[q] for q in sorted(run.keep)) or "none"
    say(f"{len(data)} rows of {sources} source{'s' if sources > 1 else ''}; {kept_how(args)}: {small}")
    if args.selection not in KEEPING:
        return
    share = sum(counts[sorted(run.keep)].tolist()) / len(data)
    share *= args.keep_share + (1 - args.keep_share) * args.coreset_size / args.pool_size
    if share * args.pool_size > args.coreset_size:
        say(f"they fill {share:.0%} of a pool: most coresets will be a random part of them alone")
    if sources > args.coreset_size:
        say(
            f"{sources} sources outnumber the {args.coreset_size} examples of a coreset: in a step most big "
            "sources get none or one, drawn at random; a coarser --source_field or --cluster_sources would say more"
        )


def summary(run: Run, final: Path) -> str:
    """What a reader wants to know at the end of a run."""
    folder, data = Path(run.args.output_dir), run.train
    evals, metrics = read_records(folder / "eval.jsonl"), read_records(folder / "metrics.jsonl")
    if evals:
        before, after, what = evals[0]["eval_loss"], evals[-1]["eval_loss"], "held-out loss"
    else:
        tenth = max(1, len(metrics) // 10)
        losses = [record["loss"] for record in metrics]
        before, after = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
        what = "training loss, first and last tenth"
    counts = rows_by_source(run)
    sizes = torch.bincount(data.sources, minlength=len(data.names)).tolist()
    lines = [f"\n{what}: {before:.4f} -> {after:.4f} in {len(metrics)} steps"]
    if run.args.cluster_sources:
        lines.append("sources as clustered last:")
    lines.append(f"{'source':<32} {'rows':>8} {'seen':>8} {'kept':>8} {'selected':>8}")
    for q, name in enumerate(data.names):
        line = f"{name[:32]:<32} {sizes[q]:>8} {counts['pool'][q]:>8} {counts['kept'][q]:>8} {counts['selected'][q]:>8}"
        if q in run.keep:
            line = f"{line}  ({kept_how(run.args)})"
        lines.append(line)
    if data.shortened or data.dropped:
        lines.append(f"{data.shortened} prompts were shortened and {data.dropped} rows dropped to fit --max_length")
    kind = "adapter" if run.args.lora_r else "model"
    lines.append(f"{kind}: {final}")
    return "\n".join(lines)


def start_trackers(run: Run, start: int) -> None:
    """Begin the curves of --report_to, or continue those of the run that is resumed."""
    args, folder = run.args, Path(run.args.output_dir)
    options = {}
    if "tensorboard" in args.report_to and start > 0:
        options["tensorboard"] = {"purge_step": start + 1}  # steps that will be made again are shown once
    if "wandb" in args.report_to and run.accelerator.is_main_process:
        identity = folder / "wandb_id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        name = args.run_name or folder.absolute().name
        options["wandb"] = {"name": name, "id": identity.read_text(), "resume": "allow"}
    project = os.environ.get("WANDB_PROJECT", "colm")
    config = {}
    for name, value in vars(args).items():
        config[name] = str(value)  # tensorboard takes no lists
    run.accelerator.init_trackers(project, config=config, init_kwargs=options)


def stop_on_signals(run: Run) -> None:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 end the run after the step under way, with a checkpoint."""

    def ask(number, frame):
        run.stop = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, ask)
    # `accelerate launch` runs a single process as its child and passes no signal on, and SIGUSR1 or SIGKILL ends
    # torchrun without a word to its ranks: have the kernel send a signal when the launcher ends. A shell is no
    # launcher: a run in its background outlives it.
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    launchers = (b"accelerate", b"torchrun", b"torch.distributed")
    if parent.exists() and any(name in parent.read_bytes() for name in launchers):
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def main(argv: list[str]) -> None:
    """A whole run: check, load, wrap, train, save."""
    # Flags, output folder and data first: what can be refused before a model is loaded is refused in seconds.
    args = parse_args(argv)
    folder = Path(args.output_dir)
    checkpoint = find_checkpoint(args, folder)
    tokenizer = load_tokenizer(args)
    train, held_out, keep = load_data(args, tokenizer, show=os.environ.get("RANK", "0") == "0")
    if args.max_steps is None:
        args.max_steps = max(1, int(args.num_epochs * (len(train) // args.pool_size)))
    if args.cluster_sources and args.cluster_warmup >= args.max_steps:
        raise UserError(
            f"--cluster_warmup {args.cluster_warmup} reaches the last step: lower it below {args.max_steps}"
        )
    settings = settings_of(args, train)
    if checkpoint:
        check_settings(args, settings, checkpoint)

    # The model on its devices, and the state of the run that is resumed.
    accelerator = make_accelerator(args)
    model = load_model(args, accelerator, tokenizer, checkpoint)
    run = build_run(args, accelerator, tokenizer, model, train, held_out, keep)
    run.settings = settings
    start = 0  # steps done
    if checkpoint:
        start = load_checkpoint(run, checkpoint)
    check_agreement(run, start)
    stop_on_signals(run)

    # Training, with the output folder locked.
    with open_output(run, checkpoint, start):
        start_trackers(run, start)
        announce(run)
        train_loop(run, start)
        final = save_final(run)
        if accelerator.is_main_process:
            if "png" in args.report_to:
                draw_run(run)
            accelerator.print(summary(run, final))
        accelerator.wait_for_everyone()
        accelerator.end_training()


def cli(argv: list[str]) -> None:
    """Run, and turn what the user can fix into one line and exit code 2."""
    hush_libraries()
    try:
        main(argv)
    except torch.OutOfMemoryError:  # of this process, whichever it is
        size = f"--max_tokens_per_micro_batch {parse_args(argv).max_tokens_per_micro_batch}"
        print(
            f"error: {size} takes more memory than the GPU has free: lower it, or add --gradient_checkpointing or "
            "--compile, then resume from the last checkpoint with --resume auto",
            file=sys.stderr,
        )
        sys.exit(2)
    except (UserError, OSError, RuntimeError) as error:
        if is_compiler_error(error):
            error = UserError(f"--compile fails on this model ({one_line(error)}): drop the flag")
        full_disk = isinstance(error, OSError) and error.errno == errno.ENOSPC
        unpackable = "--no-packing" in str(error)  # `packed_attention` knows no UserError, but names the remedy
        if not (isinstance(error, UserError) or full_disk or unpackable):
            raise  # a fault of ours, which needs its traceback
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line a host: another host may have other files
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli(sys.argv[1:])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # a gloo thread that wants the closing interpreter would abort it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

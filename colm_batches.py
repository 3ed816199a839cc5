"""From examples to per-example losses, fast: micro-batches by length, packed or padded, logits only where labels are.

    examples -> plan_micro_batches -> collate or pack -> micro_batch_losses(model(...))

Nothing here changes what is computed: `colm_core.example_losses` is the plain form of the same losses, and the tests
hold every function against a loop over single examples. The speed comes from four things: rows of similar length share
a micro-batch, packed rows have no padding at all, the output embedding runs at supervised positions alone, and the
cross-entropy never holds a float32 copy of the logits.

Symbols: n examples, B rows and T tokens of a micro-batch, M supervised tokens, L longest example, C copies (perturbed
by SPSA), V vocabulary, d hidden size.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

# ------------------------------------------------------------------------------------------ which examples run together


def plan_micro_batches(lengths: list[int], max_tokens: int, ranks: int, packed: bool) -> list[list[list[int]]]:
    """Split examples into micro-batches: plan[rank][i] lists the numbers of the examples in micro-batch i.

    A micro-batch has at most `max_tokens` tokens, padding included; a longer example runs alone. All ranks get the same
    number of micro-batches, since FSDP's collectives would hang otherwise, and about the same number of tokens. A rank
    that runs out of examples gets empty micro-batches; the caller runs any example with weight 0 in their place.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if packed:
        return _plan_packed(lengths, longest_first, max_tokens, ranks)
    return _plan_padded(lengths, longest_first, max_tokens, ranks)


def _plan_packed(lengths: list[int], longest_first: list[int], max_tokens: int, ranks: int) -> list[list[list[int]]]:
    """Fill as few bins as possible evenly: the longest example left goes into the emptiest bin.

    A bin is a micro-batch. The greedy rule keeps the largest load near the mean, and so the ranks in step.
    """
    bins_per_rank = -(-sum(lengths) // (max_tokens * ranks))  # rounded up: fewer can't hold all tokens
    bins_per_rank = min(bins_per_rank, -(-len(lengths) // ranks))  # more would stay empty
    while True:
        bins: list[list[int]] = []
        loads = []  # a heap of (tokens, bin): the emptiest is first
        for b in range(bins_per_rank * ranks):
            bins.append([])
            loads.append((0, b))
        for example in longest_first:
            tokens, b = loads[0]
            bins[b].append(example)
            heapq.heapreplace(loads, (tokens + lengths[example], b))
        if all(tokens <= max_tokens or len(bins[b]) == 1 for tokens, b in loads):
            return [bins[rank::ranks] for rank in range(ranks)]
        bins_per_rank += 1  # the bins were a little too few: no bin may overflow


def _plan_padded(lengths: list[int], longest_first: list[int], max_tokens: int, ranks: int) -> list[list[list[int]]]:
    """Deal examples to the ranks by length, then cut each rank's hand where padding to its longest would overflow."""
    plan: list[list[list[int]]] = []
    for rank in range(ranks):
        micro_batches: list[list[int]] = []
        for turn, start in enumerate(range(0, len(lengths), ranks)):
            # deal there and back (0 1 2, 2 1 0, ...), or rank 0 would get the longest example of every turn
            seat = rank if turn % 2 == 0 else ranks - 1 - rank
            if start + seat >= len(longest_first):
                continue  # the last turn does not reach every rank
            example = longest_first[start + seat]
            if micro_batches:
                width = lengths[micro_batches[-1][0]]  # its first example is its longest: all are padded to it
                fits = (len(micro_batches[-1]) + 1) * width <= max_tokens
            if micro_batches and fits:
                micro_batches[-1].append(example)
            else:
                micro_batches.append([example])
        plan.append(micro_batches)
    most = max(map(len, plan))
    for micro_batches in plan:
        while len(micro_batches) < most:
            micro_batches.append([])
    return plan


# --------------------------------------------------------------------------------------------- micro-batches as tensors


class MicroBatch(NamedTuple):
    """Examples as a model takes them: right-padded rows, or all end to end in one row, told apart by `offsets`."""

    input_ids: Tensor  # [B, T]; packed: [1, T]
    positions: Tensor  # [M] flat positions in B * T whose logits predict a supervised token
    targets: Tensor  # [M] those tokens
    owner: Tensor  # [M] the example (0..n-1) that each belongs to
    counts: Tensor  # [n] supervised tokens of each example
    lengths: Tensor  # [n] all tokens of each example
    offsets: Tensor | None = None  # packed: [slots] int32, first token of each example, then the end, repeated
    position_ids: Tensor | None = None  # packed: [1, T] positions that start at 0 in each example
    longest: int = 0  # packed: at least the length of every example

    def to(self, device) -> MicroBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> MicroBatch:
        """In page-locked memory, from which a GPU copies while the host continues."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> MicroBatch:
        """The batch with `function` of every tensor in it."""
        fields = self._asdict()
        for name, value in fields.items():
            if isinstance(value, Tensor):
                fields[name] = function(value)
        return MicroBatch(**fields)

    def model_inputs(self) -> dict:
        inputs = {"input_ids": self.input_ids, "use_cache": False}
        if self.offsets is not None:
            # the names under which transformers hands variable-length batches to its attention functions
            inputs |= {"cu_seq_lens_q": self.offsets, "cu_seq_lens_k": self.offsets}
            inputs |= {"max_length_q": self.longest, "max_length_k": self.longest, "position_ids": self.position_ids}
        return inputs

    def per_example(self, x: Tensor) -> Tensor:
        """One row for each example, zero beyond its end: packed [1, T, d] -> [n, L, d]. Padded rows are so already."""
        if self.offsets is None:
            return x
        return unpack(x[0], self.offsets[: len(self.counts) + 1], self.longest)


def collate(examples: Sequence[tuple[Tensor, Tensor]], pad_id: int = 0) -> MicroBatch:
    """Pad (token ids [T], supervised mask [T]) pairs on the right.

    A causal model needs no attention mask for that: no real token sees the padding behind it, and no padded position
    is supervised. Without a mask the fastest attention kernels can be used.
    """
    pad = nn.utils.rnn.pad_sequence
    ids, masks = zip(*examples, strict=True)  # one [T] tensor of each for every example
    lengths = torch.tensor([*map(len, ids)])  # [B]
    input_ids = pad(ids, batch_first=True, padding_value=pad_id).long()  # [B, T]
    supervised = pad(masks, batch_first=True)  # [B, T]
    owner, columns = supervised.nonzero(as_tuple=True)  # [M] each
    positions = owner * input_ids.shape[1] + columns - 1  # the token before predicts it
    return MicroBatch(input_ids, positions, input_ids[supervised], owner, supervised.sum(1), lengths)


def pack(examples: Sequence[tuple[Tensor, Tensor]], longest: int, multiple: int = 128, slots: int = 32) -> MicroBatch:
    """The same examples end to end in one row; `packed_attention` keeps them apart, `longest` bounds their lengths.

    The row is filled up to a multiple of `multiple` tokens, and `offsets` to a multiple of `slots` entries, so that few
    different shapes occur: every new shape would make a compiled model compile again and the allocator search again.
    The filling is one more example, without labels.
    """
    ids, masks = zip(*examples, strict=True)  # one [T_i] tensor of each for every example
    total = sum(map(len, ids))
    size = -(-total // multiple) * multiple  # T, rounded up
    filling = size - total
    lengths = torch.tensor([*map(len, ids), filling])  # [n + 1]
    starts = lengths.cumsum(0) - lengths  # [n + 1]
    entries = -(-(len(examples) + 2) // slots) * slots  # n + 1 starts and the end, rounded up
    offsets = torch.full((entries,), size, dtype=torch.int32)  # entries beyond the last example are empty examples
    offsets[: len(starts)] = starts
    input_ids = F.pad(torch.cat(ids).long(), (0, filling))  # [T]
    supervised = F.pad(torch.cat(masks), (0, filling))  # [T]
    example_of = torch.repeat_interleave(lengths, output_size=size)  # [T]
    column = torch.arange(size) - starts[example_of]  # [T] position within its example
    columns = column.clamp(max=longest - 1)  # the filling may be longer than the model has positions
    targets = supervised.nonzero()[:, 0]  # [M]
    owner = example_of[targets]
    return MicroBatch(
        input_ids[None],
        positions=targets - 1,
        targets=input_ids[targets],
        owner=owner,
        counts=torch.bincount(owner, minlength=len(examples)),
        lengths=lengths[:-1],
        offsets=offsets,
        position_ids=columns[None],
        longest=max(longest, filling),
    )


def unpack(x: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Packed rows to padded ones, zero beyond each end: [T, ...] -> [len(offsets) - 1, longest, ...]."""
    index = offsets[:-1, None] + torch.arange(longest, device=x.device)  # [n, L]
    outside = index >= offsets[1:, None]  # [n, L]
    outside = outside.view(*index.shape, *[1] * (x.dim() - 1))
    return x[index.clamp(max=len(x) - 1)].masked_fill(outside, 0)  # a product with 0 would let a neighbour's NaN pass


# ---------------------------------------------------------------------------------------- attention within each example


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Causal attention within each packed example, [1, heads, T, d_head] -> [1, T, heads, d_v].

    An attention function for transformers' AttentionInterface. The width of V may differ from that of Q and K. A GPU
    runs a variable-length kernel: flash attention in half precision, the memory-efficient one in float32. What those
    can't do (wide heads, a window in float32) and other devices pad for the one call.
    """
    offsets, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if offsets is None:
        raise RuntimeError("the model does not tell its attention where packed examples begin: use --no-packing")
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:  # no kernel below caps scores or has sinks
        raise RuntimeError("packed attention has no soft cap and no attention sinks, this model does: use --no-packing")
    window = kwargs.get("sliding_window")  # tokens a query sees, its own included
    if window is not None and window >= longest:
        window = None  # no example is long enough to notice
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, heads, d_head] each
    if torch.compiler.is_compiling():  # the kernel before writes this order at once, and output and gradients follow it
        q, k = q.contiguous(), k.contiguous()
    if scaling is None:
        scaling = q.shape[-1] ** -0.5  # the kernels' own default would count the columns that they are padded with
    half = v.dtype in (torch.bfloat16, torch.float16)
    if v.is_cuda and half and _flash_takes(max(q.shape[-1], v.shape[-1]), v.device):
        return _flash_varlen(q, k, v, offsets, longest, window, scaling, dropout)[None], None
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # grouped-query attention: the other paths want a key and a value for every query head
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    q, k = q.to(v.dtype), k.to(v.dtype)  # rotary embeddings in float32 widen them
    if v.is_cuda and v.dtype == torch.float32 and window is None:
        return _efficient_varlen(q, k, v, offsets, longest, scaling, dropout), None
    return _padded_varlen(q, k, v, offsets, longest, window, scaling, dropout)[None], None


def _padded_varlen(q, k, v, offsets, longest: int, window: int | None, scaling, dropout: float) -> Tensor:
    """The plain form: pad every example to the longest, attend, and take the real tokens back; [T, heads, d_v]."""
    total = len(q)
    offsets = offsets.unique()  # without empty slots
    q = unpack(q, offsets, longest).transpose(1, 2)  # [n, heads, L, d_head]
    k = unpack(k, offsets, longest).transpose(1, 2)
    v = unpack(v, offsets, longest).transpose(1, 2)
    mask = None
    if window is not None:
        position = torch.arange(longest, device=q.device)
        behind = position[:, None] - position  # [L, L] how far a key lies behind its query
        mask = (behind >= 0) & (behind < window)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    ).transpose(1, 2)  # [n, L, heads, d_v]
    token = torch.arange(total, device=q.device, dtype=offsets.dtype)
    owner = torch.searchsorted(offsets, token, right=True) - 1  # [T] the example of each token
    return out[owner, token - offsets[owner]]


# The two kernels are private operators of torch, called as seen in 2.9, 2.11 and 2.13. The public
# torch.nn.attention.varlen has no attention dropout and no float32, is missing in 2.9, and its arguments differ between
# 2.10 and 2.13.


def _flash_takes(width: int, device: torch.device) -> bool:
    """Heads go up to 256. Above 192 the backward fits no consumer GPU (compute capability 8.6, 8.9, 12)."""
    if width <= 192:
        return True
    major, minor = torch.cuda.get_device_capability(device)
    consumer = (major == 8 and minor > 0) or major == 12
    return width <= 256 and not consumer


def _flash_varlen(q, k, v, offsets, longest: int, window: int | None, scaling, dropout: float) -> Tensor:
    limits = {}
    if window is not None:
        limits = {"window_size_left": window - 1, "window_size_right": 0}  # keys beside the query's own
    causal, debug_mask = True, False
    d_v, widest = v.shape[-1], max(q.shape[-1], v.shape[-1])
    width = -(-widest // 8) * 8  # the kernel has one width for Q, K and V, a multiple of 8; columns of 0 add nothing
    q, k = q.to(v.dtype), k.to(v.dtype)  # rotary embeddings in float32 widen them
    if q.shape[-1] != width:
        q, k = F.pad(q, (0, width - q.shape[-1])), F.pad(k, (0, width - k.shape[-1]))
    if d_v != width:
        v = F.pad(v, (0, width - d_v))
    out = torch.ops.aten._flash_attention_forward(
        *(q, k, v, offsets, offsets, longest, longest, dropout, causal, debug_mask), scale=scaling, **limits
    )[0]  # [T, heads, width]
    return out[..., :d_v]  # [T, heads, d_v]


def _efficient_varlen(q, k, v, offsets, longest: int, scaling, dropout: float) -> Tensor:
    bias, causal, keep_for_backward = None, 1, torch.is_grad_enabled()
    return torch.ops.aten._efficient_attention_forward(
        *(q[None], k[None], v[None], bias, offsets, offsets, longest, longest, dropout, causal, keep_for_backward),
        scale=scaling,
    )[0]  # [1, T, heads, d_v]


# --------------------------------------------------------------------------------------------------------------- losses


class LabelledLogits:
    """Hook on the output embedding: hidden states [C * B, T, d] become [C, M, d], so logits exist only where labels do.

    At 512 tokens a row and 50,000 words of vocabulary the logits of all positions would be the largest tensor of a
    step. The hook acts on the one call that `micro_batch_losses` announces; any other forward passes untouched.
    C = 1, or the number of perturbed copies while `VProjectionProbe.spsa` runs.
    """

    def __init__(self, model: nn.Module):
        self.announced: MicroBatch | None = None
        self.kernels = LossKernels()
        self.handle = model.get_output_embeddings().register_forward_pre_hook(self._select)

    def _select(self, module, args):
        if self.announced is None:
            return None  # a forward of another caller, such as generation
        batch, self.announced = self.announced, None
        hidden = args[0].reshape(-1, batch.input_ids.numel(), args[0].shape[-1])  # [C, B * T, d]
        return (hidden.index_select(1, batch.positions), *args[1:])  # [C, M, d]


def micro_batch_losses(model: nn.Module, labelled_logits: LabelledLogits, batch: MicroBatch) -> Tensor:
    """L_i = mean of -log p over example i's supervised tokens, [C, n] in nats, in one `model(...)`."""
    labelled_logits.announced = batch
    logits = model(**batch.model_inputs()).logits  # [C, M, V]
    if labelled_logits.announced is not None:
        raise RuntimeError("the model did not call its output embedding: CoLM needs a causal LM with a head module")
    copies = len(logits)
    targets = batch.targets.repeat(copies)  # [C * M]
    token_losses = TokenCrossEntropy.apply(logits.flatten(0, 1), targets, labelled_logits.kernels)  # [C * M]
    sums = token_losses.new_zeros(copies, len(batch.counts))
    sums = sums.index_add(1, batch.owner, token_losses.view(copies, -1))  # [C, n]
    return sums / batch.counts  # DIFFERS 10: each example by its own tokens, not by the padded width


def _log_sum_exp(logits: Tensor) -> Tensor:
    """[M, V] -> [M], at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(1)


def _scaled_softmax_(logits: Tensor, log_sum_exp: Tensor, scale: Tensor) -> None:
    """Write softmax(logits) * scale over the logits [M, V]; `log_sum_exp` and `scale` are [M]."""
    logits.copy_((logits.to(log_sum_exp.dtype) - log_sum_exp[:, None]).exp() * scale[:, None])


class LossKernels(NamedTuple):
    """How `TokenCrossEntropy` works through the logits.

    Run as written, an operation makes a float32 copy of the rows it works on: 512 rows of 50,000 words are 100 MB, and
    enough to keep a GPU busy. Compiled, it makes none and takes all rows at once.
    """

    rows_at_once: int = 512
    log_sum_exp: Callable = _log_sum_exp
    scaled_softmax_: Callable = _scaled_softmax_

    @staticmethod
    def compiled() -> LossKernels:
        no_limit = 1 << 30
        # dynamic at once: else the first number of rows gets kernels of its own, and the second number all others
        log_sum_exp = torch.compile(_log_sum_exp, dynamic=True)
        return LossKernels(no_limit, log_sum_exp, torch.compile(_scaled_softmax_, dynamic=True))


class TokenCrossEntropy(torch.autograd.Function):
    """Cross-entropy of every token, logits [M, V] and targets [M] -> [M], at least float32.

    Backward writes the gradient over the logits, which saves a tensor of their size. So it runs once, and whatever made
    the logits must not need them again (a bare tanh would, and autograd then says so).
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, kernels: LossKernels) -> Tensor:
        # detached: or compiled kernels would tell logits that need a gradient from those that don't
        parts = [kernels.log_sum_exp(rows) for rows in logits.detach().split(kernels.rows_at_once)]
        log_sum_exp = torch.cat(parts)  # [M]
        log_p = logits.gather(1, targets[:, None])[:, 0].to(log_sum_exp.dtype) - log_sum_exp  # [M]
        ctx.save_for_backward(logits, targets, log_sum_exp, log_p)
        ctx.kernels = kernels
        return -log_p

    @staticmethod
    def backward(ctx, grad: Tensor):
        logits, targets, log_sum_exp, log_p = ctx.saved_tensors
        n = ctx.kernels.rows_at_once
        for rows, lse, scale in zip(logits.split(n), log_sum_exp.split(n), grad.split(n), strict=True):
            ctx.kernels.scaled_softmax_(rows, lse, scale)  # d/d logits = (softmax - one-hot) grad
        at_target = log_p.expm1() * grad  # (p - 1) grad, exact where p is near 1
        return logits.scatter_(1, targets[:, None], at_target[:, None].to(logits.dtype)), None, None


# -------------------------------------------------------------------------------------------- can examples share a row?


class Differences(NamedTuple):
    """How much a few rows' token losses depend on what they must not depend on, in units of rounding noise."""

    ahead: float  # on the tokens behind them; NaN where the losses are not finite
    apart: float = 0.0  # on being packed instead of padded: windows, positions, kernels
    leaks: float = 0.0  # on the neighbour before them in a packed row: state and attention that pass a row's end
    problem: str = ""  # what packing raised
    idle_adapter: str = ""  # a LoRA module, where none of them ever runs


def check_rows(data: Sequence) -> list[Tensor]:
    """Token ids of seven rows of TokenizedRows: the longest, three of middle length, and the three shortest.

    Windows and positions show in the longest; short neighbours share a packed row.
    """
    places = []  # (length, data set, row) of every row
    for part, rows in enumerate(data):
        for i in range(len(rows)):
            places.append((rows.length(i), part, i))
    places.sort()
    middle = max(0, len(places) // 2 - 1)
    chosen = [places[-1], *places[middle : middle + 3], *places[:3]]
    chosen = (chosen * 7)[:7]  # where there are fewer rows, some are taken twice
    return [data[part].example(i).ids.long() for _, part, i in chosen]


FIRST, LAST = 32, 96  # tokens of a row whose losses are compared: leaks show at its beginning, windows at its end


def watched(tokens: int) -> Tensor:
    """Which tokens of a row have a loss in the check, [tokens] bool."""
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[1 : 1 + FIRST] = True
    mask[max(1, tokens - LAST) :] = True
    return mask


@dataclass
class PackingCheck:
    """Runs a few rows in several arrangements before training and compares their token losses.

    Packing is right only for models whose every layer keeps the examples of a row apart. Recurrent states and
    convolutions pass from one to the next; some models cut attention windows in the mask alone, count positions from 2,
    or ignore the attention function. No list of architectures stays complete, so the model itself is asked.
    """

    model: nn.Module  # as prepared, DDP's inner
    labelled_logits: LabelledLogits
    autocast: Callable
    max_tokens: int  # of a micro-batch
    max_length: int
    dtype: torch.dtype  # that the model computes in

    def differences(self, rows: list[Tensor], packed: bool) -> Differences:
        """Four forwards of `rows` (token ids each), seven when they may be `packed`. Raises what the model raises."""
        # 1. Padded, as they are; and again after their last quarter was replaced by their beginning.
        adapters = [name for name, module in self.model.named_modules() if hasattr(module, "lora_A")]
        ran = []  # adapters, as they run

        def note(module, args, output):
            if hasattr(module, "lora_A"):
                ran.append(module)

        with register_module_forward_hook(note):  # of every module, while this block lasts
            padded = self.token_losses(rows)
        if not torch.cat(padded).isfinite().all():
            return Differences(ahead=math.nan)
        idle = adapters[0] if adapters and not ran else ""
        kept = [max(2, len(ids) * 3 // 4) for ids in rows]
        changed = []
        for ids, n in zip(rows, kept, strict=True):
            changed.append(torch.cat([ids[:n], ids[: len(ids) - n]]))
        changed = self.token_losses(changed)

        # 2. The unit: how far the same losses move when every rounding falls differently.
        rounded = []
        for seed in range(2):
            with _rounding_errors(self.model, self.dtype, seed):
                rounded.append(self.token_losses(rows))

        def in_noise(a: list[Tensor], b: list[Tensor], part: slice) -> float:
            """Mean difference of the losses of some rows, in that unit."""
            reference = padded[part]
            noise = sum(_mean_difference(reference, other[part]) for other in rounded) / len(rounded)
            floor = torch.finfo(torch.float32).eps * float(torch.cat(reference).mean())  # losses are float32
            return _mean_difference(a[part], b[part]) / max(noise, floor, 1e-30)

        # 3. A causal model's earlier losses know nothing of a changed end.
        before, after = [], []
        for ids, n, value, other in zip(rows, kept, padded, changed, strict=True):
            early = int(watched(len(ids))[:n].sum())  # losses of tokens before the change
            before.append(value[:early])
            after.append(other[:early])
        ahead = in_noise(before, after, slice(None))
        if not packed:
            return Differences(ahead, idle_adapter=idle)

        # 4. Packed: each as it fits, then short ones in one row, twice, with one of them reversed the second time.
        room = max(2, self.max_tokens // len(rows))
        short = [ids[:room] for ids in rows]
        reversed_one = len(short) // 2
        neighbour = [*short]
        neighbour[reversed_one] = short[reversed_one].flip(0)
        try:
            use_packed_attention(self.model)
            alone = self.token_losses(rows, packed=True)
            first = self.token_losses(short, packed=True, together=True)
            second = self.token_losses(neighbour, packed=True, together=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # kernels that are not installed, attention that can't, ...
            self.labelled_logits.announced = None  # the output embedding may not have been reached
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return Differences(ahead, math.inf, math.inf, problem, idle)
        apart = max(in_noise(padded, alone, slice(1)), in_noise(padded, alone, slice(1, None)))
        # What a change does to the rows before it is numerical: experts that are handed other numbers of tokens.
        coupling = in_noise(first, second, slice(reversed_one))
        leaks = in_noise(first, second, slice(reversed_one + 1, None))
        if leaks <= 3 * coupling:
            leaks = 0.0
        return Differences(ahead, apart, leaks, idle_adapter=idle)

    @torch.no_grad()
    def token_losses(self, rows: list[Tensor], packed: bool = False, together: bool = False) -> list[Tensor]:
        """Losses of the watched tokens of each row, [watched] float32 on the host for each.

        The rows are padded, packed, or packed `together` into one row in their order.
        """
        plan = [list(range(len(rows)))]
        if not together:
            plan = plan_micro_batches([*map(len, rows)], self.max_tokens, 1, packed)[0]
        device = self.model.get_input_embeddings().weight.device
        losses: list[Tensor] = [torch.zeros(0)] * len(rows)
        for members in plan:
            examples = [(rows[i], watched(len(rows[i]))) for i in members]
            batch = pack(examples, self.max_length) if packed else collate(examples)
            owner = batch.owner
            # every token becomes an example of its own: the mean over a row would hide a leak at its beginning
            batch = batch._replace(owner=torch.arange(len(owner)), counts=torch.ones_like(owner))
            with self.autocast():
                values = micro_batch_losses(self.model, self.labelled_logits, batch.to(device))[0].float().cpu()
            for place, i in enumerate(members):
                losses[i] = values[owner == place]
        return losses


def use_packed_attention(model: nn.Module) -> None:
    """Give the model `packed_attention`, through transformers' registry of attention functions."""
    import transformers

    transformers.AttentionInterface.register("packed", packed_attention)
    model.set_attn_implementation("packed")


def attention_configs(model: nn.Module) -> list[tuple]:
    """The configs of a model and its parts, each with the name of its attention function, to be able to go back."""
    seen, found = set(), []
    for module in model.modules():
        config = getattr(module, "config", None)
        if id(config) in seen or not hasattr(config, "_attn_implementation_internal"):
            continue
        seen.add(id(config))  # many modules share a config
        found.append((config, config._attn_implementation))
    return found


def _mean_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return float((torch.cat(a) - torch.cat(b)).abs().mean())


@contextmanager
def _rounding_errors(model: nn.Module, dtype: torch.dtype, seed: int):
    """Embeddings off by one rounding error of `dtype` each, in a random direction, which changes all later roundings.

    Two batches of the same rows would not do: a GPU often gives them the same bits.
    """

    def shift(module, args, output):
        generator = torch.Generator(output.device).manual_seed(seed)
        up = torch.randint(0, 2, output.shape, generator=generator, device=output.device)
        return output * (1 + (2 * up - 1) * torch.finfo(dtype).eps / 2).to(output.dtype)

    with model.get_input_embeddings().register_forward_hook(shift):
        yield


# ----------------------------------------------------------------------------------------- hidden states for clustering


@torch.no_grad()
def mean_hidden_states(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Mean over its tokens of what the output embedding gets to see of an example, [n, d] in float32 (section 5.4)."""
    seen: list[Tensor] = []

    def capture(module, args):
        seen.append(batch.per_example(args[0]).float())  # [n, L, d]
        return (args[0][:, :1], *args[1:])  # the logits are not used: one position is enough

    with model.get_output_embeddings().register_forward_pre_hook(capture):  # the hook lasts for this block
        model(**batch.model_inputs())
    hidden = seen[0]
    real = torch.arange(hidden.shape[1], device=hidden.device) < batch.lengths[:, None]  # [n, L]
    return (hidden * real[:, :, None]).sum(1) / batch.lengths[:, None]

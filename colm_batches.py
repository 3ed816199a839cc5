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
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """Fill as few bins as possible evenly: the longest example left goes into the emptiest bin."""
    bins_per_rank = -(-sum(lengths) // (max_tokens * ranks))  # rounded up: fewer can't hold all tokens
    bins_per_rank = min(bins_per_rank, -(-len(lengths) // ranks))  # more would stay empty
    while True:
        bins: list[list[int]] = [[] for _ in range(bins_per_rank * ranks)]
        loads = [(0, b) for b in range(len(bins))]  # a heap of (tokens, bin): the emptiest is first
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
    most = max(len(micro_batches) for micro_batches in plan)
    for micro_batches in plan:
        micro_batches.extend([] for _ in range(most - len(micro_batches)))
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
        return MicroBatch(*(t.to(device, non_blocking=True) if isinstance(t, Tensor) else t for t in self))

    def pin(self) -> MicroBatch:
        return MicroBatch(*(t.pin_memory() if isinstance(t, Tensor) else t for t in self))

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
    lengths = torch.tensor([len(ids) for ids, _ in examples])
    input_ids = pad([ids.long() for ids, _ in examples], batch_first=True, padding_value=pad_id)  # [B, T]
    supervised = pad([mask for _, mask in examples], batch_first=True)  # [B, T]
    owner, columns = supervised.nonzero(as_tuple=True)  # [M] each
    positions = owner * input_ids.shape[1] + columns - 1  # the token before predicts it
    return MicroBatch(input_ids, positions, input_ids[supervised], owner, supervised.sum(1), lengths)


def pack(examples: Sequence[tuple[Tensor, Tensor]], longest: int, multiple: int = 128, slots: int = 32) -> MicroBatch:
    """The same examples end to end in one row; `packed_attention` keeps them apart, `longest` bounds their lengths.

    The row is filled up to a multiple of `multiple` tokens, and `offsets` to a multiple of `slots` entries, so that few
    different shapes occur: every new shape would make a compiled model compile again and the allocator search anew. The
    filling is one more example, without labels.
    """
    total = sum(len(ids) for ids, _ in examples)
    size = -(-total // multiple) * multiple
    filling = size - total
    lengths = torch.tensor([*(len(ids) for ids, _ in examples), filling])  # [n + 1]
    starts = lengths.cumsum(0) - lengths  # [n + 1]
    entries = -(-(len(examples) + 2) // slots) * slots
    offsets = torch.full((entries,), size, dtype=torch.int32)  # entries beyond the last example are empty examples
    offsets[: len(starts)] = starts
    input_ids = F.pad(torch.cat([ids for ids, _ in examples]).long(), (0, filling))  # [T]
    supervised = F.pad(torch.cat([mask for _, mask in examples]), (0, filling))  # [T]
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
    """Causal attention within each packed example, [1, heads, T, d_head] -> [1, T, heads, d_head].

    An attention function for transformers' AttentionInterface. A GPU runs a variable-length kernel: flash attention in
    half precision, the memory-efficient one in float32; anything else pads for the one call.
    """
    offsets, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if offsets is None or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise RuntimeError("this model's attention can't keep packed examples apart: use --no-packing")
    window = kwargs.get("sliding_window")  # tokens a query sees, its own included
    if window is not None and window >= longest:
        window = None  # no example is long enough to notice
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, d_head]
    if v.is_cuda and v.dtype in (torch.bfloat16, torch.float16):
        return _flash_varlen(q, k, v, offsets, longest, window, scaling, dropout)[None], None
    if window is not None:
        raise RuntimeError(f"a sliding window of {window} tokens needs half precision on a GPU: use --no-packing")
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # grouped-query attention: these two paths want a key and a value for every query head
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if v.is_cuda and v.dtype == torch.float32:
        return _efficient_varlen(q, k, v, offsets, longest, scaling, dropout), None
    offsets = offsets.unique()  # without empty slots
    q, k, v = (unpack(x, offsets, longest).transpose(1, 2) for x in (q, k, v))  # [n, heads, L, d_head]
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling).transpose(1, 2)
    token = torch.arange(query.shape[2], device=query.device, dtype=offsets.dtype)
    owner = torch.searchsorted(offsets, token, right=True) - 1  # [T] the example of each token
    return out[owner, token - offsets[owner]][None], None


# The two kernels are private operators of torch, called as seen in 2.9, 2.11 and 2.13. The public
# torch.nn.attention.varlen has no attention dropout and no float32, is missing in 2.9, and its arguments differ between
# 2.10 and 2.13.


def _flash_varlen(q, k, v, offsets, longest: int, window: int | None, scaling, dropout: float) -> Tensor:
    limits = {}
    if window is not None:
        limits = {"window_size_left": window - 1, "window_size_right": 0}  # keys beside the query's own
    causal, debug_mask = True, False
    q, k = q.to(v.dtype), k.to(v.dtype)  # rotary embeddings in float32 widen them
    return torch.ops.aten._flash_attention_forward(
        *(q, k, v, offsets, offsets, longest, longest, dropout, causal, debug_mask), scale=scaling, **limits
    )[0]  # [T, heads, d_head]


def _efficient_varlen(q, k, v, offsets, longest: int, scaling, dropout: float) -> Tensor:
    bias, causal, keep_for_backward = None, 1, torch.is_grad_enabled()
    q, k = q.to(v.dtype), k.to(v.dtype)
    return torch.ops.aten._efficient_attention_forward(
        *(q[None], k[None], v[None], bias, offsets, offsets, longest, longest, dropout, causal, keep_for_backward),
        scale=scaling,
    )[0]  # [1, T, heads, d_head]


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
            return None  # somebody else's forward, such as generation
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
    """How `TokenCrossEntropy` goes over the logits.

    Run as written, an operation makes a float32 copy of the rows it works on: 512 rows of 50,000 words are 100 MB, and
    enough to keep a GPU busy. Compiled, it makes none and takes all rows at once.
    """

    rows_at_once: int = 512
    log_sum_exp: Callable = _log_sum_exp
    scaled_softmax_: Callable = _scaled_softmax_

    @staticmethod
    def compiled() -> LossKernels:
        no_limit = 1 << 30
        return LossKernels(no_limit, torch.compile(_log_sum_exp), torch.compile(_scaled_softmax_))


class TokenCrossEntropy(torch.autograd.Function):
    """Cross-entropy of every token, logits [M, V] and targets [M] -> [M], at least float32.

    Backward writes the gradient over the logits, which saves a tensor of their size. So it runs once, and whatever made
    the logits must not need them again (a bare tanh would, and autograd then says so).
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, kernels: LossKernels) -> Tensor:
        parts = [kernels.log_sum_exp(rows) for rows in logits.split(kernels.rows_at_once)]
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


# ----------------------------------------------------------------------------------------- hidden states for clustering


@torch.no_grad()
def mean_hidden_states(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Mean over its tokens of what the output embedding gets to see of an example, [n, d] in float32 (section 5.4)."""
    seen: list[Tensor] = []

    def capture(module, args):
        seen.append(batch.per_example(args[0]).float())  # [n, L, d]
        return (args[0][:, :1], *args[1:])  # nobody needs the logits

    with model.get_output_embeddings().register_forward_pre_hook(capture):  # the hook lasts for this block
        model(**batch.model_inputs())
    hidden = seen[0]
    real = torch.arange(hidden.shape[1], device=hidden.device) < batch.lengths[:, None]  # [n, L]
    return (hidden * real[:, :, None]).sum(1) / batch.lengths[:, None]

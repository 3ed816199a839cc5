"""VProjectionProbe against autograd and in-place perturbation in float64, on every layout of the V projection."""

import copy
import pickle
import warnings
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import KINDS, VOCAB, tiny_model, v_rows
from torch import Tensor, nn

import colm_batches
from colm_batches import LabelledLogits, collate, micro_batch_losses, pack
from colm_core import VProjectionProbe, example_losses, find_v_projection

SIZES = [(9, 3), (5, 1), (14, 6), (7, 0), (3, 2)]  # (tokens, prompt)
DIRECTIONS = 3
EVERY_MODEL = pytest.mark.parametrize(("kind", "lora"), [(kind, lora) for kind in KINDS for lora in (True, False)])


def examples(sizes=SIZES) -> list[tuple[Tensor, Tensor]]:
    """Token ids [T] and which of them are supervised: all behind the prompt, but never the first."""
    g = torch.Generator().manual_seed(3)
    rows = []
    for tokens, prompt in sizes:
        rows.append((torch.randint(0, VOCAB, (tokens,), generator=g), torch.arange(tokens) >= max(prompt, 1)))
    return rows


def in_float64(model: nn.Module) -> nn.Module:
    """A float64 copy throughout; Transformers' RMSNorm, which always works in float32, gets a forward of its own."""
    model = copy.deepcopy(model).double().eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(rms_norm, module)
    return model


def rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    return module.weight * x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


class Probed:
    """A model with its hook and probe; `gradients` [B, D] and `spsa` [B, n] of some examples in one batch."""

    def __init__(self, model: nn.Module, **options):
        self.model, self.hook, self.probe = model, LabelledLogits(model), VProjectionProbe(model, **options)

    def losses(self, rows, **options):
        batch = collate(rows, **options)
        return lambda: micro_batch_losses(self.model, self.hook, batch)

    def gradients(self, rows, **options) -> Tensor:
        return self.probe.gradients(self.losses(rows, **options))

    def spsa(self, rows, z: Tensor, eps: float, wide_tail: bool = True, **options) -> Tensor:
        return self.probe.spsa(self.losses(rows, **options), z, eps, wide_tail)

    def directions(self, n: int = DIRECTIONS) -> Tensor:
        return torch.randn(n, *self.probe.shape, generator=torch.Generator().manual_seed(4))


def plain_loss(model: nn.Module, ids: Tensor, supervised: Tensor) -> Tensor:
    """Mean loss of one example alone, from the model's full logits: no batch, no hook, no chunk."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0]  # [T, V]
    return F.cross_entropy(logits[:-1][supervised[1:]], ids[supervised])


class Reference:
    """The probed matrix of a float64 copy: its gradient by autograd, its derivative by perturbing it in place."""

    def __init__(self, model: nn.Module, name: str, rows: list[int], transposed: bool = False):
        self.model = in_float64(model)
        module = self.model.get_submodule(name)
        self.weight = module.lora_B["default"].weight if hasattr(module, "lora_B") else module.weight
        self.rows, self.transposed = rows, transposed

    def gradients(self, examples) -> Tensor:
        out = []
        for ids, supervised in examples:
            (g,) = torch.autograd.grad(plain_loss(self.model, ids, supervised), self.weight)
            out.append((g.T if self.transposed else g)[self.rows].flatten())
        return torch.stack(out)

    @torch.no_grad()
    def differences(self, examples, z: Tensor, eps: float) -> Tensor:
        """[L(w + eps z) - L(w - eps z)] / (2 eps) with the weight overwritten (Eq. 5)."""
        original, out = self.weight.clone(), torch.zeros(len(examples), len(z), dtype=torch.float64)
        for k, direction in enumerate(z.double()):
            for sign in (1, -1):
                self.weight.copy_(original)
                (self.weight.T if self.transposed else self.weight)[self.rows] += sign * eps * direction
                for i, (ids, supervised) in enumerate(examples):
                    out[i, k] += sign * plain_loss(self.model, ids, supervised) / (2 * eps)
        self.weight.copy_(original)
        return out


@cache
def reference(kind: str, lora: bool) -> SimpleNamespace:
    """Float64 truth for the standard examples and directions; computed once for all tests."""
    model = tiny_model(kind, lora)
    probed = Probed(copy.deepcopy(model))
    truth = Reference(model, probed.probe.name, v_rows(kind), transposed=kind == "gpt2" and not lora)
    z, gradients = probed.directions(), truth.gradients(examples())
    return SimpleNamespace(
        gradients=gradients,
        derivatives=gradients @ z.double().flatten(1).T,
        differences={eps: truth.differences(examples(), z, eps) for eps in (1e-3, 3e-2)},
    )


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm of the expected, over all examples."""
    return float((actual.double() - expected).norm() / expected.norm())


# -------------------------------------------------------------------------------------------------- against the truth


@pytest.mark.parametrize("checkpointing", ["none", "eval", "train"])
@EVERY_MODEL
def test_both_probes_match_the_truth(kind, lora, checkpointing):
    """Measured in float32: gradients 3e-7 to 8e-7; SPSA against the same difference in float64 2e-7 to 9e-7 with a wide
    tail, and against the exact derivative, which truncation of order eps^2 adds to, at most 3e-5.
    """
    model, truth = tiny_model(kind, lora), reference(kind, lora)
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train(checkpointing == "train")  # no dropout in these models; layers only checkpoint while training
    probed = Probed(model)
    z = probed.directions()
    assert error(probed.gradients(examples()), truth.gradients) < 3e-6
    derivatives = probed.spsa(examples(), z, eps=1e-3)
    assert error(derivatives, truth.differences[1e-3]) < 3e-6
    assert error(derivatives, truth.derivatives) < 1e-4
    assert error(probed.spsa(examples(), z, eps=3e-2), truth.differences[3e-2]) < 3e-6
    narrow = probed.spsa(examples(), z, eps=3e-2, wide_tail=False)  # rounding falls with 1 / eps
    assert error(narrow, truth.differences[3e-2]) < 1e-4


@EVERY_MODEL
def test_in_float64_both_probes_are_exact(kind, lora):
    probed, truth = Probed(in_float64(tiny_model(kind, lora))), reference(kind, lora)
    z = probed.directions().double()
    assert error(probed.gradients(examples()), truth.gradients) < 1e-12
    assert error(probed.spsa(examples(), z, eps=1e-3), truth.differences[1e-3]) < 1e-10
    wide, narrow = (error(probed.spsa(examples(), z, eps=eps), truth.derivatives) for eps in (1e-3, 1e-4))
    assert wide < 1e-4 and narrow < 1e-6
    assert narrow == pytest.approx(wide / 100, rel=0.1)  # what is left is truncation, of order eps^2


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_the_probed_rows_are_values(kind):
    """Values have no part in the attention weights of their layer; queries and keys have."""
    model = tiny_model(kind, lora=False, attn_implementation="eager")
    probe = VProjectionProbe(model)
    assert probe.rows.tolist() == v_rows(kind)
    weight = probe.module.weight.T if kind == "gpt2" else probe.module.weight
    others = sorted(set(range(len(weight))) - set(v_rows(kind)))
    ids = examples()[2][0][None]

    @torch.no_grad()
    def outputs(change: list[int]) -> tuple[Tensor, Tensor]:
        before = weight.detach().clone()
        weight[change] *= 1.5
        out = model(input_ids=ids, output_attentions=True)
        weight.copy_(before)
        return out.attentions[-1], out.logits

    attention, logits = outputs([])
    changed = outputs(v_rows(kind))
    assert torch.equal(changed[0], attention) and not torch.allclose(changed[1], logits)
    for row in range(0, len(others), 8):  # any head's q or k
        assert not torch.allclose(outputs(others[row : row + 8])[0], attention)


@pytest.mark.parametrize("wide_tail", [True, False])
def test_copies_travel_together_through_a_layer_that_writes_into_its_input(wide_tail):
    """What one copy wrote must not reach the next one: every copy has hidden states of its own."""
    model = tiny_model("llama")
    layer = model.get_submodule("base_model.model.model.layers.1")
    own_forward = layer.forward

    def writing(hidden_states, *args, **kwargs):
        hidden_states.mul_(1.5)
        return own_forward(hidden_states, *args, **kwargs)

    layer.forward = writing
    probed = Probed(model)
    assert probed.probe.found.stackable and not probed.probe.found.cautions
    z = probed.directions()
    expected = probed.gradients(examples()) @ z.flatten(1).T
    derivatives = probed.spsa(examples(), z, eps=1e-2, wide_tail=wide_tail)
    assert error(derivatives, expected.double()) < 3e-3


def test_the_scaling_of_the_adapter_counts():
    for scaling in (0.5, 3.0):
        model = tiny_model("llama")
        probed = Probed(model)
        probed.probe.module.scaling["default"] = scaling
        truth = Reference(model, probed.probe.name, v_rows("llama"))
        z, expected = probed.directions(), truth.gradients(examples())
        assert error(probed.gradients(examples()), expected) < 5e-6
        assert error(probed.spsa(examples(), z, 1e-2), truth.differences(examples(), z, 1e-2)) < 3e-4


def test_a_disabled_adapter_leaves_the_base_weight_as_the_probed_matrix():
    model = tiny_model("llama")
    with model.disable_adapter():
        probed = Probed(model)
        assert probed.probe.shape == (32, 32)
        gradients = probed.gradients(examples())
    base = tiny_model("llama")
    base.disable_adapter_layers()
    for p in base.parameters():
        p.requires_grad_()
    truth = Reference(base, probed.probe.name, v_rows("llama"))
    truth.weight = truth.model.get_submodule(probed.probe.name).base_layer.weight
    assert error(gradients, truth.gradients(examples())) < 5e-6


# ------------------------------------------------------------------------------------------------ what must not matter


@EVERY_MODEL
def test_batch_mates_and_padding_do_not_change_an_example(kind, lora):
    probed = Probed(in_float64(tiny_model(kind, lora)))
    z, rows = probed.directions().double(), examples()
    gradients, derivatives = probed.gradients(rows), probed.spsa(rows, z, 1e-3)
    for i, row in enumerate(rows):
        for group, at in (([row], 0), ([row, rows[2], row], 2)):
            assert error(probed.gradients(group, pad_id=5)[at], gradients[i]) < 1e-12
            assert error(probed.spsa(group, z, 1e-3, pad_id=5)[at], derivatives[i]) < 1e-9


@EVERY_MODEL
def test_as_many_rows_as_tokens(kind, lora):
    """A mask or position tensor of shape [T] or [1, T] must not be taken for one of shape [B]."""
    model, rows = in_float64(tiny_model(kind, lora)), examples([(7, p) for p in range(7)])
    probed = Probed(model)
    z = probed.directions(2).double()
    gradients, derivatives = probed.gradients(rows), probed.spsa(rows, z, 1e-3)
    for i, row in enumerate(rows):
        assert error(probed.gradients([row])[0], gradients[i]) < 1e-12
        assert error(probed.spsa([row], z, 1e-3)[0], derivatives[i]) < 1e-9


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_copies_may_equal_rows_or_tokens(rows):
    probed = Probed(in_float64(tiny_model("mistral")))
    z, group = probed.directions(2).double(), examples([(4, 1)] * rows)  # 4 copies travel together
    whole = probed.spsa(group, z, 1e-3)
    for i, row in enumerate(group):
        assert error(probed.spsa([row], z, 1e-3)[0], whole[i]) < 1e-9


@EVERY_MODEL
def test_three_directions_are_three_single_ones(kind, lora):
    probed = Probed(in_float64(tiny_model(kind, lora)))
    z = probed.directions(3).double()
    together = probed.spsa(examples(), z, 1e-3)
    singly = torch.cat([probed.spsa(examples(), z[k : k + 1], 1e-3) for k in range(3)], dim=1)
    assert together.shape == (len(SIZES), 3)
    assert error(together, singly) < 1e-9


def test_layers_before_the_last_run_once():
    probed = Probed(tiny_model("llama"))
    calls = {"first": 0, "last": 0, "head": 0}

    def count(name):
        return lambda *args: calls.update({name: calls[name] + 1})

    probed.probe.layers[0].mlp.register_forward_hook(count("first"))
    probed.probe.layers[1].mlp.register_forward_hook(count("last"))
    probed.model.get_output_embeddings().register_forward_hook(count("head"))
    probed.spsa(examples(), probed.directions(3), 1e-3)
    assert calls == {"first": 1, "last": 6, "head": 1}
    probed.gradients(examples())
    assert calls == {"first": 2, "last": 7, "head": 2}


# ----------------------------------------------------------------------------------------------------- packed examples


@pytest.fixture
def packed_attention():
    transformers.AttentionInterface.register("packed", colm_batches.packed_attention)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("mistral", "stablelm")])
def test_packed_examples_give_what_padded_ones_give(packed_attention, kind):
    padded = Probed(in_float64(tiny_model(kind)))
    packed = Probed(in_float64(tiny_model(kind, attn_implementation="packed")), found=padded.probe.found)
    z = padded.directions(2).double()
    for rows, multiple, slots in ((examples(), 8, 4), (examples(SIZES[2:3]), 14, 1), (examples(SIZES[::-1]), 38, 32)):
        batch = pack(rows, longest=14, multiple=multiple, slots=slots)

        def losses(batch=batch):
            return micro_batch_losses(packed.model, packed.hook, batch)

        with torch.no_grad():
            assert error(losses(), padded.losses(rows)()) < 1e-12
        assert error(packed.probe.gradients(losses, batch.per_example), padded.gradients(rows)) < 1e-12
        assert error(packed.probe.spsa(losses, z, 1e-3), padded.spsa(rows, z, 1e-3)) < 1e-9


def test_packing_is_refused_where_attention_does_not_learn_of_it(packed_attention):
    found = VProjectionProbe(tiny_model("stablelm")).found
    packed = Probed(tiny_model("stablelm", attn_implementation="packed"), found=found)
    with pytest.raises(RuntimeError, match="--no-packing"):
        micro_batch_losses(packed.model, packed.hook, pack(examples(), longest=14, multiple=1))


# ------------------------------------------------------------------------------------------- what a probe leaves behind


def training_gradients(probed: Probed) -> dict[str, Tensor]:
    probed.model.train()
    probed.losses(examples())().mean().backward()
    return {name: p.grad for name, p in probed.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@EVERY_MODEL
def test_a_probe_leaves_no_trace(kind, lora, checkpointing):
    def fresh() -> Probed:
        model = tiny_model(kind, lora)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return Probed(model)

    probed = fresh()
    weights = {name: t.clone() for name, t in probed.model.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in probed.model.named_modules()}
    hooks = {name: len(m._forward_hooks) for name, m in probed.model.named_modules()}
    required = [p.requires_grad for p in probed.model.parameters()]
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            gradients = probed.gradients(examples())
            derivatives = probed.spsa(examples(), probed.directions(), 1e-3)
            assert torch.is_grad_enabled() is enabled
    assert not gradients.requires_grad and not derivatives.requires_grad
    assert all(torch.equal(t, weights[name]) for name, t in probed.model.state_dict().items())
    assert all(p.grad is None for p in probed.model.parameters())
    assert [p.requires_grad for p in probed.model.parameters()] == required
    assert {name: set(vars(m)) for name, m in probed.model.named_modules()} == attributes
    assert {name: len(m._forward_hooks) for name, m in probed.model.named_modules()} == hooks

    trained, untouched = training_gradients(probed), training_gradients(fresh())
    assert trained.keys() == untouched.keys() and trained
    assert all(torch.equal(trained[name], untouched[name]) for name in trained)


def test_a_failed_probe_leaves_no_trace_either():
    probed = Probed(tiny_model("llama"))
    names = [set(vars(m)) for m in probed.model.modules()]
    expected = probed.gradients(examples())

    def fail():
        probed.losses(examples())()
        raise ZeroDivisionError

    for probe in (probed.probe.gradients, lambda losses: probed.probe.spsa(losses, probed.directions())):
        with pytest.raises(ZeroDivisionError):
            probe(fail)
        assert torch.is_grad_enabled()
        assert [set(vars(m)) for m in probed.model.modules()] == names
    assert torch.equal(probed.gradients(examples()), expected)


def test_a_probe_needs_no_trainable_weight():
    model = tiny_model("llama")
    expected = Probed(model).gradients(examples())
    frozen = tiny_model("llama").requires_grad_(False)
    assert torch.equal(Probed(frozen).gradients(examples()), expected)


# ------------------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("kind", KINDS)
def test_spsa_of_a_bfloat16_model_follows_the_exact_derivative(kind):
    """Frozen weights in bfloat16, adapters in float32, autocast: as a GPU run has it."""
    model = tiny_model(kind).to(torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora" in name:
            p.data = p.data.float()
    truth = Reference(model, VProjectionProbe(model).name, v_rows(kind))
    probed = Probed(model)
    z = probed.directions(8)
    expected = truth.gradients(examples()) @ z.double().flatten(1).T
    batch = collate(examples())

    def losses():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return micro_batch_losses(model, probed.hook, batch)

    derivatives = probed.probe.spsa(losses, z, 1e-3, wide_tail=True)
    rough = probed.probe.spsa(losses, z, 1e-3, wide_tail=False)
    gradients = probed.probe.gradients(losses)
    assert derivatives.dtype == gradients.dtype == torch.float32
    assert all(p.dtype == (torch.float32 if "lora" in n else torch.bfloat16) for n, p in model.named_parameters())
    assert correlation(derivatives, expected) > 0.99
    assert correlation(rough, expected) < correlation(derivatives, expected)
    assert error(gradients, truth.gradients(examples())) < 0.05


def test_autocast_counts_as_the_precision_that_the_tail_widens():
    probed, truth = Probed(tiny_model("llama")), reference("llama", True)
    batch = collate(examples())

    def losses():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return micro_batch_losses(probed.model, probed.hook, batch)

    derivatives = probed.probe.spsa(losses, probed.directions(), 1e-3)
    assert derivatives.dtype == torch.float32
    assert correlation(derivatives, truth.derivatives) > 0.99


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1])


# ----------------------------------------------------------------------------------------------- finding the projection


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.layers.1.self_attn.v_proj"),
        ("phi3", "model.layers.1.self_attn.qkv_proj"),
        ("gpt2", "transformer.h.1.attn.c_attn"),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value"),
    ],
)
def test_the_last_v_projection_is_found(kind, name):
    probe = VProjectionProbe(tiny_model(kind, lora=False))
    assert probe.name == name
    assert probe.shape == (len(v_rows(kind)), 32) and probe.dims == len(v_rows(kind)) * 32
    probe = VProjectionProbe(tiny_model(kind, rank=5))
    assert probe.name == "base_model.model." + name
    assert probe.shape == (len(v_rows(kind)), 5)


@pytest.mark.parametrize("name", ["o_proj", "1.mlp.down_proj", "model.layers.1.self_attn.k_proj"])
def test_a_named_module_is_probed_whole(name):
    model = tiny_model("qwen2", lora=False)
    truth = Reference(model, next(n for n, _ in reversed([*model.named_modules()]) if n.endswith(name)), slice(None))
    probed = Probed(model, module_name=name)
    z, expected = probed.directions(), truth.gradients(examples())
    assert probed.probe.name.endswith(name) and "layers.1" in probed.probe.name
    assert error(probed.gradients(examples()), expected) < 5e-6
    assert error(probed.spsa(examples(), z, 3e-2), truth.differences(examples(), z, 3e-2)) < 1e-4


def test_a_projection_of_another_layer_can_be_named():
    """The layers behind it run again for every copy; with an adapter in all of them the truth is another matrix."""
    model = tiny_model("llama")
    name = "base_model.model.model.layers.0.self_attn.v_proj"
    truth = Reference(model, name, v_rows("llama"))
    probed = Probed(model, module_name="layers.0.self_attn.v_proj")
    z = probed.directions()
    assert probed.probe.name == name
    assert error(probed.gradients(examples()), truth.gradients(examples())) < 3e-6
    assert error(probed.spsa(examples(), z, 1e-3), truth.differences(examples(), z, 1e-3)) < 3e-6


def test_a_named_fused_module_is_still_probed_at_its_values():
    probe = VProjectionProbe(tiny_model("phi3"), module_name="qkv_proj")
    assert probe.rows.tolist() == v_rows("phi3")


class Unknown(nn.Module):
    """A causal model without attention, whose projections have names that nobody has heard of."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"wow": nn.Linear(4, 6), "mix": nn.Linear(6, 4)}) for _ in range(2))
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, VOCAB)
        for block in self.blocks:
            block.forward = partial(self.run_block, block)

    @staticmethod
    def run_block(block, x):
        return x + block["mix"](block["wow"](x.cumsum(1)).tanh())

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=self.out(self.norm(x)))


def test_a_model_without_attention_is_refused_with_candidates():
    with pytest.raises(ValueError, match=r"none of 5 .*value of a softmax attention.*--probe_module.*blocks\.1\.mix"):
        VProjectionProbe(Unknown())
    with pytest.raises(ValueError, match=r"no module is named v_projection.*--probe_module.*blocks\.1\.mix"):
        VProjectionProbe(Unknown(), "v_projection")


def test_a_named_projection_of_a_model_without_attention_is_probed_whole():
    probe = VProjectionProbe(Unknown(), "wow")
    assert probe.name == "blocks.1.wow" and probe.shape == (6, 4)
    assert probe.found.cautions == () and probe.found.wide and probe.found.stackable


def test_what_one_process_found_serves_another():
    model = tiny_model("phi3")
    probe = VProjectionProbe(model)
    sent = pickle.loads(pickle.dumps(probe.found))
    meta = copy.deepcopy(model).to("meta")  # a rank without weights
    assert VProjectionProbe(meta, found=sent).shape == probe.shape
    assert sent == find_v_projection(model) and sent.rows == tuple(v_rows("phi3"))


class Reused(Unknown):
    """A projection that runs twice in a forward."""

    @staticmethod
    def run_block(block, x):
        return x + block["mix"](block["wow"](x).tanh() + block["wow"](x.cumsum(1)))


def test_a_projection_that_runs_twice_is_refused():
    with pytest.raises(ValueError, match=r"blocks\.1\.wow runs 2 times in one forward"):
        VProjectionProbe(Reused(), "wow")


class Looping(Unknown):
    """A layer that runs twice before the probed one."""

    def forward(self, input_ids, use_cache=False):
        first, last = self.blocks
        x = last(first(first(self.embed(input_ids))))
        return SimpleNamespace(logits=self.out(self.norm(x)))


def test_a_layer_in_a_loop_is_not_remembered():
    """Where copies run one by one, what it returned in one round must not be taken for another round's."""
    torch.manual_seed(0)
    model = Looping()
    found = find_v_projection(model, "wow")
    assert found.before == 0
    ids = examples([(9, 1)])[0][0][None]
    probe = VProjectionProbe(model, found=found._replace(stackable=False))
    z = torch.randn(2, *probe.shape, generator=torch.Generator().manual_seed(4))

    def losses() -> Tensor:
        return example_losses(model, {"input_ids": ids, "labels": ids})

    exact = (probe.gradients(losses) @ z.flatten(1).T).double()
    assert error(probe.spsa(losses, z), exact) < 1e-4


def test_a_projection_that_no_longer_runs_is_an_error_and_not_zero():
    probed = Probed(tiny_model("llama"))
    probed.probe.layer.self_attn.v_proj = nn.Linear(32, 32)  # the probe still holds the one that was there
    for probe in (probed.probe.gradients, lambda losses: probed.probe.spsa(losses, probed.directions())):
        with pytest.raises(RuntimeError, match="v_proj ran 0 times where [16] were expected"):
            probe(probed.losses(examples()))


class Hard(Unknown):
    """An operation that knows one precision alone, as kernels do."""

    dtype = torch.float32

    @staticmethod
    def run_block(block, x):
        y = block["mix"](block["wow"](x.cumsum(1)).tanh())
        if y.dtype != Hard.dtype:
            raise NotImplementedError(f"the kernel is not implemented for {y.dtype}")
        return x + y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_no_wide_tail_can_be_had_spsa_runs_in_the_models_own_precision(dtype, monkeypatch):
    """In half precision a warning says that its differences are mostly rounding; float32's are good enough."""
    monkeypatch.setattr(Hard, "dtype", dtype)
    model = Hard().to(dtype)
    probe = VProjectionProbe(model, "wow")
    assert not probe.found.wide

    ids = examples([(9, 1)])[0][0][None]
    z = torch.randn(2, *probe.shape, generator=torch.Generator().manual_seed(4))

    def spsa() -> Tensor:
        return probe.spsa(lambda: example_losses(model, {"input_ids": ids, "labels": ids}), z, eps=1e-2)

    if dtype == torch.bfloat16:
        with (
            torch.autocast("cpu", dtype),
            pytest.warns(UserWarning, match="can't run in a wider precision .*float32.*rounding.*--probe grad"),
        ):
            spsa()
    with warnings.catch_warnings(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        warnings.simplefilter("error")  # said once is enough
        derivatives = spsa()
    if dtype == torch.float32:
        exact = probe.gradients(lambda: example_losses(model, {"input_ids": ids, "labels": ids}))
        assert error(derivatives, (exact @ z.flatten(1).T).double()) < 0.05


class Flipping(Unknown):
    """A choice of the largest of four numbers that V decides: experts without their weight."""

    @staticmethod
    def run_block(block, x):
        y = block["mix"](block["wow"](x.cumsum(1)).tanh())
        return x + y * F.one_hot(y.topk(1).indices[..., 0], 4)


def test_spsa_warns_of_choices_that_v_decides():
    with pytest.warns(UserWarning, match="top-k choice.*flips.*--probe grad"):
        model = Flipping()
        ids = examples([(9, 1)])[0][0][None]
        probe = VProjectionProbe(model, "wow")
        probe.spsa(lambda: example_losses(model, {"input_ids": ids, "labels": ids}), torch.randn(1, 6, 4))


@pytest.mark.parametrize("name", ["layers.1.self_attn.v_proj", "v_proj"])
def test_finding_leaves_no_trace(name):
    model = tiny_model("llama").train()
    state = torch.random.get_rng_state()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    VProjectionProbe(model, name)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("lm_head", "lies in no nn.ModuleList.*--probe_module"),
        ("post_attention_layernorm", "no projection"),
        ("self_attn", "no projection"),
    ],
)
def test_a_named_module_that_cannot_be_probed_is_refused(name, problem):
    with pytest.raises(ValueError, match=problem):
        VProjectionProbe(tiny_model("llama", lora=False), module_name=name)

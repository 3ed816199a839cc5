"""One tiny model for each kind of architecture: losses, both probes and training gradients against a plain float64
forward of one example at a time. `benchmarks/families.py` does the same with every family that transformers has.
"""

import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import families  # noqa: E402

from colm_batches import pack, packed_attention  # noqa: E402

HEADS, KV_HEADS, WIDTH = 4, 2, 8  # of every tiny model: heads, groups, channels of a head


def every_head(period: int, start: int) -> list[int]:
    """Channels start..start + 7 of each head's `period`: fused layouts written out, not computed as the probe does."""
    return [head * period + start + i for head in range(HEADS) for i in range(WIDTH)]


ALL, GROUPED = [*range(HEADS * WIDTH)], [*range(KV_HEADS * WIDTH)]
LAST_OF_THREE = [*range(2 * HEADS * WIDTH, 3 * HEADS * WIDTH)]  # [q k v] of all heads
PER_HEAD = every_head(3 * WIDTH, 2 * WIDTH)  # [q k v] of head 0, of head 1, ...
ROUTED = "top-k choice"

# what is special about it: family, its options, the end of the projection's name, its V rows, what SPSA has to say
KINDS = {
    "plain, grouped": ("llama", {}, "1.self_attn.v_proj", GROUPED, ""),
    "tied, biases": ("qwen2", {"tie_word_embeddings": True}, "1.self_attn.v_proj", GROUPED, ""),
    "fused": ("phi3", {}, "1.self_attn.qkv_proj", [*range(48, 64)], ""),
    "fused, Conv1D, learned positions": ("gpt2", {}, "1.attn.c_attn", LAST_OF_THREE, ""),
    "fused in blocks of q, v, k": ("codegen", {}, "1.attn.qkv_proj", every_head(24, 8), ""),
    "per head": ("gpt_neox", {}, "1.attention.query_key_value", PER_HEAD, ""),
    "per head, squared ReLU": ("persimmon", {}, "1.self_attn.query_key_value", PER_HEAD, ""),
    "multi-query": ("falcon", {}, "1.self_attention.query_key_value", [*range(40, 48)], ""),
    "multi-query, c_attn": ("gpt_bigcode", {}, "1.attn.c_attn", [*range(40, 48)], ""),
    "per head, c_attn": ("gpt_bigcode", {"multi_query": False}, "1.attn.c_attn", PER_HEAD, ""),
    "ALiBi, per head": ("bloom", {}, "1.self_attention.query_key_value", PER_HEAD, ""),
    "ALiBi, fused": ("mpt", {}, "1.attn.Wqkv", LAST_OF_THREE, ""),
    "parallel block": ("gptj", {}, "1.attn.v_proj", ALL, ""),
    "registered before the layers": ("opt", {}, "1.self_attn.v_proj", ALL, ""),
    "soft caps": ("gemma2", {}, "self_attn.v_proj", GROUPED, ""),
    "logits scaled": ("cohere", {}, "1.self_attn.v_proj", GROUPED, ""),
    "sliding window": ("mistral", {}, "1.self_attn.v_proj", GROUPED, ""),
    "window in the mask, experts": ("phimoe", {}, "1.self_attn.v_proj", GROUPED, "departs"),
    "chunks in the mask, experts": ("llama4_text", {}, "self_attn.v_proj", GROUPED, ROUTED),
    "experts": ("mixtral", {}, "1.self_attn.v_proj", GROUPED, ROUTED),
    "experts in attention": ("jetmoe", {}, "1.self_attention.kv_proj", [*range(16, 32)], ROUTED),
    "sinks, called by keyword": ("gpt_oss", {}, "1.self_attn.v_proj", GROUPED, ROUTED),
    "latent": ("minicpm3", {}, "1.self_attn.kv_b_proj", every_head(16, 8), ""),
    "latent, experts": ("deepseek_v3", {}, "self_attn.kv_b_proj", every_head(16, 8), ROUTED),
    "value norm": ("gemma4_text", {}, "self_attn.v_proj", None, ""),
    "keys and values of an earlier layer": ("gemma3n_text", {}, "1.self_attn.v_proj", GROUPED, ""),
    "recurrent beside attention": ("falcon_h1", {}, "1.self_attn.v_proj", GROUPED, ""),
    "recurrent behind attention": ("bamba", {}, "1.self_attn.v_proj", GROUPED, ""),
    "convolution": ("lfm2", {}, "self_attn.v_proj", GROUPED, ""),
    "linear attention, gates": ("qwen3_5_text", {}, "self_attn.v_proj", GROUPED, ""),
    "V of two projections": ("zaya", {}, "v_proj_current", [*range(8)], ""),
    "cross-attention that never runs": ("whisper", {}, "decoder.layers.1.self_attn.v_proj", ALL, ""),
}


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_probes_and_training_agree_with_a_plain_float64_forward(kind):
    family, options, name, rows, caution = KINDS[kind]
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    result = families.run_family(family, seconds=60, **options)
    assert result.verdict.startswith("passes"), result.trace or result.notes
    assert result.errors.keys() == {"loss", "exact probe", "SPSA", "training"}
    assert result.worst() < 2e-5, result.errors  # measured: 3e-7 to 3e-6
    assert result.found.name.endswith(name)
    assert rows is None or list(result.found.rows) == rows
    assert result.found.wide
    said = " ".join(result.found.cautions)
    assert caution in said if caution else not said


REFUSED = {
    "no attention": ("rwkv", r"none of \d+ projections becomes the value of a softmax attention"),
    "a shared query and key, local": ("reformer", r"none of \d+ projections becomes the value of a softmax attention"),
    "layers in a loop": ("hrm_text", r"v_proj runs 2 times in one forward"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_probed_is_refused_in_one_line_with_candidates(kind):
    family, problem = REFUSED[kind]
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    with pytest.raises(ValueError, match=problem + r".*--probe_module, such as \w+") as caught:
        families.VProjectionProbe(families.tiny_model(family))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("family", "name"), [("rwkv", "attention.value"), ("xlstm", "v")])
def test_what_is_refused_can_be_named(family, name):
    probe = families.VProjectionProbe(families.tiny_model(family), name)
    assert probe.name.endswith(name) and probe.shape[0] == len(probe.rows)


def test_a_packed_row_of_latent_attention_gives_the_same_gradients():
    """Its projection sees [B, 1, T, d]; `per_example` must get [B, T, d]."""
    model = families.tiny_model("minicpm3")
    rows, probe = families.examples(), families.VProjectionProbe(model)
    hook = families.LabelledLogits(model)

    def gradients(batch):
        def losses():
            return families.micro_batch_losses(model, hook, batch)

        return probe.gradients(losses, batch.per_example)

    padded = gradients(families.collate(rows))
    transformers.AttentionInterface.register("packed", packed_attention)
    model.set_attn_implementation("packed")
    packed = gradients(pack(rows, longest=14))
    assert families.error(packed, padded.double()) < 1e-5

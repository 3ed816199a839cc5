"""Tiny random causal language models, one for every way in which Transformers lays out the V projection."""

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 97, 32, 4, 2, 8

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
MLP = {"intermediate_size": 48}
GQA = {"num_key_value_heads": KV_HEADS}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

# kind: Transformers' model type, its own options, LoRA targets
KINDS = {
    "llama": ("llama", MLP, ("q_proj", "v_proj")),
    "llama_tied": ("llama", {**MLP, "tie_word_embeddings": True}, ("q_proj", "v_proj")),
    "qwen2": ("qwen2", {**MLP, **GQA, "tie_word_embeddings": True}, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "mistral": ("mistral", {**MLP, **GQA, "sliding_window": 6}, ("q_proj", "v_proj")),
    "phi": ("phi", MLP, ("q_proj", "k_proj", "v_proj", "fc1", "fc2")),
    "stablelm": (
        "stablelm",
        {**MLP, "hidden_dropout": 0.0, "use_qkv_bias": True, "num_key_value_heads": HEADS},
        ("q_proj", "v_proj"),
    ),
    "phi3": ("phi3", {**MLP, **GQA}, ("qkv_proj", "o_proj")),
    "gpt2": ("gpt2", NO_DROPOUT, ("c_attn",)),
    "gpt_neox": ("gpt_neox", MLP, ("query_key_value",)),
}

# Output channels of the named projection that are V, written out rather than computed as the probe computes them.
V_ROWS = {
    "qwen2": [*range(16)],
    "mistral": [*range(16)],
    "phi3": [*range(48, 64)],  # 32 of q, 16 of k, then v
    "gpt2": [*range(64, 96)],
    "gpt_neox": [*range(16, 24), *range(40, 48), *range(64, 72), *range(88, 96)],  # q, k, v of head 0, of head 1, ...
}


def v_rows(kind: str) -> list[int]:
    return V_ROWS.get(kind, [*range(HIDDEN)])


def tiny_model(
    kind: str, lora: bool = True, rank: int = 4, seed: int = 0, **options
) -> PreTrainedModel | peft.PeftModel:
    """A float32 model of some 30,000 random weights in evaluation mode; LoRA has a B that is not zero and scaling 2."""
    model_type, own, targets = KINDS[kind]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **own, **options))
    if lora:
        conv1d = kind == "gpt2"
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules=list(targets), fan_in_fan_out=conv1d, task_type="CAUSAL_LM"
            ),
        )
    with torch.no_grad():  # weights as large as a trained model's, biases and lora_B that are not zero
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(std=0.1 if "lora" in name else 0.2)
            else:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model.float().eval()

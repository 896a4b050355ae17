"""GGUF files of tiny models, written as llama.cpp's converter lays them out."""

from pathlib import Path

import gguf
from transformers import PreTrainedModel

TENSORS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def name_of(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    module, _, part = name.rpartition(".")
    if module in WHOLE:
        return f"{WHOLE[module]}.{part}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{TENSORS[rest]}.{part}"


def metadata(model: PreTrainedModel) -> dict:
    """What llama.cpp's converter says of a model, key → value."""
    config = model.config
    kind = "llama" if config.model_type == "mistral" else config.model_type
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": head,
        "vocab_size": config.vocab_size,
    }
    return {
        "general.architecture": kind,
        "general.name": "tiny",
        **{f"{kind}.{key}": value for key, value in found.items()},
    }


def tokenizer(size: int, pre: str = "gpt-2") -> dict:
    """A vocabulary of bytes, one merge of two, and the last three: a beginning and two ends.

    pre: how text is split.
    """
    from tokenizers import pre_tokenizers

    names = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - 4]
    names += [names[64] + names[65], "<|begin|>", "<|end|>", "<|turn|>"]
    special = [gguf.TokenType.CONTROL if name.startswith("<|") else gguf.TokenType.NORMAL for name in names]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": special,
        "tokenizer.ggml.merges": [f"{names[64]} {names[65]}"],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": size - 3,
        "tokenizer.ggml.eos_token_id": size - 2,
        "tokenizer.ggml.eot_token_id": size - 1,
    }


def write(path: Path, model: PreTrainedModel, changes: dict, tensors: dict | None = None) -> Path:
    """Write a model as a GGUF file.

    Args:
        path: of the file.
        model: with float32 weights.
        changes: metadata beside or in place of `metadata` and `tokenizer`; None leaves a key out. A key
            without its architecture begins with a dot.
        tensors: further tensors, name → array.
    """
    told = metadata(model)
    kind = told["general.architecture"]
    told |= tokenizer(model.config.vocab_size, "gpt-2" if kind == "llama" else "qwen2")
    told |= {kind + key if key.startswith(".") else key: value for key, value in changes.items()}
    writer = gguf.GGUFWriter(path, kind)
    if told["general.architecture"] is None:
        writer.kv_data[0].pop("general.architecture")
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in told.items():
        if key == "general.architecture" and value is not None:
            continue  # the writer has said it
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            add[type(value)](key, value)
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, tensor in state.items():
        part = name.split(".")[-2]
        if kind == "llama" and part in heads:  # the halves of a rotary pair beside each other
            tensor = tensor.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(name_of(name), tensor.contiguous().numpy())
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

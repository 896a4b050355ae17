"""The keys of a config.json: a model of which one is not understood is refused, rather than half read.

transformers ignores keys that its class does not read, so a model that needs one (a scale of its logits, a
cap, a window) would be converted into another without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helix_megatron.convert.families import FAMILIES

# What families.to_megatron reads or refuses.
_UNDERSTOOD = {
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters", "rope_scaling",
    "rope_theta", "partial_rotary_factor", "rms_norm_eps", "tie_word_embeddings", "vocab_size", "hidden_act",
    "layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "attention_bias", "mlp_bias",
    "quantization_config", "original_max_position_embeddings",
}  # fmt: skip
# Of training, of generation, of a classifier, of the program that wrote the file.
_NOTES = {
    "architectures", "attn_implementation", "auto_map", "attention_dropout", "attn_pdrop",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "hidden_dropout", "id2label", "initializer_range",
    "label2id", "length_penalty", "max_length", "max_sequence_length", "min_length", "model_max_length",
    "neftune_noise_alpha", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_router_logits", "output_scores", "pad_token_id",
    "prefix", "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty",
    "resid_pdrop", "return_dict", "return_dict_in_generate", "router_aux_loss_coef", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k",
    "top_p", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
    "unk_token_id", "use_cache",
}  # fmt: skip
_NOTE_PREFIXES = ("_", "unsloth_")
# Switches, and the values with which they do nothing here.
_OFF: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "is_llama_config": (True,),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_bfloat16": (False, True),
    "use_mrope": (False,),
}
_ROPE = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "original_max_position_embeddings"}
_ROPE_LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor"}


def refuse_unknown(file: Path, keys: dict[str, Any]) -> None:
    """ValueError for the first key of a config.json that is not understood; null is as not there."""
    kind = keys["model_type"]
    for name, value in keys.items():
        if value is None or name in _UNDERSTOOD or name in _NOTES or name.startswith(_NOTE_PREFIXES):
            continue
        if name in _OFF and value in _OFF[name]:
            continue
        raise ValueError(
            f"{file} has {name!r} {_shown(value)}, which no {kind} model that is understood here has, so the "
            "model cannot be converted exactly; if it changes nothing that the model computes, remove it."
        )
    classes = keys.get("architectures") or []
    classes = [str(name).lower() for name in classes] if isinstance(classes, list) else ["no list"]
    if classes and classes[0] not in [f"{family}forcausallm" for family in FAMILIES]:
        raise ValueError(
            f"{file} has 'architectures' {keys['architectures']}: only language models ("
            f"{'ForCausalLM, '.join(name.capitalize() for name in FAMILIES)}ForCausalLM) are converted."
        )
    for section in ("rope_parameters", "rope_scaling"):
        _refuse_rope(file, section, keys.get(section) or {})


def _refuse_rope(file: Path, section: str, rope: Any) -> None:
    if not isinstance(rope, dict):
        raise ValueError(f"{file} has {section!r} {_shown(rope)}; it maps settings to values, or is null.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        return  # refused as a whole
    known = _ROPE | (_ROPE_LLAMA3 if kind == "llama3" else set())
    for name, value in rope.items():
        if name not in known and value is not None:
            raise ValueError(
                f"{file} has {name!r} {_shown(value)} in {section!r} of type {kind!r}, which is not "
                "understood here, so the model cannot be converted exactly."
            )


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) < 80 else repr(value)[:76] + " ..."

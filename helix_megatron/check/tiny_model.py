"""A tiny Llama as a Hugging Face folder, random but hard: most of the time every true logit is negative, its
vocabulary is no multiple of what Megatron pads to, and its tokens are bytes, so a character may take several.
"""

import json
from pathlib import Path

import torch

VOCABULARY = 259  # 256 bytes, end of text, two tokens that no text has
EOS = 256


def make(
    folder: Path, heads: int = 6, kv_heads: int = 2, layers: int = 2, positions: int = 512,
    half: bool = False,
) -> Path:  # fmt: skip
    """Write the model and its tokenizer into `folder`.

    Args:
        half: weights that bf16 has, and logits of about 3 that it tells apart, in place of about -50.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names += ["<|end|>", "<|a|>", "<|b|>"]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=16,
        max_position_embeddings=positions, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=EOS,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if half:
        model.to(torch.bfloat16).float().save_pretrained(folder)
        return folder
    with torch.no_grad():  # hidden states share a direction, and every row of the head points away from it
        direction = torch.zeros(96)
        direction[:4] = 1
        model.model.embed_tokens.weight.mul_(20).add_(35 * direction)
        model.lm_head.weight.sub_(40 * direction)
    model.save_pretrained(folder)
    return folder


def end_at(folder: Path, *tokens: int) -> None:
    """Let several tokens end a text, as a chat model's generation_config.json does."""
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": list(tokens)}))


def greedy(folder: Path, prompts: list[str], new_tokens: int) -> list[list[int]]:
    """What transformers generates, prompt by prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        with torch.no_grad():
            assert (model(ids).logits.max(-1).values < 0).float().mean() > 0.5
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
            pad_token_id=EOS,
        )  # fmt: skip
        found.append(out[0, ids.shape[1] :].tolist())
    return found


def tokenize(folder: Path, text: str) -> list[int]:
    """The tokens of a prompt."""
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(folder).encode(text))

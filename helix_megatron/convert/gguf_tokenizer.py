"""The tokenizer in a GGUF file: transformers' reading of it, and what that leaves out of the metadata.

transformers splits text as GPT-2 does wherever it does not know the file's `tokenizer.ggml.pre`, adds no
beginning of a text that the file leaves to llama.cpp, puts a space first whatever the file says, and spells
a special token that is not ASCII in bytes. Other tokens of a prompt are another answer, so each of these is
mended or refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# How a file says that text is split before merges are looked for. What transformers splits by an expression
# of its own is not here.
_AS_GPT2 = {
    "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "a.x-4.0",
    "mellum", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "modern-bert",
}  # fmt: skip
_DIGITS_ALONE = {  # and the text between them as GPT-2
    "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2",
}  # fmt: skip
# A word that is a token is that token, whatever its merges; a text begins with its token unless told not to.
_WORDS_FIRST = {
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken",
}  # fmt: skip
# Keys of `tokenizer.` that are obeyed, by transformers or here; more are those of special tokens.
_OBEYED = {
    "ggml.model", "ggml.pre", "ggml.tokens", "ggml.scores", "ggml.token_type", "ggml.merges",
    "ggml.add_bos_token", "ggml.add_eos_token", "ggml.add_space_prefix", "ggml.token_type_count",
    "chat_template", "chat_templates", "huggingface.json",
}  # fmt: skip
_OBEYED_PARTS = ("chat_template.",)
_KINDS = ("gpt2", "llama")  # byte-level and sentencepiece
_READER = "5.23"  # transformers that reads `ggml.pre` (since 5.18.0) and `ggml.add_bos_token` (not in 5.22.0)
# Types of tokens that are found whole in a text. The first is left out of an answer.
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL = "_token_id"
_OFF: dict[str, tuple[Any, ...]] = {
    "ggml.add_sep_token": (False,),
    "ggml.remove_extra_whitespaces": (False,),
    "ggml.suppress_tokens": ([],),
}
# Keys that name an end, then texts that are one in every model that has them.
_ENDS = ("eos", "eot", "eom")
_ENDS_BY_NAME = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>",
    "<EOT>", "</s>",
)  # fmt: skip


def understands(key: str, value: Any) -> bool:
    """Whether a key of the metadata, without `tokenizer.`, is obeyed or turns nothing on."""
    known = key in _OBEYED or key.startswith(_OBEYED_PARTS) or key.endswith(_SPECIAL)
    return known or (key in _OFF and value in _OFF[key])


def exists(fields: dict[str, Any]) -> bool:
    """Whether the file carries a tokenizer."""
    kind = fields.get("tokenizer.ggml.model", "none")
    return kind not in ("none", "no_vocab") and "tokenizer.ggml.tokens" in fields


def token_ids(fields: dict[str, Any], tokens: Iterable[str]) -> dict[str, Any]:
    """Of the beginning, the padding and every end: of a text, a turn, a message.

    Args:
        fields: the file's metadata, key → value.
        tokens: its vocabulary. An end that no key names is known by its text, as to llama.cpp.
    """
    get = lambda name: fields.get(f"tokenizer.ggml.{name}_token_id")  # noqa: E731
    named = [get(name) for name in _ENDS if get(name) is not None]
    ends = list(dict.fromkeys([*named, *(i for i, token in enumerate(tokens) if token in _ENDS_BY_NAME)]))
    end = ends if len(ends) > 1 else next(iter(ends), None)
    return {"bos_token_id": get("bos"), "eos_token_id": end, "pad_token_id": get("padding")}


def save(file: Path, fields: dict[str, Any], vocabulary: Sequence[tuple[str, int]], folder: Path) -> None:
    """Write the file's tokenizer into a folder, as Hugging Face files.

    Args:
        file: the GGUF file.
        fields: its metadata, key → value.
        vocabulary: (text, type) of every token, by index.

    Raises:
        ValueError: it cannot be read, or nothing here splits text as the file says.
    """
    from transformers import AutoTokenizer

    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    texts, special = [text for text, _ in vocabulary], _special(fields, vocabulary)
    tokenizer = _read(file, kind)
    _keep_own_ids(tokenizer, texts, special, file)
    if kind == "gpt2":
        _split_as_told(tokenizer.backend_tokenizer, pre, file)
        if pre in _WORDS_FIRST:
            tokenizer.backend_tokenizer.model.ignore_merges = True
            if "tokenizer.ggml.add_bos_token" not in fields:
                tokenizer.add_bos_token = True
    elif fields.get("tokenizer.ggml.add_space_prefix") is False:
        _put_no_space_first(tokenizer.backend_tokenizer)
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    _refuse_if_read_otherwise(again, tokenizer, file)
    _refuse_other_ids(again.get_vocab(), texts, special, file)


def _special(fields: dict[str, Any], vocabulary: Sequence[tuple[str, int]]) -> dict[int, bool]:
    """Tokens that are found whole in a text: index → whether an answer leaves them out."""
    named = {fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    return {
        index: type_ == _CONTROL or index in named
        for index, (_, type_) in enumerate(vocabulary)
        if type_ in (_CONTROL, _USER_DEFINED) or index in named
    }


def _read(file: Path, kind: str) -> Any:
    """What transformers makes of the file's tokenizer. ValueError where it cannot, or is too old."""
    import transformers
    from packaging.version import Version

    if kind not in _KINDS:
        raise ValueError(
            f"{file} has a tokenizer of the kind {kind!r} (tokenizer.ggml.model); {' and '.join(_KINDS)} are "
            "known here: convert its safetensors."
        )
    if Version(transformers.__version__) < Version(_READER):
        raise ValueError(
            f"{file}: transformers {transformers.__version__} drops a part of what a GGUF file says of its "
            f"tokenizer, and prompts would be other tokens: pip install 'transformers>={_READER}'."
        )
    with tempfile.TemporaryDirectory() as alone:  # transformers would prefer files beside it
        Path(alone, file.name).symlink_to(file.resolve())
        try:
            return transformers.AutoTokenizer.from_pretrained(alone, gguf_file=file.name)
        except Exception as error:  # it has many converters
            raise ValueError(
                f"{file}: transformers cannot read its tokenizer ({kind}): {error}; convert its safetensors."
            ) from error


def _keep_own_ids(tokenizer: Any, texts: list[str], special: dict[int, bool], file: Path) -> None:
    """Make every special token of the file its own index, and drop those that the file has not.

    transformers spells what is outside GPT-2's letters for bytes in these, as if a merge could make it; the
    beginning and the ends then come after the vocabulary, as does a token of GPT-2's own.
    """
    from tokenizers import Tokenizer

    state = _state(tokenizer.backend_tokenizer)
    ids = state["model"]["vocab"]
    spelled = {index: text for text, index in ids.items()}
    own = {text: index for index, text in enumerate(texts)}
    added = {told["content"]: told for told in state["added_tokens"] if told["id"] < len(texts)}
    as_it_is = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for index, left_out in special.items():
        text = texts[index]
        if ids.get(text) != index:
            in_bytes = spelled.get(index)
            ids.pop(in_bytes, None)
            if in_bytes in own:  # another token of the file
                ids[in_bytes] = own[in_bytes]
            ids[text] = index
        added.setdefault(text, {"id": index, "content": text, **as_it_is, "special": left_out})
    state["added_tokens"] = sorted(added.values(), key=lambda told: told["id"])
    try:
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))  # it has no other setter
    except Exception as error:  # tokenizers knows no narrower one
        raise ValueError(
            f"{file} has merges that need a special token in bytes ({error}); convert its safetensors."
        ) from error
    tokenizer.update_post_processor()


def _split_as_told(backend: Any, pre: str | None, file: Path) -> None:
    """Split text as a byte-level vocabulary wants it. ValueError for a way that is not known here."""
    from tokenizers import pre_tokenizers

    if '"Split"' in json.dumps(_state(backend)["pre_tokenizer"]):  # transformers knows it
        return
    as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _AS_GPT2:
        backend.pre_tokenizer = as_gpt2
    elif pre in _DIGITS_ALONE:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), as_gpt2])
    else:
        says = "does not say how" if pre in (None, "default") else f"says that {pre!r} is how"
        raise ValueError(
            f"{file} {says} text is split into tokens (tokenizer.ggml.pre), and prompts would be other "
            "tokens than the model knows; convert its safetensors, or write the way into the file: "
            "gguf-new-metadata --pre-tokenizer WAY FILE OUT.gguf (llama-bpe, qwen2, tekken, smollm, ...)."
        )


def _put_no_space_first(backend: Any) -> None:
    """A sentencepiece vocabulary whose texts do not begin with a space of their own."""
    from tokenizers import decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def _state(backend: Any) -> dict[str, Any]:
    return json.loads(backend.to_str())


def _refuse_if_read_otherwise(again: Any, tokenizer: Any, file: Path) -> None:
    """ValueError when the classes of transformers make another tokenizer of the files that were written."""
    meant, found = _state(tokenizer.backend_tokenizer), _state(again.backend_tokenizer)
    ignores = [state["model"].get("ignore_merges", False) for state in (meant, found)]
    parts = ("pre_tokenizer", "post_processor")
    if ignores[0] != ignores[1] or any(meant[part] != found[part] for part in parts):
        raise ValueError(
            f"{file}: transformers reads its tokenizer as a {type(again).__name__}, which splits text in "
            "another way than the file says; convert its safetensors."
        )


def _refuse_other_ids(ids: dict[str, int], texts: list[str], special: dict[int, bool], file: Path) -> None:
    """ValueError when a special token is not its index in the file, or a token is none of the file's."""
    wrong = next((index for index in special if ids.get(texts[index]) != index), None)
    if wrong is not None:
        raise ValueError(
            f"{file}: its special token {texts[wrong]!r} is {wrong}, and {ids.get(texts[wrong])} to "
            "transformers; convert its safetensors."
        )
    more = [text for text, index in ids.items() if index >= len(texts)]
    if more:
        names = ", ".join(map(repr, more))
        raise ValueError(
            f"{file} has {len(texts)} tokens, and transformers adds {names}; convert its safetensors."
        )

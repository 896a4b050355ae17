"""The tokenizer of a GGUF file splits text as the file says, which transformers' reader partly drops.

The right tokens are written out: what the ways of splitting are is public (the models' own tokenizer.json).
"""

import json

import pytest

from helix_megatron.convert import command
from tests.convert.test_convert import make

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
import gguf  # noqa: E402

from tests.convert import tiny_gguf  # noqa: E402  after gguf is known to be there

SIZE = 203
MERGES = ["Ċ Ċ", "Ġ Ġ", "1 2", "12 3", "123 4", "Ġ a"]
SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return make(tmp_path_factory.mktemp("qwen2"), "qwen2")


def vocabulary(*more):
    """Metadata of a byte-level vocabulary of merges, a word that no merge makes, and `more`."""
    names = [chr(code) for code in range(33, 127)] + ["Ċ", "Ġ", "hello", *more]
    names += [merge.replace(" ", "") for merge in MERGES]
    names += [f"filler{number}" for number in range(SIZE - len(names) - len(SPECIAL))] + SPECIAL
    kinds = {name: gguf.TokenType.CONTROL for name in (*SPECIAL, *more)}
    return {
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [kinds.get(name, gguf.TokenType.NORMAL) for name in names],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.unknown_token_id": None,
    }


def converted(tmp_path, model, changes):
    """The tokenizer that Megatron loads of a converted file, and the checkpoint's arguments."""
    file = tiny_gguf.write(tmp_path / "m.gguf", model, vocabulary() | changes)
    args = command.to_megatron(file, tmp_path / "out")
    return transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "hf"), args


@pytest.mark.parametrize(
    ("family", "pre", "text", "tokens"),
    [
        ("llama", "gpt-2", "a\n\n1", "a Ċ Ċ 1"),  # the last of spaces is the next word's
        ("llama", "gpt-2", "a  1234 hello", "a Ġ Ġ 1234 Ġ h e l l o"),
        ("llama", "smollm", "a\n\n1", "a ĊĊ 1"),  # digits stand alone, and spaces before them together
        ("llama", "smollm", "a  1234", "a ĠĠ 1 2 3 4"),
        ("llama", "starcoder", "a  12", "a ĠĠ 1 2"),
        ("llama", "llama-bpe", "12345 hello", "<|begin|> 123 4 5 Ġ h e l l o"),
        ("llama", "llama-bpe", "hello", "<|begin|> hello"),  # a token as it is, whatever its merges
        ("llama", "tekken", "1234", "<|begin|> 1 2 3 4"),
        ("qwen2", "qwen2", "a\n\n1234", "a ĊĊ 1 2 3 4"),
    ],
)
def test_text_is_split_as_the_file_says(tmp_path, request, family, pre, text, tokens):
    model = request.getfixturevalue(family)
    tokenizer, _ = converted(tmp_path, model, {"tokenizer.ggml.pre": pre})
    ids = tokenizer(text).input_ids
    assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == tokens
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_text_begins_with_its_token_where_the_file_says_so(tmp_path, llama):
    for number, (told, first) in enumerate([({}, 200), ({"tokenizer.ggml.add_bos_token": False}, 64)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        tokenizer, _ = converted(folder, llama, {"tokenizer.ggml.pre": "llama-bpe"} | told)
        assert tokenizer("a").input_ids[0] == first
    folder = tmp_path / "gpt"
    folder.mkdir()
    told = {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": True}
    assert converted(folder, llama, told)[0]("a").input_ids == [200, 64]


@pytest.mark.parametrize(
    ("family", "pre", "message"),
    [
        ("llama", None, "does not say how text is split into tokens .*gguf-new-metadata"),
        ("llama", "default", "does not say how text is split"),
        ("llama", "poro-chat", "says that 'poro-chat' is how text is split"),
        ("qwen2", "gpt-2", "transformers reads its tokenizer as a Qwen2Tokenizer, which splits"),
    ],
)
def test_a_way_of_splitting_that_is_not_known_is_refused(tmp_path, request, family, pre, message):
    file = tiny_gguf.write(
        tmp_path / "m.gguf", request.getfixturevalue(family), vocabulary() | {"tokenizer.ggml.pre": pre}
    )
    with pytest.raises(ValueError, match=message) as refused:
        command.to_megatron(file, tmp_path / "out")
    assert str(file) in str(refused.value) and [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_sentencepiece_text_begins_with_a_space_unless_the_file_says_no(tmp_path, llama):
    names = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab"]
    names += [f"filler{number}" for number in range(SIZE - len(names))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    told = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",  # of these vocabularies it says nothing
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": kinds + [gguf.TokenType.NORMAL] * (SIZE - 3),
        "tokenizer.ggml.scores": [0.0] * 6 + [-1.0, -2.0] + [-1000.0] * (SIZE - 8),
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": None,
    }
    alone = {"tokenizer.ggml.add_space_prefix": False}
    for number, (more, ids) in enumerate([({}, [1, 6, 5]), (alone, [1, 7])]):
        folder = tmp_path / str(number)
        folder.mkdir()
        tokenizer, args = converted(folder, llama, told | more)
        assert tokenizer("ab").input_ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
        assert args.eos_token_id == 2


def test_every_end_is_found_by_its_key_or_its_text(tmp_path, llama):
    """A Llama 3 file names one end; llama.cpp knows the others, as generation_config.json does."""
    told = vocabulary("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
    names = told["tokenizer.ggml.tokens"]
    told |= {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.eot_token_id": None}
    told["tokenizer.ggml.eos_token_id"] = names.index("<|end_of_text|>")
    file = tiny_gguf.write(tmp_path / "m.gguf", llama, told)
    args = command.to_megatron(file, tmp_path / "out")
    ends = [names.index(name) for name in ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>")]
    assert args.eos_token_id == ends
    kept = json.loads((tmp_path / "out" / "hf" / "config.json").read_text())
    assert kept["eos_token_id"] == ends

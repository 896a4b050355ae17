"""The tokenizer of a GGUF file splits text as the file says, which transformers' reader partly drops.

The right tokens are written out: what the ways of splitting are is public (the models' own tokenizer.json).
"""

import json

import pytest

from helix_megatron.convert import command, gguf_tokenizer
from tests.convert.test_convert import make

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
import gguf  # noqa: E402

from tests.convert import tiny_gguf  # noqa: E402  after gguf is known to be there

SIZE = 203
MERGES = ["Ċ Ċ", "Ġ Ġ", "1 2", "12 3", "123 4", "Ġ a"]
SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>"]
# As DeepSeek-R1's: GPT-2's letters for bytes have neither this bar nor a space.
USER, BEGIN, END = (f"<\uff5c{name}\uff5c>" for name in ("User", "begin▁of▁text", "end▁of▁text"))
BEYOND_ASCII = [USER, "  ", "<think>", BEGIN, END, "<|turn|>"]


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


def beyond_ascii():
    """Metadata of a vocabulary that ends in special tokens beyond ASCII; the first three are text."""
    told = vocabulary()
    told["tokenizer.ggml.tokens"][-6:] = BEYOND_ASCII
    told["tokenizer.ggml.token_type"][-6:-3] = [gguf.TokenType.USER_DEFINED] * 3
    return told


@pytest.mark.parametrize(("family", "pre"), [("qwen2", "deepseek-r1-qwen"), ("llama", "llama-bpe")])
def test_special_tokens_beyond_ascii_are_those_of_the_file(tmp_path, request, family, pre):
    told = beyond_ascii() | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": True}
    tokenizer, args = converted(tmp_path, request.getfixturevalue(family), told)
    a, spaces = 64, told["tokenizer.ggml.tokens"].index("ĠĠ")  # the token "  " is another, and found first
    ids = [200, 197, a, 198, a, 199, a, 201]
    assert tokenizer(f"{USER}a  a<think>a{END}").input_ids == ids
    assert tokenizer.decode([*ids, spaces], skip_special_tokens=True) == f"{USER}a  a<think>a  "
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, args.eos_token_id] == [200, 201, [201, 202]]
    assert tokenizer.convert_ids_to_tokens([spaces, *range(197, 203)]) == ["ĠĠ", *BEYOND_ASCII]
    assert len(tokenizer) == SIZE


def test_a_beginning_and_an_end_are_special_where_the_file_has_no_types(tmp_path, llama):
    told = beyond_ascii() | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.token_type": None}
    tokenizer, _ = converted(tmp_path, llama, told)
    assert tokenizer(f"a{END}").input_ids == [200, 64, 201] and len(tokenizer) == SIZE
    assert tokenizer.decode([200, 64, 201], skip_special_tokens=True) == "a"


@pytest.mark.parametrize(("family", "pre"), [("qwen2", "qwen2"), ("llama", "llama-bpe")])
def test_a_vocabulary_of_ascii_is_what_transformers_reads(tmp_path, request, family, pre):
    """All but the end of text of GPT-2, which it puts behind a vocabulary that lacks it."""
    told = {"tokenizer.ggml.pre": pre}
    tokenizer, _ = converted(tmp_path, request.getfixturevalue(family), told)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert read.get_vocab() == tokenizer.get_vocab() | {"<|endoftext|>": SIZE}
    assert max(tokenizer("a<|endoftext|>").input_ids) < SIZE
    same = {index: token for index, token in read.added_tokens_decoder.items() if index < SIZE}
    assert tokenizer.added_tokens_decoder == same


@pytest.mark.parametrize(
    ("text", "kind", "more", "message"),
    [
        ("<|turn|>", "CONTROL", {}, r"special token '<.turn.>' is 199, and 202 to transformers"),
        ("a ", "USER_DEFINED", {"merges": ["a Ġ"]}, "has merges that need a special token in bytes"),
        ("a", "NORMAL", {"token_type": [gguf.TokenType.NORMAL] * 9}, "has 203 tokens and 9 types of tokens"),
        ("a", "NORMAL", {"model": "t5"}, r"a tokenizer of the kind 't5' .*; gpt2 and llama are known"),
    ],
)
def test_a_vocabulary_that_would_be_numbered_otherwise_is_refused(tmp_path, llama, text, kind, more, message):
    told = vocabulary() | {"tokenizer.ggml.pre": "llama-bpe"}
    told["tokenizer.ggml.tokens"][199] = text
    told["tokenizer.ggml.token_type"][199] = gguf.TokenType[kind]
    told |= {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    file = tiny_gguf.write(tmp_path / "m.gguf", llama, told)
    with pytest.raises(ValueError, match=message) as refused:
        command.to_megatron(file, tmp_path / "out")
    assert "\n" not in str(refused.value) and [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_token_that_transformers_adds_is_refused(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(gguf_tokenizer, "_keep_own_ids", lambda *all_of_it: None)
    with pytest.raises(ValueError, match=r"has 203 tokens, and transformers adds '<\|endoftext\|>'; convert"):
        converted(tmp_path, llama, {"tokenizer.ggml.pre": "llama-bpe"})


def test_a_reader_that_drops_how_text_is_split_is_named(tmp_path, llama, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.22.2")
    with pytest.raises(ValueError, match=r"transformers 5.22.2 drops .* pip install 'transformers>=5.23'"):
        converted(tmp_path, llama, {"tokenizer.ggml.pre": "llama-bpe"})


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

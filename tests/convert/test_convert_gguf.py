"""GGUF files: every key of the metadata is obeyed or refused by name, and broken files say so in one line."""

import json

import numpy as np
import pytest
import torch

from helix_megatron.convert import command, files, hf
from helix_megatron.generate.model import open_tokenizer
from tests.convert.test_convert import make

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
from tests.convert import tiny_gguf  # noqa: E402  after gguf is known to be there

TOKENS = torch.arange(60)[None] * 3 % 203


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llama"), "llama")


def config_of(path):
    return hf.open_source(path).config


def refusal(path):
    with pytest.raises(ValueError) as refused:
        hf.open_source(path)
    message = str(refused.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_gguf_file_is_the_model_it_was_written_from(tmp_path, name):
    """As transformers computes it from its safetensors; its reader of GGUF files drops unknown keys."""
    theta = {"rope_type": "default", "rope_theta": 77777.0}
    model = make(tmp_path / "hf", name, rope_parameters=theta, tie_word_embeddings=name == "qwen2")
    file = tiny_gguf.write(tmp_path / "m.gguf", model, {})
    command.to_megatron(file, tmp_path / "megatron")
    command.to_hf(tmp_path / "megatron", tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(back(TOKENS).logits, model(TOKENS).logits)
    told = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (told["bos_token_id"], told["eos_token_id"]) == (200, [201, 202])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (200, 201)
    assert theirs("<|turn|>", add_special_tokens=False).input_ids == [202]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0},
            "llama.rope.scaling.type 'linear', llama.rope.scaling.factor 4.0:",
        ),
        ({".rope.scaling.factor": 4.0}, "llama.rope.scaling.factor 4.0"),  # linear where no type is given
        ({".rope.scaling.type": "yarn"}, "llama.rope.scaling.type 'yarn'"),
        ({".rope.scaling.type": "longrope"}, "llama.rope.scaling.type 'longrope'"),
        ({".rope.scaling.yarn_ext_factor": 1.0}, "llama.rope.scaling.yarn_ext_factor 1.0"),
        ({".rope.scaling.attn_factor": 1.2}, "llama.rope.scaling.attn_factor 1.2"),
        ({".rope.scale_linear": 2.0}, "llama.rope.scale_linear 2.0"),
        ({".rope.dimension_sections": [4, 4, 0, 0]}, "llama.rope.dimension_sections"),
        ({".rope.dimension_count": 8}, "llama.rope.dimension_count 8, but heads of 16"),
        ({".rope.freq_base": 10000.5}, "rope_theta is 10000.5"),
        ({".rope.freq_base_swa": 5.0}, "llama.rope.freq_base_swa 5.0"),
        ({".attention.sliding_window": 32}, "llama.attention.sliding_window 32, and Helix attends to all 64"),
        ({".attention.value_length": 8}, "llama.attention.value_length 8, but keys of 16"),
        ({".attention.scale": 0.5}, "llama.attention.scale 0.5, and GPTModel scales"),
        ({".attention.causal": False}, "llama.attention.causal False"),
        ({".attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv 8.0"),
        ({".attention.max_alibi_bias": 8.0}, "llama.attention.max_alibi_bias 8.0"),
        ({".attention.head_count_kv": [3, 3, 1]}, "llama.attention.head_count_kv .3, 3, 1., another"),
        ({".attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping 50.0"),
        ({".final_logit_softcapping": 30.0}, "llama.final_logit_softcapping 30.0"),
        ({".logit_scale": 0.25}, "llama.logit_scale 0.25"),
        ({".embedding_scale": 12.0}, "llama.embedding_scale 12.0"),
        ({".residual_scale": 0.5}, "llama.residual_scale 0.5"),
        ({".expert_count": 8}, "llama.expert_count 8"),
        ({".use_parallel_residual": True}, "llama.use_parallel_residual True"),
        ({".tensor_data_layout": "other"}, "llama.tensor_data_layout 'other'"),
        ({".pooling_type": 1}, "llama.pooling_type 1"),
        ({".a_key_of_tomorrow": 3}, "llama.a_key_of_tomorrow 3"),
        ({"xielu.beta": 0.5}, "xielu.beta 0.5"),
        ({".vocab_size": 200}, "llama.vocab_size 200, but an embedding of 203"),
        ({".block_count": None}, "lacks llama.block_count"),
        ({".block_count": "three"}, "llama.block_count 'three'; it is a whole number above 0"),
        ({".attention.head_count": 0}, "llama.attention.head_count 0; it is a whole number above 0"),
        ({".attention.head_count": [6, 6, 3]}, "another num_attention_heads in every layer"),
        ({".attention.head_count": 5, ".attention.key_length": None}, "5 of .*head_count do not divide 48"),
        ({".attention.sliding_window": [8, 64, 8]}, "attention.sliding_window .8, 64, 8., another value in"),
        ({".attention.layer_norm_rms_epsilon": "small"}, "epsilon 'small'; it is a number above 0"),
        ({".rope.freq_base": float("inf")}, "llama.rope.freq_base inf; it is a number above 0"),
        ({"split.count": "3"}, "is part 1 of 3 of a model"),
        ({"tokenizer.ggml.suppress_tokens": [5, 6]}, "tokenizer.ggml.suppress_tokens .5, 6."),
        ({"tokenizer.ggml.a_key_of_tomorrow": 3}, "tokenizer.ggml.a_key_of_tomorrow 3"),
        ({".attention.layer_norm_rms_epsilon": None}, "lacks llama.attention.layer_norm_rms_epsilon"),
        ({"general.architecture": None}, "names no architecture"),
        ({"general.type": "adapter"}, "general.type is 'adapter'"),
        ({"split.count": 3, "split.no": 1}, "is part 2 of 3 of a model; merge them .* llama-gguf-split "),
    ],
)  # fmt: skip
def test_what_a_key_says_is_refused_unless_it_is_computed(tmp_path, llama, changes, message):
    file = tiny_gguf.write(tmp_path / "m.gguf", llama, changes)
    with pytest.raises(ValueError, match=message):
        command.to_megatron(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_keys_that_are_off_or_say_nothing_change_nothing(tmp_path, llama):
    """The values with which llama.cpp computes the plain model, and what quantizing leaves in a file."""
    plain = config_of(tiny_gguf.write(tmp_path / "plain.gguf", llama, {}))
    more = {
        ".rope.scaling.type": "linear", ".rope.scaling.factor": 1.0, ".rope.scale_linear": 1.0,
        ".rope.scaling.finetuned": False, ".rope.scaling.original_context_length": 32,
        ".attention.scale": 0.25, ".attention.sliding_window": 64, ".attention.causal": True,
        ".attention.head_count_kv": [3, 3, 3], ".attn_logit_softcapping": 0.0, ".expert_count": 0,
        ".tensor_data_layout": "Meta AI original pth", "general.file_type": 3, "split.count": 1,
        "general.sampling.temp": 0.5, "tokenizer.ggml.remove_extra_whitespaces": False,
        "tokenizer.ggml.fim_pre_token_id": 3, "tokenizer.ggml.add_sep_token": False,
        "quantize.imatrix.chunks_count": 4,
    }  # fmt: skip
    assert config_of(tiny_gguf.write(tmp_path / "more.gguf", llama, more)).to_dict() == plain.to_dict()
    fewer = {".rope.scaling.type": "none", ".attention.value_length": None, ".vocab_size": None,
             ".rope.dimension_count": None, "general.type": "model"}  # fmt: skip
    assert config_of(tiny_gguf.write(tmp_path / "fewer.gguf", llama, fewer)).to_dict() == plain.to_dict()
    assert plain.rms_norm_eps == 1e-3 and plain.head_dim == 16


def test_what_llama_cpp_assumes_of_keys_that_are_not_there(tmp_path):
    """Not what the classes of transformers assume: 128 dimensions of a Qwen3 head, other RoPE bases."""
    model = make(tmp_path / "hf", "qwen3", head_dim=8, num_key_value_heads=6)
    lacking = dict.fromkeys([".attention.key_length", ".attention.value_length", ".attention.head_count_kv",
                             ".rope.freq_base", ".rope.dimension_count"])  # fmt: skip
    config = config_of(tiny_gguf.write(tmp_path / "m.gguf", model, lacking))
    assert (config.head_dim, config.num_key_value_heads) == (8, 6)
    assert config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.ffn_gate_inp.weight", "blk.0.attn_sinks"])
def test_unknown_tensors_are_refused(tmp_path, llama, name):
    file = tiny_gguf.write(tmp_path / "m.gguf", llama, {}, {name: np.ones(8, dtype=np.float32)})
    assert name in refusal(file)


def test_broken_files_are_named_in_one_line(tmp_path, llama):
    file = tiny_gguf.write(tmp_path / "m.gguf", llama, {})
    whole = file.read_bytes()
    for length in (4, 20, 1000, len(whole) // 2, len(whole) - 64):
        file.write_bytes(whole[:length])
        assert "is no complete GGUF file" in refusal(file), length
    file.write_bytes(b"")
    assert "is empty; download it again" in refusal(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "is a Git-LFS pointer" in refusal(file) and "git lfs pull" in refusal(file)
    file.write_bytes(b"PK\3\4" + whole)
    assert "is no GGUF file" in refusal(file)


@pytest.mark.parametrize("kind", [None, "no_vocab"])
def test_a_file_without_a_tokenizer_is_converted_without_one(tmp_path, llama, kind):
    without = {key: None for key in tiny_gguf.tokenizer(203)} | {"tokenizer.ggml.model": kind}
    file = tiny_gguf.write(tmp_path / "m.gguf", llama, without)
    args = command.to_megatron(file, tmp_path / "out")
    assert not hasattr(args, "tokenizer_model") and args.vocab_size == 203 and args.eos_token_id is None
    assert [path.name for path in (tmp_path / "out" / "hf").iterdir()] == ["config.json"]
    with pytest.raises(ValueError, match=r"no Hugging Face tokenizer in .*m\.gguf: the model brings none;"):
        open_tokenizer(tmp_path / "out", None, file)


def test_tokens_of_no_vocabulary_are_no_tokenizer(tmp_path, llama):
    file = tiny_gguf.write(tmp_path / "m.gguf", llama, {"tokenizer.ggml.model": "no_vocab"})
    command.to_megatron(file, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "hf").iterdir()] == ["config.json"]


def test_a_tokenizer_nobody_can_read_is_one_line(tmp_path, llama):
    file = tiny_gguf.write(tmp_path / "m.gguf", llama, {"tokenizer.ggml.merges": ["of tomorrow"]})
    with pytest.raises(ValueError, match=r"transformers cannot read its tokenizer \(gpt2\): .*`of` out of"):
        command.to_megatron(file, tmp_path / "out")


def test_files_beside_it_do_not_change_its_tokenizer(tmp_path, llama):
    from helix_megatron.check import tiny_model

    tiny_model.make(tmp_path / "beside")
    (tmp_path / "beside" / "chat_template.jinja").write_text("of another model")
    alone = tiny_gguf.write(tmp_path / "m.gguf", llama, {"tokenizer.chat_template": "{{ mine }}"})
    file = tiny_gguf.write(tmp_path / "beside" / "m.gguf", llama, {"tokenizer.chat_template": "{{ mine }}"})
    for source, out in ((alone, "one"), (file, "two")):
        command.to_megatron(source, tmp_path / out)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / out / "hf").iterdir()}
                for out in ("one", "two"))  # fmt: skip
    assert one == two and b"mine" in one["chat_template.jinja"]
    assert files.used_files(file) == [file]

"""Folders to convert: broken or ambiguous files, keys of config.json, tied weights; and what comes back."""

import json
import os
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helix_megatron.convert import command, torch_dist
from helix_megatron.generate import model as models
from tests.convert.test_convert import make, weights

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(60)[None] * 3 % 203
ROPE = {"rope_type": "default", "rope_theta": 1e4}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder of several shards."""
    folder = tmp_path_factory.mktemp("llama") / "hf"
    make(folder, "llama")
    return folder


@pytest.fixture
def folder(tmp_path, llama):
    """A copy to break."""
    return shutil.copytree(llama, tmp_path / "hf")


def edit(file, **changes):
    """Change keys of a JSON file; ... takes one away."""
    found = {**json.loads(file.read_text()), **changes} if file.exists() else changes
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def refusal(folder):
    """One line."""
    with pytest.raises(ValueError) as refused:
        command.to_megatron(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()
    return " ".join(str(refused.value).split())


def logits(folder):
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits


# ---- files ----
@pytest.mark.parametrize("name", ["model-00002-of", "config.json", "model.safetensors.index", "tokenizer"])
def test_a_broken_file_is_named_with_what_to_do(folder, name):
    (folder / "tokenizer.json").write_text("{}")
    file = next(path for path in folder.iterdir() if path.name.startswith(name))
    file.write_bytes(b"")
    assert f"{file} is empty; download it again" in refusal(folder)
    file.write_bytes(LFS)
    assert f"{file} is a Git-LFS pointer" in refusal(folder)
    file.write_bytes(LFS[30:])
    assert f"{file} is no" in refusal(folder)


def test_a_truncated_or_missing_shard_is_named(folder):
    shard = sorted(folder.glob("model-0*"))[1]
    whole = shard.read_bytes()
    for length in (4, 100, len(whole) - 1):
        shard.write_bytes(whole[:length])
        assert f"{shard} is no complete safetensors file" in refusal(folder)
    shard.unlink()
    assert f"{shard} is missing" in refusal(folder)
    other = sorted(folder.glob("model-0*"))[1]
    shutil.copy(other, shard)
    assert f"in {shard.name} and in {other.name}" in refusal(folder)
    save_file({}, shard)
    assert f"{shard} lacks model.layers." in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_a_link_to_nothing_is_named(folder, name):
    """What is left of a download that was cut short, or of a cache that was cleared."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder / "blobs" / "none")
    assert models._fingerprint(folder, "float32")
    assert f"{folder / name} is missing (a link to a file that is not there)" in refusal(folder)


@pytest.mark.parametrize("weight_map", [["a"], {"model.norm.weight": 3}])
def test_an_index_that_names_no_files_is_refused(folder, weight_map):
    edit(folder / "model.safetensors.index.json", weight_map=weight_map)
    assert "index.json does not say which file holds each tensor" in refusal(folder)


def test_weights_that_may_be_two_models_are_refused(folder):
    other = next(folder.glob("model-0*"))
    shutil.copy(other, folder / "model.safetensors")
    assert "holds both model.safetensors and an index of other files (model-00001-of" in refusal(folder)
    edit(folder / "adapter_config.json", peft_type="LORA")
    assert "holds an adapter (adapter_config.json)" in refusal(folder)


def test_an_index_of_the_one_file_is_read(folder):
    save_file(weights(folder), folder / "model.safetensors", metadata={"format": "pt"})
    names = weights(folder)
    for file in folder.glob("model-0*"):
        file.unlink()
    edit(folder / "model.safetensors.index.json", weight_map=dict.fromkeys(names, "model.safetensors"))
    command.to_megatron(folder, folder.parent / "out")
    command.to_hf(folder.parent / "out", folder.parent / "back")
    assert torch.equal(logits(folder.parent / "back"), logits(folder))


# ---- config.json ----
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_multiplier": 12.0}, "has 'embedding_multiplier' 12.0, which no llama model"),
        ({"logits_scaling": 8}, "has 'logits_scaling' 8"),
        ({"num_local_experts": 8}, "has 'num_local_experts' 8"),
        ({"rope_interleaved": True}, "has 'rope_interleaved' True"),
        ({"no_rope_layers": [1, 0, 1]}, "has 'no_rope_layers'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only language models"),
        ({"rope_parameters": {**ROPE, "mrope_section": [1, 2]}}, "'mrope_section' [1, 2] in 'rope_param"),
        ({"rope_parameters": {"full_attention": ROPE}}, "'full_attention'"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 4.0}}, "type 'linear'"),
        ({"num_hidden_layers": "three"}, "cannot be read by transformers"),
        ({"model_type": ["llama"]}, "cannot be converted: its architecture is not known here"),
        ({"architectures": [3]}, "only language models"),
        ({"architectures": "LlamaForCausalLM"}, "only language models"),
        ({"eos_token_id": [1, "2"]}, "cannot be read by transformers"),
        ({"num_attention_heads": 5}, "cannot be read by transformers"),
    ],
)  # fmt: skip
def test_a_key_that_is_not_understood_is_refused(folder, changes, message):
    edit(folder / "config.json", **changes)
    assert message in refusal(folder)


def test_ends_that_are_no_tokens_are_refused(folder):
    """They would end no answer, without a word."""
    for ends in ([201, True], "</s>", [[201]]):
        edit(folder / "generation_config.json", eos_token_id=ends)
        said = f"generation_config.json: eos_token_id is {ends!r}; it is a token's number, or a list of them"
        assert said in refusal(folder)


def test_keys_that_say_nothing_are_fine(folder):
    """What transformers of several years, and who used it, have left in real files."""
    expected = logits(folder)
    edit(
        folder / "config.json", _name_or_path="x", torch_dtype="float32", is_llama_config=True, dtype=...,
        rope_interleaved=False, unsloth_fixed=True, pretraining_tp=1, auto_map={"AutoModel": "x--y.Z"},
        rope_scaling=None, rope_parameters=..., rope_theta=10000.0, num_local_experts=None,
        architectures=None, use_cache=False, attention_dropout=0.1, transformers_version="4.31.0",
        pruned_heads={},
    )  # fmt: skip
    command.to_megatron(folder, folder.parent / "out")
    command.to_hf(folder.parent / "out", folder.parent / "back")
    assert torch.equal(logits(folder.parent / "back"), expected)


# ---- tied weights ----
@pytest.mark.parametrize("same", [False, True])
def test_an_output_matrix_of_its_own_beside_tied_embeddings(folder, same):
    """transformers keeps two matrices that differ, whatever config.json says."""
    embedding = weights(folder)["model.embed_tokens.weight"]
    head = embedding.clone() if same else torch.randn_like(embedding)
    shard = next(folder.glob("model-00001*"))
    save_file({**load_file(shard), "lm_head.weight": head}, shard, metadata={"format": "pt"})
    args = command.to_megatron(folder, folder.parent / "out")
    assert args.untie_embeddings_and_output_weights is not same
    command.to_hf(folder.parent / "out", folder.parent / "back")
    assert torch.equal(logits(folder.parent / "back"), logits(folder))
    assert ("lm_head.weight" in weights(folder.parent / "back")) is not same


# ---- what comes back ----
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("eos", [201, [201, 202]])
def test_tokens_and_vocabulary_come_back_without_the_folder(tmp_path, name, eos):
    make(tmp_path / "hf", name, bos_token_id=200, eos_token_id=201, pad_token_id=7)
    edit(tmp_path / "hf" / "generation_config.json", eos_token_id=eos)
    command.to_megatron(tmp_path / "hf", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "hf")
    command.to_hf(tmp_path / "out", tmp_path / "back")
    told = json.loads((tmp_path / "back" / "config.json").read_text())
    found = [told[f"{token}_token_id"] for token in ("bos", "eos", "pad")]
    assert (found, told["vocab_size"]) == ([200, eos, 7], 203)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.generation_config.eos_token_id == eos


def test_tokens_that_a_model_has_not_are_not_made_up(tmp_path):
    """The classes of transformers would say 1 and 2."""
    make(tmp_path / "hf", "llama", bos_token_id=None, eos_token_id=None)
    command.to_megatron(tmp_path / "hf", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "hf")
    config = command.to_hf(tmp_path / "out", tmp_path / "back")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "no config.json; give the folder of a Hugging Face model"),
        ({"logits_scaling": 8}, "has 'logits_scaling' 8"),
        ({"num_hidden_layers": "three"}, "cannot be read by transformers"),
        ({"rms_norm_eps": 0.5}, "layernorm_epsilon is 0.5, the checkpoint says 0.001"),
    ],
)
def test_a_configuration_of_another_model_is_not_taken_over(folder, tmp_path, changes, message):
    command.to_megatron(folder, tmp_path / "out")
    like = tmp_path / "like"
    like.mkdir()
    if changes is not None:
        shutil.copy(folder / "config.json", like)
        edit(like / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        command.to_hf(tmp_path / "out", tmp_path / "back", like=like)
    assert not (tmp_path / "back").exists()


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A tiny model with a tokenizer of 259 tokens, and its checkpoint."""
    from helix_megatron.check import tiny_model

    folder = tiny_model.make(tmp_path_factory.mktemp("spoken") / "hf")
    edit(folder / "generation_config.json", eos_token_id=[256, 257])
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    for name in ("special_tokens_map.json", "added_tokens.json", "vocab.json"):
        (folder / name).write_text("{}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    command.to_megatron(folder, folder.parent / "out")
    return folder


def retrained(source, out, **changes):
    """A checkpoint as a run writes it that began with `source`: without hf/, of its own arguments."""
    stored = torch_dist.Checkpoint(source)
    args = stored.args
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"):
        delattr(args, name)
    vars(args).update(changes)
    entries = list(command.mapping.entries(args, args.padded_vocab_size))
    out.mkdir()
    torch_dist.write(out, entries, args, stored.read)
    return out


@pytest.mark.parametrize("way", ["tokenizer", "another model's tokenizer", "tokenizer alone", "load"])
def test_a_trained_checkpoint_is_exported_with_its_tokens(spoken, tmp_path, way):
    """It knows the tokenizer that it was trained with, or what it was loaded from; its rows are padded."""
    out = spoken.parent / "out"
    null = {"tokenizer_type": "NullTokenizer", "tokenizer_model": None, "load": str(out)}
    changes = {"load": None} if way != "load" else null
    if way.startswith(("another", "tokenizer a")):
        folder = shutil.copytree(spoken, tmp_path / "theirs")
        if way == "tokenizer alone":
            (folder / "config.json").unlink()
        else:
            edit(folder / "config.json", num_hidden_layers=7)
        changes["tokenizer_model"] = str(folder)
    trained = retrained(out, tmp_path / "trained", **changes)
    config = command.to_hf(trained, tmp_path / "back")
    assert config.vocab_size == 259 and config.num_hidden_layers == 2
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.generation_config.eos_token_id == [256, 257]
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (spoken / "tokenizer.json").read_bytes()
    stops = models.stop_tokens(trained, None, str(tmp_path / "back"))
    assert stops == (256, 257)


def test_the_tokenizer_is_found_wherever_a_run_is_started(spoken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = command.to_megatron(spoken, command.Path("out"))
    told = yaml.safe_load((tmp_path / "out" / "model.yaml").read_text())["MODEL_ARGS"]["tokenizer-model"]
    assert told == args.tokenizer_model == str(tmp_path / "out" / "hf")


# ---- a Megatron checkpoint ----
def cut(name, length):
    return lambda folder: [path.write_bytes(path.read_bytes()[:length]) for path in folder.glob(name)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("latest*", 0), "latest_checkpointed_iteration.txt says ''; it says release"),
        (cut("release/metadata.json", 1), "release is no complete checkpoint (Expecting property name"),
        (cut("release/.metadata", 100), "pickle data was truncated"),
        (cut("release/*.distcp", 0), "release is no complete checkpoint ("),
        (lambda folder: (folder / "release" / ".metadata").unlink(), "release is no complete checkpoint ("),
    ],
)
def test_a_broken_checkpoint_is_named(spoken, tmp_path, damage, message):
    """By torch, a traceback of several hundred lines, and no exception of Python's Exception."""
    folder = shutil.copytree(spoken.parent / "out", tmp_path / "out")
    damage(folder)
    with pytest.raises(ValueError) as refused:
        command.to_hf(folder, tmp_path / "back")
    said = str(refused.value)
    assert message in said and said.startswith(str(folder)) and "\n" not in said and len(said) < 600


# ---- the cache ----
def test_every_file_of_the_converted_model_is_noticed(spoken, tmp_path):
    """What conversion has copied or read: by its content, as time and size can be the same."""
    folder = shutil.copytree(spoken, tmp_path / "hf")
    before = models._fingerprint(folder, "float32")
    kept = spoken.parent / "out" / "hf"
    names = [path.relative_to(kept) for path in kept.rglob("*") if path.is_file()]
    assert len(names) == 10 and {"merges.txt", "tool.jinja"} < {path.name for path in names}
    for name in [*names, "model.safetensors"]:
        old = (folder / name).read_bytes()
        time = (folder / name).stat().st_mtime_ns
        weights = name == "model.safetensors"
        (folder / name).write_bytes(old if weights else old[:-1] + bytes([old[-1] ^ 1]))
        os.utime(folder / name, ns=(0, time + weights))
        assert models._fingerprint(folder, "float32") != before, name
        (folder / name).write_bytes(old)
        os.utime(folder / name, ns=(0, time))
        assert models._fingerprint(folder, "float32") == before, name
    for name in ("vocab.txt", "tokenizer.model", "adapter_config.json", "model.safetensors.index.json"):
        before = models._fingerprint(folder, "float32")
        (folder / name).write_text("{}")
        assert models._fingerprint(folder, "float32") != before, name
    (folder / "README.md").write_text("changes nothing")
    after = models._fingerprint(folder, "float32")
    (folder / "README.md").unlink()
    assert models._fingerprint(folder, "float32") == after


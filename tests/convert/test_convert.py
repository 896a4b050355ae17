"""`helix convert`: bit-identical round trips of every family, the same logits as transformers, refusals."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from helix_megatron import cli
from helix_megatron.convert import check, command, families, mapping, torch_dist
from tests.megatron_glue.test_training import HELIX

transformers = pytest.importorskip("transformers")

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "vocab_size": 203,  # padded to 256: nothing divides it
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama 3.1": ("LlamaConfig", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen3": ("Qwen3Config", {"rms_norm_eps": 1e-3}),
}


def make(folder, name, dtype=torch.float32, **changes):
    """A random model of a family in `folder`; norms and biases too, so that losing one changes the logits."""
    kind, settings = MODELS[name]
    config = getattr(transformers, kind)(**{**SHAPE, **settings, **changes})
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1)
            parameter.copy_(spread + (1 if parameter.dim() == 1 else 0))
    model.save_pretrained(folder, max_shard_size="60KB")
    return model.eval()


def weights(folder):
    """Every tensor in the safetensors files of a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_identical(tmp_path, name, dtype):
    make(tmp_path / "hf", name, dtype)
    before = weights(tmp_path / "hf")
    args = command.to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert args.padded_vocab_size == 256
    command.to_hf(tmp_path / "megatron", tmp_path / "back", shard_bytes=50_000)
    after = weights(tmp_path / "back")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == dtype
        assert torch.equal(tensor, after[key]), key
    ours, theirs = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("back", "hf"))
    assert ours == theirs
    # Without the configuration kept beside the checkpoint, one is made from Megatron's arguments.
    (tmp_path / "megatron" / "hf").rename(tmp_path / "elsewhere")
    command.to_hf(tmp_path / "megatron", tmp_path / "again")
    remade = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.arange(40)[None]
    assert torch.equal(remade(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        ("llama", {1: []}),
        ("llama 3.1", {1: []}),
        ("llama with biases", {4: []}),
        ("qwen2", {2: ["--helix-dim-parallel-size", "2"]}),
        ("qwen3", {1: [], 2: []}),
    ],
)
def test_megatron_computes_what_transformers_computes(tmp_path, name, layouts):
    model = make(tmp_path / "hf", name)
    command.to_megatron(tmp_path / "hf", tmp_path / "megatron")
    tokens = torch.randint(203, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = check.reference(model, tokens, new_tokens=4, logits_file=tmp_path / "logits.npy")
    for tp, more in layouts.items():
        found = check.check(tmp_path / "megatron", tp, expected, more=more, timeout_s=200)
        assert found["max_difference"] < 2e-4, (name, tp)
        assert found["greedy"] == expected.greedy


def test_the_check_sees_a_difference(tmp_path):
    """The same weights with another norm epsilon: what forgetting --norm-epsilon would compute."""
    model = make(tmp_path / "hf", "llama")
    command.to_megatron(tmp_path / "hf", tmp_path / "megatron")
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5
    expected = check.reference(model, list(range(60)), new_tokens=4, logits_file=tmp_path / "logits.npy")
    assert check.check(tmp_path / "megatron", 1, expected, timeout_s=200)["max_difference"] > 1e-3


def test_flags_and_files(tmp_path):
    make(tmp_path / "hf", "qwen3")
    args = command.to_megatron(tmp_path / "hf", tmp_path / "out", dtype="bfloat16", divisible_by=1)
    assert args.padded_vocab_size == 203
    from helix_megatron.megatron import integrate, yaml_config

    config = yaml_config.load(tmp_path / "out" / "model.yaml")
    integrate.install()
    try:
        argv = yaml_config.to_argv(config.model_args, "model.yaml", yaml_config.known_flags())
    finally:
        integrate.uninstall()
    assert "--bf16" in argv and "--qk-layernorm" in argv
    assert argv[argv.index("--norm-epsilon") + 1] == "0.001"
    stored = torch_dist.Checkpoint(tmp_path / "out")
    assert {tensor.properties.dtype for tensor in stored.tensors.values()} == {torch.bfloat16}
    first = next(mapping.entries(stored.args, 203))
    whole = load_file(next((tmp_path / "hf").glob("model-00001*")))[first.names[0]]
    assert torch.equal(stored.read(first), whole.bfloat16())


def test_padding_is_added_and_taken_away():
    args = SimpleNamespace(padded_vocab_size=8)
    entry = mapping.Entry("embedding.word_embeddings.weight", None, ("x",), (8, 3), "vocab")
    rows = torch.randn(5, 3)
    padded = mapping.merge(entry, [rows], args)
    assert padded.shape == (8, 3) and not padded[5:].any()
    assert torch.equal(mapping.split(entry, padded, args, 5)[0], rows)


REFUSED = [
    ({"model_type": "gemma3_text"}, "'gemma3_text' cannot be converted: its local layers have a RoPE base"),
    ({"model_type": "mixtral"}, "'mixtral' cannot be converted: it has experts.*a loader for it"),
    ({"model_type": "qwen3_moe"}, "'qwen3_moe' cannot be converted: .*go by Megatron-Bridge"),
    ({"model_type": "gpt_oss"}, "'gpt_oss' cannot be converted: .*go by Megatron-Bridge"),
    ({"model_type": "qwen3_5_text"}, "'qwen3_5_text' cannot be converted: .*go by Megatron-Bridge"),
    ({"model_type": "mamba"}, "'mamba' cannot be converted: its architecture is not known here"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"rope_parameters": {**LLAMA3, "factor": 32.0}}, "llama3 RoPE scaling with factor 32.0"),
    (
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 4096},  # transformers' model has 4096
        "llama3 RoPE scaling with original_max_position_embeddings 4096",
    ),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "type 'yarn'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}}, "rope_theta is 10000.5"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta is None; it is a number"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, "rope_theta is '1e4'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}}, "rope_theta is -5.0"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps -1.0, and it is a number above 0"),
    ({"max_position_embeddings": 0}, "max_position_embeddings 0, and it is a number above 0"),
    ({"attention_bias": True}, "attention_bias True and mlp_bias False"),
    ({"model_type": "mistral", "sliding_window": 32}, r"sliding-window attention \(sliding_window 32 of 64"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized weights"),
    ({"num_hidden_layers": 4}, "lacks model.layers.3.input_layernorm.weight"),
    ({"num_hidden_layers": 2}, "has a tensor model.layers.2.*which a llama model .* lacks"),
    ({"tie_word_embeddings": False}, "lacks lm_head.weight"),
    ({"intermediate_size": 96}, r"gate_proj.weight is \[80, 48\], config.json says \[96, 48\]"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refusals(tmp_path, changes, message):
    make(tmp_path / "hf", "llama")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        command.to_megatron(tmp_path / "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]  # nothing half-written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 4}, "num_experts is 4"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'"),
        ({"helix_slices_as_heads": 2}, "helix_slices_as_heads is 2"),
        ({"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma is True"),
        ({"mup_output_mult": 0.5}, "mup_output_mult is 0.5, which no model of the Llama family has"),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0}, "rope_scaling_factor is 32.0"),
        ({"softmax_scale": 0.1}, "softmax_scale is 0.1"),
        ({"spec": ["a.module", "spec"]}, "spec is"),
        ({"hybrid_layer_pattern": "*-*-"}, r"hybrid_layer_pattern is '\*-\*-'.*hybrid-to-gpt makes a GPT"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "Qwen3 has no biases"),
    ],
)
def test_models_that_hugging_face_cannot_hold(tmp_path, changes, message):
    model = make(tmp_path / "hf", "llama")
    args = families.to_megatron(model.config)
    families.to_hf(args, torch.float32)
    vars(args).update(changes)
    with pytest.raises(ValueError, match=message):
        families.to_hf(args, torch.float32)


def test_mixed_dtypes_need_a_choice(tmp_path):
    make(tmp_path / "hf", "llama")
    file = next(file for file in (tmp_path / "hf").glob("*.safetensors") if len(load_file(file)) > 1)
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name].half()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"several dtypes \(float16, float32\); choose one with --dtype"):
        command.to_megatron(tmp_path / "hf", tmp_path / "out")
    assert command.to_megatron(tmp_path / "hf", tmp_path / "out", "bfloat16").params_dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_tensors_are_refused_whatever_config_json_says(tmp_path, dtype):
    make(tmp_path / "hf", "llama")
    file = next(file for file in (tmp_path / "hf").glob("*.safetensors") if len(load_file(file)) > 1)
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name].to(dtype)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is {dtype}: quantized"):
        command.to_megatron(tmp_path / "hf", tmp_path / "out", "float32")


@pytest.mark.parametrize(
    "flags", ["--make-vocab-size-divisible-by 0", "--max-shard-gib 0", "--max-shard-gib nan"]
)
def test_numbers_of_the_command_line(capsys, flags):
    assert cli.main(["convert", "--from", "hf", "x", "--to", "megatron", "y", *flags.split()]) == 2
    assert f"helix: {flags.split()[0]} " in capsys.readouterr().err


def test_a_vocabulary_that_is_not_known_is_told(tmp_path, capsys):
    """A run whose tokenizer is not of Hugging Face saves its padded rows alone."""
    from tests.convert.test_convert_sources import retrained

    make(tmp_path / "hf", "llama", bos_token_id=1)
    command.to_megatron(tmp_path / "hf", tmp_path / "out")
    for way, unknown in (("like", False), ("own", True)):
        source = retrained(tmp_path / "out", tmp_path / way, load=None)
        like = ["--like", str(tmp_path / "hf")] if way == "like" else []
        argv = ["--from", "megatron", str(source), "--to", "hf", str(tmp_path / f"{way} back"), *like]
        assert cli.main(["convert", *argv]) == 0
        told = "do not say how many of the 256 rows of the embedding mean a token"
        assert (told in capsys.readouterr().out) is unknown


def test_command_line(tmp_path, capsys):
    make(tmp_path / "hf", "llama")
    folders = {name: str(tmp_path / name) for name in ("hf", "out", "back")}
    assert cli.main(["convert", "--from", "hf", folders["hf"], "--to", "megatron", folders["out"]]) == 0
    said = capsys.readouterr().out
    assert f"--load {folders['out']} --use-checkpoint-args --norm-epsilon 0.001" in said
    assert cli.main(["convert", "--from", "megatron", folders["out"], "--to", "hf", folders["back"]]) == 0
    assert "a llama model" in capsys.readouterr().out
    assert weights(tmp_path / "back").keys() == weights(tmp_path / "hf").keys()

    def refusal(*argv):
        assert cli.main(["convert", *argv]) == 2
        return capsys.readouterr().err

    assert "back exists; give a new" in refusal(
        "--from", "megatron", folders["out"], "--to", "hf", folders["back"]
    )
    assert "the other way round" in refusal("--from", "hf", folders["hf"], "--to", "hf", folders["out"])
    assert "neither a folder" in refusal("--from", "hf", folders["hf"] + "x", "--to", "megatron", "y")
    assert "not a torch_dist" in refusal("--from", "megatron", folders["hf"], "--to", "hf", "y")
    other = tmp_path / "other"
    make(other, "llama", rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    said = refusal("--from", "megatron", folders["out"], "--to", "hf", "y", "--like", str(other))
    assert "rotary_base is 777, the checkpoint says 10000" in said


def test_helix_is_used(tmp_path):
    """The layouts above do slice heads: Megatron alone refuses them."""
    from helix_megatron.host.launcher import RankError

    model = make(tmp_path / "hf", "llama")
    command.to_megatron(tmp_path / "hf", tmp_path / "megatron")
    expected = check.reference(model, list(range(40)), new_tokens=2, logits_file=tmp_path / "logits.npy")
    with pytest.raises(RankError, match=r"num_query_groups \(3\) must be a multiple or divisor of tensor"):
        check.check(tmp_path / "megatron", 2, expected, more=["--attention-impl", "megatron"], timeout_s=200)
    assert HELIX.split() == check.HELIX_FLAGS

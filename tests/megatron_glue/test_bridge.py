"""Megatron-Bridge with Helix: Hugging Face weights into sliced heads and back, on the host."""

import json
import subprocess
import sys

import pytest
import torch

from tests.megatron_glue.te_environment import environment

transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file
TOKENS = (torch.arange(2 * 21) * 7 % 96).view(2, 21)  # as in bridge_worker.py
SHAPE = dict(
    vocab_size=96, hidden_size=144, intermediate_size=64, num_hidden_layers=2, rms_norm_eps=1e-5,
    max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
MODELS = {  # 3 KV heads: Megatron alone refuses T = 2; Qwen3 has QK-norm, Qwen2 biases
    "llama": transformers.LlamaConfig(**SHAPE, num_attention_heads=9, num_key_value_heads=3),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=16, num_attention_heads=8, num_key_value_heads=2),
    "qwen2": transformers.Qwen2Config(**SHAPE, num_attention_heads=4, num_key_value_heads=2),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SHAPE, head_dim=16, num_attention_heads=8, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True,
    ),
    "gpt_oss": transformers.GptOssConfig(  # learned sinks, windows in every other layer, YaRN
        **SHAPE | dict(intermediate_size=48), head_dim=16, num_attention_heads=8, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, sliding_window=6, rope_parameters=dict(
            rope_type="yarn", rope_theta=150000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
            original_max_position_embeddings=4096,
        ),
    ),
    "qwen3_5": transformers.Qwen3_5TextConfig(  # output gates, a quarter of a head rotated, gated delta nets
        **SHAPE | dict(num_hidden_layers=4), head_dim=32, num_attention_heads=8, num_key_value_heads=2,
        full_attention_interval=2, layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=8, linear_value_head_dim=8,
        rope_parameters=dict(
            rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25, mrope_section=[2, 1, 1],
            mrope_interleaved=True,
        ),
    ),
}
# Tensor-parallel and pipeline sizes, {model: Helix's settings or the way in; None: Megatron's attention}
RUNS = [
    (1, 1, {"llama": None, "qwen3": None, "qwen2": None, "qwen3_moe": None}),
    (2, 1, {"llama": {}, "qwen3": "plugin", "qwen2": "gpt_layer_spec"}),
    (2, 2, {"qwen2": {"head_parallel_size": 1}, "qwen3_5": {"head_parallel_size": 1}}),
    (4, 1, {"llama": {}, "qwen3": {}, "qwen3_moe": {}, "gpt_oss": {}, "qwen3_5": {},
            "qwen2": {"query_placement": "dims"}}),
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """For each run {model: (logits, exported weights)}; what was refused; what transformers has of both."""
    env, out = environment(), tmp_path_factory.mktemp("bridge")
    reference = {}
    for name, config in MODELS.items():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for weight in model.parameters():  # biases and norms too, which start as zeros and ones
                weight.add_(torch.randn_like(weight) * 0.05)
            logits = model(TOKENS).logits
        model.save_pretrained(out / name)
        reference[name] = (logits, load_file(out / name / "model.safetensors"))
    runs = [
        (tp, pp, {name: (str(out / name), settings) for name, settings in models.items()})
        for tp, pp, models in RUNS
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.megatron_glue.bridge_worker"],
        input=json.dumps({"runs": runs, "out": str(out), "refusals": str(out / "llama")}),
        env=env | {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"},  # of gated delta nets in torch
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [torch.load(out / f"run{number}.pt", weights_only=True) for number in range(len(RUNS))]
    return results, json.loads(done.stdout.splitlines()[-1]), reference


@pytest.mark.parametrize(("run", "name"), [(run, name) for run in range(len(RUNS)) for name in RUNS[run][2]])
def test_logits_and_exported_weights_are_those_of_transformers(found, run, name):
    results, _, reference = found
    logits, exported = results[run][name]
    expected, weights = reference[name]
    assert (logits is None) == (RUNS[run][1] > 1)
    if logits is not None:
        assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()
    assert set(exported) == set(weights)
    assert all(torch.equal(exported[key], weight) for key, weight in weights.items())


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("not told", "call helix_megatron.with_helix before building the model"),
        ("per-slice", "Hugging Face weights are those of ordinary attention"),
        ("uneven", "has slices of 12, 4 dimensions, but Megatron-Bridge deals"),
        ("grid", "n = 2 does not divide the 3 KV heads"),
        ("adapter", "would be exported in the wrong order"),
        ("hybrid model", "HelixParallelSelfAttention"),  # is not refused
        ("plugin", "Hugging Face weights are those of ordinary attention"),
        ("plugin of Megatron's", "num_attention_heads (9) must be a multiple"),
    ],
)
def test_what_would_be_wrong_is_refused_on_every_rank(found, case, words):
    for rank in found[1]:
        assert rank[case] is not None and words in rank[case]

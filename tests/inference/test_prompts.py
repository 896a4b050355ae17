"""Prompts without history: by the core that trains, kept by position."""

import json
import subprocess
import sys

import pytest
import torch

from helix_megatron.check.reference import Case
from helix_megatron.host.launcher import run_ranks
from helix_megatron.inference.prompts import find_prompts
from helix_megatron.kernels.paged_attention import Requests
from helix_megatron.partition.config import HelixConfig
from tests.inference.kv_cache_worker import memory_of_prompts, prompts_by_the_core
from tests.megatron_glue.te_environment import environment


@pytest.mark.parametrize("te_core", [False, True], ids=["local core", "stand-in for Transformer Engine's"])
def test_the_core_attends_and_what_follows_finds_the_prompt_in_the_cache(te_core):
    """Its chunks after the first do not take it, nor do ranks that attend with some of the KV heads."""
    runs = [  # of one rank: the core is Transformer Engine's, the local one
        (Case(8, 1, 16, seq=12), {}, [5], 1, 1),
        (Case(8, 1, 16, seq=12, gate=True, qk_norm="RMSNorm"), dict(query_placement="dims"), [5, 4], 1, 1),
        (Case(9, 3, 16, seq=12), {}, [7], 2, 2),  # a share of the positions in two chunks
        (Case(8, 2, 16, seq=12), {}, [5], 0, 0),
        (Case(8, 1, 16, seq=12, window=(3, 0)), {}, [9], 1, 0),  # local: scores of the whole prompt
        (Case(8, 1, 16, seq=4), {}, [1], 0, 0),
    ]
    sizes = dict(head_parallel_size=1, dim_parallel_size=2, kv_interleave_size=2)
    jobs = [(case, HelixConfig(**sizes, **more), prompt) for case, more, prompt, *_ in runs]
    for rank in run_ranks(prompts_by_the_core, 2, 2, jobs, te_core):
        for (name, error, calls), (*_, of_te, local) in zip(rank, runs, strict=True):
            assert error < 2e-6, name
            assert calls == (of_te if te_core else local), name


def test_prompts_need_memory_that_is_linear_in_their_length_and_half_precision():
    """Neither scores of all pairs of tokens nor a copy of the outputs in fp32, on the way of the core."""
    prompt, heads, dim = 384, 8, 16
    case = Case(heads, 1, dim, seq=prompt, batch=1, hidden=64)
    jobs = [(case, HelixConfig(1, 2, query_placement=placement)) for placement in ("heads", "dims")]
    for rank in run_ranks(memory_of_prompts, 2, 2, jobs):
        for found in rank:
            assert found["runs of the core"] == 1
            assert found["any"][0] < prompt * prompt, found
            assert found["fp32"][0] < prompt * heads // 2 * dim, found


def test_transformer_engines_core_attends_over_prompts_one_and_several():
    """Its own Python code over torch versions of its kernels."""
    command = [sys.executable, "-m", "tests.inference.te_prompts_worker"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in json.loads(done.stdout.splitlines()[-1]):
        assert len(rank) == 2
        for core, error, runs, packed_error in rank:
            assert core == "TEDotProductAttention" and runs == 1  # the cache's own kernel afterwards
            assert max(error, packed_error) < 2e-6


def _requests(new, before):
    ends = torch.tensor([0, *new, 0]).cumsum(0).int()  # padding behind
    return Requests(ends, torch.tensor([*map(sum, zip(new, before)), 0]), torch.zeros(len(new) + 1, 3))


def test_which_tokens_are_whole_prompts():
    new, before = [1, 1, 3, 7, 5], [9, 4, 8, 0, 0]
    found = find_prompts(new, before, _requests(new, before))
    assert (found.first, found.stop, found.longest, found.singles) == (5, 17, 7, 2)
    assert found.host_ends.tolist() == found.ends.tolist() == [0, 7, 12]
    assert found.others.longest == 3
    assert found.others.query_ends.tolist() == [0, 1, 2, 5] and found.others.lengths.tolist() == [10, 5, 11]
    packed = found.packed(on_host=True)
    assert packed.cu_seqlens_q is found.host_ends and packed.max_seqlen_kv == 7
    alone = find_prompts([1, 6], [3, 0], _requests([1, 6], [3, 0]))
    assert alone.packed(on_host=False) is None and alone.singles == 1 and alone.host_ends.tolist() == [0, 6]
    for new, before in (([1, 2], [3, 5]), ([4, 2], [0, 5]), ([1, 4, 2], [6, 0, 5])):
        assert find_prompts(new, before, _requests(new, before)) is None

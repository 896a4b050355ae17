"""Bad input to the command line: one line that names what was given and what would work, and exit code 2."""

import contextlib
import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from helix_megatron.host.launcher import run_ranks
from helix_megatron.megatron.refusals import refuse_unsupported
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError
from tests.training import HELIX, MODEL


def rank_main(arguments, extra_of_rank_1=(), megatron_version=None):
    """(exit code, what was printed to stderr) of the entry point in one rank."""
    from megatron.core import package_info

    from helix_megatron import pretrain_gpt

    if megatron_version is not None:
        package_info.__shortversion__ = megatron_version
    if os.environ["RANK"] == "1":
        arguments = [*arguments, *extra_of_rank_1]
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        code = pretrain_gpt.main([*MODEL, "--helix-host-mode", *arguments])
    assert not torch.distributed.is_initialized()  # no process group was made
    return code, printed.getvalue()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--helix-head-parallel-size 3 --helix-dim-parallel-size 2", "n*m = 6, but the tensor-parallel size"),
        ("--helix-head-parallel-size 2", "n = 2 does not divide the 3 KV heads; legal grids: n=1 m=2"),
        ("--kv-channels 1 --position-embedding-type none", "m = 2 is more than the 1 dimensions of a head"),
        ("--kv-channels 15", "15 rotary dimensions of the 15 of a head are not made of them"),
        ("--kv-channels 2 --helix-dim-parallel-size 2", "more than the 1 rotary pairs of a head; a slice"),
        ("--kv-channels 18 --helix-softmax per-slice", "does not divide the 9 rotary pairs of a head, and"),
        ("--helix-slice-weights 2,1,1", "(2,1,1) were given, but Helix grid 1x2 has 2 slices"),
        ("--helix-slice-weights 2,x", "--helix-slice-weights 2,x: 'x' is not a number"),
        ("--helix-slice-weights 1 0", "slice weights 1,0: 0 is not a positive number"),
        ("--helix-slice-weights nan,1", "slice weights nan,1: nan is not a positive number"),
        ("--helix-slice-weights 2,1 --helix-softmax per-slice", "2,1 were given with per-slice softmax"),
        ("--attention-impl megatron --helix-slice-weights 2,1", "--helix-slice-weights was given with"),
        ("--helix-query-placement heads", "query placement 'heads' needs whole heads"),
        ("--helix-softmax per-slice --helix-comm-type a2a", "per-slice softmax, which exchanges nothing"),
        ("--multi-latent-attention", "not support --multi-latent-attention with sliced heads (here m = 2)"),
        ("--spec a b", "does not support --spec with sliced heads (here m = 2); give helix_megatron"),
        ("--heterogeneous-layers-config-path f", "--heterogeneous-layers-config-path with sliced heads"),
        ("--experimental-attention-variant dsa", "not support --experimental-attention-variant with sliced"),
        ("--inference-shards tp=3,role=prefill+tp=3,role=decode", "prefill and decode apart"),
        ("--attention-impl megatron --helix-dim-parallel-size 2", "was given with --attention-impl megatron"),
        ("--attention-output-gate --helix-softmax per-slice", "--attention-output-gate"),
        ("--transformer-impl inference_optimized", "alone (--transformer-impl inference_optimized)"),
        ("--softmax-type learnable", "m does not divide the query heads"),
        ("--softmax-type learnable --helix-comm-type all_reduce", "--softmax-type"),
        ("--helix-softmax per-slice --position-embedding-type yarn", "YaRN"),
        (
            "--fp8-format hybrid --bf16 --transformer-impl transformer_engine --kv-channels 8",
            "multiples of 16, but rank 0 of Helix grid 1x2 holds 60 rows of linear_qkv",
        ),
        (
            "--reset-attention-mask --bf16 --helix-comm-type all_reduce --attention-backend auto "
            "--transformer-impl transformer_engine",
            "does not support --reset-attention-mask in half precision",
        ),
        ("--fp8-format hybrid --bf16 --fp8-param-gather", "--fp8-param-gather"),
        ("--helix-hierarchical-allreduce", "needs two levels, but Helix grid 1x2 has one"),
        (
            "--ffn-hidden-size 193",
            "--tensor-model-parallel-size 2 does not divide 193 of the MLP's --ffn-hidden-size; "
            "tensor-parallel sizes that work on these ranks: 1",
        ),
        ("--sequence-parallel --seq-length 47", "2 does not divide 47 of a sequence (--sequence-parallel"),
        ("--num-experts 2 --moe-ffn-hidden-size 65", "2 does not divide 65 of an expert's --moe-ffn-hidden"),
        ("--optimizer muon", "does not support --optimizer muon"),
        ("--ckpt-format torch --save nowhere --save-interval 5", "does not support --ckpt-format torch "),
        (
            "--load nowhere --ckpt-convert-format torch --ckpt-convert-save nowhere",
            "does not support --ckpt-convert-format torch (",
        ),
    ],
)
def test_one_line_and_exit_code_2(flags, message):
    arguments = f"--tensor-model-parallel-size 2 {HELIX} {flags}".split()
    for code, printed in run_ranks(rank_main, 2, arguments, host_mode=False):
        assert code == 2 and message in printed, printed
        assert len(printed.strip().splitlines()) == 1


def test_context_parallelism_is_refused_where_scores_are_summed():
    layout = "--tensor-model-parallel-size 2 --context-parallel-size 2 --helix-comm-type all_reduce"
    arguments = f"{layout} {HELIX}".split()
    for code, printed in run_ranks(rank_main, 4, arguments, host_mode=False):
        assert code == 2 and "--context-parallel-size" in printed


def test_ranks_with_different_settings_are_told_apart():
    arguments = f"--tensor-model-parallel-size 2 {HELIX} --num-attention-heads 8 --num-query-groups 1".split()
    extra = ["--helix-query-placement", "dims"]
    for code, printed in run_ranks(rank_main, 2, arguments, extra, host_mode=False):
        assert code == 2
        assert "helix query placement is dims on rank 1 and heads on rank 0" in printed


def test_ranks_with_different_slices_are_told_apart():
    arguments = f"--tensor-model-parallel-size 2 {HELIX}".split()
    for code, printed in run_ranks(
        rank_main, 2, arguments, ["--helix-slice-weights", "3,1"], host_mode=False
    ):
        assert code == 2 and "helix slices is 12, 4 on rank 1 and 8, 8 on rank 0" in printed, printed


def test_another_megatron_is_refused():
    ((code, printed),) = run_ranks(rank_main, 1, HELIX.split(), (), "0.15.3", host_mode=False)
    assert code == 2 and "megatron-core 0.15.3 is not supported" in printed and "0.19" in printed


def test_the_launcher_passes_the_line_and_the_exit_code_on():
    command = [sys.executable, "-m", "helix_megatron.launch", "--nproc-per-node", "2"]
    command += ["-m", "helix_megatron.pretrain_gpt", *MODEL, "--helix-host-mode", *HELIX.split()]
    command += ["--tensor-model-parallel-size", "2", "--helix-head-parallel-size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 2
    assert "n = 2 does not divide the 3 KV heads" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_blockwise_fp8_wants_whole_blocks():
    """480 rows of linear_qkv are whole MXFP8 blocks of 32, and no whole blocks of 128."""
    plan = HelixConfig(1, 2).resolve(9, 3, 64, 2)
    for fp8 in (dict(fp8="hybrid", fp8_recipe="mxfp8"), dict(fp8=None, fp8_recipe="blockwise")):
        refuse_unsupported(SimpleNamespace(**fp8), plan)
    blockwise = SimpleNamespace(fp8="hybrid", fp8_recipe="blockwise")
    refuse_unsupported(blockwise, HelixConfig(1, 2).resolve(4, 1, 128, 2))
    message = r"blockwise works in blocks of 128, .* rank 0 of Helix grid 1x2 holds 480 rows of linear_qkv"
    with pytest.raises(HelixConfigError, match=message):
        refuse_unsupported(blockwise, plan)


def test_layers_made_for_inference_alone_are_refused_whoever_makes_them():
    """By flags, and in a script that has no flags: their weights may be quantised where they are."""
    plan = HelixConfig(1, 2).resolve(8, 4, 16, 2)
    refuse_unsupported(SimpleNamespace(transformer_impl="local"), plan)
    with pytest.raises(HelixConfigError, match="--transformer-impl inference_optimized"):
        refuse_unsupported(SimpleNamespace(transformer_impl="inference_optimized"), plan)


def test_residual_streams_beside_each_other_are_refused():
    """Of Megatron core 0.20."""
    plan = HelixConfig(1, 2).resolve(8, 4, 16, 2)
    refuse_unsupported(SimpleNamespace(enable_mhc_connections=False), plan)
    with pytest.raises(HelixConfigError, match=r"--enable-mhc-connections\), which were never tried"):
        refuse_unsupported(SimpleNamespace(enable_mhc_connections=True), plan)

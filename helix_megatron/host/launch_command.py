"""Command line of `python -m helix_megatron.launch`: ranks as processes of this machine, like torchrun's."""

import argparse
import os
import runpy
import sys

from helix_megatron.host.launcher import RankError, run_ranks


def _run_target(module, target, arguments) -> None:
    """Run a module or script as __main__, as `python -m` and `python` would."""
    if "--helix-host-mode" in arguments:
        from helix_megatron.host.mode import enable_host_mode

        enable_host_mode()
    sys.argv = [target, *arguments]
    if module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(target)))
        runpy.run_path(target, run_name="__main__")


def main(argv=None) -> int:
    """The command line; returns the exit code of the first rank that failed, 124 after a time-out, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m helix_megatron.launch", description="Start ranks on this machine, like torchrun."
    )
    add = parser.add_argument
    add("--nproc-per-node", "--nproc_per_node", type=int, required=True, metavar="N", help="number of ranks")
    add("--timeout", type=float, default=86400, metavar="S", help="kill all ranks after S seconds")
    add("--log-dir", metavar="DIR", help="rank k > 0 writes DIR/rank_k.log")
    add("--share-gpu", action="store_true",
        help="all ranks use the one GPU 0: for whether it is right, not for how long it takes")  # fmt: skip
    add("-m", dest="module", action="store_true", help="TARGET is a module, not a script")
    add("target", metavar="TARGET", help="script, or module with -m")
    add("arguments", nargs=argparse.REMAINDER, help="arguments of TARGET")
    options = parser.parse_args(argv)
    if not options.module and not os.path.isfile(options.target):
        parser.error(f"there is no script {options.target!r}; a module is started with -m {options.target}")
    if options.share_gpu:
        if "--helix-host-mode" in options.arguments:
            parser.error("--share-gpu and --helix-host-mode were both given; a host has no GPU to share")
        ranks = options.nproc_per_node
        print(f"{parser.prog}: {ranks} ranks share GPU 0; their times mean nothing", file=sys.stderr)
    try:
        run_ranks(
            _run_target, options.nproc_per_node, options.module, options.target, options.arguments,
            timeout_s=options.timeout, host_mode=False, log_dir=options.log_dir, show_rank0=True,
            share_gpu=options.share_gpu,
        )  # fmt: skip
    except RankError as error:
        print(error.message if error.message is not None else error, file=sys.stderr)
        return error.exit_code
    return 0

"""Whether `helix generate` and `helix serve` replay their steps from CUDA graphs; decided before ranks start.

    --cuda-graph-impl local   Megatron's engine captures its steps when it starts, for each of some sizes
    --cuda-graph-impl none    every step is launched kernel by kernel (eager)
    neither                   local wherever that works, else none, and why is said

A layer makes what captures it when it is built, so the model's flags say it. Which sizes are captured is
Megatron's choice, by its own flags (`engine_settings`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from helix_megatron.partition.config import HelixConfig, HelixPlan
from helix_megatron.partition.grid import HelixConfigError

_FLAG = "--cuda-graph-impl"
_COUNT = "--inference-dynamic-batching-num-cuda-graphs"
_OF_TRAINING = ("transformer_engine", "full_iteration")
_READ = {
    _COUNT,
    "--inference-dynamic-batching-cuda-graph-mixed-prefill-count",
    "--inference-dynamic-batching-cuda-graph-sizing-distribution",
    "--inference-cuda-graph-all-prefills",
    "--inference-cuda-graph-max-tokens",
    "--inference-cuda-graph-scope",
    "--inference-rng-tracker",
}
_UNREAD = {
    "--inference-dynamic-batching-block-size": "give --kv-block-size",
    "--inference-max-seq-length": "helix serve has --max-sequence-length",
    "--inference-max-requests": "give --max-batch-size",
    "--inference-dynamic-batching-max-requests": "give --max-batch-size",
    "--enable-cuda-graph": f"give {_FLAG} local",
    "--enable-chunked-prefill": "prompts are computed whole",
    "--num-speculative-tokens": "one token a step; Megatron's own scripts serve more",
    "--use-flashinfer-fused-rope": "leave it out",
}


@dataclass(frozen=True)
class Steps:
    """How an engine's steps are run.

    Args:
        impl: --cuda-graph-impl, none or local.
        reason: in words.
    """

    impl: str
    reason: str

    def flags(self, count: int | None, decode_only: bool) -> tuple[str, ...]:
        """For Megatron.

        Args:
            count: sizes of a step to capture, -1 for as many as Megatron likes; None for its default.
            decode_only: steps with prompts are eager.

        Raises:
            ValueError: a count where nothing is captured.
        """
        if count is not None and (self.impl != "local" or (count < 1 and count != -1)):
            raise ValueError(f"{_COUNT} {count}: at least 1, or -1 to let Megatron choose; {self}.")
        if self.impl != "local":
            return ()
        counted = () if count is None else (_COUNT, str(count))
        # the tracker: what draws no random numbers leaves none for a graph to remember
        only = ("--decode-only-cuda-graphs",) if decode_only else ()
        return (_FLAG, "local", "--inference-rng-tracker", *counted, *only)

    def __str__(self) -> str:
        return f"steps {'from CUDA graphs' if self.impl == 'local' else 'eager'}: {self.reason}"


EAGER = Steps("none", "nothing else was asked for")


def asked_for(option: str | None, more: Sequence[str], host: bool) -> str | None:
    """`none`, `local`, or None where nothing was asked.

    Args:
        option: of the command's own flag.
        more: further flags, which may have it too.
        host: there is no GPU.

    Raises:
        ValueError: what no engine of these commands captures.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(_FLAG, default=option)
    found = parser.parse_known_args(list(more))[0].cuda_graph_impl
    if option is not None and found != option:
        raise ValueError(f"{_FLAG} {option}, but --megatron-args has {_FLAG} {found}; give one of them.")
    if found in _OF_TRAINING:
        raise ValueError(f"{_FLAG} {found} captures training steps; an engine's are captured by local.")
    if found not in (None, "none", "local"):
        raise ValueError(f"{_FLAG} {found}: none or local.")
    if found == "local" and host:
        raise ValueError(f"{_FLAG} local: there is no GPU here to capture CUDA graphs on; leave it out.")
    return found


def choose_steps(asked: str | None, layout: Any, trained: argparse.Namespace) -> Steps:
    """How steps are run.

    Args:
        asked: by `asked_for`.
        layout: model.Layout.
        trained: arguments of the model's checkpoint.

    Raises:
        ValueError: graphs were asked for, and cannot be.
    """
    if layout.on_host:
        return Steps("none", "there is no GPU")
    if asked == "none":
        return Steps("none", f"{_FLAG} none")
    plan, obstacle = _plan(layout, trained), None
    if plan is not None and not plan.is_megatron:
        obstacle = _obstacle(plan, layout)
    if obstacle and asked:
        raise ValueError(f"{_FLAG} local is not served with {obstacle}.")
    if obstacle:
        return Steps("none", f"CUDA graphs are not served with {obstacle}")
    return Steps("local", "as asked" if asked else f"the default of GPUs ({_FLAG} none: eager)")


def _plan(layout: Any, trained: argparse.Namespace) -> HelixPlan | None:
    """Of the attention of a model with these arguments; None where it is Megatron's."""
    if layout.attention != "helix":
        return None
    helix = _helix_config(layout, trained)
    heads = trained.num_attention_heads
    return helix.resolve(
        heads,
        trained.num_query_groups if trained.group_query_attention else heads,
        trained.kv_channels or trained.hidden_size // heads,
        layout.tensor_parallel,
        getattr(trained, "rotary_interleaved", False),
        getattr(trained, "attention_output_gate", False),
    )


def _helix_config(layout: Any, trained: argparse.Namespace) -> HelixConfig:
    from helix_megatron.megatron.arguments import add_helix_arguments, helix_config_from_args

    parser = add_helix_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    known, _ = parser.parse_known_args(["--attention-impl", "helix", *layout.more])
    known.position_embedding_type = trained.position_embedding_type
    known.rotary_percent = getattr(trained, "rotary_percent", 1.0)
    config = helix_config_from_args(known)
    assert config is not None
    return config


def _obstacle(plan: HelixPlan, layout: Any) -> str | None:
    """What of a model with sliced heads no graph holds, in words; None where nothing stands in the way."""
    import torch

    from helix_megatron.kernels import selection

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cuda-graph-warmup-steps", type=int, default=3)
    parser.add_argument("--flash-attention-version", type=int)
    given, _ = parser.parse_known_args(list(layout.more))
    if plan.kv_cache == "dim":
        return "--helix-kv-cache dim, which asks the device for lengths; sequence has graphs"
    if not given.cuda_graph_warmup_steps:
        return "--cuda-graph-warmup-steps 0: kernels are chosen and compiled in the steps before a capture"
    if plan.kv_cache != "sequence":
        return None
    kind = getattr(torch, layout.dtype), 256, False, os.environ.get(selection.OVERRIDE)
    settings = dict(dim=plan.layout.shape.kv_channels, flash_version=given.flash_attention_version)
    try:
        selection.choose("cuda", *kind, graph=True, compare=False, **settings)
    except HelixConfigError as error:
        return f"attention that waits for the device: {error}"
    return None


def engine_settings(config: Any) -> dict[str, Any]:
    """Fields of InferenceConfig that say which sizes are captured, by Megatron's own flags; none where steps
    are eager.

    Args:
        config: the model's TransformerConfig.
    """
    if getattr(config, "cuda_graph_impl", "none") != "local":
        return {}
    from megatron.core.inference.config import CudaGraphSizingDistribution
    from megatron.training import get_args

    args = get_args()
    return {
        "num_cuda_graphs": args.inference_dynamic_batching_num_cuda_graphs,
        "cuda_graph_mixed_prefill_count": args.inference_dynamic_batching_cuda_graph_mixed_prefill_count,
        "cuda_graph_sizing_distribution": CudaGraphSizingDistribution(
            args.inference_dynamic_batching_cuda_graph_sizing_distribution
        ),
        "use_cuda_graphs_for_non_decode_steps": not args.decode_only_cuda_graphs,
        "cuda_graph_all_prefills": args.inference_cuda_graph_all_prefills,
        "cuda_graph_max_tokens": args.inference_cuda_graph_max_tokens,
    }


def refuse_unread_flags(more: Sequence[str]) -> None:
    """ValueError for the first of Megatron's inference flags that a command would not obey, which makes its
    engine itself."""
    for word in more:
        flag = word.partition("=")[0]
        if flag in _UNREAD or (flag.startswith("--inference-") and flag not in _READ):
            way_out = _UNREAD.get(flag, "leave it out, or use a script of Megatron's own")
            raise ValueError(f"{flag} in --megatron-args is not obeyed here: {way_out}.")

"""What a rank does in the tests of the sharded KV cache."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from unittest import mock

import torch

from helix_megatron import compat
from helix_megatron.check.reference import Case, reference
from helix_megatron.partition.config import HelixConfig
from tests.megatron_glue.layer_worker import Groups, inferring, load, make_layer, start


def make(case: Case, helix: HelixConfig, tp: int, groups: Groups, **kind):
    """A Helix layer with the case's weights, and its layout.

    Sinks are learned, and off by one (they stay 0) where ranks share a query head.
    """
    case.draw()
    plan = helix.resolve(case.heads, case.groups, case.dim, tp, case.interleaved, case.gate)
    layout, loaded = plan.layout, case
    if case.sinks and layout.query_heads % layout.grid.dim_parallel_size:
        case.tensors["sinks"].zero_()
        loaded, kind = replace(case, sinks=False), dict(kind, softmax_type="off-by-one")
    layer = make_layer(case, helix, tp, groups.of(layout.grid), **kind).eval()
    rank = torch.distributed.get_rank() % tp
    load(layer, loaded, layout.qkv_rows(rank), layout.proj_columns(rank), torch.float32)
    return layer, layout


def decode(layer, case: Case, context, prompt: list[int], meter=None) -> tuple[torch.Tensor, list[dict]]:
    """Output [s, b, h] of the case's input in chunks: those of `prompt`, then token by token."""
    hidden, table = case.tensors["hidden"].float(), case.rope_table()
    outs, tallies, begin = [], [], 0
    with inferring():
        while begin < case.seq:
            step = prompt.pop(0) if prompt else 1
            context.sequence_len_offset = begin
            chunk = hidden[begin : begin + step]
            if meter is None:
                outs.append(layer(chunk, None, inference_context=context, rotary_pos_emb=table)[0])
            else:
                with meter.counting():
                    outs.append(layer(chunk, None, inference_context=context, rotary_pos_emb=table)[0])
                tallies.append(meter.as_json())
            begin += step
            if not prompt:
                context.enable_decode_mode()
    return torch.cat(outs).double(), tallies


def decode_all(tp: int, jobs: list[tuple[Case, HelixConfig, list[int]]]) -> list[tuple[str, float, int]]:
    """Of each job: its name, the relative error against float64, and the bytes this rank caches."""
    from megatron.core.inference.contexts import StaticInferenceContext

    start(tp)
    groups, found = Groups(), []
    for case, helix, prompt in jobs:
        name = f"{case} {helix} prompt {prompt}"
        layer, layout = make(case, helix, tp, groups)
        context = StaticInferenceContext(case.batch, case.seq)
        out, _ = decode(layer, case, context, list(prompt))
        slices = layout.grid.dim_parallel_size if layout.per_slice else 1
        expected = reference(case, slices)["output"]
        cached = sum(cache.nbytes for cache in context.key_value_memory_dict[1])
        error = ((out - expected).norm() / expected.norm()).item()
        found.append((name, error if torch.isfinite(out).all() else float("inf"), cached))
    return found


def prompts_by_the_core(
    tp: int, jobs: list[tuple[Case, HelixConfig, list[int]]], te_core: bool
) -> list[tuple[str, float, int]]:
    """Of each job: its name, the relative error against float64, and how often the layer's core ran."""
    from megatron.core.inference.contexts import StaticInferenceContext

    start(tp)
    groups, found = Groups(), []
    for case, helix, prompt in jobs:
        layer, _ = make(case, helix, tp, groups, te_core=te_core)
        runs: list[int] = []
        layer.core_attention.core.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        out, _ = decode(layer, case, StaticInferenceContext(case.batch, case.seq), list(prompt))
        expected = reference(case)["output"]
        error = ((out - expected).norm() / expected.norm()).item()
        found.append((f"{case} {helix}", error, len(runs)))
    return found


def memory_of_prompts(tp: int, jobs: list[tuple[Case, HelixConfig]]) -> list[dict[str, tuple[int, str]]]:
    """Of each job, a prompt of the whole case in half precision: the largest tensor of all and of fp32 that
    its attention makes, in elements, and the operation that makes it; how often the core ran."""
    from megatron.core.inference.contexts import StaticInferenceContext

    from tests.inference.allocations import Allocations

    start(tp)
    groups, found = Groups(), []
    for case, helix in jobs:
        layer, _ = make(case, helix, tp, groups)
        layer.bfloat16()
        runs: list[int] = []
        layer.core_attention.core.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        context, hidden = StaticInferenceContext(case.batch, case.seq), case.tensors["hidden"].bfloat16()
        with inferring(), Allocations() as made:
            layer(hidden, None, inference_context=context, rotary_pos_emb=case.rope_table())
        largest = dict(any=made.largest(), fp32=made.largest(torch.float32, torch.float64))
        found.append(largest | {"runs of the core": len(runs)})
    return found


def count(tp: int, case: Case, helix: HelixConfig, prompt: int, max_length: int) -> list[dict]:
    """Collectives of every step."""
    from megatron.core.inference.contexts import StaticInferenceContext

    from helix_megatron.measure.comm import CommMeter

    start(tp)
    layer, _ = make(case, helix, tp, Groups())
    return decode(layer, case, StaticInferenceContext(case.batch, max_length), [prompt], CommMeter())[1]


def refused(tp: int, ways: list[str]) -> list[str]:
    """The error of each way to ask a layer for what a cache of its kind does not serve."""
    from megatron.core.inference.contexts import StaticInferenceContext

    start(tp)
    groups, messages = Groups(), []
    for way in ways:
        case = Case(4, 2, 8, seq=6)
        case.window = (3, 1) if way == "window ahead" else None
        case.mask = "none" if way == "not causal" else "causal"
        layer, _ = make(case, HelixConfig(1, 2), tp, groups)
        context = StaticInferenceContext(case.batch, 4 if way == "too long" else case.seq)
        mask = None
        if way in ("padding mask", "causal mask"):
            mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).triu(1)
            mask[..., 3:, 2] |= way == "padding mask"
        if way == "context parallelism":
            layer.config.context_parallel_size = 2
        if way == "graphs":
            layer.config.cuda_graph_impl = "local"
        extra = {"attention_bias": torch.zeros(1)} if way == "bias" else {}
        try:
            hidden = case.tensors["hidden"].float()
            layer(hidden, mask, None, context, case.rope_table(), **extra)
            if way == "context parallelism":  # what a cache of slices does comes second
                context = StaticInferenceContext(case.batch, case.seq)
                decode(layer, case, context, [3])
        except (NotImplementedError, ValueError) as error:
            messages.append(str(error))
        else:
            messages.append("ran")
    return messages


class Letters:
    """The tokenizer an engine asks for."""

    vocab_size, eod, bos = 64, 63, None

    def tokenize(self, text):
        return [ord(letter) % 60 for letter in text]

    def detokenize(self, tokens, **kwargs):
        return " ".join(map(str, tokens))


def engine(tp: int, helix: HelixConfig | None, model_settings: dict, settings: dict):
    """A tiny model in Megatron's dynamic engine; its context is `engine.context`."""
    from megatron.core import parallel_state
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.contexts import DynamicInferenceContext
    from megatron.core.inference.engines import DynamicInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt import gpt_inference_wrapper as wrappers
    from megatron.core.inference.text_generation_controllers import text_generation_controller
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from helix_megatron.megatron import integrate

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl")
    sizes = dict(num_attention_heads=4, num_query_groups=2, kv_channels=8, ffn_hidden_size=96)
    shape = {**sizes, **model_settings}
    later, tables = shape.pop("later", {}), dict(position_embedding_type="rope") | shape.pop("tables", {})
    pattern = shape.pop("hybrid_layer_pattern", None)
    if helix is not None:
        kv = shape["num_query_groups"], shape["kv_channels"]
        grid = helix.resolve(shape["num_attention_heads"], *kv, tp).grid
        integrate.enable(helix, grid)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tp)
    torch.manual_seed(3)
    model_parallel_cuda_manual_seed(3, inference_rng_tracker=shape.get("cuda_graph_impl") == "local")
    config = TransformerConfig(
        num_layers=len(pattern or "**"), hidden_size=48, tensor_model_parallel_size=tp,
        use_cpu_initialization=True, pipeline_dtype=torch.float32, masked_softmax_fusion=False,
        bias_dropout_fusion=False, gradient_accumulation_fusion=False, persist_layer_norm=False,
        init_method_std=0.3, attention_dropout=0.0, hidden_dropout=0.0, **shape,
    )  # fmt: skip
    for name, value in later.items():
        setattr(config, name, value)  # as Megatron's arguments do what is no field of it
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    tables |= dict(vocab_size=96, max_sequence_length=64)
    if pattern is None:
        if config.mtp_num_layers:
            from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

            tables["mtp_block_spec"] = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
        model = GPTModel(config, spec, **tables)
    else:
        model = hybrid_model(config, spec, hybrid_layer_pattern=pattern, **tables)
    sizes = dict(max_sequence_length=64, buffer_size_gb=0.002, max_requests=12, block_size_tokens=8)
    settings = dict(settings)
    # Packed tokens are padded to a multiple of this; max_tokens, hence a chunk of a prompt, is no smaller.
    DynamicInferenceContext.TOKEN_ROUNDER = settings.pop("token_rounder", 64)
    inference_config = InferenceConfig(unified_memory_level=0, **{**sizes, **settings})
    context = DynamicInferenceContext(config, inference_config)
    if helix is not None and grid.dim_parallel_size > 1:
        refuse_unwritten_memory(context)
    wrapped = wrappers.GPTInferenceWrapper(model.cuda().eval(), context)
    controller = text_generation_controller.TextGenerationController(wrapped, Letters())
    return DynamicInferenceEngine(controller, context)


def refuse_unwritten_memory(context):
    """Memory that is allocated holds NaN, and the cache's does not: kernels may multiply it by 0."""
    from megatron.core.inference.config import KVCacheManagementMode
    from megatron.core.inference.contexts import dynamic_context

    allocated = torch.empty

    def of_nan(*shape, **options):
        memory = allocated(*shape, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    torch.empty = of_nan
    try:
        context._allocate_memory_buffer()
    finally:
        torch.empty = allocated
    assert context.memory_buffer.isfinite().all(), "the cache is made of what memory held before"
    saver = mock.Mock(resume=lambda tag: context.memory_buffer.fill_(torch.nan))
    resumed = dict(
        is_tensor_state_allocated=False,
        _uses_torch_memory_saver=True,
        kv_cache_management_mode=KVCacheManagementMode.RECOMPUTE,
    )
    with (
        mock.patch.object(dynamic_context, "torch_memory_saver", saver, create=True),
        mock.patch.multiple(context, **resumed),
    ):
        context.reinitialize_inference_state_buffers()
        assert context.memory_buffer.isfinite().all(), "the cache is resumed with what memory held before"
        context.memory_buffer.fill_(1.0)
        context.reinitialize_inference_state_buffers()  # nothing was given away
        assert context.memory_buffer.eq(1.0).all()
        context.memory_buffer.zero_()


def hybrid_model(config, layer, **sizes):
    """A HybridModel of the local layers of a GPT's layer spec; its final norm is always Transformer Engine's,
    and left out."""
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    parts = layer.submodules
    attends = TransformerLayerSubmodules(
        input_layernorm=parts.input_layernorm,
        self_attention=parts.self_attention,
        self_attn_bda=parts.self_attn_bda,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=parts.pre_mlp_layernorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda
    )
    layers = HybridStackSubmodules(
        attention_layer=ModuleSpec(TransformerLayer, submodules=attends),
        mlp_layer=ModuleSpec(MLPLayer, submodules=mlp),
    )
    stack = ModuleSpec(HybridStack, params={"post_layer_norm": False}, submodules=layers)
    return HybridModel(config, stack, **sizes)


def propose(model, tokens: dict[int, list[int]]) -> None:
    """Have the model's multi-token prediction propose what `tokens` (of requests, prompts included) go on
    with, but wrong at every fourth position; it computes its own proposals too."""
    following = {
        (position, token): after
        for whole in tokens.values()
        for position, (token, after) in enumerate(pairwise(whole))
    }
    own = model.compute_mtp_single_step

    def compute_mtp_single_step(hidden_states, next_token_ids, position_ids, **kwargs):
        hidden, logits = own(
            hidden_states=hidden_states, next_token_ids=next_token_ids, position_ids=position_ids, **kwargs
        )
        assert torch.isfinite(logits).all()
        logits = torch.zeros_like(logits)
        places = zip(position_ids[0].tolist(), next_token_ids[0].tolist(), strict=True)
        for row, (position, token) in enumerate(places):
            right = following.get((position, token), 0)
            logits[row, 0, right if position % 4 else (right + 1) % 96] = 1.0
        return hidden, logits

    model.compute_mtp_single_step = compute_mtp_single_step


def generate(
    tp: int, helix: HelixConfig | None, model: dict | None = None, settings: dict | None = None,
    proposals: dict[int, list[int]] | None = None,
):  # fmt: skip
    """Greedy tokens of requests that come and go, and what the context says of its memory.

    With `proposals` (the requests' tokens, prompts included) multi-token prediction proposes them.

    Prompts of 1, 5, 8 (one block), 17 and 30 tokens start together with different numbers of tokens to
    generate; two more join while those decode, one with a prompt that is there already.
    """
    from megatron.core.inference.sampling_params import SamplingParams

    from helix_megatron.measure.comm import CommMeter
    from helix_megatron.megatron.self_attention import HelixParallelSelfAttention

    texts = ["a", "hello", "exactly8", "the quick brown f", "one prompt that takes four pages"[:30]]
    lengths = [12, 3, 9, 20, 6]
    late = {4: ("the quick brown f", 5), 7: ("late", 8)}
    with torch.inference_mode():
        running = engine(tp, helix, model or {}, settings or {})
        context = running.context
        if proposals is not None:
            propose(running.controller.inference_wrapped_model.model, proposals)
        assert compat.cache_blocks(context.kv_block_allocator) == context.memory_buffer.shape[2]

        def add(number: int, text: str, new: int) -> None:
            running.add_request(
                number, text, SamplingParams(num_tokens_to_generate=new, top_k=1, termination_id=-1)
            )

        for number, (text, new) in enumerate(zip(texts, lengths, strict=True)):
            add(number, text, new)
        by_the_core: list[tuple] = []
        prompt_heads = HelixParallelSelfAttention.prompt_heads

        def noted(layer, query, *args):
            by_the_core.append((layer.layer_number, len(query)))
            return prompt_heads(layer, query, *args)

        HelixParallelSelfAttention.prompt_heads = noted
        done, step, seen, decode_steps, paused, cached = {}, 0, set(), set(), 0, 0
        meter = CommMeter()
        while running.has_unfinished_requests() or any(when >= step for when in late):
            if step in late:
                add(10 + step, *late[step])
            with meter.counting():
                result = running.step_modern()
            batch = context.batch_dimensions
            seen.add((batch.prefill_req_count > 0, batch.decode_req_count > 0))
            if not batch.prefill_req_count:
                tally = meter.as_json()
                decode_steps.add(
                    tuple((name, tally[name]["calls"], tally[name]["bytes"]) for name in sorted(tally))
                )
            paused = max(paused, context.paused_request_count)
            for record in result["finished_request_records"]:
                request = record.merge()
                cached += request.num_cached_tokens
                done[request.request_id] = [int(token) for token in request.generated_tokens]
            step += 1
            assert step < 100, "requests never end"
    return {
        "tokens": done,
        "prompt tokens by the core": sum(tokens for layer, tokens in by_the_core if layer == 1),
        "steps": step,
        "prompts": {number: Letters().tokenize(text) for number, text in enumerate(texts)}
        | {10 + when: Letters().tokenize(text) for when, (text, _) in late.items()},
        "kinds of steps": sorted(seen),
        "collectives of decode steps": sorted(decode_steps),
        "paused": paused,
        "cached prompt tokens": cached,
        "bytes of a token": context.memory_buffer.nbytes
        / compat.cache_blocks(context.kv_block_allocator)
        / context.block_size_tokens,
        "block bytes": context.block_size_bytes,
    }


def generate_by_flash(tp: int, runs: list[tuple]) -> list[dict]:
    """`generate` for each run, with FlashAttention 3's stand-in in as many of the ranks; and its calls.

    Args:
        runs: Helix, model and inference settings, proposals, ranks that have it.
    """
    import os
    import sys

    from helix_megatron.inference import agreement
    from helix_megatron.kernels import flash, known_case, selection
    from helix_megatron.megatron import integrate
    from tests.kernels import flash_standin

    found = []
    for helix, model, settings, proposals, ranks in runs:
        calls: list[tuple] = []
        known = agreement.all_choose_alike, flash._installed, known_case.known_case_error, selection.choose
        for function in known:
            function.cache_clear()
        has_it = int(os.environ["RANK"]) < ranks
        sys.modules["flash_attn_interface"] = flash_standin.third(False, calls)
        with mock.patch.dict(os.environ, {selection.OVERRIDE: "flash-attn-3" if has_it else "torch"}):
            found.append(generate(tp, helix, model, settings, proposals) | {"calls": calls})
        del sys.modules["flash_attn_interface"]
        if helix is not None:
            integrate.disable()
    return found


def generate_like(
    tp: int, runs: list[tuple[HelixConfig, dict, str]], prompts: list[list[int]], new: int
) -> list[list[list[int]]]:
    """Greedy tokens of a model's weights after each prompt, for each run: Helix, model settings, weights.

    All runs are on one grid.
    """
    from megatron.core.inference.sampling_params import SamplingParams

    from helix_megatron.megatron import integrate
    from tests.inference.known_models import load

    found = []
    for helix, settings, weights in runs:
        with torch.inference_mode():
            running = engine(tp, helix, settings, {"max_requests": 16})
            model = running.controller.inference_wrapped_model.model
            load(model, torch.load(weights), tp, torch.distributed.get_rank())
            sampling = SamplingParams(num_tokens_to_generate=new, top_k=1, termination_id=-1)
            records = running.generate(prompts, sampling)
        found.append([[int(token) for token in record.merge().generated_tokens] for record in records])
        integrate.disable()
    return found


def warmed_up(tp: int, helix: HelixConfig, model: dict) -> list[dict]:
    """What is compiled as the engine starts: slots and KV heads of a page, window, and the piece written."""
    from helix_megatron.inference import warm_up
    from helix_megatron.kernels import backend

    with (
        mock.patch.object(backend, "warm_up") as compiled,
        mock.patch.object(warm_up, "runs_triton", lambda device: True),
    ):
        running = engine(tp, helix, model, {})
    found, memory = [], running.context.memory_buffer
    for layer, call in enumerate(compiled.call_args_list):
        keys, values, heads, dtype, visible, *settings, piece, _ = call.args
        assert keys.shape == values.shape and len(keys) == memory.shape[2]
        assert [keys.data_ptr(), values.data_ptr()] == [x[layer].data_ptr() for x in memory]
        assert dtype is torch.float32 and settings == [None, False]
        kind = dict(left=visible.left, rank=visible.rank, piece=piece)
        found.append(dict(page=tuple(keys.shape[1:]), heads=heads, **kind))
    return found


def generate_without_cache(tp: int, helix: HelixConfig) -> tuple[list[int], list[int]]:
    """Greedy tokens after one prompt: by the dynamic engine, and by running all tokens anew for each."""
    from megatron.core.inference.sampling_params import SamplingParams

    text, new = "the quick brown f", 12
    with torch.inference_mode():
        running = engine(tp, helix, {}, {})
        sampling = SamplingParams(num_tokens_to_generate=new, top_k=1, termination_id=-1)
        (record,) = running.generate([text], sampling)
        model = running.controller.inference_wrapped_model.model
        tokens = torch.tensor([Letters().tokenize(text)])
        for _ in range(new):
            logits = model(tokens, torch.arange(tokens.shape[1])[None], None, runtime_gather_output=True)
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return [int(token) for token in record.merge().generated_tokens], tokens[0, -new:].tolist()


def generate_by_the_static_engine(tp: int, helix: HelixConfig | None) -> tuple[list[list[int]], str]:
    """Greedy tokens of prompts of 1, 5 and 17 tokens, in an engine whose context has sizes for CUDA graphs
    while the model has none; and the class of its attention layers."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    with torch.inference_mode():
        model = engine(tp, helix, {}, {}).controller.inference_wrapped_model.model
        wrapped = GPTInferenceWrapper(model, StaticInferenceContext(max_batch_size=4, max_sequence_length=64))
        static = StaticInferenceEngine(
            TextGenerationController(wrapped, Letters()), max_batch_size=4, buffer_size_gb=0.01
        )
        sampling = SamplingParams(num_tokens_to_generate=12, top_k=1, termination_id=-1)
        requests = static.generate(["a", "hello", "the quick brown f"], sampling_params=sampling)
    context = static.dynamic_engine.context
    assert not static.legacy and context.cuda_graph_batch_dimensions_list
    layer = next(module for name, module in model.named_modules() if name.endswith("self_attention"))
    merged = [request.merge() if hasattr(request, "merge") else request for request in requests]
    return [list(map(int, request.generated_tokens)) for request in merged], type(layer).__name__


def context_refused(tp: int, ways: list[tuple[dict, dict, dict]]) -> list[str]:
    """The error of each way to build a dynamic context: (Helix, model, inference) settings."""
    from megatron.core import parallel_state
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.contexts import DynamicInferenceContext, dynamic_context
    from megatron.core.transformer import TransformerConfig

    from helix_megatron.megatron import integrate
    from helix_megatron.partition.grid import HelixConfigError

    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel(tp)
    messages = []
    for helix, model, settings in ways:
        settings = dict(settings)
        dynamic_context.HAVE_FLASHINFER = settings.pop("flashinfer", False)
        integrate.enable(HelixConfig(1, tp, **helix))
        config = TransformerConfig(
            num_layers=1, hidden_size=32, num_attention_heads=4, tensor_model_parallel_size=tp
        )
        for name, value in model.items():
            setattr(config, name, value)
        sizes = dict(max_sequence_length=64, buffer_size_gb=0.001, max_requests=4, block_size_tokens=8)
        try:
            context = DynamicInferenceContext(config, InferenceConfig(**{**sizes, **settings}))
            assert context.use_flashinfer_fused_rope is False
            messages.append("built")
        except HelixConfigError as error:
            messages.append(str(error))
        integrate.disable()
    return messages

"""Host mode: Megatron's own training loop, checkpoints and inference engines on a CPU, with gloo.

Everything that needs host mode runs in ranks of its own (host mode cannot be undone): the functions whose
names start with `rank_`.
"""

import threading
import time

import pytest
import torch

from helix_megatron.host import kernels as host_kernels
from helix_megatron.host import megatron as host_megatron
from helix_megatron.host import mode as host
from helix_megatron.host.launcher import RankError, run_ranks
from tests.training import LOOP

MODEL = [
    *LOOP,
    *"""--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 4
    --ffn-hidden-size 64 --seq-length 32 --max-position-embeddings 32 --train-iters 6 --vocab-size 251
    --make-vocab-size-divisible-by 64""".split(),
]
NO_DROPOUT = "--attention-dropout 0 --hidden-dropout 0"
DROPOUT = "--attention-dropout 0.2 --hidden-dropout 0.2"
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def rank_train(arguments):
    from helix_megatron import pretrain_gpt
    from helix_megatron.megatron import entry

    entry.use_built_helpers()
    pretrain_gpt.refuse_unsupported = lambda args: None  # what that script leaves out, host mode still runs
    pretrain_gpt.train(arguments)


@pytest.fixture(scope="module")
def train(trainer):
    """train(ranks, flags) runs Megatron and returns what it printed: {iteration: (lm loss, grad norm)}."""

    def run(ranks, flags):
        printed = trainer(ranks, [*MODEL, *flags.split()], rank_train)
        return {step: (loss, printed.norms[step]) for step, loss in printed.steps.items()}

    return run


@pytest.fixture(scope="module")
def one_rank(train):
    losses = train(1, NO_DROPOUT)
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6][0] < losses[1][0]
    return losses


def assert_same(losses, expected):
    """Equal up to one unit of the last digit that Megatron prints: fp32 sums are taken in another order."""
    assert list(losses) == list(expected)
    for iteration, (loss, norm) in expected.items():
        assert losses[iteration][0] == pytest.approx(loss, abs=1.1e-6), iteration
        assert losses[iteration][1] == pytest.approx(norm, abs=1.1e-3), iteration


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, "--tensor-model-parallel-size 2"),
        (4, "--tensor-model-parallel-size 4"),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (4, "--tensor-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce"),
        (2, f"--tensor-model-parallel-size 2 --sequence-parallel {FULL_RECOMPUTE}"),
    ],
)
def test_every_parallel_size_prints_the_same_losses(train, one_rank, ranks, flags):
    losses = train(ranks, f"{flags} {NO_DROPOUT}")
    assert losses[1] == one_rank[1]  # the same initial model
    assert_same(losses, one_rank)


@pytest.mark.parametrize("flags", ["", "--tensor-model-parallel-size 2 --sequence-parallel"])
def test_recomputation_replays_the_dropout_masks(train, one_rank, flags):
    ranks = 2 if flags else 1
    plain = train(ranks, f"{flags} {DROPOUT}")
    assert plain[1] != one_rank[1]  # the masks do something
    assert train(ranks, f"{flags} {DROPOUT} {FULL_RECOMPUTE}") == plain


@pytest.mark.parametrize("flags", ["--bf16 --pipeline-model-parallel-size 2", "--fp16 --loss-scale 1024"])
def test_low_precision_and_pipelines_train(train, flags):
    losses = train(2, f"{flags} {NO_DROPOUT}")
    assert losses[6][0] < losses[1][0]


def test_experts_exchange_tokens(train):
    moe = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0"
    one = train(1, f"{moe} {NO_DROPOUT}")
    two = train(2, f"{moe} {NO_DROPOUT} --expert-model-parallel-size 2")
    assert two[1][0] == pytest.approx(one[1][0], rel=1e-2)  # each rank draws its own experts
    assert two[6][0] < two[1][0]


@pytest.mark.parametrize("way", ["", "--async-save"])
def test_checkpoint_resumes_at_another_size(train, one_rank, tmp_path, way):
    optimizer = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --ckpt-format torch_dist"
    save = f"--save {tmp_path} --save-interval 3 {way}"
    assert_same(train(2, f"--tensor-model-parallel-size 2 {NO_DROPOUT} {optimizer} {save}"), one_rank)
    resumed = train(1, f"{NO_DROPOUT} {optimizer} --load {tmp_path} --ckpt-step 3")
    del resumed[5]  # Megatron prints the mean over its first two iterations there
    assert_same(resumed, {iteration: one_rank[iteration] for iteration in (4, 6)})


# --- the CUDA surface ---


def test_nothing_is_patched_by_an_import():
    assert host_megatron.patch_megatron and not host.host_mode_enabled()
    assert not torch.cuda.is_available()
    assert torch.Tensor.cuda is not torch.Tensor.cpu
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(RuntimeError, match=r"3 usable CUDA devices.*CUDA_VISIBLE_DEVICES"):
        host.enable_host_mode()
    assert not host.host_mode_enabled()


def rank_surface():
    host.enable_host_mode()  # a second call does nothing
    assert host.host_mode_enabled() and torch.get_num_threads() == 1
    for device in ("cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 0)):
        assert torch.zeros(2, device=device).device.type == "cpu"
        assert torch.zeros(2).to(device).device.type == "cpu"
        assert torch.zeros(2).to(device, torch.bfloat16).dtype is torch.bfloat16
    assert torch.nn.Linear(2, 2, device="cuda").cuda().to("cuda:0").weight.device.type == "cpu"
    assert torch.empty_like(torch.zeros(2), device="cuda", pin_memory=True).numel() == 2
    x = torch.ones(2, dtype=torch.half)
    assert x.cuda() is x and x.pin_memory() is x and x.is_pinned() and x.get_device() == 0
    assert (x.type(), x.type("torch.cuda.FloatTensor").dtype) == ("torch.cuda.HalfTensor", torch.float)
    host_device = torch.device("cpu")
    for snapshot in (x.cpu(), x.to("cpu"), x.to(device="cpu"), x.to(host_device, non_blocking=True)):
        assert snapshot.data_ptr() != x.data_ptr()
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert isinstance(torch.cuda.current_device(), int) and torch.cuda.get_device_capability() == (8, 0)
    assert torch.cuda.memory_stats()["allocated_bytes.all.current"] == 0
    assert torch.cuda.get_device_properties(0).total_memory > 2**30
    assert torch.accelerator.is_available() and not torch.cuda.is_current_stream_capturing()
    with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.device(0):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    time.sleep(0.02)
    end.record()
    assert 20 <= start.elapsed_time(end) < 2000
    generator = torch.Generator(device="cuda").manual_seed(1)
    assert isinstance(generator, torch.Generator) and isinstance(torch.default_generator, torch.Generator)
    drawn = torch.rand(1, device="cuda", generator=generator)
    assert drawn == torch.rand(1, generator=generator.manual_seed(1))
    return True


def test_cuda_surface():
    assert run_ranks(rank_surface, 1, timeout_s=60) == [True]


class MakesDeviceTensorInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient + torch.ones(2, device="cuda")


def rank_placement_everywhere():
    x = torch.ones(2, device="cuda", requires_grad=True)
    MakesDeviceTensorInBackward.apply(x).sum().backward()
    (gradient,) = torch.autograd.grad(MakesDeviceTensorInBackward.apply(x).sum(), x)
    made = []
    thread = threading.Thread(target=lambda: made.append(torch.ones(2, device="cuda")))
    thread.start()
    thread.join()
    return x.grad.tolist(), gradient.tolist(), len(made)


def test_placement_holds_in_backward_and_in_threads():
    assert run_ranks(rank_placement_everywhere, 1, timeout_s=60) == [([2.0, 2.0], [2.0, 2.0], 1)]


def rank_streams():
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random as megatron_random

    torch.distributed.init_process_group("nccl")
    rank = torch.distributed.get_rank()
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(2)
    torch.manual_seed(5)
    megatron_random.model_parallel_cuda_manual_seed(5)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    draws = {}
    host_state = torch.get_rng_state()
    draws["device"] = torch.rand(4, device="cuda")
    draws["dropout"] = torch.nn.functional.dropout(torch.ones(64), 0.5)
    with tracker.fork():
        draws["forked init"] = torch.nn.init.normal_(torch.empty(4))
        draws["forked in place"] = torch.empty(4).uniform_()
        draws["forked dropout"] = torch.nn.functional.dropout(torch.ones(64), 0.5)
    assert torch.equal(host_state, torch.get_rng_state()), "device draws took from the host stream"
    device_state = torch.cuda.get_rng_state()
    draws["host"] = torch.rand(4)
    draws["host init"] = torch.nn.init.normal_(torch.empty(4))
    assert torch.equal(device_state, torch.cuda.get_rng_state()), "host draws took from the device stream"
    assert not torch.equal(draws["device"], draws["host"]), "equal seeds must not give equal streams"
    torch.cuda.set_rng_state(device_state)
    torch.cuda.manual_seed(9)
    again = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(9)
    assert torch.equal(again, torch.rand(4, device="cuda"))
    return {name: value.tolist() for name, value in draws.items()}, rank


def test_two_random_streams():
    (first, _), (second, _) = run_ranks(rank_streams, 2, timeout_s=60)
    for name in first:  # the model-parallel tracker differs between tensor-parallel ranks, all else agrees
        assert (first[name] == second[name]) == ("forked" not in name), name


def rank_waits_in_vain():
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda:0"))
    group = torch.distributed.new_group([0, 1], backend="nccl", pg_options=torch.distributed.ProcessGroup)
    x = torch.ones(2, device="cuda")
    torch.distributed.all_reduce(x, group=group)
    torch.distributed.barrier(device_ids=[0])
    assert torch.distributed.get_backend(group) == "gloo" and x.tolist() == [2.0, 2.0]
    if torch.distributed.get_rank() == 0:
        torch.distributed.all_reduce(x)
    else:
        time.sleep(60)


def test_groups_use_gloo_and_time_out():
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?i)rank 0 failed(.|\n)*tim(ed|e) ?out"):
        run_ranks(rank_waits_in_vain, 2, timeout_s=50, env={"HELIX_HOST_TIMEOUT_S": "2"})
    assert time.monotonic() - start < 30


# --- inside Megatron ---


@pytest.mark.parametrize("decoupled", [True, False])
def test_host_adam_is_torch_adam_with_fused_state(decoupled):
    torch.manual_seed(0)
    start, options = torch.randn(5, 3), dict(lr=0.1, weight_decay=0.3, betas=(0.8, 0.9))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    groups = [{"params": [ours]}, {"params": []}]
    adam = host_megatron.HostFusedAdam(groups, adam_w_mode=decoupled, **options)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)([theirs], **options)
    for step in range(4):
        if step == 2:  # a reload in the middle changes nothing
            state = adam.state_dict()
            adam = host_megatron.HostFusedAdam([{"params": [ours]}, {"params": []}], adam_w_mode=decoupled)
            adam.load_state_dict(state)
        ours.grad = torch.randn(5, 3)
        theirs.grad = ours.grad.clone()
        adam.step()
        reference.step()
    assert torch.equal(ours, theirs)
    assert [group.get("step") for group in adam.param_groups] == [4, None]
    assert set(adam.state[ours]) == {"exp_avg", "exp_avg_sq"}


def reference_attention(q, k, v, causal, window):
    # one sequence, straight from the definition, in float64
    s_q, s_k, ratio = len(q), len(k), q.shape[1] // k.shape[1]
    out, lse = torch.zeros(q.shape).double(), torch.full((q.shape[1], s_q), -torch.inf).double()
    for i in range(s_q):
        last = s_k - s_q + i
        first = 0 if window[0] < 0 else max(0, last - window[0])
        seen = list(range(first, min(last + 1, s_k) if causal else s_k))
        for h in range(q.shape[1]):
            if seen:
                scores = (k[seen, h // ratio].double() @ q[i, h].double()) * 0.3
                lse[h, i] = torch.logsumexp(scores, 0)
                out[i, h] = torch.softmax(scores, 0) @ v[seen, h // ratio].double()
    return out, lse


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (2, -1)])
@pytest.mark.parametrize("paged", [True, False])
def test_flash_attention_entry_points(causal, window, paged):
    torch.manual_seed(0)
    lengths_q, lengths_k = [3, 1, 0, 5], [7, 4, 6, 2]  # one sequence has fewer keys than queries
    q = [torch.randn(n, 4, 8) for n in lengths_q]
    k, v = ([torch.randn(n, 2, 8) for n in lengths_k] for _ in range(2))
    ends_q, ends_k = (torch.tensor([0, *n]).cumsum(0) for n in (lengths_q, lengths_k))
    table, caches = None, (torch.cat(k), torch.cat(v))
    if paged:
        table = torch.randperm(12).reshape(4, 3)
        caches = torch.full((2, 12, 3, 2, 8), torch.nan)
        for cache, parts in zip(caches, (k, v)):
            for b, part in enumerate(parts):
                for position, row in enumerate(part):
                    cache[table[b, position // 3], position % 3] = row
    padded = torch.cat([*q, torch.randn(2, 4, 8)])
    options = dict(softmax_scale=0.3, causal=causal, window_size=window, block_table=table)
    out, lse, _ = host_kernels.flash_attn_varlen_func(
        padded, *caches, ends_q, ends_k, 5, 7, return_attn_probs=True, **options
    )
    outs, lses = zip(*(reference_attention(*one, causal, window) for one in zip(q, k, v)))
    expected_out, expected_lse = torch.cat(outs), torch.cat(lses, 1)
    torch.testing.assert_close(out[:-2].double(), expected_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[:, :-2].double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert out[-2:].abs().max() == 0 and lse[:, -2:].isneginf().all()
    if paged:
        new = torch.randn(4, 2, 4, 8)
        out, lse = host_kernels.flash_attn_with_kvcache(
            new, *caches, cache_seqlens=torch.tensor(lengths_k), return_softmax_lse=True, **options
        )
        for b in range(4):
            expected_out, expected_lse = reference_attention(new[b], k[b], v[b], causal, window)
            torch.testing.assert_close(out[b].double(), expected_out, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[b].double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_flash_attention_refuses_what_it_would_get_wrong():
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match="rotary_cos, softcap"):
        host_kernels.flash_attn_with_kvcache(q, q, q, rotary_cos=q, softcap=1.0)


# --- inference ---


class Letters:
    """The tokenizer an engine asks for."""

    vocab_size, eod, bos = 64, 63, None

    def tokenize(self, text):
        return [ord(letter) % 60 for letter in text]

    def detokenize(self, tokens, **kwargs):
        return " ".join(map(str, tokens))


def rank_generate(tensor_parallel, dynamic):
    from megatron.core import parallel_state
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.contexts import DynamicInferenceContext, StaticInferenceContext
    from megatron.core.inference.engines import DynamicInferenceEngine, StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt import gpt_inference_wrapper as wrappers
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers import text_generation_controller
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel(tensor_parallel)
    torch.manual_seed(3)
    model_parallel_cuda_manual_seed(3)
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=64,
        use_cpu_initialization=True, tensor_model_parallel_size=tensor_parallel, pipeline_dtype=torch.float32,
        masked_softmax_fusion=False, bias_dropout_fusion=False, gradient_accumulation_fusion=False,
        persist_layer_norm=False, init_method_std=0.2, attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec()
    model = GPTModel(config, spec, vocab_size=64, max_sequence_length=64, position_embedding_type="rope")
    sizes = dict(max_sequence_length=64, buffer_size_gb=0.01, max_requests=4, block_size_tokens=8)
    settings = InferenceConfig(unified_memory_level=0, **sizes)
    context = DynamicInferenceContext(config, settings) if dynamic else StaticInferenceContext(4, 64)
    wrapped = wrappers.GPTInferenceWrapper(model.cuda().eval(), context)
    controller = text_generation_controller.TextGenerationController(wrapped, Letters())
    prompts = ["hello world", "a", "the quick brown fox"]
    sampling = SamplingParams(num_tokens_to_generate=8, top_k=1, termination_id=-1)
    if dynamic:
        with torch.inference_mode():
            engine = DynamicInferenceEngine(controller, context)
            requests = [record.merge() for record in engine.generate(prompts, sampling)]
    else:
        engine = StaticInferenceEngine(controller, legacy=True)
        requests = engine.generate(prompts=prompts, sampling_params=sampling)
    return [[int(token) for token in request.generated_tokens] for request in requests]


@pytest.mark.dynamic_engine
def test_static_and_dynamic_engines_agree():
    pytest.importorskip("tqdm", reason="Megatron's static engine refuses to run without tqdm")
    ways = [(ranks, dynamic) for ranks in (1, 2) for dynamic in (False, True)]
    results = [run_ranks(rank_generate, ranks, ranks, dynamic, timeout_s=100) for ranks, dynamic in ways]
    tokens = results[0][0]
    assert [len(sequence) for sequence in tokens] == [8] * 3
    assert len({tuple(sequence) for sequence in tokens}) == 3
    assert all(rank == tokens for result in results for rank in result)

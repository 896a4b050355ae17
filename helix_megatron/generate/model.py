"""A model on disk, as the checkpoint and the flags with which Megatron loads it on any number of ranks.

A Hugging Face folder or GGUF file is converted once, into a folder of the cache that is named after the
source's files; a Megatron checkpoint (torch_dist) is used where it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from argparse import Namespace
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from helix_megatron.checkpoint import compatibility
from helix_megatron.checkpoint.model_arguments import flag_of
from helix_megatron.convert import command, files
from helix_megatron.convert.check import HOST_FLAGS
from helix_megatron.convert.families import HYBRID_WAY_OUT
from helix_megatron.convert.torch_dist import Checkpoint

_CONVERSION = 3  # counts up when the same files are converted into something else
# What a model run here may have unlike Megatron's defaults; all of it is given back as flags, since
# --use-checkpoint-args restores a part.
_SERVED = set(
    """normalization layernorm_epsilon layernorm_zero_centered_gamma qk_layernorm
    position_embedding_type no_rope_freq rotary_base rotary_percent rotary_interleaved
    rotary_seq_len_interpolation_factor use_rope_scaling rotary_scaling_factor mscale mscale_all_dim
    yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
    swiglu squared_relu quick_geglu
    add_bias_linear add_qkv_bias untie_embeddings_and_output_weights""".split()
)
_POSITIONS = ("learned_absolute", "rope", "yarn", "none")


def default_cache() -> Path:
    """Where converted models are kept: $HELIX_CACHE, or helix_megatron in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HELIX_CACHE") or Path(base, "helix_megatron"))


def _is_checkpoint(path: Path) -> bool:
    return any((path / name).is_file() for name in ("latest_checkpointed_iteration.txt", "metadata.json"))


def _fingerprint(source: Path, dtype: str) -> str:
    """Of every file that conversion reads or copies, and of what they are converted into.

    Weights count by size and time, all others by what is in them.
    """
    digest = hashlib.sha256(f"{_CONVERSION} {source.resolve()} {dtype}".encode())
    for path in files.used_files(source):
        if not path.exists():  # a link to nothing, of which conversion speaks
            continue
        found = path.stat()
        weights = path.suffix in (".safetensors", ".gguf")
        state = f"{found.st_size} {found.st_mtime_ns}".encode() if weights else path.read_bytes()
        digest.update(f"\n{path.name} {hashlib.sha256(state).hexdigest()}".encode())
    return digest.hexdigest()[:16]


def prepare_checkpoint(source: Path, dtype: str, cache: Path) -> Path:
    """The Megatron checkpoint of a model; several processes may ask at once.

    Args:
        source: a Hugging Face folder, a .gguf file, or a Megatron checkpoint.
        dtype: of the converted weights: float32, bfloat16 or float16.
        cache: folder of converted models.

    Raises:
        ValueError: there is no model, or it cannot be converted exactly.
    """
    if not source.exists():
        raise ValueError(f"--model {source} does not exist; give a Hugging Face folder, a .gguf file, or a "
                         "Megatron checkpoint.")  # fmt: skip
    if source.is_dir() and _is_checkpoint(source):
        return source
    out = cache / f"{source.stem}-{_fingerprint(source, dtype)}"
    if _is_checkpoint(out):
        return out
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f".{out.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first one converts, the others wait for it
        if not _is_checkpoint(out):
            command.to_megatron(source, out, dtype)
    return out


@dataclass(frozen=True)
class Layout:
    """How a model is spread, as the user asks for it.

    Args:
        tensor_parallel: T.
        attention: `helix` or `megatron`.
        dtype: float32, bfloat16 or float16.
        on_host: no GPU.
        more: further flags of Megatron and Helix, which override those given here.
    """

    tensor_parallel: int
    attention: str
    dtype: str
    on_host: bool
    more: tuple[str, ...] = ()


def flags(checkpoint: Path, layout: Layout, sequence: int) -> list[str]:
    """The command line that builds and loads the model for sequences of up to `sequence` tokens.

    Raises:
        ValueError: the checkpoint has a feature that this command does not serve.
    """
    args = Checkpoint(checkpoint).args
    own = compatibility.format_flags(_checked_arguments(checkpoint, args))
    half = {"bfloat16": ["--bf16"], "float16": ["--fp16"]}.get(layout.dtype, [])
    local = layout.on_host or find_spec("transformer_engine") is None
    return [
        *(HOST_FLAGS if local else []),
        *([] if layout.on_host or not local else ["--attention-backend", "auto"]),
        *f"--load {checkpoint} --use-checkpoint-args --exit-on-missing-checkpoint --no-load-optim".split(),
        *f"--no-load-rng --finetune --micro-batch-size 1 --seq-length {sequence}".split(),
        *f"--tensor-model-parallel-size {layout.tensor_parallel}".split(),
        *f"--tokenizer-type NullTokenizer --vocab-size {args.padded_vocab_size}".split(),
        *["--attention-impl", layout.attention],
        *(["--helix-context-length", str(sequence)] if layout.attention == "helix" else []),
        *own,
        *half,
        *layout.more,
    ]


def _checked_arguments(checkpoint: Path, args: Namespace) -> dict[str, Any]:
    """What is unlike Megatron's defaults in a checkpoint's arguments. ValueError for what is not served."""
    if unsaid := compatibility.missing_arguments(args):
        raise ValueError(
            f"the arguments in {checkpoint} lack {', '.join(unsaid)}, so which model it is is unknown."
        )
    unlike = compatibility.non_default_arguments(args)
    for name, value in unlike.items():
        if name not in _SERVED or (name == "position_embedding_type" and value not in _POSITIONS):
            raise ValueError(
                f"{checkpoint} has {name} {value!r}, which is not served; this command runs dense models "
                f"with full causal attention{HYBRID_WAY_OUT if name == 'hybrid_layer_pattern' else ''}."
            )
    return unlike


def _refuse_other_function(checkpoint: Path, asked: tuple[str, ...]) -> None:
    """ValueError when this run's arguments are not the checkpoint's, save for those that the user gave."""
    from megatron.training import get_args

    given = {word.partition("=")[0] for word in asked}
    known, _ = compatibility.differences(Checkpoint(checkpoint).args, get_args())
    differ = [words for name, words in known.items() if flag_of(name) not in given]
    if differ:
        raise ValueError(f"{checkpoint} was not restored as it was trained: {'; '.join(differ)}.")


def load(
    checkpoint: Path, layout: Layout, tokenizer: str | None, sequence: int, more: list[str] = ()
) -> tuple[Any, Any]:
    """In a rank: (model, tokenizer), for sequences of up to `sequence` tokens; the model in eval mode.

    Args:
        tokenizer: folder of one that is not the checkpoint's, or None.
        more: flags.
    """
    from helix_megatron.convert.check import build_and_load
    from helix_megatron.generate.engine import refuse_without_flash_attention

    opened = open_tokenizer(checkpoint, tokenizer)
    (model,) = build_and_load(
        [*flags(checkpoint, layout, sequence), *more], refuse_without_flash_attention
    )
    _refuse_other_function(checkpoint, layout.more)
    mask_padding(model, vocabulary(checkpoint, opened))
    return model, opened


def vocabulary(checkpoint: Path, tokenizer: Any) -> int:
    """Rows of the embedding that mean a token; those after them are padding."""
    return getattr(Checkpoint(checkpoint).args, "vocab_size", None) or tokenizer.vocab_size


def mask_padding(model: Any, vocabulary: int) -> None:
    """Let no token be chosen whose row of the embedding is padding: its logit is 0, which can be the largest.

    Args:
        model: returns logits [..., V], gathered over the ranks.
        vocabulary: rows that mean a token.
    """

    from megatron.core.utils import unwrap_model

    def mask(module: Any, inputs: Any, logits: Any) -> Any:
        logits[..., vocabulary:] = float("-inf")
        return logits

    if unwrap_model(model).vocab_size > vocabulary:  # in half precision Megatron wraps it
        model.register_forward_hook(mask)


def stop_tokens(checkpoint: Path, tokenizer: Any, given: str | None) -> tuple[int, ...]:
    """The tokens at which an answer ends: those of generation_config.json, else of config.json, else the
    tokenizer's one.

    Args:
        checkpoint: a converted model, or one whose arguments name a tokenizer's folder.
        tokenizer: Megatron's.
        given: folder of a tokenizer that the user chose, or None.
    """
    args = Checkpoint(checkpoint).args
    trained = command.trained_tokenizer(args)
    for folder in (given and Path(given), checkpoint / command.HF_FOLDER, trained):
        found = files.token_ids(folder)["eos_token_id"] if folder else None
        if found is not None:
            break
    else:
        found = getattr(args, "eos_token_id", None)
    if found is None:
        found = tokenizer.eod
    return () if found is None else tuple(found) if isinstance(found, list) else (found,)


def open_tokenizer(checkpoint: Path, given: str | None, called: Path | None = None) -> Any:
    """Megatron's Hugging Face tokenizer of a model.

    Args:
        checkpoint: a converted model brings its own.
        given: folder of another one, or None.
        called: what the user calls the model, for messages.

    Raises:
        ValueError: there is none.
    """
    from megatron.core.tokenizers import MegatronTokenizer

    folder = Path(given) if given else checkpoint / command.HF_FOLDER
    if not given and not any(folder.glob("tokenizer*")):
        args = Checkpoint(checkpoint).args
        kind, model = (getattr(args, name, None) for name in ("tokenizer_type", "tokenizer_model"))
        if kind != "HuggingFaceTokenizer" or not model:
            has = f"was trained with {kind}" if kind else "brings none"
            raise ValueError(
                f"there is no Hugging Face tokenizer in {called or checkpoint}: the model {has}; give the "
                "folder of one with --tokenizer."
            )
        folder = Path(model)
    if not folder.is_dir():
        raise ValueError(f"there is no tokenizer at {folder}; give the folder of one with --tokenizer.")
    return MegatronTokenizer.from_pretrained(str(folder), {"library": "huggingface"})

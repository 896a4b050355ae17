"""One start for every layout.

`--use-cpu-initialization` draws every weight in full and keeps this rank's part, so the weights do not
depend on TP. They still depend on the pipeline: each stage draws from the beginning of its own stream. Here
the stream is seeded anew before the embedding, before each layer by its number in the whole model, and
after the last layer, so PP=2 starts from the weights of PP=1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

_AFTER_LAYERS = 1_000_000


@contextmanager
def same_weights_at_any_layout(seed: int) -> Iterator[None]:
    """While entered, a GPT built with `--use-cpu-initialization` has weights that only `seed` decides."""
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset

    embedding, block = LanguageModelEmbedding.__init__, TransformerBlock.__init__
    layer = TransformerLayer.__init__

    def seed_anew(number: int) -> None:
        torch.manual_seed(seed * 10_000_019 + number)

    def build_embedding(self: Any, *args: Any, **kwargs: Any) -> None:
        seed_anew(0)
        embedding(self, *args, **kwargs)

    def build_layer(
        self: Any, config: Any, submodules: Any, layer_number: int = 1, *args: Any, **kwargs: Any
    ) -> None:
        whole = not kwargs.get("add_layer_offset", True)  # a hybrid model's layers are numbered in the whole
        offset = 0 if whole else get_transformer_layer_offset(config, kwargs.get("vp_stage"))
        seed_anew(layer_number + offset)
        layer(self, config, submodules, layer_number, *args, **kwargs)

    def build_block(self: Any, *args: Any, **kwargs: Any) -> None:
        block(self, *args, **kwargs)
        seed_anew(_AFTER_LAYERS)

    with (
        mock.patch.object(LanguageModelEmbedding, "__init__", build_embedding),
        mock.patch.object(TransformerLayer, "__init__", build_layer),
        mock.patch.object(TransformerBlock, "__init__", build_block),
    ):
        yield

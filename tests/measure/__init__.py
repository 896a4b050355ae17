"""Tests of helix_megatron/measure."""

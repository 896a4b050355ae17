"""Helix for Megatron: two-level tensor-parallel attention."""

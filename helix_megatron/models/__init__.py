"""Shapes of known models, and data that every Python carries.

presets.py  shapes of known models, and of a Hugging Face config.json
support.py  which tensor-parallel sizes a model runs at: Megatron's word beside Helix's grid
data.py     byte tokens of a text
"""

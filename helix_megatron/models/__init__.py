"""Shapes of known models, and data that every Python carries.

presets.py  shapes of known models, and of a Hugging Face config.json
asked.py    attention shapes of the models that people ask about
support.py  which tensor-parallel sizes a model runs at: Megatron's word beside Helix's grid
data.py     byte tokens of a text
"""

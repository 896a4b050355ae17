"""Shapes of known models, and data that every Python carries.

shape.py      the shape of a model: sizes, parameters, Megatron's flags
presets.py    shapes of known models
hf_config.py  the shape in a Hugging Face config.json
popular.py    attention shapes of the models that people ask about
support.py    which tensor-parallel sizes a model runs at: Megatron's word beside Helix's grid
data.py       byte tokens of a text
"""

"""Shapes of known models, and data that every Python carries.

presets.py  shapes of known models, and of a Hugging Face config.json
data.py     byte tokens of a text
"""

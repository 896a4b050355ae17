"""Checkpoints in Megatron's standard layout, whatever the grid.

layout.py         a rank's rows and columns as pieces of the standard tensors
integrity.py      reads a checkpoint's tensors once each, comparing checksums
compatibility.py  whether a checkpoint's weights mean this run's model
model_arguments.py  which of Megatron's arguments change what weights compute
"""

"""Real models in and out: Hugging Face weights ↔ Megatron's torch_dist checkpoints.

families   which models, and their Megatron arguments
mapping    which tensors of one are which of the other
config_json    which keys of a config.json are understood
gguf_metadata  which keys of a GGUF file are understood, and what they say
files      which files belong to a model, and whether they are whole
hf         reading safetensors folders and GGUF files, writing safetensors folders
torch_dist writing and reading checkpoints one tensor at a time
command    `helix convert`
"""

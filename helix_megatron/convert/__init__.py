"""Real models in and out: Hugging Face weights ↔ Megatron's torch_dist checkpoints.

families   which models, and their Megatron arguments
mapping    which tensors of one are which of the other
hf         reading safetensors folders and GGUF files, writing safetensors folders
torch_dist writing and reading checkpoints one tensor at a time
command    `helix convert`
"""

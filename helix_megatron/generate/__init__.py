"""Text from a model: `helix generate` and `helix serve`, by Megatron's dynamic inference engine.

    kv_bytes.py   what a KV cache holds on a rank: Helix's share beside Megatron's replication
    model.py      a model on disk (Hugging Face, GGUF, Megatron) as a checkpoint, and its flags
    graphs.py     whether steps are replayed from CUDA graphs, and of which sizes
    engine.py     the dynamic engine around a loaded model; everything here that knows Megatron's engine
    prompts.py    prompts of the command line or a file, and text that streams token by token
    generate.py   what the ranks of `helix generate` do
    report.py     the text of answers as it comes, and the report after them
    ranks.py      starting the ranks, or being one of torchrun's
    check.py      a real model against transformers: tokens and logits
    requests.py   every field that a request to the server may have; all else is refused
    messages.py   the same of a chat's messages and tools
    stops.py      texts and special tokens that end an answer, wherever they lie
    front_end.py  around Megatron's HTTP handlers: requests checked, answers put right, failures said
    serve.py      Megatron's own text-generation server on those ranks
    cli.py        the command lines
"""

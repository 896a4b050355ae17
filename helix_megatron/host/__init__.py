"""Host mode: Megatron without a GPU, ranks as processes of one machine.

mode.py           what of CUDA's surface acts on host memory
rng.py            placement and random streams
collectives.py    collectives between processes of one machine
shared_memory.py  the memory in which they meet
kernels.py        torch versions of flash-attn's entry points
megatron.py       changes inside Megatron's modules
launcher.py       starts ranks, import once, then fork; launch_command.py: its command line
rank.py           one rank: its environment, its report, who ends it
preload.py        what is imported once for all of them
processes.py      children end with their parent
"""

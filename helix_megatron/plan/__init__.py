"""`helix plan`: which layout a model should run in on given hardware, predicted and explained.

layout.py     a layout (tp, pp, dp, n x m, ...) and the work to be done   }
memory.py     bytes that a rank holds                                     }
traffic.py    collectives of a step, and the bytes a rank receives        } pure arithmetic
compute.py    matrix products, attention and passing over memory          }
hardware.py   what a cluster can do: constants of devices and links       }
placement.py  which domains of the fast link a group's ranks lie in
timing.py     seconds of a step, from the four above                      }
search.py     every layout that fits, ranked                              }
advice.py     why nothing fits, and what would                            }
rule.py       the grid without a search, for `--attention-impl helix`     }
clusters.py, cluster_fields.py   known clusters, and those in files
inputs.py     models and clusters from presets, files and flags
given.py      Megatron's flags that come with a model: what is used, named as not planned, refused
nvml.py       this machine's GPUs
pasted.py     flags and, on a host, the command to paste
report.py     table, JSON, explanation
probe.py      measures a host's constants: collectives and software,
probe_gpu.py  or those of GPUs,
rates.py      and what a core or a GPU does in a second
trial.py      builds a layout with Megatron and measures it: what predictions are checked against
command.py    the command line
"""

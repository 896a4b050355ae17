"""`helix plan`: which layout a model should run in on given hardware, predicted and explained.

A layout (tp, pp, dp, n x m, ...) and the work to be done are a `Problem`; pure arithmetic turns it into bytes
held, collectives, operations and, with the constants of a cluster, seconds; the search ranks all that fit.
Constants are data sheets' or measured by a probe. Every figure is predicted and printed with its formula.

layout, terms                       a problem; a quantity as a product of named factors     }
parameters, memory                  elements and bytes that a rank holds                    }
traffic, compute                    collectives and operations of a rank                    } pure
hardware, timing, decode_launches   rates and times of a cluster, seconds of a step         } arithmetic
search, suggestions                 every layout that fits, ranked; what to change          }
crossover                           from which batch a sharded cache pays                   }
clusters, machine                   known clusters and those in files; this machine
inputs, megatron_flags              the model; Megatron's flags, read and printed
command, report                     the command line; tables, JSON, explanation
probe, probe_collectives, probe_rates   measures a host's or GPUs' constants
calibration                         rates and links from a check.json of `helix check`
trial                               builds a layout with Megatron and measures it, to check predictions
"""

"""`helix serve` with a fault in its engine, named by $FAULT:

    temperature   what the check of requests refuses reaches the engine of every rank
    rank          the engine of rank 1 raises when a prompt has the token 258
"""

import os
import sys

from helix_megatron.generate import serve

sound = serve.rank_serve


def rank_serve(terminal, server):
    from megatron.core.inference.engines import DynamicInferenceEngine

    from helix_megatron.generate import requests

    if os.environ["FAULT"] == "temperature":
        requests.COLDEST = 0.0
    elif os.environ["RANK"] == "1":
        forward = DynamicInferenceEngine.async_forward

        async def async_forward(self):
            if any(258 in entry.record[-1].prompt_tokens for entry in self.requests.values()):
                raise ZeroDivisionError("planted")
            return await forward(self)

        DynamicInferenceEngine.async_forward = async_forward
    sound(terminal, server)


if __name__ == "__main__":
    import serve_fault_worker  # ranks import this function by name

    from helix_megatron import cli

    serve.rank_serve = serve_fault_worker.rank_serve
    sys.exit(cli.main(sys.argv[1:]))

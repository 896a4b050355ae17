"""Ports for servers that tests start."""

import errno
import random
import socket


def free_port():
    """A port that nobody has, of those that Linux gives to no client.

    A port that the kernel chose may be given to another process's connection before the server takes it.
    """
    for port in random.SystemRandom().sample(range(10000, 32000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
    raise AssertionError("no free port among 100")

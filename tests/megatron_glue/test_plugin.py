"""The module that registers Helix when it is imported; what it does to Megatron-Bridge: test_bridge.py."""

import os

import pytest

from helix_megatron.host.launcher import run_ranks

CASES = {  # HELIX_ARGS: the settings, or what is said
    "": dict(head_parallel_size=None, dim_parallel_size=None),
    "--helix-dim-parallel-size 2 --helix-query-placement dims": dict(
        dim_parallel_size=2, query_placement="dims"
    ),
    "--attention-impl megatron": None,
    "--attention-impl megatron --helix-dim-parallel-size 2": "was given with --attention-impl megatron",
    "--helix-dim-parallel 2": "unrecognized arguments: --helix-dim-parallel 2",
    "--tensor-model-parallel-size 2": "it takes Helix's flags",
    "--helix-host-mode": "HELIX_ARGS has --helix-host-mode, which acts elsewhere",
}


def rank_import():
    """What Megatron's parser knows before and after the import, and what each HELIX_ARGS comes to."""
    from argparse import ArgumentParser
    from dataclasses import asdict

    from megatron.training import arguments

    from helix_megatron.megatron import integrate
    from helix_megatron.partition.grid import HelixConfigError

    def knows():
        return "--attention-impl" in arguments.add_megatron_arguments(ArgumentParser())._option_string_actions

    os.environ.pop("HELIX_ARGS", None)
    before = knows()
    from helix_megatron import plugin

    after, found = knows(), {}
    for words in CASES:
        try:
            helix = plugin.settings_from(words)
            found[words] = helix and asdict(helix)
        except HelixConfigError as error:
            found[words] = str(error)
    integrate.uninstall()
    return before, after, knows(), found


@pytest.mark.training
def test_the_import_registers_and_reads_its_settings():
    (result,) = run_ranks(rank_import, 1, host_mode=False)
    assert result[:3] == (False, True, False)
    for words, expected in CASES.items():
        found = result[3][words]
        if isinstance(expected, dict):
            assert expected.items() <= found.items()
        elif expected is None:
            assert found is None
        else:
            assert expected in found

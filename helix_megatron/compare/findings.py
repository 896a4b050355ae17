"""What the measured numbers say, in sentences: losses, failures, tokens, and who was slower than whom.

A difference of speed is said only where the samples do not overlap and the noise between launches is smaller.
"""

from __future__ import annotations

from statistics import median
from typing import Any


def findings(results: dict[str, Any]) -> list[str]:
    """What the numbers say, one sentence each: losses, failures, and who was slower than whom."""
    said: list[str] = []
    tolerance = results["config"]["loss_tolerance"]
    finished = [v for v in results["variants"] if v["status"] == "ok"]
    compared = [v for v in finished if v["loss_check"]["reference"] != v["name"]]
    for variant in compared:
        check = variant["loss_check"]
        if not check["agrees"]:
            said.append(
                f"LOSSES DISAGREE: {variant['name']} is up to {check['max_abs_difference']:.3g} away from "
                f"{check['reference']}; at most {tolerance:g} is allowed."
            )
    if compared and all(v["loss_check"]["agrees"] for v in compared):
        worst = max(v["loss_check"]["max_abs_difference"] for v in compared)
        said.append(
            f"Losses agree: within {worst:.1e} for every pair of the same model (allowed: {tolerance:g})."
        )
    if not compared and finished:
        said.append("Losses were not compared: no two finished variants are the same model.")
    for variant in results["variants"]:
        if variant["status"] != "ok":
            said.append(f"{variant['name']}: {variant['status']}: {variant['cause']}")
        elif "decode_cause" in variant["measured"]:
            said.append(f"{variant['name']}: no decode: {variant['measured']['decode_cause']}")
    return said + decoded(finished) + speeds(finished)


def decoded(finished: list[dict[str, Any]]) -> list[str]:
    """Whether variants of the same model chose the same tokens; no error, as a near tie may flip one."""
    said: list[str] = []
    references: dict[str, dict[str, Any]] = {}
    same = 0
    for variant in (v for v in finished if "decoded_tokens" in v["measured"]):
        reference = references.setdefault(variant["model"], variant)
        if reference is variant:
            continue
        if variant["measured"]["decoded_tokens"] == reference["measured"]["decoded_tokens"]:
            same += 1
        else:
            said.append(f"{variant['name']} decoded other tokens than {reference['name']}.")
    return said + ([f"Greedy decode: {same} variants chose the tokens of their reference."] if same else [])


_SPEEDS = (  # samples in `measured`, what they are seconds of
    ("train_step_seconds", "training"),
    ("forward_seconds", "forward"),
    ("decode_token_seconds", "decode"),
)


def speeds(finished: list[dict[str, Any]]) -> list[str]:
    """Each Helix variant next to each Megatron variant of the same model, gains and losses alike.

    A grid of m = 1 is Megatron's own attention: what separates it from Megatron at the same TP and PP is
    the noise from one launch to the next, and differences up to that size are not differences.
    """
    noise = dict.fromkeys((samples for samples, _ in _SPEEDS), 1.0)
    said = []
    pairs = [
        (helix, peer)
        for helix in finished
        for peer in finished
        if helix["model"] == peer["model"]
        and (helix["attention_impl"], peer["attention_impl"]) == ("helix", "megatron")
    ]
    for helix, peer in pairs:
        if helix["row"].get("m") == 1 and all(helix["row"][k] == peer["row"][k] for k in ("tp", "pp")):
            for samples, what in _SPEEDS:
                if samples in helix["measured"] and samples in peer["measured"]:
                    ratio = median(peer["measured"][samples]) / median(helix["measured"][samples])
                    noise[samples] = max(noise[samples], ratio, 1 / ratio)
                    said.append(
                        f"Noise, measured: {helix['name']} computes what {peer['name']} computes, and its "
                        f"{what} ran at {ratio:.2f}x the speed. Smaller differences are not shown as such."
                    )
    for helix, peer in pairs:
        parts = [
            f"{what} {_versus(helix['measured'][samples], peer['measured'][samples], noise[samples])}"
            for samples, what in _SPEEDS
            if samples in helix["measured"] and samples in peer["measured"]
        ]
        said.append(f"{helix['name']} against {peer['name']}, measured: {'; '.join(parts)}.")
    return said


def _versus(own: list[float], other: list[float], noise: float) -> str:
    """Compare two series of seconds by their medians; overlap, or a ratio within `noise`, decides nothing."""
    ratio = median(other) / median(own)
    if min(own) <= max(other) and min(other) <= max(own):
        return f"{ratio:.2f}x (no difference shown: the samples overlap)"
    if max(ratio, 1 / ratio) <= noise:
        return f"{ratio:.2f}x (no difference shown: within the noise)"
    return f"{ratio:.2f}x ({'faster' if ratio > 1 else 'SLOWER'})"

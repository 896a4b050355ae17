"""What the measured numbers say, in sentences: failures, losses, numerical errors, tokens, noise."""

from __future__ import annotations

from typing import Any

from helix_megatron.compare.comparisons import WORKLOADS, finished_variants


def describe_findings(results: dict[str, Any]) -> list[str]:
    """One sentence each, the worst news first."""
    said = [f"MIXED RUNS, put together because you asked for it: {line}." for line in results["mixed"]]
    for variant in results["variants"]:
        if variant["status"] != "ok":
            said.append(f"{variant['name']}: {variant['status']}: {variant.get('cause', 'not yet')}")
        for name, cause in variant.get("measured", {}).get("causes", {}).items():
            said.append(f"{variant['name']}: no {WORKLOADS[name]}: {cause}")
        for error in variant.get("measured", {}).get("gpu", {}).get("errors", []):
            said.append(f"{variant['name']}: NVML stopped answering, so that number is absent: {error}")
    said += compare_losses(results) + compare_logits(results)
    return said + compare_tokens(finished_variants(results)) + describe_noise(results)


def compare_losses(results: dict[str, Any]) -> list[str]:
    """Whether variants of the same model, and runs of the same variant, have the same losses."""
    said, tolerance = [], results["config"]["loss_tolerance"]
    checked = [v for v in results["variants"] if "loss_check" in v]
    compared = [v for v in checked if v["loss_check"]["reference"] != v["name"] or len(v["runs"]) > 1]
    for variant in (v for v in checked if not v["loss_check"]["agrees"]):
        check = variant["loss_check"]
        far = check["max_abs_difference"]
        far = "missing or not a number, or not as many" if far is None else f"up to {far:.3g} away"
        said.append(
            f"LOSSES DISAGREE: {variant['name']} is {far} from {check['reference']}; at most {tolerance:g} "
            "is allowed."
        )
    if compared and all(v["loss_check"]["agrees"] for v in checked):
        worst = max(v["loss_check"]["max_abs_difference"] for v in compared)
        said.append(
            f"Losses agree: within {format_tiny(worst)} between all variants and runs of the same model "
            f"(allowed: {tolerance:g})."
        )
    if checked and not compared:
        said.append("Losses were not compared: no two finished runs are of the same model.")
    return said


def compare_logits(results: dict[str, Any]) -> list[str]:
    """How far the logits are from the fp32 reference."""
    said = [
        f"{reference['name']}: {reference['status']}: {reference.get('cause', 'not yet')}"
        for reference in results["references"]
        if reference["status"] not in ("ok", "not run")
    ]
    measured = {v["name"]: v.get("measured", {}) for v in results["variants"]}
    found = {name: m["error"] for name, m in measured.items() if "error" in m}
    said += [f"{name}: no numerical error: {e['cause']}" for name, e in found.items() if "cause" in e]
    relative = {name: e["relative"] for name, e in found.items() if "relative" in e}
    if relative:
        worst = max(relative, key=relative.__getitem__)
        said.append(
            f"Logits against the same weights on one rank in fp32: relative error at most "
            f"{format_tiny(relative[worst])} ({worst})."
        )
    return said


def compare_tokens(variants: list[dict[str, Any]]) -> list[str]:
    """Whether variants of the same model chose the same tokens; no error, as a near tie may flip one."""
    said: list[str] = []
    references: dict[str, dict[str, Any]] = {}
    same = 0
    for variant in (v for v in variants if "decoded_tokens" in v["measured"]):
        reference = references.setdefault(variant["model"], variant)
        if reference is variant:
            continue
        if variant["measured"]["decoded_tokens"] == reference["measured"]["decoded_tokens"]:
            same += 1
        else:
            said.append(f"{variant['name']} decoded other tokens than {reference['name']}.")
    return said + ([f"Greedy decode: {same} variants chose the tokens of their reference."] if same else [])


def describe_noise(results: dict[str, Any]) -> list[str]:
    """What separates two variants that run the same program: a measure of the noise."""
    said = []
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in (e for e in results["comparisons"] if e["same_program"]):
        pairs.setdefault((entry["variant"], entry["baseline"]), []).append(entry)
    for (variant, baseline), entries in pairs.items():
        parts = ", ".join(f"{WORKLOADS[e['workload']]} {e['ratio']:.2f}x" for e in entries)
        said.append(
            f"{variant} computes what {baseline} computes. Their ratio is noise, and no smaller difference "
            f"is shown as one: {parts}."
        )
    return said


def format_ratio(entry: dict[str, Any]) -> str:
    """'1.13x [1.05, 1.21] faster': ratio of speeds, 95 % interval, verdict."""
    said = f"{entry['ratio']:.2f}x"
    if entry["ci95"] is not None:
        said += " [{}, {}]".format(*map(format_bound, entry["ci95"]))
    return f"{said} {_SHORT.get(entry['verdict'], entry['verdict'])}"


_SHORT = {
    "slower": "SLOWER",
    "no difference shown": "unclear",
    "within the noise of two equal programs": "within the noise",
    "one run shows no difference": "one run",
}


def format_tiny(value: float) -> str:
    """A difference near zero: '1.2e-07', or '0' where there is none."""
    return f"{value:.1e}" if value else "0"


def format_bound(value: float) -> str:
    """One end of a ratio's interval; few runs can make it absurd, and no digits of that mean anything."""
    return "<0.01" if value < 0.01 else ">100" if value > 100 else f"{value:.2f}"

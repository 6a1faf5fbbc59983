"""`llava-fa doctor`."""

from __future__ import annotations

from typing import Any

import typer

from llava_fa.cli import options, output


def doctor(
    json_output: options.Json = False,
) -> None:
    """Show which kernels run here and why, check that each computes what it should, and what would serve a model."""
    from llava_fa.kernels.doctor import diagnose

    diagnosis = diagnose() | {"serving": _serving()}
    if diagnosis["gpu"]["implementation"] == "triton":
        import torch

        from llava_fa.solver.check import fitting_checks

        diagnosis["checks"] += fitting_checks(torch.device("cuda"))
        diagnosis["ok"] = all(check["ok"] for check in diagnosis["checks"])
    if json_output:
        output.print_json(diagnosis)
    else:
        _show(diagnosis)
    if not diagnosis["ok"]:
        raise typer.Exit(1)


def _serving() -> dict[str, Any]:
    """Which vLLM is here, whether it is one that this package supports, and what `serve --engine auto` takes."""
    from llava_fa.serve.choice import choose
    from llava_fa.vllm.support import refusal, vllm_version

    taken = choose("auto")
    vllm = {"version": vllm_version(), "supported": refusal() is None}
    return {"vllm": vllm, "auto": taken.engine, "reason": taken.reason}


def _show(diagnosis: dict[str, Any]) -> None:
    console = output.stdout()
    kernels = diagnosis["kernels"]
    lines = [
        ("versions", ", ".join(f"{name} {number}" for name, number in diagnosis["versions"].items())),
        ("CPU", f"{diagnosis['cpu']}, {diagnosis['threads']} threads; OpenMP: {diagnosis['openmp']}"),
        ("kernels", f"{kernels['level'] or 'PyTorch'} ({kernels['reason']}); built: {', '.join(kernels['available'])}"),
    ]
    if kernels["trellis"]:
        lines.append(("trellis codes", f"points found {kernels['trellis']}"))
    lines.append(("fitting", f"products of large matrices by {kernels['products']}"))
    lines += [
        (f"layer, {dtype}", f"{layer['implementation']} ({layer['reason']}), {layer['activations']} activations")
        for dtype, layer in diagnosis["layer"].items()
    ]
    gpu = diagnosis["gpu"]
    on = f"{gpu['device']}: {gpu['implementation']} ({gpu['reason']})" if gpu["device"] else f"none ({gpu['reason']})"
    lines.append(("GPU", f"{on}; Triton {gpu['triton'] or 'not installed'}"))
    worst: dict[str, float] = {"exact": 0.0, "int8": 0.0}
    wrong = []
    for check in diagnosis["checks"]:
        worst[check["activations"]] = max(worst.get(check["activations"], 0.0), check["error"])
        if not check["ok"]:
            wrong.append(f"{check['level']}, {check['codes']}, {check['activations']}")
    verdict = f"WRONG: {'; '.join(wrong)}" if wrong else "right"
    largest = ", ".join(f"{error:.1e} {kind}" for kind, error in worst.items())
    count = len(diagnosis["checks"])
    lines.append(("checks", f"{count} layers against float64 or the CPU's fit: {verdict}; largest error {largest}"))
    serving = diagnosis["serving"]
    lines.append(("serve", f"--engine auto takes {serving['auto']} ({serving['reason']})"))
    for name, text in lines:
        console.print(f"{name:<16}{text}", markup=False, soft_wrap=True)

"""The GPU's kernels compiled for GPUs that need not be there: registers, spills and shared memory of each (gpu.py)."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from llava_fa import triton_search
from llava_fa.kernels import triton, words
from llava_fa.kernels.layout import best_layout

Rows = Iterator[dict[str, Any]]
Build = Callable[..., Rows]


def compile_all(architectures: list[int]) -> Rows:
    """Every kernel of a 3584 × 18944 and an 18944 × 3584 layer, and of the searches that fit it."""

    def build(
        name: str,
        function: Any,
        pointers: dict[str, str],
        numbers: dict[str, int],
        constants: Any,
        warps: int,
        options: dict[str, Any],
        reals: tuple[str, ...] = (),
    ) -> Rows:
        for architecture in architectures:
            row = built(function, pointers, numbers, reals, constants, architecture, {"num_warps": warps, **options})
            row = {"kernel": name, "sm": architecture, "warps": warps, **row}
            print(row, flush=True)
            yield row

    yield from layers(build)
    yield from searches(build)


def built(
    function: Any,
    pointers: dict[str, str],
    numbers: dict[str, int],
    reals: tuple[str, ...],
    constants: dict[str, Any],
    architecture: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """What one kernel takes of a GPU of this compute capability."""
    import triton as triton_lang
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tools, start = Path(triton_lang.__file__).parent / "backends" / "nvidia" / "bin", time.monotonic()
    types = {**pointers, **dict.fromkeys(numbers, "i32"), **dict.fromkeys(reals, "fp32")}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {key: types[key] for key in function.arg_names}
    even = [key for key in signature if key in pointers or (key in numbers and numbers[key] % 16 == 0)]
    attributes = {(function.arg_names.index(key),): [["tt.divisibility", 16]] for key in even}
    source = ASTSource(function, signature, constants, attributes)
    made = triton_lang.compile(source, GPUTarget("cuda", architecture, 32), options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        command = [tools / "cuobjdump", "--dump-resource-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    cores = "wgmma" if "wgmma" in made.asm["ptx"] else "mma" if "mma.sync" in made.asm["ptx"] else ""
    row = {"registers": registers, "stack": stack, "local": local, "shared": made.metadata.shared}
    return {**row, "seconds": round(time.monotonic() - start, 1), "tensor cores": cores}


def layers(build: Build) -> Rows:
    """The packed layer's two launches."""
    from llava_fa.kernels import triton_kernels as kernels

    types = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    for n in (3584, 18944):
        first, second = triton.split(n)
        pointers = dict.fromkeys(("input_scale", "right_scale", "left_scale"), "*bf16") | {"right": "*i8"}
        pointers |= dict.fromkeys(("first", "second", "twiddle", "z", "low"), "*fp32") | {"x": "*bf16", "signs": "*u8"}
        numbers = {"n": n, "N1": first, "N2": second, "blocks": 1, "rank": 1, "batch": 1}
        pointers |= {"chosen": "*i32", "table": "*i64"}
        constants = {"CODES": 4, "TERMS": 1, "SCALED": True, **triton.transform_tile(second)}
        warps = constants.pop("num_warps")
        for name, grouped in ((f"transform {n}", False), (f"transform {n}, grouped", True)):
            constants["GROUPED"] = grouped
            yield from build(name, kernels.transform_kernel, pointers, numbers, constants, warps, triton.OPTIONS)
    for bits, state in [(2, 0), (3, 0), (4, 0), (6, 0), (7, 0), (8, 0), (4, 12), (5, 12)]:
        cases = [(1, torch.bfloat16, False), (16, torch.bfloat16, False)]
        if (bits, state) in ((3, 0), (8, 0), (4, 12)):
            cases += [(16, torch.float32, False), (512, torch.bfloat16, False), (512, torch.float16, False)]
            cases += [(1, torch.bfloat16, True)]
        for batch, dtype, grouped in cases:
            units = words.units(best_layout(18944, 3584, bits, state))
            tile = triton.tiles(18944, batch, units, dtype)
            exact = batch == 1 or dtype == torch.float32
            pointers = {"y": types[dtype], "codes": "*i32", "points": "*i32", "z": "*fp32" if exact else "*bf16"}
            pointers |= {"row_scale": "*bf16", "left": "*i8", "low": "*fp32", "bias": types[dtype]}
            numbers = {"m": 18944, "quads": units // 4, "rank": 1}
            codes, count = words.unit(bits)
            constants = {"BITS": bits, "WINDOW": state or bits, "CODES": codes, "WORDS": count, "LOW_RANK": True}
            constants |= {"HAS_BIAS": True, "BLOCK_M": tile.rows, "BLOCK_U": tile.units, "BLOCK_R": 16}
            function = kernels.vector_kernel
            if batch == 1:
                pointers |= {"chosen": "*i32", "table": "*i64"}
                numbers["numbers"] = units * 2 * codes
                constants["GROUPED"] = grouped
            else:
                function = kernels.matrix_kernel
                numbers |= {"batch": batch, "blocks": 1}
                constants |= {"TERMS": 1 if exact else triton._TERMS[dtype], "BLOCK_B": tile.inputs}
            kind = f"{bits}-bit {'trellis' if state else 'rings'}, batch {batch}, {str(dtype)[6:]}"
            kind += ", grouped" if grouped else ""
            yield from build(kind, function, pointers, numbers, constants, tile.warps, triton.OPTIONS)


def searches(build: Build) -> Rows:
    """The searches that fit a layer, with the largest of codebooks."""
    from llava_fa import triton_search_kernels as rings
    from llava_fa import triton_trellis_kernels as trellis

    real, whole, options = "*fp32", "*i32", triton_search.OPTIONS
    tables = {"cells": whole, "candidates": whole, "points": real, "half_norm": real, "codes": whole}
    sizes = {"WIDTH": 6, "SIZE": 256, "SIDE": 512}

    def tile(kind: str) -> dict[str, int]:
        return dict(zip(("ROWS", "CHUNK"), triton_search._TILES[kind], strict=True))

    block = {"columns": 128, "rows": 18944}
    pointers = {"error": real, "base": real, "unit": real, **tables}
    constants = {**sizes, **tile("Greedy")}
    yield from build("greedy", rings.greedy_kernel, pointers, block, constants, 1, options, ("REACH",))
    pointers = {"error": real, "gradient": real, "moment": real, "inverse": real, "changed": whole, **tables}
    constants = {**sizes, **tile("Refine")}
    yield from build("refine", rings.refine_kernel, pointers, block, constants, 1, options, ("REACH",))
    pointers = dict.fromkeys(("error", "base", "unit", "metric", "tried", "aim"), real)
    pointers |= {"numbers": whole, "past": whole, **tables}
    constants = {**sizes, "KEPT": 4, "TRIED": 4, **tile("Beam")}
    yield from build("beam", rings.beam_kernel, pointers, block, constants, 1, options, ("REACH",))
    for bits in (4, 8):
        pointers = {"target": real, "table": real, "before": real, "winners": "*u8", "states": whole}
        numbers = {"first": 0, "steps": 1792, "rows": 18944}
        constants = {"BRANCHES": 1 << bits, "GROUPS": 1 << 12 - bits, "BITS": bits}
        warps = triton_search._VITERBI_WARPS
        yield from build(f"viterbi, {bits} bits", trellis.viterbi_kernel, pointers, numbers, constants, warps, options)
        pointers = dict.fromkeys(("target", "base", "unit", "metric"), real)
        pointers |= {"points": whole, "lists": "*i16", "first": "*i16", "memory": whole, "states": whole}
        numbers = {"start": 32, "columns": 32, "size": 3584, "rows": 18944, "ahead": 64}
        constants = {"BITS": bits, "SIDE": 64, "TRIED": 6, "TRIED_FIRST": 64, "SLOTS": 8, "PATHS": 32, "BLOCK": 32}
        constants |= tile("TrellisBeam")
        name, function = f"trellis beam, {bits} bits", trellis.trellis_beam_kernel
        yield from build(name, function, pointers, numbers, constants, 1, options, ("REACH",))

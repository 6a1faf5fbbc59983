"""One packed layer against ggml's matrix products on this CPU: the same shapes, calls alternating in one process.

    .venv/bin/pip download --no-deps --no-binary llama-cpp-python llama-cpp-python   # anywhere outside this tree
    tar xzf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B ggml -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
        -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    cmake --build ggml --target ggml ggml-cpu
    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/ggml.py --library ggml/bin [--shapes 4096x4096] [--out runs/ggml]
    .venv/bin/python benchmarks/ggml.py --report

ggml runs on torch's OpenMP (torch is imported first, and both ask for libgomp.so.1), its weights in its repacked order
where it has one for the type and this CPU. Weights, their copies and the reading as in benchmarks/kernels.py. Each of
ggml's products is checked against the float weights once. Bits are stored bits a weight. Prints a table of
docs/results.md.
"""

from __future__ import annotations

import ctypes
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from common import arguments, write_json
from kernels import BEYOND_CACHE, OURS, Turns, alternate, bf16, packed, reading, tenth

# ggml_type of ggml.h; the order repacked where there is one; the least cosine of its product and the exact one.
TYPES = {"Q4_K": (12, True, 0.98), "Q4_0": (2, True, 0.98), "Q2_K": (10, True, 0.85), "TQ2_0": (35, False, 0.3)}
TYPES["IQ2_XXS"] = (16, False, 0.8)
_POINTER, _SIZE, _INT64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
_ROWS = 64  # of different weights; the others repeat them


class _Init(ctypes.Structure):
    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


class Ggml:
    """ggml's CPU backend with torch's number of threads."""

    def __init__(self, folder: Path) -> None:
        self.base, cpu = (
            ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu")
        )
        pages = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
        if len(pages) != 1:
            raise SystemExit(f"there are {len(pages)} OpenMP runtimes, which disturb each other: {sorted(pages)}")
        self.quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)(lambda *_: None)
        self.function("ggml_log_set", None, type(self.quiet), _POINTER)(self.quiet, None)
        self.declare(cpu.ggml_backend_cpu_init)
        self.declare(cpu.ggml_backend_cpu_set_n_threads, None, _POINTER, ctypes.c_int)
        self.backend = cpu.ggml_backend_cpu_init()
        cpu.ggml_backend_cpu_set_n_threads(self.backend, torch.get_num_threads())
        plain = self.function("ggml_backend_cpu_buffer_type")()
        device = self.function("ggml_backend_get_device", _POINTER, _POINTER)(self.backend)
        registry = self.function("ggml_backend_dev_backend_reg", _POINTER, _POINTER)(device)
        find = self.function("ggml_backend_reg_get_proc_address", _POINTER, _POINTER, ctypes.c_char_p)
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(
            find(registry, b"ggml_backend_dev_get_extra_bufts")
        )(device)
        name = self.function("ggml_backend_buft_name", ctypes.c_char_p, _POINTER)
        found = {}
        for one in extra:
            if one is None:
                break
            found[name(one)] = one
        self.orders = {False: plain, True: found[b"CPU_REPACK"]}

    @staticmethod
    def declare(function: Any, result: Any = _POINTER, *arguments: Any) -> Any:
        function.restype, function.argtypes = result, arguments
        return function

    def function(self, name: str, result: Any = _POINTER, *arguments: Any) -> Any:
        return self.declare(getattr(self.base, name), result, *arguments)

    def context(self) -> Any:
        return self.function("ggml_init", _POINTER, _Init)(_Init(1 << 24, None, True))

    def product(self, m: int, n: int, x: torch.Tensor, name: str, hot: bool) -> tuple[Turns, int]:
        """W x for the next copy of W at each call, and W's bytes."""
        kind, repacked, least = TYPES[name]
        tensor = self.function("ggml_new_tensor_2d", _POINTER, _POINTER, ctypes.c_int, _INT64, _INT64)
        place = self.function("ggml_backend_alloc_ctx_tensors_from_buft", _POINTER, _POINTER, _POINTER)
        put = self.function("ggml_backend_tensor_set", None, _POINTER, _POINTER, _SIZE, _SIZE)
        get = self.function("ggml_backend_tensor_get", None, _POINTER, _POINTER, _SIZE, _SIZE)
        row = self.function("ggml_row_size", _SIZE, ctypes.c_int, _INT64)(kind, n)
        quantise = self.function(
            "ggml_quantize_chunk", _SIZE, ctypes.c_int, _POINTER, _POINTER, _INT64, _INT64, _INT64, _POINTER
        )
        W, important = torch.randn(_ROWS, n), torch.ones(n)
        some = torch.empty(_ROWS * row, dtype=torch.uint8)
        quantise(kind, W.data_ptr(), some.data_ptr(), 0, _ROWS, n, important.data_ptr())
        codes = some.repeat(-(-m // _ROWS))[: m * row].contiguous()
        count = 1 if hot else -(-BEYOND_CACHE // (m * row)) + 1
        weights, work = self.context(), self.context()
        Ws = [tensor(weights, kind, n, m) for _ in range(count)]
        assert place(weights, self.orders[repacked])
        for one in Ws:
            put(one, codes.data_ptr(), 0, m * row)
        given = tensor(work, 0, n, len(x))
        multiply = self.function("ggml_mul_mat", _POINTER, _POINTER, _POINTER, _POINTER)
        made = [multiply(work, one, given) for one in Ws]
        graph_of = self.function("ggml_new_graph_custom", _POINTER, _POINTER, _SIZE, ctypes.c_bool)
        graphs = [graph_of(work, 16, False) for _ in Ws]
        for graph, one in zip(graphs, made, strict=True):
            self.function("ggml_build_forward_expand", None, _POINTER, _POINTER)(graph, one)
        assert place(work, self.orders[False])
        wide = x.float().contiguous()
        put(given, wide.data_ptr(), 0, 4 * wide.numel())
        compute = self.function("ggml_backend_graph_compute", ctypes.c_int, _POINTER, _POINTER)
        turns = Turns(graphs, lambda graph: compute(self.backend, graph))
        compute(self.backend, graphs[0])
        y = torch.empty(len(x), m)
        get(made[0], y.data_ptr(), 0, 4 * y.numel())
        wanted = wide @ W.T
        found, wanted = y[:, : min(m, _ROWS)].flatten(), wanted[:, :m].flatten()
        like = float(torch.cosine_similarity(found, wanted, dim=0))
        assert like > least, f"{name} has a product of similarity {like}"
        return turns, m * row


def measure(library: Ggml, m: int, n: int, batch: int, hot: bool, seconds: float) -> dict[str, float]:
    """Median and lowest tenth in microseconds of each, its stored bits a weight, and ``read GB/s``."""
    x = torch.randn(batch, n).bfloat16()
    contenders: dict[str, Turns] = {}
    sizes: dict[str, int] = {}
    for name, (code_bits, state_bits) in OURS.items():
        contenders[name], sizes[name] = packed(m, n, x, code_bits, state_bits, hot)
    for name in TYPES:
        contenders[name], sizes[name] = library.product(m, n, x, name, hot)
    contenders["torch bf16"], sizes["torch bf16"] = bf16(m, n, x, hot), 2 * m * n
    contenders["read"] = reading(sizes["4 bits"], hot)
    times = alternate(contenders, seconds)
    found: dict[str, float] = {"readings": len(times["read"])}
    for name, values in times.items():
        if name != "read":
            found |= {f"{name} bits": 8 * sizes[name] / m / n}
            found |= {name: statistics.median(values) * 1e6, f"least {name}": tenth(values) * 1e6}
    found["read GB/s"] = sizes["4 bits"] / statistics.median(times["read"]) / 1e9
    found["least read GB/s"] = sizes["4 bits"] / tenth(times["read"]) / 1e9
    return found


def report(out: Path, least: bool) -> None:
    at = "least " if least else ""
    cases = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    names = [*OURS, *TYPES, "torch bf16"]
    print("| m × n, batch | " + " | ".join(f"{name} ({cases[0][f'{name} bits']:.2f})" for name in names) + " | GB/s |")
    print("|---" * (len(names) + 2) + "|")
    for case in sorted(cases, key=lambda case: (case["m"] * case["n"], case["m"], case["batch"])):
        cells = [f"{case['m']} × {case['n']}, {case['batch']}{' hot' if case['hot'] else ''}"]
        cells += [f"{case[at + name]:.0f}" for name in names] + [f"{case[at + 'read GB/s']:.1f}"]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--library", type=Path, help="the folder of libggml-base.so and libggml-cpu.so")
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "18944x3584", "3584x18944"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--hot", action="store_true")
    parser.add_argument("--seconds", type=float, default=4.0, help="of alternating passes a case, three at least")
    parser.add_argument("--out", type=Path, default=Path("runs/ggml"))
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--least", action="store_true", help="the lowest tenth instead of the median")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.report:
        report(args.out, args.least)
        return
    if args.library is None:
        parser.error("--library: where ggml was built (see above)")
    library = Ggml(args.library)
    for m, n in (tuple(map(int, shape.split("x"))) for shape in args.shapes):
        for batch in args.batches:
            path = args.out / f"{m}x{n}-{batch}{'-hot' if args.hot else ''}.json"
            if path.exists():
                continue
            found = measure(library, m, n, batch, args.hot, args.seconds)
            case = {"m": m, "n": n, "batch": batch, "hot": args.hot, "threads": torch.get_num_threads()}
            write_json(path, {**case, **found})
            print(path.name, {key: round(value, 2) for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()

"""A server's throughput at 1 to 16 clients: packed at 4 and 2 bits under vLLM, vLLM dense, `serve` by transformers.

    .venv/bin/python benchmarks/serve.py --make [--model runs/serve/model]
    .venv/bin/python benchmarks/serve.py [--clients 1 4 8 16] [--requests 1] [--tokens 48] [--only vllm-4 …]
    .venv/bin/python benchmarks/serve.py --report
    .venv/bin/python benchmarks/serve.py --ranks

--make: a LLaVA with random weights and the shape of Qwen2.5-1.5B (CLIP-L on pictures of 112 pixels: 64 visual tokens),
and what `llava_fa.compress` makes of it at 4 and 2 bits, words at 4. It says nothing, at the speed of one that does.

Servers run one after the other, each with the machine to itself, by the OpenAI API: vLLM (its environment's Python,
--vllm) with `python -m vllm.entrypoints.openai.api_server`, libiomp5 preloaded where it is installed, as vLLM advises,
cores as it divides them, one for its front end, the others for its worker; --eager starts it without a compiled graph;
`llava-fa serve --engine transformers` with the Python that runs this. vLLM's dense model is measured in bf16 and in
float32: which is faster depends on the CPU. Every client sends --requests requests one after the other: a picture of
its own, about 30 words that begin differently (nothing is found in a prefix cache), --tokens tokens of answer exactly.
One request goes before, unmeasured.

*requests/s*, *tokens/s*: of all clients, first request to last token, prefill included. *decode*: what clients
together get between a request's first and last token: their number over the median time from token to token. *first*:
median seconds to the first token. Rounds (--rounds) go through the servers in turn, backwards every other time; figures
are medians over them. Rows that --out has are not measured again. Prints the tables of docs/results.md, "Served by
vLLM".

--ranks: what a rank of 2 and of 4 holds and sends for each layer of Qwen2.5-7B's shape, packed at 4 and 2 bits and
dense, computed: the table of docs/serving.md, "Several devices".
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import shapes
from common import Row, Rows, arguments

SERVERS = {
    "vllm-4": ("4", "auto"),
    "vllm-2": ("2", "auto"),
    "vllm-bf16": ("model", "bfloat16"),
    "vllm-float32": ("model", "float32"),
    "transformers-4": ("4", "auto"),
    "transformers-2": ("2", "auto"),
}
"""Name → folder beside the model's, dtype; auto: bf16, or float32 on a CPU without bf16 instructions."""
VOCABULARY, PICTURE, CONTEXT = 151936, 112, 512


def make(folder: Path) -> None:
    """The model, and what compressing makes of it."""
    import llava_fa

    shapes.write(shapes.llava_1_5b(picture=PICTURE), folder)
    for bits in (4, 2):
        out = folder.parent / str(bits)
        if not (out / "config.json").exists():
            llava_fa.compress(folder, out, llava_fa.FourierConfig(bits=bits), embeddings=4)


class Server:
    """A server in a process of its own, until the block ends."""

    def __init__(self, name: str, root: Path, vllm: Path, log: Path, eager: bool) -> None:
        self.name, self.root, self.vllm, self.log, self.eager = name, root, vllm, log, eager

    def __enter__(self) -> str:
        folder, dtype = SERVERS[self.name]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = dict(os.environ)
        if self.name.startswith("vllm"):
            command = [self.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", self.root / folder]
            command += ["--served-model-name", "bench", "--port", port, "--max-model-len", CONTEXT]
            command += ["--max-num-seqs", 16, "--dtype", _fast_dtype() if dtype == "auto" else dtype]
            command += ["--max-num-batched-tokens", 1024, *(["--enforce-eager"] if self.eager else [])]
            env["VLLM_CPU_KVCACHE_SPACE"] = "2"
            openmp = self.vllm.parent.parent / "lib" / "libiomp5.so"
            if openmp.exists():
                env["LD_PRELOAD"] = str(openmp)
        else:
            command = [sys.executable, "-c", "from llava_fa.cli.main import app; app()", "serve", self.root / folder]
            command += ["--engine", "transformers", "--name", "bench", "--port", port]
        self.file = self.log.open("wb")
        self.process = subprocess.Popen(
            [str(part) for part in command], stdout=self.file, stderr=self.file, env=env, start_new_session=True
        )
        self._wait(port)
        return f"http://127.0.0.1:{port}/v1"

    def _wait(self, port: int) -> None:
        import httpx

        while True:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended: see {self.log}")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(1)

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.file.close()


def _fast_dtype() -> str:
    import torch

    from llava_fa.hub.loading import fast_dtype

    return str(fast_dtype(torch.device("cpu"))).removeprefix("torch.")


def body(seed: int, tokens: int) -> dict[str, Any]:
    """A request: a picture of noise, words that begin differently."""
    from PIL import Image

    draw = random.Random(seed)
    picture = Image.frombytes("RGB", (PICTURE, PICTURE), draw.randbytes(3 * PICTURE * PICTURE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    words = " ".join(f"w{draw.randrange(4, VOCABULARY)}" for _ in range(30))
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": words}]
    asked = {"model": "bench", "max_tokens": tokens, "temperature": 0, "stream": True}
    return {**asked, "messages": [{"role": "user", "content": content}]}


async def client(http: Any, url: str, seeds: list[int], tokens: int, ignore: dict[str, Any]) -> list[Row]:
    """Requests one after the other: seconds to the first token and between further ones."""
    rows = []
    for seed in seeds:
        start, times = time.monotonic(), []
        request = {**body(seed, tokens), **ignore}
        async with http.stream("POST", f"{url}/chat/completions", json=request) as reply:
            if reply.status_code != 200:
                raise SystemExit((await reply.aread()).decode())
            async for line in reply.aiter_lines():
                if line.startswith("data: {") and '"content"' in line:
                    said = json.loads(line[6:])["choices"]
                    if said and said[0]["delta"].get("content"):
                        times.append(time.monotonic())
        rows.append({"first": times[0] - start, "start": start, "end": times[-1], "events": len(times), "times": times})
    return rows


async def load(url: str, clients: int, requests: int, tokens: int, seed: int, ignore: dict[str, Any]) -> Row:
    """So many clients at once."""
    import httpx

    async with httpx.AsyncClient(timeout=None) as http:
        seeds = [[seed + 1000 * index + turn for turn in range(requests)] for index in range(clients)]
        found = await asyncio.gather(*(client(http, url, some, tokens, ignore) for some in seeds))
    rows = [row for some in found for row in some]
    seconds = max(row["end"] for row in rows) - min(row["start"] for row in rows)
    gaps = [(row["end"] - row["times"][0]) / (tokens - 1) for row in rows]
    return {
        "clients": clients,
        "requests_per_s": len(rows) / seconds,
        "tokens_per_s": len(rows) * tokens / seconds,
        "decode_per_s": clients / statistics.median(gaps),
        "first_s": statistics.median(row["first"] for row in rows),
    }


def measure(name: str, args: Any, rows: Rows, round_: int) -> None:
    """One server at every number of clients."""
    wanted = [count for count in args.clients if not rows.find(name=name, clients=count, round=round_)]
    if not wanted:
        return
    # Answers as long as was asked for: transformers serve has no such field, and its model never says the end.
    ignore = {"ignore_eos": True} if name.startswith("vllm") else {}
    with Server(name, args.model.parent, args.vllm, args.out / f"{name}.log", args.eager) as url:
        asyncio.run(load(url, 1, 1, 8, 1, ignore))
        for count in wanted:
            seed = 10**6 * (1 + round_) + 10**4 * count
            row = asyncio.run(load(url, count, args.requests, args.tokens, seed, ignore))
            print(rows.add({"name": name, "round": round_, "tokens": args.tokens, **row}), flush=True)


def report(rows: Rows) -> None:
    """The table, and the goals' ratios."""
    keys = ("requests_per_s", "tokens_per_s", "decode_per_s", "first_s")
    counts = sorted({row["clients"] for row in rows})
    table = {
        (name, count): [statistics.median(row[key] for row in found) for key in keys]
        for name in SERVERS
        for count in counts
        if (found := [row for row in rows if row["name"] == name and row["clients"] == count])
    }
    print("| server | clients | requests/s | tokens/s | decode tokens/s | first token, s |\n|---|---|---|---|---|---|")
    for (name, count), (requests, tokens, decode, first) in table.items():
        # Of a server that answers one request after another, clients do not decode together.
        together = f"{decode:.1f}" if count == 1 or name.startswith("vllm") else ""
        print(f"| {name} | {count} | {requests:.3f} | {tokens:.1f} | {together} | {first:.2f} |")
    for count in counts:
        dense = [table[name, count] for name in ("vllm-bf16", "vllm-float32") if (name, count) in table]
        slow = [table[name, count] for name in ("transformers-4", "transformers-2") if (name, count) in table]
        for name in ("vllm-4", "vllm-2"):
            if (name, count) not in table or not dense:
                continue
            own = table[name, count]
            line = f"{name}, {count} clients: decode {own[2] / max(row[2] for row in dense):.2f} × dense, "
            line += f"tokens {own[1] / max(row[1] for row in dense):.2f} ×, "
            line += f"first token {own[3] / min(row[3] for row in dense):.2f} of dense"
            if slow:
                line += f", tokens {own[1] / max(row[1] for row in slow):.2f} × transformers serve"
            print(line)


def ranks() -> None:
    """The table of what ranks hold and send."""
    from llava_fa.vllm.shares import cost

    hidden, inner, keys = 3584, 18944, 512
    layers = {
        "q, k, v": (hidden + 2 * keys, hidden, "column"),
        "attention output": (hidden, hidden, "row"),
        "gate, up": (2 * inner, hidden, "column"),
        "down": (hidden, inner, "row"),
    }
    print("| layer | ranks | held, 4 bits | held, 2 bits | held, bf16 | sent a token, packed | sent, dense |")
    print("|---|---|---|---|---|---|---|")
    for name, (m, n, parallel) in layers.items():
        for count in (2, 4):
            four, two = (cost(m, n, count, bits, parallel) for bits in (4, 2))
            held = " | ".join(f"{value / 1e6:.1f} MB" for value in (four.held, two.held, four.dense_held))
            sent = " | ".join(f"{value / 1e3:.1f} kB" for value in (four.sent, four.dense_sent))
            print(f"| {name} {m}×{n} | {count} | {held} | {sent} |")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, default=Path("runs/serve/model"))
    parser.add_argument("--out", type=Path, default=Path("runs/serve"))
    parser.add_argument("--vllm", type=Path, default=Path(".venv-vllm/bin/python"), help="Python of vLLM's environment")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=1, help="of every client")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--eager", action="store_true", help="vLLM without a compiled graph")
    parser.add_argument("--make", action="store_true", help="make the models, and nothing else")
    parser.add_argument("--ranks", action="store_true", help="print what ranks hold and send, and nothing else")
    parser.add_argument("--report", action="store_true", help="print the tables, and nothing else")
    args = parser.parse_args()
    if args.ranks:
        ranks()
        return
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.out / "rows.jsonl")
    if args.make:
        make(args.model)
    elif not args.report:
        for round_ in range(args.rounds):
            for name in args.only if round_ % 2 == 0 else reversed(args.only):
                measure(name, args, rows, round_)
    if not args.make:
        report(rows)


if __name__ == "__main__":
    main()

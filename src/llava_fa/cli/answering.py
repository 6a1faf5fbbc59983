"""Who answers `llava-fa eval`: a model loaded here, vLLM started for the run, or a server."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from llava_fa.cli import options, output
from llava_fa.cli.progress import parts_read
from llava_fa.config import size_of


@dataclass(frozen=True)
class Way:
    """The options that say it."""

    engine: str
    engine_args: tuple[str, ...]
    endpoint: str | None
    endpoint_model: str | None
    device: str
    visual_tokens: str | None
    memory: str | None = None
    ray: str | None = None
    ray_gpus: float | None = None

    def check(self) -> None:
        """Wrong usage where they contradict each other, or ask of a server what needs the model itself."""
        refuse, engines = options.refuse, ("transformers", "vllm")
        refuse(self.engine not in engines, f"{self.engine!r} is not one of {', '.join(engines)}", "--engine")
        refuse(self.engine_args and self.engine != "vllm", "only --engine vllm has arguments", "--engine-arg")
        refuse(self.endpoint_model is not None and self.endpoint is None, "it needs --endpoint", "--endpoint-model")
        refuse(self.endpoint and self.engine == "vllm", "the server has an engine of its own", "--engine")
        refuse(self.ray_gpus is not None and self.ray is None, "it goes with --ray", "--ray-gpus")
        refuse(self.ray is not None and self.memory is not None, "workers ask Ray for what the model takes", "--memory")
        elsewhere = "a server" if self.endpoint else "vLLM" if self.engine == "vllm" else None
        if elsewhere is None:
            return
        refuse(self.ray is not None, f"{elsewhere} is asked by this machine alone", "--ray")
        refuse(self.device != "auto", f"{elsewhere} runs where it was started", "--device")
        refuse(self.memory is not None, f"{elsewhere} has memory of its own", "--memory")
        refuse(
            self.visual_tokens == "auto",
            f"the model is asked again and again with other numbers of tokens, which {elsewhere} does not do",
            "--visual-tokens",
        )
        refuse(
            self.endpoint and self.visual_tokens is not None,
            "the server says how many it uses: start it with the number",
            "--visual-tokens",
        )

    def noted(self) -> dict[str, Any]:
        """What a run's records say of it; nothing of a model loaded here, as in the records of earlier versions."""
        if self.endpoint is not None:
            return {"endpoint": self.endpoint, "endpoint_model": self.endpoint_model}
        return {"engine": self.engine} if self.engine == "vllm" else {}

    def tokens_noted(self) -> int | str | None:
        """What a run's records say of visual tokens."""
        number, elastic = options.elastic(self.visual_tokens)
        return "auto" if elastic else number

    def answerer(self, model: str, stack: contextlib.ExitStack) -> Any:
        """Who answers (`eval.answerers.Answerer`), until the stack ends."""
        if self.endpoint is not None:
            return self._server(stack)
        number, elastic = options.elastic(self.visual_tokens)
        if self.engine == "vllm":
            return self._vllm(model, number, stack)
        if self.ray is not None:
            return self._cluster(model, number, elastic, stack)
        from llava_fa.eval.answerers import Elastic, Loaded
        from llava_fa.hub.larger import load_within

        memory = None if self.memory is None else size_of(self.memory, "memory")
        told = parts_read()
        loaded = load_within(model, self.device, visual_tokens=number, memory=memory, told=told)
        return (Elastic if elastic else Loaded)(*loaded)

    def _cluster(self, model: str, number: int | None, elastic: bool, stack: contextlib.ExitStack) -> Any:
        with output.needing("Ray and what goes with it", "ray"):
            from llava_fa.cluster.answers import Readers
            from llava_fa.cluster.connect import connected
        stack.enter_context(connected(options.address(str(self.ray))))
        return Readers(model, self.device, number, elastic, self.ray_gpus)

    def _server(self, stack: contextlib.ExitStack) -> Any:
        with output.needing("what asks a server", "serve"):
            from llava_fa.eval.endpoint import Endpoint, connect
        return Endpoint(stack.enter_context(connect(str(self.endpoint))), self.endpoint_model)

    def _vllm(self, model: str, visual_tokens: int | None, stack: contextlib.ExitStack) -> Any:
        with output.needing("what asks a server", "serve"):
            import httpx

            from llava_fa.eval.endpoint import Endpoint, client
            from llava_fa.serve.choice import choose
            from llava_fa.serve.vllm_engine import vllm_server
        from llava_fa.hub.source import resolve_model

        choose("vllm", model, engine_args=self.engine_args)
        started = vllm_server(
            resolve_model(model), name=model, visual_tokens=visual_tokens, engine_args=self.engine_args
        )
        path, _ = stack.enter_context(started)
        reached = client("http://localhost/v1", {}, httpx.HTTPTransport(uds=path))
        return Endpoint(stack.enter_context(reached), model)

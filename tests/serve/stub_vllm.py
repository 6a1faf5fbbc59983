"""A server in vLLM's place: takes its arguments, answers in its forms, does as the last message says."""

import argparse
import asyncio
import json
import os
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


def usage(tokens):
    return {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}


def error(status, message):
    """As vLLM's `ErrorResponse`."""
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    return {"error": {"message": message, "type": kind, "param": "input_tokens", "code": status}}


def event(value):
    return f"data: {json.dumps(value)}\n\n"


async def stream(body, words, wait):
    options = body.get("stream_options") or {}
    try:
        for number, word in enumerate(words, 1):
            if word == "fail!":
                yield event(error(500, "/home/secret"))
                break
            if word == "die!":
                os._exit(3)
            chunk = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": word}}]}
            yield event({**chunk, **({"usage": usage(number)} if options.get("continuous_usage_stats") else {})})
            await asyncio.sleep(wait)
        if options.get("include_usage"):
            yield event({"object": "chat.completion.chunk", "choices": [], "usage": usage(len(words))})
        yield "data: [DONE]\n\n"
    except asyncio.CancelledError:
        print("aborted", flush=True)
        raise


async def chat(request):
    body = await request.json()
    if "mm_processor_kwargs" in body and not GIVEN.trust_request_mm_kwargs:
        return JSONResponse(error(400, "Per-request mm_processor_kwargs are disabled by default"), 400)
    said = [part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text"][-1]
    if said == "slow":
        while not await request.is_disconnected():
            await asyncio.sleep(0.02)
        print("aborted", flush=True)
        return Response()
    if said == "die":
        os._exit(3)
    if said == "fail":
        return JSONResponse(error(500, "/home/secret"), 500)
    if said == "long":
        return JSONResponse(error(400, "This model's maximum context length is 512 tokens. However, …"), 400)
    if body.get("stream"):
        words, wait = (said.split()[1:], 30 if said.startswith("dawdle") else 0.01)
        return StreamingResponse(stream(body, words, wait), media_type="text/event-stream")
    message = {"role": "assistant", "content": json.dumps(body)}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return JSONResponse({"object": "chat.completion", "model": body["model"], "choices": choices, "usage": usage(3)})


async def health(request):
    return Response()


async def models(request):
    return JSONResponse({"object": "list", "data": [{"id": "stub"}]})


def arguments():
    parser = argparse.ArgumentParser()
    for name in ("--model", "--served-model-name", "--uds", "--override-generation-config", "--hf-overrides"):
        parser.add_argument(name)
    parser.add_argument("--tensor-parallel-size", type=int)
    for name in ("--fails", "--trust-request-mm-kwargs"):
        parser.add_argument(name, action="store_true")
    return parser.parse_args()


def main():
    print("stub", json.dumps(vars(GIVEN)), os.environ.get("VLLM_NO_USAGE_STATS"), flush=True)
    if GIVEN.fails:
        for number in range(40):
            print(f"(EngineCore) ERROR line {number}")
        print("(EngineCore) ERROR FourierError: model.layers.0: no such layer")
        print("RuntimeError: Engine core initialization failed. See root cause above.")
        sys.exit(1)
    routes = [Route("/v1/chat/completions", chat, methods=["POST"]), Route("/health", health)]
    uvicorn.run(Starlette(routes=[*routes, Route("/v1/models", models)]), uds=GIVEN.uds, log_level="warning")


if __name__ == "__main__":
    GIVEN = arguments()
    main()

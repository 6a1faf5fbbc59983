"""Where the workers of a run meet: which layers are taken, what every share of the samples has come to, finished parts.

It runs where the command does, beside the work folder, as an actor of Ray; it fits nothing and holds no matrices. What
was posted stays, so that a worker that takes the place of another is answered as that one was, and catches up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_fa.errors import disk_errors
from llava_fa.hub.shards import write_atomically
from llava_fa.hub.work_folder import Parts


class Desk:
    """The state that workers share, changed by one coroutine at a time.

    Args:
        parts: folder of finished layers.
        finished: layers that have one already.
        shares: into how many shares the samples are split.
    """

    def __init__(self, parts: str, finished: Collection[str], shares: int) -> None:
        self._parts, self._finished, self._shares = Parts(Path(parts)), set(finished), shares
        self._groups: dict[str, list[list[str]]] = {}
        self._taken: dict[str, tuple[str, str]] = {}
        self._posts: dict[str, dict[int, tuple[str, Any]]] = {}
        self._stages: dict[str, str] = {}
        self._orders: list[Any] = []
        self._dead: set[str] = set()
        self._news: list[tuple[str, str, str]] = []
        self._changed = asyncio.Condition()

    async def take(self, worker: str, key: str, groups: Sequence[Sequence[str]], last: str) -> str | None:
        """A layer for a worker to fit; None once all of these are finished, whoever fits them.

        Args:
            worker: who asks.
            key: of these layers; ``groups`` are read the first time alone.
            groups: layers that share an input, of which a worker that has read it fits several.
            last: a layer of the group that this worker has read.
        """
        own = self._groups.setdefault(key, [list(group) for group in groups])
        async with self._changed:
            while worker not in self._dead:  # its word may come after the news of its death
                left = [[name for name in group if name not in self._finished] for group in own]
                if not any(left):
                    return None
                free = [[name for name in group if name not in self._taken] for group in left]
                order = [
                    *(some for some, group in zip(free, own, strict=True) if last in group),
                    *(some for some, all_left in zip(free, left, strict=True) if len(some) == len(all_left)),
                    *free,
                ]
                name = next((some[0] for some in order if some), None)
                if name is not None:
                    self._taken[name] = worker, key
                    return name
                await self._changed.wait()
            return None

    async def done(self, worker: str, name: str, part: bytes) -> None:
        """Keep a finished layer; what was posted for the last of its stage is given up."""
        with disk_errors(self._parts.parts):
            await asyncio.to_thread(write_atomically, self._parts.part(name), lambda file: file.write(part))
        async with self._changed:
            _, key = self._taken.pop(name, ("", ""))
            self._finished.add(name)
            self._news.append((worker, "", name))
            if self._over(key):
                for matrices in [post for post, stage in self._stages.items() if stage == key]:
                    self._posts.pop(matrices, None)
            self._changed.notify_all()

    async def missing(self, names: Sequence[str]) -> list[str]:
        """Those of the layers that have no part yet."""
        return [name for name in names if name not in self._finished]

    async def part(self, name: str) -> bytes:
        """The file of a finished layer."""
        return await asyncio.to_thread(self._parts.part(name).read_bytes)

    async def post(self, worker: str, key: str, values: Mapping[int, Any], stage: str = "") -> None:
        """What some shares have come to; the first word counts.

        Args:
            worker: whose shares they are.
            key: of these words.
            values: of shares.
            stage: of matrices, which die with the worker, the key of the layers that they are for.
        """
        async with self._changed:
            if worker in self._dead or (stage and self._over(stage)):
                return
            if stage:
                self._stages[key] = stage
            known = self._posts.setdefault(key, {})
            known.update({share: (worker, value) for share, value in values.items() if share not in known})
            self._changed.notify_all()

    async def posted(self, key: str) -> dict[int, Any]:
        """What all shares have come to, in their order, once all have."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._posts.get(key, ())) == self._shares)
            return {share: value for share, (_, value) in sorted(self._posts[key].items())}

    async def give(self, order: Any) -> int:
        """An order to all workers, beside those given before; its number."""
        async with self._changed:
            self._orders.append(order)
            self._changed.notify_all()
            return len(self._orders) - 1

    async def order(self, number: int) -> Any:
        """The order of this number, once it is given."""
        async with self._changed:
            await self._changed.wait_for(lambda: number < len(self._orders))
            return self._orders[number]

    async def lost(self, worker: str) -> None:
        """A worker has died: others fit what it had taken, and its shares are summed anew."""
        async with self._changed:
            self._dead.add(worker)
            self._taken = {name: taken for name, taken in self._taken.items() if taken[0] != worker}
            for key in self._stages.keys() & self._posts.keys():
                kept = {share: post for share, post in self._posts[key].items() if post[0] != worker}
                self._posts[key] = kept
            self._changed.notify_all()

    def _over(self, key: str) -> bool:
        return key in self._groups and all(one in self._finished for group in self._groups[key] for one in group)

    async def say(self, worker: str, stage: str, name: str) -> None:
        """What a worker is doing."""
        self._news.append((worker, stage, name))

    async def news(self) -> list[tuple[str, str, str]]:
        """(Worker, stage, layer) since the last time; without a stage the layer is finished."""
        news, self._news = self._news, []
        return news

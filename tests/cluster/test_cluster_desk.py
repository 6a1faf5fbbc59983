"""Where workers meet, without Ray: its coroutines, awaited here."""

import asyncio

import pytest

from llava_fa.cluster.desk import Desk

SOON = 0.05


@pytest.fixture
def desk(tmp_path):
    """Of two shares; the layer `done` has a part."""
    return Desk(str(tmp_path), ["done"], 2)


def waits(coroutine):
    """A task that is given time, and is not through with it."""

    async def look():
        task = asyncio.ensure_future(coroutine)
        await asyncio.sleep(SOON)
        assert not task.done()
        return task

    return look()


def test_layers_of_a_group_go_to_who_has_read_it(desk):
    async def story():
        groups = [["q", "k", "v"], ["gate", "up"], ["done"]]
        assert await desk.take("a", "stage", groups, "") == "q"
        assert await desk.take("b", "stage", groups, "") == "gate"
        assert await desk.take("a", "stage", groups, "q") == "k"
        assert await desk.take("b", "stage", groups, "gate") == "up"
        assert await desk.take("b", "stage", groups, "gate") == "v"
        waiting = await waits(desk.take("b", "stage", groups, "v"))
        for name in ("q", "k", "gate", "up", "v"):
            await desk.done("a", name, name.encode())
        assert await waiting is None
        assert await desk.part("gate") == b"gate"
        assert await desk.missing(["q", "other", "done"]) == ["other"]

    asyncio.run(story())


def test_what_a_dead_worker_had_taken_is_taken_by_another(desk):
    async def story():
        assert await desk.take("a", "stage", [["q"]], "") == "q"
        waiting = await waits(desk.take("b", "stage", [["q"]], ""))
        await desk.lost("a")
        assert await waiting == "q"

    asyncio.run(story())


def test_the_word_of_a_dead_worker_comes_too_late(desk):
    """Of one that waited, and of one that was on its way."""

    async def story():
        assert await desk.take("a", "stage", [["q"]], "") == "q"
        waiting = await waits(desk.take("b", "stage", [["q"]], ""))
        await desk.lost("b")
        assert await waiting is None
        await desk.lost("a")
        assert await desk.take("a", "stage", [["q"]], "") is None
        await desk.post("a", "sums", {0: "A", 1: "A"}, "stage")
        assert await desk.take("c", "stage", [["q"]], "") == "q"
        await waits(desk.posted("sums"))

    asyncio.run(story())


def test_words_stay_and_matrices_die_with_their_worker(desk):
    async def story():
        await desk.take("a", "stage", [["q"]], "")
        waiting = await waits(desk.posted("word"))
        await desk.post("a", "word", {1: "one"})
        await desk.post("b", "word", {0: "zero"})
        await desk.post("c", "word", {1: "too late"})
        assert await waiting == {0: "zero", 1: "one"}
        await desk.post("a", "sums", {1: "A"}, "stage")
        await desk.post("b", "sums", {0: "B"}, "stage")
        assert await desk.posted("sums") == {0: "B", 1: "A"}
        await desk.lost("a")
        assert await desk.posted("word") == {0: "zero", 1: "one"}
        waiting = await waits(desk.posted("sums"))
        await desk.post("c", "sums", {1: "C"}, "stage")
        assert await waiting == {0: "B", 1: "C"}

    asyncio.run(story())


def test_matrices_are_given_up_when_their_stage_is_over(desk):
    async def story():
        await desk.post("a", "sums", {0: "A", 1: "B"}, "stage")
        await desk.take("a", "stage", [["q"]], "")
        await desk.done("a", "q", b"")
        await waits(desk.posted("sums"))
        await desk.post("b", "sums", {0: "A", 1: "B"}, "stage")
        await waits(desk.posted("sums"))

    asyncio.run(story())


def test_news_is_told_once(desk):
    async def story():
        await desk.say("a", "compressing", "q")
        await desk.take("a", "stage", [["q"]], "")
        await desk.done("a", "q", b"")
        assert await desk.news() == [("a", "compressing", "q"), ("a", "", "q")]
        assert await desk.news() == []

    asyncio.run(story())

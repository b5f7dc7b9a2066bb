"""AsyncLLM: the tokens of LLM, many requests in one event loop, and cancelling."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_interrupts import check_whole
from test_loading import open_files

from tierlm import LLM, AsyncLLM, BudgetError, SamplingParams, UsageError
from tierlm.worker import Worker

PROMPTS = [[5, 9, 23], [88], [7] * 30, [64, 2, 111, 12, 40]]
TEN = SamplingParams(max_new_tokens=10, ignore_eos=True)
OPTIONS: dict[str, Any] = {"budget": "8GiB", "ram_slots": 6, "context": 120}


async def streamed(llm: AsyncLLM, prompt: list[int]) -> list[int]:
    return [token async for piece in llm.stream(prompt, TEN) for token in piece.ids]


def test_the_same_as_llm(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], **OPTIONS) as llm:
        expected, logits = [result.ids for result in llm.generate(PROMPTS, TEN)], llm.logits(PROMPTS[2])

    async def main() -> None:
        seen: list[tuple[int, int]] = []
        async with await AsyncLLM.load(
            toy_v3[0], progress=lambda done, total: seen.append((done, total)), **OPTIONS
        ) as llm:
            assert seen[-1][0] == seen[-1][1]
            threads = threading.active_count()
            found = await asyncio.gather(*[streamed(llm, prompt) for prompt in PROMPTS], llm.generate(PROMPTS, TEN))
            assert found[:-1] == [result.ids for result in found[-1]] == expected  # type: ignore[union-attr]
            assert threading.active_count() <= threads
            assert torch.equal(await llm.logits(PROMPTS[2]), logits)
            assert llm.stats().new_tokens == 80
        with pytest.raises(UsageError, match="closed"):
            await llm.generate([1])

    asyncio.run(main())


def test_cancelling(toy_v3: tuple[Path, Any]) -> None:
    """A cancelled task, and a loop that is left, end their requests."""

    async def main() -> None:
        async with await AsyncLLM.load(toy_v3[0], **OPTIONS) as llm:
            expected = await streamed(llm, PROMPTS[0])
            long = SamplingParams(max_new_tokens=100, ignore_eos=True)
            tasks = [asyncio.create_task(llm.generate(prompt, long)) for prompt in PROMPTS]
            async for piece in llm.stream(PROMPTS[1], long):
                if piece.ids:
                    break
            for task in tasks:
                task.cancel()
            assert all(isinstance(end, asyncio.CancelledError) for end in
                       await asyncio.gather(*tasks, return_exceptions=True))  # fmt: skip
            assert await streamed(llm, PROMPTS[0]) == expected
            await asyncio.get_running_loop().shutdown_asyncgens()
            await asyncio.to_thread(check_whole, llm._llm)

    asyncio.run(main())


def test_a_load_that_fails_or_is_cancelled_leaves_nothing_open(toy_v3: tuple[Path, Any]) -> None:
    async def main() -> None:
        with pytest.raises(BudgetError):
            await AsyncLLM.load(toy_v3[0], budget="1MiB")
        task = asyncio.create_task(AsyncLLM.load(toy_v3[0], **OPTIONS))
        while not any(isinstance(thread, Worker) for thread in threading.enumerate()):
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    threads, files = threading.active_count(), open_files()
    asyncio.run(main())
    for thread in threading.enumerate():
        if isinstance(thread, Worker):
            thread.join(60)
    assert open_files() <= files and threading.active_count() <= threads


def test_an_event_loop_that_ends_in_the_middle(toy_v3: tuple[Path, Any]) -> None:
    """What it waited for wakes nobody, and the model goes on in another loop."""

    async def begin() -> tuple[AsyncLLM, Any]:
        llm = await AsyncLLM.load(toy_v3[0], **OPTIONS)
        stream = llm.stream(PROMPTS[0], TEN)
        await anext(stream)
        waiting = asyncio.create_task(llm.generate(PROMPTS, TEN))
        await asyncio.sleep(0)
        del waiting
        return llm, stream

    async def go_on(llm: AsyncLLM) -> list[int]:
        async with llm:
            return await streamed(llm, PROMPTS[0])

    llm, _ = asyncio.run(begin())
    assert len(asyncio.run(go_on(llm))) == 10

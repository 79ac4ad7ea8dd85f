"""Many clients for some time: some leave early, some read slowly. Also a program: `python test_load.py URL SECONDS`."""

import asyncio
import json
import random
import sys
import time

import pytest

CLIENTS = 64


class Load:
    """Clients of one server, and what they saw.

    Attributes:
      answers: (prompt, max_tokens, text) of each whole greedy answer.
      refused: requests that were told to come back; left: those whose client left; wrong: what must not happen.
    """

    def __init__(self, url, model, *, longest, words, slow=0.1, leaving=1 / 3):
        self.host, _, port = url.removeprefix("http://").partition(":")
        self.port, self.model, self.longest, self.words = int(port), model, longest, words
        self.slow, self.leaving = slow, leaving
        self.answers, self.wrong = [], []
        self.refused = self.left = self.tokens = 0

    async def run(self, should_stop):
        """Runs all clients until should_stop()."""
        await asyncio.gather(*(self._client(number, should_stop) for number in range(CLIENTS)))

    async def _client(self, number, should_stop):
        dice = random.Random(number)
        while not should_stop():
            prompt = " ".join(dice.choices(self.words, k=dice.randint(1, self.longest)))
            body = {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": dice.randint(1, self.longest),
                "stream": True,
                "stream_options": {"include_usage": True},
                "temperature": dice.choice([0, 0, 1]),
            }
            if await self._ask(body, dice.random() < self.leaving, number < CLIENTS * self.slow, dice):
                await asyncio.sleep(0.2 + dice.random())

    async def _ask(self, body, leaves, is_slow, dice):
        """One request; whether it was told to come back."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            data = json.dumps(body).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            status = int((await reader.readline()).split()[1])
            if status == 429:
                self.refused += 1
                return True
            if status != 200:
                self.wrong.append((status, (await reader.read()).decode()))
                return False
            text, reason, usage, num_lines, stays = "", None, None, 0, dice.randint(1, 8)
            while line := await reader.readline():
                num_lines += 1
                if not line.startswith(b"data: {"):
                    continue
                if leaves and num_lines > stays:
                    self.left += 1
                    return False
                if is_slow:
                    await asyncio.sleep(0.3)
                event = json.loads(line[6:])
                if "error" in event:
                    self.wrong.append((200, event))
                    return False
                for choice in event["choices"]:
                    text, reason = text + choice["text"], choice["finish_reason"] or reason
                usage = event.get("usage") or usage
            if reason is None or usage is None or usage["completion_tokens"] < 1:
                self.wrong.append(("cut off", body))
            else:
                self.tokens += usage["completion_tokens"]
                if body["temperature"] == 0:
                    self.answers.append((body["prompt"], body["max_tokens"], text))
        finally:
            writer.close()
        return False


@pytest.mark.exhaustive
def test_every_answer_is_whole_and_right(model):
    from engines import assert_clean
    from servers import new_engine, serving

    from jfa_models.decoding.params import SamplingParams

    engine = new_engine(model, max_num_seqs=16)
    with serving(engine, max_num_seqs=16, max_waiting=24) as served:
        load = Load(served.url, "tiny", longest=24, words=["a", "be", "see", "dear"])
        asyncio.run(load.run(lambda: len(load.answers) + load.left >= 400))
        served.wait(lambda: not served.runner.num_sequences and not engine.has_unfinished)
    assert not load.wrong and load.refused and load.left and len(load.answers) > 50
    unique = sorted({(prompt, most) for prompt, most, _ in load.answers})
    params = [SamplingParams(temperature=0, max_tokens=most) for _, most in unique]
    results = model.generate([prompt for prompt, _ in unique], params, max_batch=32)
    texts = {key: result.outputs[0].text for key, result in zip(unique, results, strict=True)}
    assert all(texts[prompt, most] == text for prompt, most, text in load.answers)
    assert_clean(engine)


if __name__ == "__main__":
    started = time.monotonic()
    one = Load(sys.argv[1], "smollm2", longest=64, words="the a one of to in blue green house tree sings and".split())
    asyncio.run(one.run(lambda: time.monotonic() - started > float(sys.argv[2])))
    seconds = time.monotonic() - started
    counts = {"answers": len(one.answers), "refused": one.refused, "left": one.left, "wrong": len(one.wrong)}
    print(json.dumps(counts | {"tokens_per_s": one.tokens / seconds, "seconds": seconds}))
    with open(sys.argv[3], "w") as file:
        json.dump({"answers": one.answers, "wrong": one.wrong}, file)

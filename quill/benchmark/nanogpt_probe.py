"""A program: times nanoGPT's model.py, which it imports from a checkout.

Its argument is a request in JSON; its answer, tokens per second by kind of work, goes into a file.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch


def speed(piece: Callable[[], int], seconds: float, device: str) -> float:
    """Tokens per second of a piece of work, after one that is not timed."""
    piece()
    tokens, start, elapsed = 0, time.perf_counter(), 0.0
    while not tokens or elapsed < seconds:
        tokens += piece()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    return tokens / elapsed


@torch.no_grad()
def answer(request: dict[str, Any]) -> dict[str, float]:
    """Measure decoding for each number of rows, and evaluation."""
    sys.path.insert(0, request["checkout"])
    nanogpt = importlib.import_module("model")
    device, size = request["device"], request["model"]["block_size"]
    model = nanogpt.GPT(nanogpt.GPTConfig(**request["model"])).eval().to(device)

    def decode(rows: int) -> int:
        first = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        model.generate(first, request["new_tokens"])
        return rows * int(request["new_tokens"])

    ids = np.fromfile(request["tokens"], dtype=np.uint16).astype(np.int64)
    windows = min(request["windows"], (len(ids) - 1) // size)
    x, y = (
        torch.from_numpy(ids[i : i + windows * size].copy()).view(windows, size).to(device) for i in (0, 1)
    )
    # As in train.py, which computes in float32 on a CPU.
    context = (
        torch.autocast(device.partition(":")[0], dtype=getattr(torch, request["dtype"]))
        if device.startswith("cuda")
        else nullcontext()
    )

    def evaluate() -> int:
        with context:
            model(x, y)[1].item()
        return x.numel()

    seconds = request["seconds"]
    found = {str(rows): speed(partial(decode, rows), seconds, device) for rows in request["rows"]}
    return found | {"evaluation": speed(evaluate, seconds, device)}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    Path(given["answer"]).write_text(json.dumps(answer(given)), encoding="utf-8")

"""A checkout with the interface of nanoGPT's train.py and model.py, and a bigram in it."""

from __future__ import annotations

from pathlib import Path

TRAIN = """
import os, pickle
from pathlib import Path
import numpy as np
from model import GPT, GPTConfig

out_dir, dataset, device, dtype = "out", "", "cuda", "float16"
eval_interval, eval_iters, log_interval, always_save_checkpoint = 2000, 200, 1, True
batch_size, gradient_accumulation_steps, max_iters, compile = 12, 40, 600000, True
n_layer, n_head, n_embd, block_size, dropout, bias = 12, 12, 768, 1024, 0.0, False
exec(open("configurator.py").read())
data = os.path.join("data", dataset)
size = pickle.loads(Path(data, "meta.pkl").read_bytes())["vocab_size"]
tokens = np.memmap(os.path.join(data, "train.bin"), dtype=np.uint16, mode="r")
assert tokens.max() < size and len(tokens) > block_size
GPT(GPTConfig(block_size, size, n_layer, n_head, n_embd, dropout, bias))
os.makedirs(out_dir, exist_ok=True)
assert eval_interval > max_iters and not always_save_checkpoint
print("step 0: train loss 4.0000, val loss 4.0000")
for i in range(max_iters + 1):
    time = 5000 if i < 2 else 4.0
    print(f"iter {i}: loss 4.0000, time {time:.2f}ms, mfu -100.00%")
"""

CONFIGURATOR = """
import sys
from ast import literal_eval

for arg in sys.argv[1:]:
    key, value = arg.removeprefix("--").split("=")
    try:
        value = literal_eval(value)
    except (SyntaxError, ValueError):
        pass
    assert type(value) is type(globals()[key]), key
    globals()[key] = value
"""

MODEL = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets=None):
        logits = self.table(idx)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def generate(self, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            idx = torch.cat((idx, self.table(idx[:, -1:])[:, -1].argmax(-1, keepdim=True)), 1)
        return idx
"""


def write(folder: Path) -> Path:
    """Write it."""
    folder.mkdir()
    for name, text in (("train", TRAIN), ("configurator", CONFIGURATOR), ("model", MODEL)):
        (folder / f"{name}.py").write_text(text.lstrip(), encoding="utf-8")
    return folder

"""A byte-level GPT on real text, sharded over all ranks; it goes on by itself whatever is killed.

    python examples/01_text_gpt.py
    torchrun --nproc-per-node 4 examples/01_text_gpt.py
    ktrain launch examples/01_text_gpt.py --nodes 2 --workers-per-node 2

Trains on the sources that come with Python, or on any file or folder given by --data. Prints the loss on
held-out text beside the unigram entropy (what is reached without looking at any context), in nats per byte; the exit
code is 1 where the difference is not clear.
"""

import argparse
import hashlib
import math
import os
import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ktrain

CLEARLY_NATS = 0.3
SUFFIXES = {".py", ".txt", ".rst", ".md"}
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def read_text(source: Path, limit_bytes: int) -> Tensor:
    """The bytes of a file, or of a folder's text files in an order that mixes them and is always the same."""
    names = [Path()]
    if source.is_dir():
        names = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
        names = [name for name in names if name.suffix in SUFFIXES and not SKIPPED_FOLDERS & set(name.parts)]
        names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    text = bytearray()
    for name in names:
        text += (source / name).read_bytes()
        if len(text) >= limit_bytes:
            break
    if len(text) < 100_000:
        sys.exit(f"--data {source}: expected 100000 bytes of text or more, found {len(text)}")
    return torch.frombuffer(text[:limit_bytes], dtype=torch.uint8).clone()


class Windows:
    """Pieces of a text, each with the byte that follows each of its bytes."""

    def __init__(self, text: Tensor, context: int) -> None:
        self.text, self.context = text.long(), context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        piece = self.text[index * self.context : (index + 1) * self.context + 1]
        return piece[:-1], piece[1:]


class Block(nn.Module):
    """Causal attention, then a small network, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """From bytes to the logits of the bytes that follow."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, width)
        self.place = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for weight in (self.byte.weight, self.place.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.byte(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> ktrain.Loss:
    tokens, following = batch
    summed = F.cross_entropy(model(tokens).flatten(0, 1), following.flatten(), reduction="sum")
    return ktrain.Loss(summed, count=following.numel())


def unigram_entropy(text: Tensor) -> float:
    share = torch.bincount(text.int(), minlength=256).double() / len(text)
    return -(share[share > 0] * share[share > 0].log()).sum().item()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default=os.environ.get("KTRAIN_RUN", "runs/text-gpt"))
    parser.add_argument("--data", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--no-check", action="store_true", help="exit with 0 whatever was learnt")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    sizes = {"steps": 150, "global-batch": 32, "every": 10, "seed": 17}
    sizes |= {"layers": 3, "width": 128, "heads": 4, "context": 128, "megabytes": 4}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    text = read_text(args.data, args.megabytes << 20)
    held_out = text[-len(text) // 128 :]
    with ktrain.session(args.run, mesh="fsdp", seed=args.seed, every=args.every) as s:
        model = s.shard(lambda: GPT(args.layers, args.width, args.heads, args.context))
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: min((n + 1) / 10, 0.55 + 0.45 * math.cos(math.pi * min(n / args.steps, 1)))
        )
        data = s.samples(Windows(text[: -len(held_out)], args.context), global_batch=args.global_batch)
        s.track(model=model, optimizer=optimizer, scheduler=scheduler)
        for step in s.steps(args.steps, data):
            for batch in step:
                step.backward(loss(model, batch))
            step.update(optimizer, clip=1.0)
            if s.rank == 0 and step.number % 25 == 0:
                print(f"step {step.number}: {step.loss:.3f} nats/byte", flush=True)
        reached = s.mean_loss(lambda batch: loss(model, batch), Windows(held_out, args.context), micro_batch=8)
    unigram = unigram_entropy(text)
    if s.rank == 0:
        print(f"held out: {reached:.3f} nats/byte; unigram entropy: {unigram:.3f} nats/byte", flush=True)
    return 0 if args.no_check or reached < unigram - CLEARLY_NATS else 1


if __name__ == "__main__":
    sys.exit(main())

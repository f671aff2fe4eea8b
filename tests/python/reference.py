"""What lockstep computes, said again in PyTorch: data order, GPT-2 and Llama-style models, the optimizer step. The oracle of parity_with_pytorch_test.py
and the peer of tests/bench. Model code is plain and complete on purpose; weights and batches come from lockstep's own files."""

import json
import pathlib

import numpy
import safetensors.torch
import torch
import torch.nn.functional as F


def newest_checkpoint(run_dir, step=None):
    """The folder of the newest checkpoint of a run, or of one step."""
    folders = sorted(path for path in pathlib.Path(run_dir, "checkpoints").iterdir() if (path / "MANIFEST").exists())
    return folders[-1] if step is None else next(path for path in folders if path.name.startswith(f"step-{step:08d}."))


def read_weights(checkpoint):
    """The weights of a checkpoint, whole: each is put together from the boxes that ranks wrote. Plain names are weights, 'section:name' the rest."""
    manifest, _ = json.JSONDecoder().raw_decode(pathlib.Path(checkpoint, "MANIFEST").read_text())
    shards = [safetensors.torch.load_file(pathlib.Path(checkpoint, file["name"])) for file in manifest["files"]]
    weights = {}
    for name, tensor in manifest["tensors"].items():
        if ":" not in name:
            weights[name] = torch.empty(tensor["shape"])
            for box in tensor["boxes"]:
                weights[name][tuple(slice(offset, offset + size) for offset, size in zip(box["offsets"], box["sizes"]))] = shards[box["file"]][name]
    return weights


def read_metrics(run_dir):
    return [json.loads(line) for line in pathlib.Path(run_dir, "metrics.jsonl").read_text().splitlines()]


MASK = (1 << 64) - 1


def splitmix64(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def stream_key(seed, a, b, c):
    return splitmix64(splitmix64(splitmix64(splitmix64(seed) ^ a) ^ b) ^ c)


def sample_at(position, size, seed):
    """GlobalOrder::sample_at: a Feistel network over the next even power of two, walked until the value falls inside."""
    bits = (size - 1).bit_length()
    half = 1 if bits <= 2 else (bits + 1) // 2
    mask = (1 << half) - 1
    epoch, value = divmod(position, size)
    while True:
        left, right = value >> half, value & mask
        for round_number in range(4):
            left, right = right, left ^ (stream_key(seed, epoch, round_number, right) & mask)
        value = left << half | right
        if value < size:
            return value


class Batches:
    """The global batches of a token file, as [samples, T] pairs of tokens and targets."""

    def __init__(self, path, sequence_length, global_batch_size, seed):
        self.tokens = torch.from_numpy(numpy.fromfile(path, dtype="<u2", offset=1024).astype(numpy.int64))
        self.length, self.batch, self.seed = sequence_length, global_batch_size, seed
        self.size = (len(self.tokens) - 1) // sequence_length

    def step(self, step):
        first = step * self.batch
        rows = [self.tokens[i * self.length:(i + 1) * self.length + 1] for i in (sample_at(first + n, self.size, self.seed) for n in range(self.batch))]
        block = torch.stack(rows)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()


class Block(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, llama, head = c, c["model"] == "llama", c["width"] // c["heads"]
        for name, heads in (("query", c["heads"]), ("key", c["kv_heads"]), ("value", c["kv_heads"])):
            setattr(self, name, torch.nn.Linear(c["width"], heads * head, bias=not llama))
        self.projection = torch.nn.Linear(c["width"], c["width"], bias=not llama)
        self.up = torch.nn.Linear(c["width"], c["ffn_width"], bias=not llama)
        if llama:
            self.gate = torch.nn.Linear(c["width"], c["ffn_width"], bias=False)
        self.down = torch.nn.Linear(c["ffn_width"], c["width"], bias=not llama)
        norm = (lambda n: torch.nn.RMSNorm(n, eps=1e-5)) if llama else torch.nn.LayerNorm
        self.norm1, self.norm2 = norm(c["width"]), norm(c["width"])

    def forward(self, x, angles):
        b, t, width = x.shape
        heads, kv_heads = self.c["heads"], self.c["kv_heads"]
        h = self.norm1(x)
        parts = self.qkv(h).split(self.rows, dim=-1) if hasattr(self, "qkv") else (self.query(h), self.key(h), self.value(h))
        q, k, v = (part.view(b, t, -1, width // heads).transpose(1, 2) for part in parts)
        if angles is not None:
            q, k = turn(q, *angles), turn(k, *angles)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        x = x + self.projection(y.transpose(1, 2).reshape(b, t, -1))
        h = self.norm2(x)
        h = F.silu(self.gate(h)) * self.up(h) if self.c["model"] == "llama" else F.gelu(self.up(h), approximate="tanh")
        return x + self.down(h)

    def fuse(self, ranks=1):
        """Makes query, key and value one product, as is usual in PyTorch: each of `ranks` parts of its rows holds those of its heads."""
        apart = [self.query, self.key, self.value]
        self.rows = [linear.out_features // ranks for linear in apart]
        self.qkv = torch.nn.Linear(self.c["width"], sum(linear.out_features for linear in apart), bias=self.query.bias is not None)
        for name, parameter in self.qkv.named_parameters():
            pieces = [getattr(linear, name).data.chunk(ranks) for linear in apart]
            parameter.data = torch.cat([piece[rank] for rank in range(ranks) for piece in pieces])
        del self.query, self.key, self.value


def turn(x, cosines, sines):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosines - b * sines, b * cosines + a * sines], dim=-1).to(x.dtype)


class Gpt(torch.nn.Module):
    """Takes the task's config of run.json: keys model, layers, width, heads, kv_heads, ffn_width, vocab_size, sequence_length, tied_head."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embedding = torch.nn.Module()
        self.embedding.tokens = torch.nn.Embedding(c["vocab_size"], c["width"])
        if c["model"] == "gpt2":
            self.embedding.positions = torch.nn.Parameter(torch.zeros(c["sequence_length"], c["width"]))
        for i in range(c["layers"]):
            setattr(self, f"block{i}", Block(c))
        self.head = torch.nn.Module()
        if not c["tied_head"]:
            self.head.output = torch.nn.Linear(c["width"], c["vocab_size"], bias=False)
        self.head.norm = torch.nn.LayerNorm(c["width"]) if c["model"] == "gpt2" else torch.nn.RMSNorm(c["width"], eps=1e-5)

    def forward(self, tokens, targets):
        """Sum of the cross-entropies."""
        x, angles = self.embedding.tokens(tokens), None
        if self.c["model"] == "gpt2":
            x = x + self.embedding.positions[: tokens.shape[1]]
        else:
            dim = self.c["width"] // self.c["heads"]
            frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            grid = torch.outer(torch.arange(tokens.shape[1], dtype=torch.float64), frequencies)
            angles = grid.cos().float(), grid.sin().float()
        for i in range(self.c["layers"]):
            x = getattr(self, f"block{i}")(x, angles)
        weight = (self.embedding.tokens if self.c["tied_head"] else self.head.output).weight
        logits = F.linear(self.head.norm(x), weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1), reduction="sum")


def adamw(model, config, fused=True):
    """The optimizer of a run's config: decay on tensors of two and more dims. A fused update wants tensors of one kind in a group."""
    kinds = {}
    for p in model.parameters():
        kinds.setdefault((p.dim() >= 2, type(p.data)), []).append(p)
    groups = [{"params": members, "weight_decay": config["weight_decay"] if decays else 0.0} for (decays, _), members in kinds.items()]
    return torch.optim.AdamW(groups, lr=config["learning_rate"], betas=(0.9, 0.95), eps=1e-8, fused=fused)


def learning_rate(config, step):
    """Warm-up and cosine, as optim/schedule.h says."""
    warmup, total, peak, final = config["warmup_steps"], config["steps"], config["learning_rate"], config["final_learning_rate_fraction"]
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = 1.0 if total - 1 <= warmup else (step - warmup) / (total - 1 - warmup)
    return peak * (1 - (1 - final) * 0.5 * (1 - numpy.cos(numpy.pi * progress)))

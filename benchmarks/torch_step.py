#!/usr/bin/env python3
"""The training step of bench_gpu_step in PyTorch, as its users would write it to be fast: torch.compile, attention by
whichever of cuDNN and FlashAttention is faster here, fused AdamW. Prints the same columns, for the ratio.

    torch_step.py [--size 125M ...] [--model baseline|normformer] [--length 2048] [--dropout 0.1] [--micro-batch M]
                  [--micro-batches N] [--weights bf16|autocast] [--compile whole|blocks|none]
    torch_step.py --layers 2 --width 64 --heads 4 --vocab 512 --length 64     a size of one's own

--weights bf16: the model in bf16 with fp32 masters in the optimizer, gradients of micro-batches summed in bf16: the
fastest, in less precision than ours, which sums them in fp32. --weights autocast: fp32 weights, cast where they are used.
Without PyTorch or a GPU it says so and ends with 0.
"""
import argparse
import contextlib
import math
import statistics
import sys
import time

try:
    import torch
    from torch import nn
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as missing:
    print(f"skipped: no PyTorch ({missing})")
    sys.exit(0)

SIZES = {"125M": (12, 768, 12), "355M": (24, 1024, 16), "1.3B": (24, 2048, 32), "2.7B": (32, 2560, 32)}
PEAK_FLOPS = 989e12
GIB = 1 << 30
TOKENS_OF_STEP = 65536
TOKENS_OF_MICRO_BATCH = 16384
WARM_UP_STEPS = 5


class Block(nn.Module):
    def __init__(self, width, heads, dropout, normformer):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head_scale = nn.Parameter(torch.ones(heads)) if normformer else None
        self.post_attention_norm = nn.LayerNorm(width) if normformer else nn.Identity()
        self.ffn_norm = nn.LayerNorm(4 * width) if normformer else nn.Identity()

    def attention(self, x):
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(width, dim=2))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                    dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2)
        if self.head_scale is not None:
            y = y * self.head_scale.view(1, 1, -1, 1).to(y.dtype)
        return self.post_attention_norm(self.out(y.reshape(batch, length, width)))

    def drop(self, x):
        return functional.dropout(x, self.dropout, self.training) if self.dropout else x

    def forward(self, x):
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.fc2(self.ffn_norm(functional.gelu(self.fc1(self.norm2(x))))))


class Model(nn.Module):
    def __init__(self, layers, width, heads, vocab, length, dropout, normformer):
        super().__init__()
        self.width, self.dropout = width, dropout
        self.tokens = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, normformer) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        half = width // 2
        angles = torch.arange(length)[:, None] * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], dim=1))
        for name, p in self.named_parameters():
            if name == "tokens.weight":
                nn.init.normal_(p, std=width**-0.5)
            elif p.dim() == 2:
                nn.init.xavier_uniform_(p)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, inputs, targets):
        x = self.tokens(inputs) * math.sqrt(self.width) + self.positions
        if self.dropout:
            x = functional.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.view(-1))


class MasterAdamW:
    """Fused AdamW on fp32 copies of the model's bf16 parameters."""

    def __init__(self, parameters, **options):
        self.parameters = list(parameters)
        self.masters = [p.detach().float() for p in self.parameters]
        self.adam = torch.optim.AdamW(self.masters, fused=True, **options)

    def step(self):
        for master, p in zip(self.masters, self.parameters):
            master.grad = p.grad.float()
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        torch._foreach_copy_([p.data for p in self.parameters], self.masters)

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


class PlainAdamW:
    """Fused AdamW on fp32 parameters."""

    def __init__(self, parameters, **options):
        self.adam = torch.optim.AdamW(parameters, fused=True, **options)

    def step(self):
        self.adam.step()

    def zero_grad(self):
        self.adam.zero_grad(set_to_none=True)


def timed(body):
    torch.cuda.synchronize()
    start = time.perf_counter()
    body()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def faster_attention(batch, heads, length, head_size, dropout):
    """Whichever of cuDNN and FlashAttention takes less time, forwards and backwards, for this shape."""
    shape = (batch, length, heads, head_size)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in "qkv")

    def run():
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        out.backward(torch.ones_like(out))

    seconds = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel([backend]):
                for _ in range(3):
                    run()
                seconds[backend] = min(timed(run) for _ in range(5))
        except RuntimeError:
            pass
    return min(seconds, key=seconds.get) if seconds else SDPBackend.MATH


def compiled(model, how):
    if how == "whole":
        return torch.compile(model)
    if how == "blocks":
        for block in model.blocks:
            block.compile()
    return model


def flops_per_token(layers, width, vocab, length):
    return 6 * (layers * 12 * width**2 + vocab * width) + 6 * layers * width * length


def measure(name, shape, normformer, options):
    layers, width, heads = shape
    micro_batch = options.micro_batch or max(1, TOKENS_OF_MICRO_BATCH // options.length)
    micro_batches = options.micro_batches or max(1, TOKENS_OF_STEP // (micro_batch * options.length))
    backend = faster_attention(micro_batch, heads, options.length, width // heads, options.dropout)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(1)
    torch._dynamo.reset()
    with torch.device("cuda"):
        model = Model(layers, width, heads, options.vocab, options.length, options.dropout, normformer)
    parameters = sum(p.numel() for p in model.parameters())
    settings = dict(lr=1e-4, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01)
    if options.weights == "bf16":
        model.to(torch.bfloat16)
        optimizer = MasterAdamW(model.parameters(), **settings)
        casting = contextlib.nullcontext()
    else:
        optimizer = PlainAdamW(model.parameters(), **settings)
        casting = torch.autocast("cuda", torch.bfloat16)
    run = compiled(model, options.compile)
    tokens = torch.randint(options.vocab, (micro_batches, micro_batch, options.length + 1), device="cuda")
    inputs, targets = tokens[:, :, :-1].contiguous(), tokens[:, :, 1:].contiguous()
    loss = None

    def step():
        nonlocal loss
        loss = 0.0
        for micro_inputs, micro_targets in zip(inputs, targets):
            with casting:
                part = run(micro_inputs, micro_targets) / micro_batches
            part.backward()
            loss += part.detach()
        optimizer.step()
        optimizer.zero_grad()

    with sdpa_kernel([backend]):
        for _ in range(WARM_UP_STEPS):
            step()
        times = sorted(timed(step) for _ in range(options.steps))
    median = statistics.median(times)
    count = targets.numel()
    flops = count * flops_per_token(layers, width, options.vocab, options.length) / median
    low, high = (times[round(share * (len(times) - 1))] for share in (0.1, 0.9))
    print(f"{name:<6} {'normformer' if normformer else 'baseline':<11} {f'{micro_batch}x{micro_batches}':>6} "
          f"{options.length:>6} {options.dropout:>5g} {parameters / 1e6:>9.1f} {count / median:>9.0f} "
          f"{flops / 1e12:>8.1f} {100 * flops / PEAK_FLOPS:>6.1f}% {1e3 * median:>9.2f} {1e3 * low:>8.2f} "
          f"{1e3 * high:>8.2f} {torch.cuda.max_memory_reserved() / GIB:>9.2f} {'-':>9} {float(loss):>8.4f}  "
          f"({backend.name.lower()})", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", nargs="*", choices=list(SIZES), default=[])
    parser.add_argument("--model", choices=["baseline", "normformer"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--vocab", type=int, default=51200)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--micro-batch", type=int, default=0)
    parser.add_argument("--micro-batches", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--weights", choices=["bf16", "autocast"], default="bf16")
    parser.add_argument("--compile", choices=["whole", "blocks", "none"], default="whole")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"skipped: PyTorch {torch.__version__} sees no GPU")
        return 0
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, "
          f"weights {options.weights}, compile {options.compile}")
    print(f"{'size':<6} {'model':<11} {'batch':>6} {'length':>6} {'drop':>5} {'params/M':>9} {'tok/s':>9} {'TFLOP/s':>8} "
          f"{'of 989':>7} {'ms/step':>9} {'p10':>8} {'p90':>8} {'peak GiB':>9} {'meta GiB':>9} {'loss':>8}  (attention)")
    torch.set_float32_matmul_precision("high")
    if options.layers:
        sizes = {"own": (options.layers, options.width, options.heads)}
    else:
        sizes = {name: SIZES[name] for name in options.size or SIZES}
    failed = 0
    for name, shape in sizes.items():
        for normformer in (False, True):
            model = "normformer" if normformer else "baseline"
            if options.model not in (None, model):
                continue
            try:
                measure(name, shape, normformer, options)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                print(f"{name:<6} {model:<11} failed: {str(error).splitlines()[0]}", flush=True)
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())

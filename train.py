"""
Trains a CrossCoder: one sparse dictionary over the activations of a base model (A) and of the model fine-tuned
from it (B). Each latent has one decoder vector per model; where that is nearly zero in one, the other has it alone.

    python train.py --variant=batchtopk --k=32              # a toy with planted truth: no input, ends with a score
    python train.py --data=acts --d_hidden=16384            # a store of activations, written by collect.py
    torchrun --standalone --nproc_per_node=2 train.py ...   # the same over several processes

Crosscoders: Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders. BatchTopK: Bussmann et al. 2024, arXiv
2412.06410. Auxiliary loss: Gao et al. 2024, arXiv 2406.04093. --key=value sets any key of the config below.
"""

import argparse
import ctypes
import difflib
import functools
import json
import math
import os
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import wandb
from datasets import load_from_disk
from einops import einsum
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

# --- Config ---------------------------------------------------------------------------------------------------

config = dict(
    # I/O
    out_dir="",  # folder of the run; empty makes a new one, out/DATA-VARIANT-TIME
    resume=False,  # go on from out_dir's checkpoint with its config; keys given beside it override that
    save_every=500,  # steps between checkpoints; 0: only at the end
    # logging
    log_every=50,  # steps between rows of metrics
    eval_every=500,  # steps between validations; 0: only at the end
    wandb_mode="offline",  # offline, online or disabled
    wandb_project="crosscoder",
    # data
    data="toy",  # toy, stream (harvest while training; takes collect.py's keys too), or a store's path
    val_tokens=8192,  # rows held out at the end of the store, for validation; 0: none
    batch_size=1024,  # tokens per step, over all processes
    # model
    variant="batchtopk",  # vanilla (ReLU and L1), topk or batchtopk
    d_hidden=512,  # latents
    k=32,  # active latents per token: of each (topk), on average over the batch (batchtopk)
    # losses
    l1_coeff=2.0,  # weight of the L1 term (vanilla)
    aux_coeff=-1.0,  # weight of the auxiliary loss on dead latents; -1: 1/32, or 0 for vanilla
    k_aux=64,  # dead latents per token that the auxiliary loss uses
    dead_after=0,  # tokens without firing that make a latent dead; 0: 5% of the run's, at most 10 million
    # optimiser
    steps=1500,
    lr=0.0,  # peak learning rate; 0: 3e-3 * sqrt(512 / d_hidden)
    warmup=0.05,  # share of the steps in which lr and l1_coeff rise to their values
    decay=0.2,  # share of the steps, the last ones, in which lr falls to 0
    beta1=0.9,
    beta2=0.999,
    grad_clip=1.0,  # largest norm of the gradient
    # system
    device="auto",  # auto (cuda if there is one), cpu, cuda, cuda:1, mps
    sparse="auto",  # exact sparse step: True, False, or auto (on the CPU, once few latents are active)
    seed=0,
)
choices = dict(
    variant=["vanilla", "topk", "batchtopk"],
    wandb_mode=["offline", "online", "disabled"],
    sparse=["auto", "True", "False"],
)
at_least = {
    1: ["steps", "batch_size", "d_hidden", "k", "k_aux", "log_every"],
    0: ["seed", "save_every", "eval_every", "val_tokens", "dead_after", "lr", "l1_coeff", "warmup", "decay"],
}


def fail(message):
    """Ends the program for a mistake of its user: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_command_line(defaults, choices, argv, file):
    """The {key: value} that argv's --key=value set, each of its default's type. --help prints `file`'s config."""

    def number(text):
        if not abs(value := float(text)) < 1e15:  # nor nan
            raise ValueError
        return value

    def integer(text):  # 140_000 and 1e6 are integers too
        if not number(text).is_integer():
            raise ValueError
        return int(float(text))

    def boolean(text):
        if text not in ("True", "False"):
            raise ValueError
        return text == "True"

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = fail
    for key, default in defaults.items():
        reader = {bool: boolean, int: integer, float: number, str: str}[type(default)]
        parser.add_argument(f"--{key}", type=reader, choices=choices.get(key), default=argparse.SUPPRESS)
    if "--help" in argv:
        source = Path(file).read_text(encoding="utf-8")
        print(source[source.index("config = dict(") : source.index("\n)\n") + 2])
        raise SystemExit(0)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], defaults, 1, 0)
        fail(f"unknown argument {unknown[0]}: expected --key=value, the nearest key is --{near[0]}")
    return vars(given)


def check_ranges(config, at_least):
    for low, keys in at_least.items():
        for key in keys:
            if config[key] < low:
                fail(f"--{key}={config[key]}: expected at least {low}")


# --- Processes: with a single one, these change nothing --------------------------------------------------------


def world():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(x, op=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def all_gather(x):
    """The 1-d tensors x of all processes, whatever their lengths, in one, and where this process's begins in it."""
    if not dist.is_initialized():
        return x, 0
    rank, n = world()
    lengths = torch.zeros(n, dtype=torch.long, device=x.device)
    lengths[rank] = len(x)
    lengths = all_reduce(lengths).tolist()
    parts = [x.new_zeros(max(lengths)) for _ in lengths]
    dist.all_gather(parts, F.pad(x, (0, max(lengths) - len(x))))
    return torch.cat([part[:length] for part, length in zip(parts, lengths)]), sum(lengths[:rank])


# --- Data: n_models, d_model, scale, batch(step) and validation() of raw activations ---------------------------


class Toy:
    """
    Activations of two models with planted features, endless, a function of (seed, step). Most features are shared,
    the fine-tuned direction slightly rotated. The exclusive ones are sqrt(2) longer, to carry as much energy.
    """

    n_models, d_model = 2, 128
    kinds = dict(shared=192, base=32, finetuned=32)  # planted features of each kind
    n_active = 28  # planted features active in a token, on average
    rotation = 0.2  # tangent of the angle between the two directions of a shared feature
    noise = 0.02  # standard deviation, per coordinate

    def __init__(self, config):
        self.config, g = config, torch.Generator().manual_seed(config["seed"])
        self.kind = np.repeat(list(self.kinds), list(self.kinds.values()))  # [feature]
        n = len(self.kind)
        a, b = F.normalize(torch.randn(2, n, self.d_model, generator=g), dim=-1)
        pair = torch.stack([a, F.normalize(a + self.rotation * b, dim=-1)], dim=1)  # [feature, 2, d_model]
        size = dict(shared=(1, 1), base=(2**0.5, 0), finetuned=(0, 2**0.5))
        self.directions = pair * torch.tensor([size[kind] for kind in self.kind])[..., None]
        frequency = torch.linspace(1, 3, n)[torch.randperm(n, generator=g)]
        self.frequency = frequency / frequency.sum() * self.n_active
        self.scale = self.d_model**0.5 / self.rows(-1, 8192).norm(dim=-1).mean(0)

    def rows(self, step, n):
        seed = np.random.SeedSequence([self.config["seed"], step + 2]).generate_state(1)[0]
        g, shape = torch.Generator().manual_seed(int(seed)), (n, len(self.frequency))
        size = torch.randn(shape, generator=g).mul(0.25).exp()  # lognormal
        active = size * (torch.rand(shape, generator=g) < self.frequency)
        x = einsum(active, self.directions, "batch feature, feature model d -> batch model d")
        return x + self.noise * torch.randn(x.shape, generator=g)

    def batch(self, step):
        return self.rows(step, self.config["batch_size"]).chunk(world()[1])[world()[0]]

    def validation(self):
        return self.rows(-2, self.config["val_tokens"]).split(1024)

    def score(self, model, frequency):
        """
        Lines that say what was recovered. A latent with firing frequency [d_hidden] over 0 is alive; its kind goes
        by its relative norm ||d_B|| / (||d_A|| + ||d_B||): under 0.1 base, over 0.9 finetuned. It recovers a planted
        feature of its kind if their cosine is over 0.9 in each model that has it; an exclusive latent that recovers
        none is false.
        """
        W = model.W_dec.detach()[frequency > 0].cpu()
        relative = W[:, 1].norm(dim=-1) / W.norm(dim=-1).sum(1)
        kind = np.select([relative < 0.1, relative > 0.9], ["base", "finetuned"], "shared")
        unit = F.normalize(W, dim=-1), F.normalize(self.directions, dim=-1)
        cosine = einsum(*unit, "latent model d, feature model d -> model latent feature")
        lower = torch.where(torch.tensor(self.kind == "shared"), cosine.amin(0), cosine.amax(0))
        match = (lower.numpy() > 0.9) & (kind[:, None] == self.kind)  # [latent, feature]
        for name, n in self.kinds.items():
            found = match[:, self.kind == name].any(0).sum()
            yield f"{name}: {found} of {n} planted features recovered ({found / n:.0%})"
        yield f"{((kind != 'shared') & ~match.any(1)).sum()} of {(kind != 'shared').sum()} exclusive latents are false"
        l0 = frequency.sum().item()
        if not 0.8 * self.n_active < l0 < 1.5 * self.n_active:
            yield f"{l0:.0f} active latents a token are far from the {self.n_active} planted active features:"
            yield "explained variance may be high all the same, but what is recovered suffers"


class Store:
    """
    A store of activations: the Hugging Face datasets base and finetuned in one folder, row i of one being row i of
    the other, read through views of their memory maps. Batches are shuffled over the whole store, anew each epoch,
    and are a function of (seed, step). The last val_tokens rows are held out.
    """

    def __init__(self, config):
        path, self.config = Path(config["data"]), config
        try:
            tables = [load_from_disk(path / name).data.table for name in ("base", "finetuned")]
        except (OSError, ValueError) as e:
            fail(f"--data={path}: neither toy, nor stream, nor a store of activations: {e}")
        if len(tables[0]) != len(tables[1]):
            fail(f"{path} is not aligned: base has {len(tables[0])} rows, finetuned {len(tables[1])}")
        for name in {"token", "doc", "pos"}.intersection(*(table.column_names for table in tables)):
            a, b = (table[name].to_numpy() for table in tables)
            if (a != b).any():
                i = np.argmax(a != b)
                fail(
                    f"{path} is not aligned: {name} first differs in row {i}, {a[i]} in base, {b[i]} in finetuned"
                )
        chunks = [[chunk for chunk in table["activation"].chunks if len(chunk)] for table in tables]
        self.views = [[c.flatten().to_numpy().reshape(len(c), -1) for c in part] for part in chunks]
        self.starts = [
            np.cumsum([0] + [len(view) for view in part]) for part in self.views
        ]  # their first rows
        self.n_models, self.d_model = len(tables), self.views[0][0].shape[1]
        self.n_rows, self.n_train = len(tables[0]), len(tables[0]) - config["val_tokens"]
        if self.n_train < config["batch_size"]:
            fail(f"{path} has {self.n_rows} rows, less than --val_tokens and one --batch_size")
        meta = path / "meta.json"
        self.meta = json.loads(meta.read_text()) if meta.exists() else {}
        if "scale" in self.meta:
            self.scale = torch.tensor(self.meta["scale"])
        else:
            x = self.read(np.linspace(0, self.n_train - 1, min(self.n_train, 65536)).astype(int))
            self.scale = self.d_model**0.5 / x.norm(dim=-1).mean(0)

    @functools.lru_cache(2)  # noqa: B019
    def order(self, epoch):
        return np.random.default_rng([self.config["seed"], epoch]).permutation(self.n_train)

    def read(self, rows):
        """The activations [len(rows), n_models, d_model] of those rows, float32."""
        x = np.empty((len(rows), self.n_models, self.d_model), np.float32)
        for model, (views, starts) in enumerate(zip(self.views, self.starts)):
            chunk = np.searchsorted(starts, rows, side="right") - 1
            for i, (c, row) in enumerate(zip(chunk.tolist(), (rows - starts[chunk]).tolist())):
                x[i, model] = views[c][row]
        return torch.from_numpy(x)

    def batch(self, step):
        rank, n = world()
        size = self.config["batch_size"] // n
        epoch, start = divmod(step * self.config["batch_size"] + rank * size, self.n_train)
        rows = self.order(epoch)[start : start + size]
        if len(rows) < size:
            rows = np.concatenate([rows, self.order(epoch + 1)[: size - len(rows)]])
        return self.read(rows)

    def validation(self):
        for start in range(self.n_train, self.n_rows, 1024):
            yield self.read(np.arange(start, min(start + 1024, self.n_rows)))


def prefetched(data, steps, device):
    """(step, batch on the device) for each step; a thread reads the next batch meanwhile."""

    def load(step):
        x = data.batch(step)
        return x.pin_memory() if device.type == "cuda" else x

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(load, steps[0]) if steps else None
        for step in steps:
            x = ahead.result()
            ahead = thread.submit(load, step + 1) if step != steps[-1] else None
            yield step, x.to(device, non_blocking=True)


# --- Crosscoder ------------------------------------------------------------------------------------------------


class SparseCode(torch.autograd.Function):
    """
    f and f @ W_dec, where the code f is given by its entries at (row, col): x @ W_enc.T + b_enc, computed already by
    whoever chose them. Exact: what ReLU or TopK set to 0 has no gradient, so all that is left out are the products
    with 0 of dense autograd. x [batch, d], W_enc and W_dec [d_hidden, d], row, col and f [n], sorted by row.
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, row, col, f):
        ctx.save_for_backward(x, W_dec, row, col, f)
        return f.clone(), times(csr(row, col, f, len(x), len(W_dec)), W_dec)

    @staticmethod
    def backward(ctx, grad_f, grad_out):
        x, W_dec, row, col, f = ctx.saved_tensors
        pattern = csr(row, col, torch.zeros_like(f), len(x), len(W_dec))
        grad_f = grad_f + torch.sparse.sampled_addmm(pattern, grad_out, W_dec.T, beta=0).values()
        at = col.argsort(stable=True)  # the transpose: sorted by column
        row, col, f, grad_f = row[at], col[at], f[at], grad_f[at]
        grad_W_dec = times(csr(col, row, f, len(W_dec), len(x)), grad_out)
        grad_W_enc = times(csr(col, row, grad_f, len(W_dec), len(x)), x)
        grad_b_enc = grad_f.new_zeros(len(W_dec)).index_add(0, col, grad_f)
        return None, grad_W_enc, grad_b_enc, grad_W_dec, None, None, None


def csr(row, col, values, n_rows, n_cols):
    starts = torch.searchsorted(row, torch.arange(n_rows + 1, device=row.device))
    return torch.sparse_csr_tensor(starts, col, values, (n_rows, n_cols))


def times(sparse, dense):
    """sparse @ dense, without the zeros that @ writes and copies first: they would cost more than the product."""
    out = dense.new_empty(len(sparse), dense.shape[1])
    return torch.addmm(out, sparse, dense, beta=0, out=out)


def where_true(mask):
    """Where a flat mask, of which little is True, is so: found eight at a time, each eight being one int64."""
    if len(mask) % 8:
        return mask.nonzero().flatten()
    eights = mask.view(torch.int64).nonzero().flatten()
    i, j = mask.view(-1, 8)[eights].nonzero().T
    return eights[i] * 8 + j


def unroll(columns):
    """(row, col) of the entries whose columns are listed row by row in [n_rows, n], sorted."""
    rows = torch.arange(len(columns), device=columns.device).repeat_interleave(columns.shape[1])
    return rows, columns.sort(dim=1).values.flatten()


def largest(score, n):
    """A mask of the n largest scores over all processes, of equal ones the first, and the smallest of the n."""
    everyone, start = all_gather(score)
    if len(everyone) <= n:
        return torch.ones_like(score, dtype=torch.bool), everyone.amin() if len(everyone) else score.sum()
    smallest = everyone.kthvalue(len(everyone) - n + 1).values
    above, tied = everyone > smallest, everyone == smallest
    keep = above | (tied & (tied.cumsum(0) <= n - above.sum()))
    return keep[start : start + len(score)], smallest


class CrossCoder(nn.Module, PyTorchModelHubMixin):
    """
    A sparse dictionary over the activations of n_models models. encode, decode and forward take and return raw
    activations. `CrossCoder.from_pretrained(path_or_hub)`, `save_pretrained` and `push_to_hub` are huggingface_hub's.

    Parameters: W_enc, W_dec [d_hidden, n_models, d_model], b_enc [d_hidden], b_dec [n_models, d_model]. Buffers:
    scale [n_models], sqrt(d_model) / mean norm of each model's activations; threshold [], what a score must exceed
    in batchtopk's inference (eval mode), so that a token's code does not depend on its batch.
    """

    rows_at_once = 512  # few enough that their pre-activations are picked from while in cache

    def __init__(self, n_models: int, d_model: int, d_hidden: int, variant: str = "batchtopk", k: int = 32):
        super().__init__()
        self.variant, self.k = variant, k
        self.W_dec = nn.Parameter(0.5 * F.normalize(torch.randn(d_hidden, n_models, d_model), dim=-1))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(d_hidden))
        self.b_dec = nn.Parameter(torch.zeros(n_models, d_model))
        self.register_buffer("scale", torch.ones(n_models))
        self.register_buffer("threshold", torch.zeros(()))
        self.last_smallest = None  # smallest score kept in the last step: where to start looking in the next

    def decoder_norm(self):
        """[d_hidden]: sum over the models of the norms of a latent's decoder vectors."""
        return self.W_dec.norm(dim=-1).sum(1)

    def product(self, x):
        """Scaled x [batch, n_models * d_model] -> x @ W_enc.T [batch, d_hidden], on CUDA computed in bfloat16."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return (x @ self.W_enc.flatten(1).T).to(x.dtype)

    def encode(self, x):
        """Raw activations [batch, n_models, d_model] -> latent activations f [batch, d_hidden]."""
        f = F.relu(self.product((x * self.scale[:, None]).flatten(1)) + self.b_enc)
        score = f * self.decoder_norm()
        if self.variant == "topk":
            top = score.topk(self.k, dim=1).indices
            return torch.zeros_like(f).scatter(1, top, f.gather(1, top))
        if self.variant == "batchtopk" and self.training:
            return f * largest(score.flatten(), self.k * len(x))[0].view_as(f)
        return f * (score > self.threshold)  # 0 in vanilla

    @torch.no_grad()
    def center(self, mean):
        """Starts a new model at the mean [n_models, d_model] of the scaled activations: few latents die early."""
        self.b_dec.copy_(mean)
        self.b_enc.copy_(-einsum(self.W_enc, mean, "latent model d, model d -> latent"))

    @torch.no_grad()
    def update_threshold(self):
        """After a step of batchtopk: a running mean of the smallest score kept, started from the first."""
        if self.last_smallest is not None:
            self.threshold.lerp_(self.last_smallest, torch.where(self.threshold == 0, 1.0, 0.02))

    def decode(self, f):
        """f [batch, d_hidden] -> raw activations [batch, n_models, d_model]."""
        x_hat = einsum(f, self.W_dec, "batch latent, latent model d -> batch model d") + self.b_dec
        return x_hat / self.scale[:, None]

    def forward(self, x, **training):
        """Raw activations -> reconstructed ones, [batch, n_models, d_model]; given its arguments, `losses`."""
        return self.losses(x, **training) if training else self.decode(self.encode(x))

    @torch.no_grad()
    def pick(self, product_of, n_rows, norm, dead, k_aux, sparse):
        """
        The active latents of a batch as (row, col, f), each [n], and for the auxiliary loss, alike, the k_aux of the
        latents `dead` with the largest pre-activations in each row. product_of(i, j) gives x @ W_enc.T for rows i to
        j, a few at a time, so that [batch, d_hidden] is never needed whole.

        batchtopk keeps the k * batch largest scores of all processes' rows without sorting all: what is under 0.9 of
        the last step's smallest is passed over at first, and looked at again if too few are left. So the set is
        that of a full sort, whatever the last step's was.
        """

        def scan(cut):
            # a hair lower, as product > cut / norm - b_enc and (product + b_enc) * norm > cut round differently
            bound, active, aux = 0.9999 * cut / norm - self.b_enc, [], []
            for start in range(0, n_rows, self.rows_at_once):
                product = product_of(start, start + self.rows_at_once)
                entries = lambda row, col: (start + row, col, product[row, col] + self.b_enc[col])  # noqa: B023
                if self.variant == "topk":
                    score = torch.addcmul(self.b_enc * norm, product, norm)
                    active.append(entries(*unroll(score.topk(self.k, dim=1).indices)))
                else:
                    at = where_true((product > bound).flatten())
                    active.append(entries(at // len(norm), at % len(norm)))
                if len(dead):
                    best = (product[:, dead] + self.b_enc[dead]).topk(min(k_aux, len(dead)), dim=1).indices
                    aux.append(entries(*unroll(dead[best])))
            return [[torch.cat(column) for column in zip(*parts)] for parts in (active, aux)]

        if self.variant == "vanilla":
            return scan(0 if sparse else math.inf)  # the dense step needs no list of half of all latents
        if self.variant == "topk":
            (row, col, f), aux = scan(0)
            keep = f > 0
        else:
            n_keep, guess = self.k * n_rows * world()[1], self.last_smallest
            if guess is None:
                some = ((product_of(0, 32) + self.b_enc) * norm).flatten()
                guess = some.topk(min(self.k * 32, len(some))).values[-1].clamp_min(0)
                guess = all_reduce(guess, dist.ReduceOp.MIN)
            for cut in (0.9 * guess, 0.5 * guess, 0 * guess):
                (row, col, f), aux = scan(cut)
                score = f * norm[col]
                if all_reduce((score > cut).sum()) >= n_keep:
                    break
            keep, self.last_smallest = largest(score, n_keep)
        keep = keep.nonzero().flatten()
        return (row[keep], col[keep], f[keep]), aux

    def losses(self, x, l1_coeff=0.0, aux_coeff=0.0, k_aux=64, dead=(), sparse=True):
        """
        The losses of a training batch x, raw [batch, n_models, d_model]: `loss`, to be minimised, and its parts, all
        means over the batch of sums over the rest, of scaled activations. l2 + l1_coeff * l1 (vanilla) or l2;
        + aux_coeff * aux, in which the latents `dead` [n_dead] reconstruct what x_hat lacks.
        """
        x = (x * self.scale[:, None]).flatten(1)
        W_enc, W_dec, norm = self.W_enc.flatten(1), self.W_dec.flatten(1), self.decoder_norm()
        product = None if sparse else self.product(x)
        product_of = lambda i, j: self.product(x[i:j]) if sparse else product[i:j]
        (row, col, f), aux = self.pick(product_of, len(x), norm.detach(), dead, k_aux, sparse)
        if sparse:
            n = len(f)
            if len(
                dead
            ):  # as further rows of the same product, for one gradient of each weight instead of two
                row, col, f = (torch.cat(pair) for pair in zip((row, col, f), (len(x) + aux[0], *aux[1:])))
            all_x = x.repeat(2, 1) if len(dead) else x
            f, out = SparseCode.apply(all_x, W_enc, self.b_enc, W_dec, row, col, f)
            (out, *error_hat), f, col = out.split(len(x)), f[:n], col[:n]
            l1_loss, l0_loss = f @ norm[col] / len(x), torch.tensor(n / len(x))
            fired = torch.zeros_like(norm, dtype=torch.bool).index_fill(0, col, True)
        else:
            f = F.relu(product + self.b_enc)
            if self.variant != "vanilla":
                f = torch.zeros_like(f).index_put((row, col), f[row, col])
            out, l1_loss, active = f @ W_dec, (f @ norm).mean(), f > 0
            l0_loss, fired = active.sum() / len(x), active.any(0)
            error_hat = [SparseCode.apply(x, W_enc, self.b_enc, W_dec, *aux)[1]] if len(dead) else []
        x_hat = out + self.b_dec.flatten()
        l2_loss = F.mse_loss(x_hat, x, reduction="sum") / len(x)
        loss = l2_loss + l1_coeff * l1_loss if self.variant == "vanilla" else l2_loss
        aux_loss = torch.zeros_like(l2_loss)
        if error_hat:
            aux_loss = F.mse_loss(error_hat[0], (x - x_hat).detach(), reduction="sum") / len(x)
            aux_loss = aux_loss * min(len(dead) / k_aux, 1)
            loss = loss + aux_coeff * aux_loss
        parts = dict(loss=loss, l2_loss=l2_loss, l1_loss=l1_loss, l0_loss=l0_loss, aux_loss=aux_loss)
        return parts | dict(
            fired=fired, x=x.unflatten(1, self.b_dec.shape), x_hat=x_hat.unflatten(1, self.b_dec.shape)
        )


# --- Measures --------------------------------------------------------------------------------------------------


def moments(x, x_hat):
    """What explained_variance needs of [batch, n_models, d_model]; those of several batches can be added up."""
    error, square = ((y.detach().norm(dim=-1).double() ** 2).sum(0) for y in (x - x_hat, x))
    return torch.cat([torch.stack([error, square, torch.full_like(error, len(x))], dim=1), x.sum(0)], dim=1)


def explained_variance(moments):
    """1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, overall and per model: a ratio of sums over all rows."""
    error, square, rows = moments[:, :3].T
    variance = square - moments[:, 3:].square().sum(1) / rows
    each = {
        f"explained_variance_{name}": 1 - (e / v).item() for name, e, v in zip("ABCDEFGH", error, variance)
    }
    return dict(explained_variance=1 - (error.sum() / variance.sum()).item()) | each


@torch.no_grad()
def validate(model, blocks, l1_coeff):
    """Metrics of blocks of raw activations in inference mode, and how often each latent fires [d_hidden]."""
    model.eval()
    rows, sums, fired, seen = 0, 0, 0, 0
    for x in blocks:
        x = x.to(model.b_dec.device)
        f = model.encode(x)
        x, x_hat = x * model.scale[:, None], model.decode(f) * model.scale[:, None]
        l2, l1 = (x - x_hat).square().sum(), (f @ model.decoder_norm()).sum()
        rows, fired, seen = rows + len(x), fired + (f > 0).sum(0), seen + moments(x, x_hat)
        sums = sums + torch.stack([l2 + l1_coeff * l1 * (model.variant == "vanilla"), l2, l1, (f > 0).sum()])
    model.train()
    row = dict(zip(("loss", "l2_loss", "l1_loss", "l0_loss"), (sums / rows).tolist()))
    return row | explained_variance(seen) | dict(dead_latents=(fired == 0).sum().item()), fired / rows


def product_seconds(model, n_rows):
    """Seconds of the encoder's product alone: no exact step can take less."""
    x, seconds = torch.randn(n_rows, model.W_enc[0].numel(), device=model.b_dec.device), []
    for _ in range(4):
        start = time.perf_counter()
        with torch.no_grad():
            model.product(x)[0, 0].item()  # .item() waits for the device
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[1]


# --- Training --------------------------------------------------------------------------------------------------


def warmup_factor(step, config):
    return min(1, (step + 1) / max(1, config["warmup"] * config["steps"]))


def lr_factor(step, config):
    """Linear warm-up, constant, linear to 0 at the end."""
    return min(
        warmup_factor(step, config), (config["steps"] - step) / max(1, config["decay"] * config["steps"])
    )


def resolve(config):
    """The config with its by-rule values filled in; ends the program if a value cannot be."""
    check_ranges(config, at_least)
    if config["k"] > config["d_hidden"]:
        fail(f"--k={config['k']} is larger than --d_hidden={config['d_hidden']}")
    if config["batch_size"] % world()[1]:
        fail(
            f"--batch_size={config['batch_size']} is not a multiple of the number of processes, {world()[1]}"
        )
    tokens = config["steps"] * config["batch_size"]
    aux_coeff = 0.0 if config["variant"] == "vanilla" else 1 / 32
    return config | dict(
        aux_coeff=config["aux_coeff"] if config["aux_coeff"] >= 0 else aux_coeff,
        dead_after=config["dead_after"] or min(math.ceil(0.05 * tokens), 10_000_000),
        lr=config["lr"] or 3e-3 * math.sqrt(512 / config["d_hidden"]),
    )


def write_atomically(path, write):
    """write(another path), which is then renamed: at any moment `path` is the whole old one or the whole new one."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def start_run(config):
    """Makes the folder of a new run, whose path it returns; one that already holds a run is left alone."""
    name = f"{Path(config['data']).name}-{config['variant']}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    out = Path(config["out_dir"] or Path("out") / name)
    if (out / "checkpoint.pt").exists() or (out / "metrics.jsonl").exists():
        fail(f"--out_dir={out} already holds a run: go on with it by --resume=True, or give another name")
    out.mkdir(parents=True, exist_ok=True)
    return out


class Log:
    """Rows of metrics: one short line on the terminal, all of it in OUT/metrics.jsonl and wandb."""

    shown = ["l2_loss", "l0_loss", "explained_variance", "dead_latents", "aux_loss", "tokens_per_second"]

    def __init__(self, out, config, checkpoint):
        self.path = out / "metrics.jsonl"
        rows = self.path.read_text().splitlines(keepends=True) if checkpoint else []
        kept = "".join(
            row for row in rows if json.loads(row)["step"] <= checkpoint["step"]
        )  # the others come again
        write_atomically(self.path, lambda part: part.write_text(kept))
        os.environ.setdefault("WANDB_SILENT", "true")
        same = dict(id=checkpoint["wandb_id"], resume="allow") if checkpoint else {}
        options = dict(project=config["wandb_project"], mode=config["wandb_mode"], name=out.name, dir=out)
        self.wandb = wandb.init(config=config, **options, **same)

    def __call__(self, step, row, prefix=""):
        shown = "  ".join(f"{key} {row[key]:.4g}" for key in self.shown if key in row)
        print(f"{step:7d} {prefix or 'train/'}  {shown}", flush=True)
        row = {prefix + key: value for key, value in row.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(dict(step=step) | row) + "\n")
        self.wandb.log(row, step=step)


def keep_freed_memory():
    """Tells glibc to reuse what a step frees for the next one, instead of having the kernel clear new pages for it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # other C libraries have none
    mallopt(-4, 0)  # M_MMAP_MAX
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def train(config, checkpoint=None):
    """Trains by the config, from the checkpoint if one is given, and returns the crosscoder, in eval mode."""
    warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
    auto_device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto_device if config["device"] == "auto" else config["device"])
    torch.backends.cuda.matmul.allow_tf32 = True
    if sys.platform == "linux" and device.type == "cpu":
        keep_freed_memory()
    if "LOCAL_RANK" in os.environ:  # torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    is_main = world()[0] == 0
    config = resolve(config)
    torch.manual_seed(config["seed"])
    if config["data"] == "stream":
        from collect import Stream

        data = Stream(config, checkpoint["texts_read"] if checkpoint else 0)
    else:
        data = Toy(config) if config["data"] == "toy" else Store(config)
    if is_main:
        out = Path(config["out_dir"]) if checkpoint else start_run(config)
        config |= dict(out_dir=str(out))
        print("\n".join(f"{key} = {value!r}" for key, value in config.items()))

    model = CrossCoder(data.n_models, data.d_model, config["d_hidden"], config["variant"], config["k"])
    model.scale.copy_(data.scale)
    model.to(device)
    betas = (config["beta1"], config["beta2"])
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], betas=betas, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config))
    since_fired = torch.zeros(
        config["d_hidden"], dtype=torch.long, device=device
    )  # tokens since a latent fired
    share, start = (
        1.0 if config["variant"] == "vanilla" else config["k"] / config["d_hidden"],
        0,
    )  # share active
    if not checkpoint:
        model.center(all_reduce((data.batch(0).to(device) * model.scale[:, None]).mean(0)) / world()[1])
    else:
        for part, name in ((model, "model"), (optimizer, "optimizer"), (scheduler, "scheduler")):
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["random_state"])
        since_fired, share, start = (
            checkpoint["since_fired"].to(device),
            checkpoint["share"],
            checkpoint["step"],
        )
    log = Log(out, config, checkpoint) if is_main else lambda *_: None
    parallel = model
    if dist.is_initialized():
        parallel = nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    batch_size, steps = config["batch_size"], config["steps"]
    floor, logged_at, logged_step = (
        product_seconds(model, batch_size // world()[1]),
        time.perf_counter(),
        start,
    )

    for step, x in prefetched(data, range(start, steps), device):
        l1_coeff, lr = config["l1_coeff"] * warmup_factor(step, config), scheduler.get_last_lr()[0]
        dead = (since_fired > config["dead_after"]).nonzero().flatten()
        terms = dict(l1_coeff=l1_coeff, aux_coeff=config["aux_coeff"], k_aux=config["k_aux"])
        auto = device.type == "cpu" and share < 0.04  # where the two steps cost the same
        sparse = auto if config["sparse"] == "auto" else config["sparse"] == "True"
        losses = parallel(x, **terms, dead=dead if config["aux_coeff"] else dead[:0], sparse=sparse)
        optimizer.zero_grad()
        losses["loss"].backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"])
        optimizer.step()
        scheduler.step()
        model.update_threshold()
        since_fired = torch.where(all_reduce(losses["fired"].int()) > 0, 0, since_fired + batch_size)
        if config["variant"] == "vanilla" and device.type == "cpu":
            share = losses["l0_loss"].item() / config["d_hidden"]
        step += 1

        last = step == steps
        if last or step % config["log_every"] == 0:
            names = ["loss", "l2_loss", "l1_loss", "l0_loss", "aux_loss"]
            means = all_reduce(torch.stack([losses[name].detach().to(device) for name in names])) / world()[1]
            row = dict(zip(names, means.tolist()))
            row |= explained_variance(all_reduce(moments(losses["x"], losses["x_hat"])))
            row |= dict(l1_coeff=l1_coeff, lr=lr, dead_latents=len(dead), grad_norm=grad_norm.item())
            seconds = (time.perf_counter() - logged_at) / (step - logged_step)
            row |= dict(threshold=model.threshold.item(), tokens=step * batch_size)
            log(step, row | dict(tokens_per_second=batch_size / seconds, floor_fraction=floor / seconds))
            logged_at, logged_step = time.perf_counter(), step
        if (
            is_main
            and config["val_tokens"]
            and (last or config["eval_every"] and step % config["eval_every"] == 0)
        ):
            row, frequency = validate(model, data.validation(), l1_coeff)
            log(step, row, "val/")
        if is_main and (last or config["save_every"] and step % config["save_every"] == 0):
            parts = dict(model=model, optimizer=optimizer, scheduler=scheduler)
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= dict(
                step=step, since_fired=since_fired, share=share, config=config, wandb_id=log.wandb.id
            )
            state |= dict(random_state=torch.get_rng_state(), texts_read=getattr(data, "texts_read", 0))
            write_atomically(out / "checkpoint.pt", lambda part, state=state: torch.save(state, part))

    model.eval()
    if is_main:
        model.save_pretrained(out / "crosscoder")
        if config["data"] == "toy" and config["val_tokens"] and start < steps:
            print(*data.score(model, frequency), sep="\n")
        print(f"weights: CrossCoder.from_pretrained({str(out / 'crosscoder')!r})")
        log.wandb.finish()
    return model


def main(argv):
    defaults, allowed, checkpoint = dict(config), choices, None
    if "--data=stream" in argv:
        import collect

        defaults, allowed = collect.config | config, collect.choices | choices
    given = read_command_line(defaults, allowed, argv, __file__)
    if given.get("resume"):
        path = Path(given.get("out_dir", "")) / "checkpoint.pt"
        if not path.is_file():
            fail(f"--resume=True: there is no {path}; give the run's folder by --out_dir")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        defaults |= checkpoint["config"]
        for key in ("data", "variant", "d_hidden", "seed"):
            if given.get(key, defaults[key]) != defaults[key]:
                fail(f"--{key}={given[key]}: this run has {defaults[key]}, and resuming cannot change it")
    return train(defaults | given, checkpoint)


if __name__ == "__main__":
    main(sys.argv[1:])

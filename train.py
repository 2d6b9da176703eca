"""
Trains a CrossCoder: one sparse dictionary over the activations of a base model (A) and of the model
fine-tuned from it (B). A latent has a decoder vector per model: where one is 0, the other has it alone.

    python train.py --variant=batchtopk --k=32              # a toy with planted truth; ends with a score
    python train.py --data=acts --d_hidden=16384            # a store of activations, written by collect.py
    torchrun --standalone --nproc_per_node=2 train.py ...   # the same over several processes

Crosscoders: Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders. BatchTopK: Bussmann et al. 2024,
arXiv 2412.06410. Auxiliary loss: Gao et al. 2024, arXiv 2406.04093. --key=value sets any key of the config.
"""

import argparse
import contextlib
import ctypes
import difflib
import functools
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages save a tenth of a step; read by torch once

import jinja2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import wandb
from datasets import load_from_disk
from einops import einsum
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import nn
from torch.utils.benchmark import Timer

# --- Config -------------------------------------------------------------------------------------------------

config = dict(
    # I/O
    out_dir="",  # folder of the run; empty makes a new one, out/DATA-VARIANT-TIME
    resume=False,  # go on from out_dir's checkpoint, with its config and what is given beside it
    report_only=False,  # report again on out_dir's last checkpoint, without training
    save_every=500,  # steps between checkpoints; 0: only at the end
    # logging
    log_every=50,  # steps between rows of metrics
    eval_every=500,  # steps between validations; 0: only at the end
    wandb_mode="offline",  # offline, online or disabled
    wandb_project="crosscoder",
    ce_eval=False,  # with the report: how much of each model's cross-entropy the reconstruction recovers
    # data
    data="toy",  # toy, stream (harvest while training; takes collect.py's keys too), or a store's path
    val_tokens=8192,  # rows held out at the end of the store, for validation; 0: none
    batch_size=1024,  # tokens per step, over all processes
    # model
    variant="batchtopk",  # vanilla (ReLU and L1), topk or batchtopk
    basis="plain",  # plain: of (A, B); delta: of (A, B - A), made as large as A, for narrow fine-tunes
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
    device="auto",  # auto (cuda if there is one), cpu, cuda or cuda:1
    sparse="auto",  # exact sparse step: True, False, or auto (on the CPU, once few latents are active)
    seed=0,
)
choices = dict(
    variant=["vanilla", "topk", "batchtopk"],
    basis=["plain", "delta"],
    wandb_mode=["offline", "online", "disabled"],
    sparse=["auto", "True", "False"],
)


def fail(message):
    """Ends the program for a mistake of its user: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def first_line(e):
    """What an exception says, or else its kind."""
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def read_command_line(defaults, choices, argv, file):
    """{key: value} of argv's --key=value, each of the type of its default. --help prints `file`'s config."""

    def number(text):
        if not 0 <= float(text) < 1e15:  # nor is nan
            raise ValueError
        return float(text)

    def integer(text):  # 140_000 and 1e6 are integers too
        if number(text) % 1:
            raise ValueError
        return int(float(text))

    def boolean(text):
        return ["False", "True"].index(text) == 1

    if "--help" in argv:
        print(Path(file).read_text(encoding="utf-8").partition("\nconfig = ")[2].partition("\n)\n")[0])
        raise SystemExit(0)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = fail
    for key, default in defaults.items():
        kind = {bool: boolean, int: integer, float: number, str: str}[type(default)]
        parser.add_argument(f"--{key}", type=kind, choices=choices.get(key), default=argparse.SUPPRESS)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], defaults, 1, 0)
        fail(f"unknown argument {unknown[0]}: expected --key=value, the nearest key is --{near[0]}")
    return vars(given)


def require(config, positive):
    """Ends the program if one of those keys is 0."""
    for key in positive.split():
        if not config[key]:
            fail(f"--{key}=0: expected more than 0")


# --- Processes: where there is one, these change nothing ----------------------------------------------------


def world():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(x, op=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def all_gather(x):
    """The 1-d tensors x of all processes, of any lengths, in one, and where this process's begins in it."""
    if not dist.is_initialized():
        return x, 0
    parts = [None] * world()[1]
    dist.all_gather_object(parts, x.cpu())
    return torch.cat(parts).to(x.device), sum(map(len, parts[: world()[0]]))


# --- Data: n_models, d_model, scale, batch(step) and validation() of raw activations ------------------------


class Toy:
    """
    Activations of two models with planted features, endless, a function of (seed, step). Most are shared, the
    fine-tuned direction slightly rotated. The exclusive ones are sqrt(2) longer, to carry as much energy.
    """

    n_models, d_model = 2, 128
    kinds = dict(shared=192, base=32, finetuned=32)  # planted features of each kind
    n_active = 28  # planted features active in a token, on average

    def __init__(self, config):
        self.config, g = config, torch.Generator().manual_seed(config["seed"])
        self.kind = np.repeat(list(self.kinds), list(self.kinds.values()))  # [feature]
        a, b = F.normalize(torch.randn(2, len(self.kind), self.d_model, generator=g), dim=-1)
        rotated = F.normalize(a + 0.2 * b, dim=-1)
        size = dict(shared=(1, 1), base=(2**0.5, 0), finetuned=(0, 2**0.5))
        size = torch.tensor([size[kind] for kind in self.kind])[..., None]
        self.directions = torch.stack([a, rotated], dim=1) * size  # [feature, model, d_model]
        frequency = torch.linspace(1, 3, len(a))[torch.randperm(len(a), generator=g)]
        self.frequency = frequency / frequency.sum() * self.n_active
        self.scale = self.d_model**0.5 / self.rows(-1, 8192).norm(dim=-1).mean(0)

    def rows(self, step, n):
        seed = np.random.SeedSequence([self.config["seed"], step + 2]).generate_state(1)[0]
        g, shape = torch.Generator().manual_seed(int(seed)), (n, len(self.frequency))
        size = torch.randn(shape, generator=g).mul(0.25).exp()  # lognormal
        active = size * (torch.rand(shape, generator=g) < self.frequency)
        x = einsum(active, self.directions, "batch feature, feature model d -> batch model d")
        return x + 0.02 * torch.randn(x.shape, generator=g)

    def batch(self, step):
        return self.rows(step, self.config["batch_size"]).chunk(world()[1])[world()[0]]

    def validation(self):
        return self.rows(-2, self.config["val_tokens"]).split(1024)

    def score(self, model, frequency):
        """
        Lines that say what was recovered by the latents of firing frequency [d_hidden] over 0. One recovers a
        planted feature of its kind (`one_sided` or shared) if their cosine is over 0.9 in each model that has
        it; an exclusive latent that recovers none is false.
        """
        W = model.in_models(model.W_dec.detach())[frequency > 0].cpu()
        kind = np.select(one_sided(relative_norm(W)), ["base", "finetuned"], "shared")
        unit = F.normalize(W, dim=-1), F.normalize(self.directions, dim=-1)
        near = einsum(*unit, "latent model d, feature model d -> latent feature model") > 0.9
        near = (near | ~self.directions.any(-1)).all(-1).numpy() & (kind[:, None] == self.kind)
        for name, n in self.kinds.items():
            found = near[:, self.kind == name].any(0).sum()
            yield f"{name}: {found} of {n} planted features recovered ({found / n:.0%})"
        exclusive = kind != "shared"
        yield f"{(exclusive & ~near.any(1)).sum()} of {exclusive.sum()} exclusive latents are false"
        if not 0.8 * self.n_active < frequency.sum() < 1.5 * self.n_active:
            yield f"an L0 of {frequency.sum():.0f} is far from the {self.n_active} planted active features:"
            yield "explained variance may be high all the same, but what is recovered suffers"


class Store:
    """
    A store of activations: the Hugging Face datasets base and finetuned in one folder, row i of one being row
    i of the other, read through views of their memory maps. Batches are shuffled over the whole store, anew
    each epoch, and are a function of (seed, step). The last val_tokens rows are held out.
    """

    n_models = 2

    def __init__(self, config):
        path = self.path = Path(config["data"])
        self.config, self.meta, self.docs = config, {}, None
        try:
            tables = [load_from_disk(path / name).data.table for name in ("base", "finetuned")]
            chunks = [[chunk for chunk in table["activation"].chunks if len(chunk)] for table in tables]
            self.views = [[c.flatten().to_numpy().reshape(len(c), -1) for c in part] for part in chunks]
            (self.d_model, kind), *others = {(v.shape[1], v.dtype.kind) for part in self.views for v in part}
            if others or kind != "f":
                raise ValueError(f"found {[str(table['activation'].type) for table in tables]}")
            if (path / "meta.json").exists():
                self.meta = json.loads((path / "meta.json").read_text())
                self.docs = load_from_disk(path / "docs")["input_ids"]
                self.scale = torch.tensor(self.meta["scale"], dtype=torch.float)
                self.doc, self.pos = (tables[0][name].to_numpy() for name in ("doc", "pos"))
                if self.doc.max() >= len(self.docs):
                    raise ValueError(f"docs has {len(self.docs)} rows, but rows are of doc {self.doc.max()}")
                if self.scale.shape != (2,) or not (self.scale.isfinite() & (self.scale > 0)).all():
                    raise ValueError(f"scale is {self.meta['scale']} in meta.json")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            expected = "base and finetuned, rows of floats, all of one length, in column activation"
            fail(f"--data={path}: neither toy, nor stream, nor a whole store ({expected}): {first_line(e)}")
        self.n_rows, other = map(len, tables)
        if self.n_rows != other:
            fail(f"{path} is not aligned: base has {self.n_rows} rows, finetuned {other}")
        for name in {"token", "doc", "pos"}.intersection(*(table.column_names for table in tables)):
            a, b = (table[name].to_numpy() for table in tables)
            if (a != b).any():
                i = np.argmax(a != b)
                fail(f"{path} is not aligned: {name} first differs in row {i}, {a[i]} and {b[i]}")
        self.n_train = self.n_rows - config["val_tokens"]
        if self.n_train < config["batch_size"]:
            fail(f"{path} has {self.n_rows} rows, less than --val_tokens and one --batch_size")
        self.starts = [np.cumsum([0] + [len(view) for view in part]) for part in self.views]  # first rows
        if not self.meta:
            x = self.read(np.linspace(0, self.n_train - 1, min(self.n_train, 65536)).astype(int))
            self.scale = self.d_model**0.5 / x.float().norm(dim=-1).mean(0)

    @functools.lru_cache(2)  # noqa: B019
    def order(self, epoch):
        return np.random.default_rng([self.config["seed"], epoch]).permutation(self.n_train)

    def read(self, rows):
        """The activations [len(rows), n_models, d_model] of those rows, in the store's float type."""
        dtype = np.result_type(*(views[0] for views in self.views))
        x = np.empty((len(rows), self.n_models, self.d_model), dtype)
        for model, (views, starts) in enumerate(zip(self.views, self.starts)):
            chunk = np.searchsorted(starts, rows, side="right") - 1
            for i, (c, row) in enumerate(zip(chunk.tolist(), (rows - starts[chunk]).tolist())):
                x[i, model] = views[c][row]
        x = torch.from_numpy(x)
        if not x.sum(dtype=torch.double).isfinite():
            i, model = (~x.isfinite()).any(-1).nonzero()[0].tolist()
            name = self.path / ("base", "finetuned")[model]
            fail(f"{name}: row {rows[i]} holds nan or inf; take it out of both, or collect again")
        return x

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
    load = lambda step: data.batch(step).pin_memory() if device.type == "cuda" else data.batch(step)
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(load, steps[0]) if steps else None
        for step in steps:
            x = ahead.result()
            ahead = thread.submit(load, step + 1) if step != steps[-1] else None
            yield step, x.to(device, non_blocking=True)


# --- Crosscoder ---------------------------------------------------------------------------------------------


class SparseLosses(torch.autograd.Function):
    """
    The code f and the squared errors of what it decodes to, by the entries of f at (row, col) alone. They are
    x @ W_enc.T + b_enc, computed already by whoever chose them. Exact: what ReLU or TopK set to 0 has no
    gradient, so all that is left out are dense autograd's products with 0.

    x [batch, d], W_enc and W_dec [d_hidden, d], row, col and f [n], sorted by row. Entries of the auxiliary
    code are in rows batch to 2 * batch, and reconstruct what the code in row - batch leaves of x. Returns f,
    the means over the batch of squared errors, [1] or with an auxiliary code [2], and errors x_hat - x.
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, row, col, f, n_codes):
        code = csr(row, col, f, n_codes * len(x), len(W_dec))
        error = times(code, W_dec)
        error[: len(x)].add_(b_dec).sub_(x)
        if n_codes == 2:
            error[len(x) :].add_(error[: len(x)])
        ctx.save_for_backward(x, W_dec, row, col, f, code, error)
        ctx.mark_non_differentiable(error)
        return f.clone(), error.norm(dim=1).square().view(n_codes, -1).mean(1), error

    @staticmethod
    def backward(ctx, grad_f, grad_squares, _):
        x, W_dec, row, col, f, code, error = ctx.saved_tensors
        part = row // len(x)
        grad_error = 2 / len(x) * grad_squares
        weight = grad_error[part]
        grad_f = grad_f + weight * torch.sparse.sampled_addmm(code, error, W_dec.T, beta=0).values()
        at = col.argsort(stable=True)  # the transpose: sorted by column
        row, token, col, f, grad_f = (y[at] for y in (row, row - part * len(x), col, weight * f, grad_f))
        grad_W_dec = times(csr(col, row, f, len(W_dec), len(error)), error)
        grad_W_enc = times(csr(col, token, grad_f, len(W_dec), len(x)), x)
        grad_b_enc = grad_f.new_zeros(len(W_dec)).index_add(0, col, grad_f)
        grad_b_dec = grad_error[0] * error[: len(x)].sum(0)
        return (None, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, None, None, None, None)


def csr(row, col, values, n_rows, n_cols):
    starts = torch.searchsorted(row, torch.arange(n_rows + 1, device=row.device))
    return torch.sparse_csr_tensor(starts, col, values, (n_rows, n_cols))


def times(sparse, dense):
    """sparse @ dense, without the zeros that @ first writes and copies, which cost more than the product."""
    out = dense.new_empty(len(sparse), dense.shape[1])
    return torch.addmm(out, sparse, dense, beta=0, out=out)


def largest(y, k):
    """A mask of the k largest of each row of y."""
    return torch.zeros_like(y, dtype=torch.bool).scatter(1, y.topk(min(k, y.shape[1])).indices, True)


class CrossCoder(nn.Module, PyTorchModelHubMixin):
    """
    A sparse dictionary over the activations of n_models models. encode, decode and forward take and return
    raw activations. from_pretrained(path_or_hub), save_pretrained(path) and push_to_hub(name) are
    huggingface_hub's.

    Parameters: W_enc, W_dec [d_hidden, n_models, d_model], b_enc [d_hidden], b_dec [n_models, d_model].
    Buffers: scale [n_models], sqrt(d_model) / mean norm of each model's activations; threshold [], what a
    score f * norm must exceed in batchtopk's inference (eval mode), so that a token's code does not depend on
    its batch. In the basis "delta" what these are of is not A and B but A and B - A.
    """

    def __init__(self, n_models: int, d_model: int, d_hidden: int, variant="batchtopk", k=32, basis="plain"):
        super().__init__()
        self.variant, self.k, self.basis = variant, k, basis
        self.rows_at_once = 1 + 10 * 2**20 // d_hidden  # 40 MB of pre-activations, picked from while in cache
        self.W_dec = nn.Parameter(0.5 * F.normalize(torch.randn(d_hidden, n_models, d_model), dim=-1))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(d_hidden))
        self.b_dec = nn.Parameter(torch.zeros(n_models, d_model))
        self.register_buffer("scale", torch.ones(n_models))
        self.register_buffer("threshold", torch.zeros(()))
        self.last_smallest = None  # smallest score kept in the last step: where to start looking in the next

    @torch.no_grad()
    def start_at(self, x, scale):
        """Sets the scale [n_models] of a new model and, by raw x, its biases, so that few latents die."""
        self.scale.copy_(scale)
        if self.basis == "delta":
            size = (self.scaled(x)[:, 1:] / self.scale[1:, None]).norm(dim=-1).mean(0)
            self.scale[1:] = x.shape[-1] ** 0.5 / (all_reduce(size) / world()[1])
        if not self.scale.isfinite().all():
            fail("nothing changed: the activations of the two models are equal, or all 0")
        self.b_dec.copy_(all_reduce(self.scaled(x).mean(0)) / world()[1])
        self.b_enc.copy_(-einsum(self.W_enc, self.b_dec, "latent model d, model d -> latent"))

    def scaled(self, x):
        """Raw activations [batch, n_models, d_model] of any float type -> of mean norm sqrt(d_model)."""
        if self.basis == "delta":
            x = x.to(self.scale.dtype).diff(dim=1, prepend=x.new_zeros(len(x), 1, x.shape[2]))
        return (x * self.scale[:, None]).to(self.scale.dtype)

    def unscaled(self, x):
        """The inverse of `scaled`."""
        x = x / self.scale[:, None]
        return x.cumsum(dim=1) if self.basis == "delta" else x

    def in_models(self, y):
        """Scaled activations or decoder vectors [n, n_models, d_model] as A's and B's, sizes comparable."""
        return self.unscaled(y) * self.scale[0] if self.basis == "delta" else y

    def decoder_norm(self):
        """[d_hidden]: sum over the models of the norms of a latent's decoder vectors."""
        return self.W_dec.norm(dim=-1).sum(1)

    def product(self, x):
        """Scaled x [batch, n_models * d_model] -> x @ W_enc.T [batch, d_hidden], on CUDA in bfloat16."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return (x @ self.W_enc.flatten(1).T).to(x.dtype)

    def dense_code(self, product, norm):
        """f [batch, d_hidden] of x @ W_enc.T and the decoder norms."""
        f = F.relu(product + self.b_enc)
        if self.variant == "vanilla":
            return f
        (row, col, _), _ = self.pick(lambda i, j: product[i:j], len(product), norm.detach())
        return torch.zeros_like(f).index_put((row, col), f[row, col])

    def encode(self, x):
        """Raw activations [batch, n_models, d_model] -> latent activations f [batch, d_hidden]."""
        return self.dense_code(self.product(self.scaled(x).flatten(1)), self.decoder_norm())

    def decode(self, f):
        """f [batch, d_hidden] -> raw activations [batch, n_models, d_model]."""
        x_hat = einsum(f, self.W_dec, "batch latent, latent model d -> batch model d") + self.b_dec
        return self.unscaled(x_hat)

    def forward(self, x):
        """Raw activations -> reconstructed ones, [batch, n_models, d_model]."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def entries(self, product_of, n_rows, norm, cut, dead=(), k_aux=0):
        """
        The latents whose score f * norm is over `cut`, in topk the k best of each row that are, as (row, col,
        f), each [n]; alike, for the auxiliary loss, the k_aux of the latents `dead` with the largest
        pre-activations in each row. product_of(i, j) gives x @ W_enc.T of rows i to j, a few at a time:
        [batch, d_hidden] is never needed whole.
        """
        bound = 0.9999 * cut / norm - self.b_enc  # a hair low, for rounding; exact below
        best, aux = [], []
        for start in range(0, n_rows, self.rows_at_once):
            product = product_of(start, start + self.rows_at_once)
            if self.variant == "topk":
                mask = largest(torch.addcmul(self.b_enc * norm, product, norm), self.k)
            else:  # comparing into floats is faster on a CPU than into bools
                mask = torch.gt(product, bound, out=torch.empty_like(product)).bool()
            row, col = mask.nonzero(as_tuple=True)
            best.append((start + row, col, product[row, col] + self.b_enc[col]))
            if len(dead):
                pre = product[:, dead] + self.b_enc[dead]
                row, col = largest(pre, k_aux).nonzero(as_tuple=True)
                aux.append((start + row, dead[col], pre[row, col]))
        best, aux = ([torch.cat(column) for column in zip(*parts)] for parts in (best, aux))
        keep = (best[2] * norm[best[1]] > cut).nonzero().flatten()
        return [column[keep] for column in best], aux

    def pick(self, product_of, n_rows, norm, **auxiliary):
        """
        `entries` by variant and mode. In training, batchtopk keeps the k * batch largest scores of all
        processes' rows, of equal ones the first, without sorting all: what is under 0.9 of the last step's
        smallest is passed over, and looked at again if too few are left. So the set is that of a full sort.
        """
        if self.variant != "batchtopk" or not self.training:
            return self.entries(product_of, n_rows, norm, self.threshold, **auxiliary)
        n_keep, guess = self.k * n_rows * world()[1], self.last_smallest
        if guess is None:
            some = ((product_of(0, 32) + self.b_enc) * norm).flatten().detach()
            guess = some.topk(min(self.k * 32, len(some))).values[-1].clamp_min(0)
            guess = self.last_smallest = all_reduce(guess, dist.ReduceOp.MIN)
        for cut in (0.9 * guess, 0.5 * guess, 0 * guess):
            best, aux = self.entries(product_of, n_rows, norm, cut, **auxiliary)
            if all_reduce(torch.tensor(len(best[0]), device=norm.device)) >= n_keep:
                break
        score, start = all_gather(best[2] * norm[best[1]])
        if len(score):
            self.last_smallest = score.kthvalue(max(len(score) - n_keep, 0) + 1).values
        above, tied = score > self.last_smallest, score == self.last_smallest
        keep = above | (tied & (tied.cumsum(0) <= n_keep - above.sum()))
        keep = keep[start : start + len(best[0])].nonzero().flatten()
        return [column[keep] for column in best], aux

    def losses(self, x, l1_coeff=0.0, aux_coeff=0.0, k_aux=64, dead=(), sparse=True):
        """
        The losses of a training batch x, raw [batch, n_models, d_model]: `loss`, to be minimised, and its
        parts, all means over the batch of sums over the rest, of scaled activations. It is l2, in vanilla +
        l1_coeff * l1, + aux_coeff * aux, in which the latents `dead` [n_dead] reconstruct what x_hat lacks.
        """
        x = self.scaled(x).flatten(1)
        W_enc, W_dec, norm = self.W_enc.flatten(1), self.W_dec.flatten(1), self.decoder_norm()
        if sparse:
            product_of = lambda i, j: self.product(x[i:j])
            (row, col, f), aux = self.pick(product_of, len(x), norm.detach(), dead=dead, k_aux=k_aux)
            n, n_codes = len(f), 1 + (len(dead) > 0)
            if len(dead):
                row, col, f = (torch.cat(pair) for pair in zip((row, col, f), (len(x) + aux[0], *aux[1:])))
            weights = W_enc, self.b_enc, W_dec, self.b_dec.flatten()
            f, squares, error = SparseLosses.apply(x, *weights, row, col, f, n_codes)
            f, col = f[:n], col[:n]
            l1_loss, l0_loss = f @ norm[col] / len(x), torch.tensor(n / len(x), device=x.device)
            fired = torch.zeros_like(norm, dtype=torch.bool).index_fill(0, col, True)
        else:
            product = self.product(x)
            f = self.dense_code(product, norm)
            error = f @ W_dec + self.b_dec.flatten() - x
            l1_loss, active, squares = (f @ norm).mean(), f > 0, [error.square()]
            l0_loss, fired = active.sum() / len(x), active.any(0)
            if len(dead):
                pre = product[:, dead] + self.b_enc[dead]
                f = pre * largest(pre, k_aux)
                squares.append((f @ W_dec[dead] + error.detach()).square())
            squares = torch.stack([square.sum() / len(x) for square in squares])
        if self.training and self.last_smallest is not None:  # started from the first, no sentinel
            self.threshold.lerp_(self.last_smallest, torch.where(self.threshold == 0, 1.0, 0.02))
        l2_loss, aux_loss = squares[0], squares[1:].sum() * min(len(dead) / k_aux, 1)
        loss = l2_loss + aux_coeff * aux_loss + (l1_coeff * l1_loss if self.variant == "vanilla" else 0)
        parts = dict(loss=loss, l2_loss=l2_loss, l1_loss=l1_loss, l0_loss=l0_loss, aux_loss=aux_loss)
        x, error = (y.unflatten(1, self.b_dec.shape) for y in (x, error[: len(x)]))
        return parts | dict(fired=fired, x=x, error=error)


# --- Measures -----------------------------------------------------------------------------------------------


@torch.no_grad()
def moments(model, x, error):
    """What explained_variance needs of scaled x and x_hat - x [batch, n_models, d_model]; can be summed."""
    if model.basis == "delta":
        x, error = (torch.cat([y, model.in_models(y)[:, 1:]], dim=1) for y in (x, error))
    error, square = ((y.norm(dim=-1).double() ** 2).sum(0) for y in (error, x))
    return torch.cat([torch.stack([error, square, torch.full_like(error, len(x))], dim=1), x.sum(0)], dim=1)


def explained_variance(model, moments):
    """1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, a ratio of sums over all rows; and per model."""
    error, square, rows = moments[:, :3].T
    variance = square - moments[:, 3:].square().sum(1) / rows
    n, names = len(model.scale), ["A", "difference", "B"] if model.basis == "delta" else "ABCDEFGH"
    row = dict(explained_variance=(1 - error[:n].sum() / variance[:n].sum()).item())
    return row | {f"explained_variance_{k}": ev for k, ev in zip(names, (1 - error / variance).tolist())}


def relative_norm(W):
    """Decoder vectors W [n, 2, d_model] -> ||W[:, 1]|| / (||W[:, 0]|| + ||W[:, 1]||)."""
    norm = W.norm(dim=-1)
    return norm[:, 1] / norm.sum(1)


def one_sided(relative_norm):
    """Masks of the relative norms of latents that the base model, and that the fine-tuned one has alone."""
    return relative_norm < 0.1, relative_norm > 0.9


def decoded(model, code):
    """The scaled activations [rows, n_models, d_model] that a sparse code [rows, d_hidden] gives."""
    return times(code, model.W_dec.flatten(1)).unflatten(1, model.b_dec.shape) + model.b_dec


@torch.no_grad()
def validate(model, data, l1_coeff):
    """
    Of held-out rows, in inference mode: metrics, how often each latent fires [d_hidden], and the code of each
    of the blocks of data.validation(), sparse [rows, d_hidden].
    """
    norm, seen, codes = model.decoder_norm(), 0, []
    for x in data.validation():
        x = model.scaled(x.to(norm.device))
        product_of = lambda i, j, x=x: model.product(x.flatten(1)[i:j])
        codes.append(csr(*model.entries(product_of, len(x), norm, model.threshold)[0], len(x), len(norm)))
        seen = seen + moments(model, x, decoded(model, codes[-1]) - x)
    n_rows, col = sum(map(len, codes)), torch.cat([code.col_indices() for code in codes])
    fired = torch.bincount(col, minlength=len(norm))
    l1_loss = torch.cat([code.values() for code in codes]) @ norm[col]
    totals = seen[: len(model.scale), 0].sum(), l1_loss, fired.sum()
    l2_loss, l1_loss, l0_loss = (total.item() / n_rows for total in totals)
    loss = l2_loss + l1_coeff * l1_loss if model.variant == "vanilla" else l2_loss
    metrics = dict(loss=loss, l2_loss=l2_loss, l1_loss=l1_loss, l0_loss=l0_loss)
    metrics |= explained_variance(model, seen) | dict(dead_latents=(fired == 0).sum().item())
    return metrics, fired / n_rows, codes


@torch.no_grad()
def latent_scaling(model, blocks, codes, latents):
    """
    nu_r and nu_epsilon [2, n] of the latents [n], by which Minder, Dumas et al. 2025 (arXiv 2504.02922) tell
    what one model alone has from what training only shrank in the other. beta is the least-squares factor of
    f * d, d being the decoder vector in the latent's own model, in a model's reconstruction (nu_r), or in its
    error with the latent's part left in (nu_epsilon); nu is beta of the other model over beta of its own.
    """
    D = model.in_models(model.W_dec)[latents]
    n, own = torch.arange(len(D), device=D.device), D.norm(dim=-1).argmax(dim=1)
    squares, sums = 0, 0
    for x, code in zip(blocks, codes):
        f, x, x_hat = code.to_dense()[:, latents], model.scaled(x.to(D.device)), decoded(model, code)
        y = torch.stack([model.in_models(x_hat), model.in_models(x - x_hat)])
        sums = sums + einsum(f, y, "row latent, kind row model d -> kind latent model d")
        squares = squares + f.square().sum(0)
    # All betas are over the same squares * ||d||^2, which nu does not need.
    beta = einsum(sums, D[n, own], "kind latent model d, latent d -> kind latent model")
    beta[1] += squares[:, None] * einsum(D, D[n, own], "latent model d, latent d -> latent model")
    return beta[:, n, 1 - own] / beta[:, n, own]


# --- Report -------------------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>What fine-tuning changed</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark } h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin-top: 2rem }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
body { overflow-wrap: anywhere } .run { columns: 18rem; font-size: 13px } p { margin: .7rem 0 0 }
svg { width: min(20rem, 100%); margin: 1rem .8rem 0 0; font-size: 10px; fill: currentColor }
polygon { fill: #4a86c540; stroke: #4a86c5 } path { stroke: gray; stroke-dasharray: 3 }
.middle { text-anchor: middle } .end { text-anchor: end }
.example { margin: .2rem 0 .2rem 1rem; font-size: 13px; white-space: pre-wrap }
mark { background: rgb(255 140 0 / var(--a)); color: inherit }
</style><h1>{{ verdict }}</h1>
<div class="run">{% for key, value in run.items() %}{{ key }}: {{ value }}<br>{% endfor %}</div>
{% for p in pictures %}<svg viewBox="0 0 300 150"><polygon points="30,130 {{ p.points }} 290,130"/>
<text y="12">{{ p.title }}</text><text y="34">{{ p.top }}</text><text x="20" y="132">0</text>
<text x="30" y="145">{{ p.low }}</text><text x="160" y="145" class="middle">{{ p.x_name }}</text>
<text x="290" y="145" class="end">{{ p.high }}</text>{% for x, place, label in p.marks %}
<path d="M{{ x }},30 V130"/><text x="{{ x }}" y="24" class="{{ place }}">{{ label }}</text>
{% endfor %}</svg>{% endfor %}
{% for title, latents in lists.items() %}<h2>{{ title }}{{ "" if latents else ": none" }}</h2>
{% for latent, facts, examples in latents %}<p><b>latent {{ latent }}</b>
{% for key, value in facts.items() if value == value %}{{ key }} {{ value }} {% endfor %}
{% for example in examples %}<div class="example">{% for token, shade in example -%}
<mark style="--a:{{ shade }}">{{ token }}</mark>{%- endfor %}</div>{% endfor %}{% endfor %}{% endfor %}
</html>"""


def picture(title, x_name, y, low, high, log=False, marks=()):
    """What PAGE draws of values y, evenly spaced from low to high, with marks (share of it, place, label)."""
    heights = np.log1p(y) if log else np.maximum(y, 0)
    points = zip(np.linspace(30, 290, len(y)), 130 - 100 * heights / max(heights.max(), 1e-9))
    points, top = " ".join(f"{x:.1f},{y:.1f}" for x, y in points), f"{max(y):,.4g}"
    marks = [(30 + 260 * x, place, label) for x, place, label in marks]
    return dict(title=title, x_name=x_name, points=points, low=low, high=high, top=top, marks=marks)


def examples(data, f, decode):
    """Around five tokens with the largest f [held-out rows], each of another text: [(token, share of it)]."""
    order = f.argsort(descending=True)[: f.count_nonzero()]
    places = [(data.doc[data.n_train + i], data.pos[data.n_train + i]) for i in order.tolist()]
    share, best = dict(zip(places, (f[order] / f.max()).tolist())), {}
    for doc, pos in places:
        best.setdefault(doc, pos)
    for doc, pos in list(best.items())[:5]:
        ids, start = data.docs[int(doc)], max(0, pos - 16)
        tokens = [decode([i]).replace("\n", "↵") for i in ids[start : pos + 9]]
        yield [(token, f"{share.get((doc, start + i), 0):.2f}") for i, token in enumerate(tokens)]


def report(model, data, config, out, metrics, frequency, codes):
    """Writes OUT/report.html, what the models share and what each has alone; returns the same for wandb."""
    W, alive = model.W_dec.detach(), frequency > 0
    D, nu = model.in_models(W), torch.full((2, len(W)), math.nan, device=W.device)
    relative, cosine = relative_norm(D), F.cosine_similarity(D[:, 0], D[:, 1], dim=-1)
    base, finetuned = (alive & mask for mask in one_sided(relative))
    shared = alive & ((relative - 0.5).abs() <= 0.1)
    if len(exclusive := (base | finetuned).nonzero().flatten()):
        nu[:, exclusive] = latent_scaling(model, data.validation(), codes, exclusive)
    confirmed = (nu[0] < 0.5) & (nu[1] < 0.2)
    verdict = f"of {len(W):,} latents {alive.sum():,} are alive: {shared.sum():,} shared, "
    verdict += f"{base.sum():,} base-only, {finetuned.sum():,} fine-tuned-only"
    verdict += f", {confirmed.sum():,} of them confirmed" if len(exclusive) else ": no exclusive latents"

    columns = dict(relative_norm=relative, cosine=cosine, frequency=frequency, nu_r=nu[0], nu_epsilon=nu[1])
    columns["confirmed"] = torch.where(nu[0].isnan(), math.nan, confirmed.float())
    often = alive & (frequency >= min(20 / config["val_tokens"], 0.01))
    ranks = {"Fine-tuned-only latents, confirmed first": (finetuned, confirmed + frequency)}
    ranks["Base-only latents, confirmed first"] = base, confirmed + frequency
    ranks["Shared latents that rotated most"] = shared & often, -cosine
    if model.basis == "delta":
        columns["share_of_change"] = relative_norm(W)
        ranks = {"Latents with the largest share of change": (often, columns["share_of_change"])} | ranks
    decode, docs, lists = str, getattr(data, "docs", None), {}
    if docs:
        from transformers import AutoTokenizer

        with contextlib.suppress(Exception):  # of many kinds; ids are shown then
            decode = AutoTokenizer.from_pretrained(data.meta["tokenizer"], local_files_only=True).decode
    # Of each kind the first 20, and the texts of all in one pass over the codes.
    first = lambda mask, rank: rank.masked_fill(~mask, -math.inf).topk(min(20, mask.sum().item())).indices
    best = {title: first(*masked_rank) for title, masked_rank in ranks.items()}
    shown, texts = torch.cat(list(best.values())).unique(), {}
    if docs:
        f = torch.cat([code.to_dense()[:, shown] for code in codes])
        texts = {j: list(examples(data, f_j, decode)) for j, f_j in zip(shown.tolist(), f.T)}
    for title, latents in best.items():
        facts = [{key: round(column[j].item(), 4) for key, column in columns.items()} for j in latents]
        lists[title] = [(j, fact, texts.get(j, [])) for j, fact in zip(latents.tolist(), facts)]

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    pairs, facts = zip([dict(tokens=0), *rows], rows), getattr(data, "meta", {}) | config
    seconds = sum((b["tokens"] - a["tokens"]) / b["tokens_per_second"] for a, b in pairs)
    names = ("base", "finetuned", "hooks", "data", "variant", "basis", "k")
    run = {key: facts[key] for key in names if key in facts}
    run |= dict(tokens=f"{rows[-1]['tokens']:,}", seconds=round(seconds))
    run |= {key: f"{value:,.4g}" for key, value in metrics.items()}
    histogram = lambda y, low, high: (torch.histc(y.float().cpu(), 50, low, high).numpy(), low, high, True)
    marks = [(0.1, "middle", "base-only"), (0.4, "", "shared"), (0.6, "", ""), (0.9, "", "")]
    marks.append((1, "end", "fine-tuned-only"))
    log10, ends = frequency[alive].log10(), (rows[0]["step"], rows[-1]["step"])
    pictures = [
        picture("alive latents (log)", "relative decoder norm", *histogram(relative[alive], 0, 1), marks),
        picture("shared latents (log)", "cosine of d_A and d_B", *histogram(cosine[shared], -1, 1)),
        picture("alive latents (log)", "log10 of firing frequency", *histogram(log10, -6, 0)),
    ]
    curves = ("loss", "explained_variance", "l0_loss")
    pictures += [picture(key, "step", [row[key] for row in rows], *ends) for key in curves]
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    page = page.render(verdict=verdict, run=run, pictures=pictures, lists=lists)
    write_atomically(out / "report.html", lambda part: part.write_text(page, encoding="utf-8"))
    print(f"{verdict}\nreport: {out / 'report.html'}")
    values = dict(relative_norm=relative[alive], cosine=cosine[shared], log10_frequency=log10)
    logged = {f"report/{name}": wandb.Histogram(y.cpu().numpy()) for name, y in values.items()}
    table = [[title, j, *facts.values()] for title in lists for j, facts, _ in lists[title]]
    logged["report/latents"] = wandb.Table(["list", "latent", *columns], table)
    return logged | {"report/page": wandb.Html(page)}


# --- Training -----------------------------------------------------------------------------------------------


def warmup_factor(step, config):
    return min(1, (step + 1) / max(1, config["warmup"] * config["steps"]))


def lr_factor(step, config):
    """Linear warm-up, constant, linear to 0 at the end."""
    left = (config["steps"] - step) / max(1, config["decay"] * config["steps"])
    return min(warmup_factor(step, config), left)


def resolve(config):
    """The config with its by-rule values filled in; ends the program if a value cannot be."""
    require(config, "steps batch_size d_hidden k k_aux log_every")
    if config["k"] > config["d_hidden"] and config["variant"] != "vanilla":
        fail(f"--k={config['k']} is larger than --d_hidden={config['d_hidden']}")
    if config["batch_size"] % world()[1]:
        fail(f"--batch_size={config['batch_size']} is no multiple of the number of processes, {world()[1]}")
    if max(config["beta1"], config["beta2"]) >= 1:
        fail(f"--beta1={config['beta1']} and --beta2={config['beta2']}: expected less than 1")
    config = dict(config)
    if config["aux_coeff"] < 0:
        config["aux_coeff"] = 0.0 if config["variant"] == "vanilla" else 1 / 32
    tokens = config["steps"] * config["batch_size"]
    config["dead_after"] = config["dead_after"] or min(math.ceil(0.05 * tokens), 10_000_000)
    config["lr"] = config["lr"] or 3e-3 * math.sqrt(512 / config["d_hidden"])
    return config


def write_atomically(path, write):
    """write(another path): a file or folder, which then takes the place of `path`, never half-written."""
    part = path.with_name(path.name + ".part")
    discard = lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    try:
        discard(part)  # of a process that was killed
        write(part)
        for file in filter(Path.is_file, [part, *part.rglob("*")]):
            with open(file, "rb") as written:
                os.fsync(written)  # a power cut must not find the new name before what it names
        if path.is_dir():  # which no other can be renamed to
            discard(path)
        os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch's and safetensors' words for a full disk
        discard(part)  # to leave room
        fail(f"{path} cannot be written and is as it was: {first_line(e)}. Make room on the disk, and go on")


class Log:
    """Rows of metrics: one short line on the terminal, all of it in OUT/metrics.jsonl and wandb."""

    shown = "l2_loss l0_loss explained_variance dead_latents aux_loss tokens_per_second".split()
    shown += ["loss_recovered_A", "loss_recovered_B"]

    def __init__(self, out, config, start, wandb_id):
        self.path, self.has_wandb = out / "metrics.jsonl", True
        rows = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        rows = [row for row in rows if row.endswith("\n")]  # a last one may have been cut off
        rows = [row for row in rows if json.loads(row)["step"] <= start]  # the others come again
        write_atomically(self.path, lambda part: part.write_text("".join(rows)))
        os.environ.setdefault("WANDB_SILENT", "true")
        options = dict(project=config["wandb_project"], mode=config["wandb_mode"], name=out.name, dir=out)
        self.to_wandb(wandb.init, **options, config=config, id=wandb_id, resume="allow")

    def to_wandb(self, call, *args, **options):
        """call(...), a function of wandb's. A run goes on without wandb after one that fails."""
        try:
            if self.has_wandb:
                call(*args, **options)
        except Exception as e:  # of many kinds, and none is worth a run
            print(f"warning: going on without wandb: {first_line(e)}", file=sys.stderr)
            self.has_wandb = False

    def __call__(self, step, row, prefix=""):
        shown = "  ".join(f"{key} {row[key]:.4g}" for key in self.shown if key in row)
        print(f"{step:7d} {prefix or 'train/'}  {shown}", flush=True)
        row = {prefix + key: value for key, value in row.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(dict(step=step) | row) + "\n")
        self.to_wandb(wandb.log, row, step=step)


def set_up(config):
    """The device of this process, which joins the others if torchrun started it."""
    name, local_rank = config["device"], os.environ.get("LOCAL_RANK")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=f"cuda:{local_rank}" if local_rank and name == "cuda" else name).device
    except (RuntimeError, AssertionError) as e:  # no such name, or no such hardware
        fail(f"--device={name}: {first_line(e)}")
    if local_rank and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def train(config, checkpoint=None):
    """Trains by the config, from the checkpoint if one is given, and returns the crosscoder, in eval mode."""
    warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
    torch.backends.cuda.matmul.allow_tf32 = True
    device = set_up(config)
    config, (rank, n_processes) = resolve(config), world()
    if sys.platform == "linux" and device.type == "cpu":
        # What a step frees is kept for the next: to have the kernel clear new pages costs a tenth of a step.
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    torch.manual_seed(config["seed"])
    if config["data"] == "stream":
        from collect import Stream

        data = Stream(config, checkpoint.get("texts_read", 0) if checkpoint else 0)
    else:
        data = Toy(config) if config["data"] == "toy" else Store(config)
    if config["ce_eval"] and not getattr(data, "docs", None):
        fail("--ce_eval=True takes the texts of a store that collect.py wrote")
    if rank == 0:
        name = f"{Path(config['data']).name}-{config['variant']}-{datetime.now():%Y%m%d-%H%M%S-%f}"
        out = Path(config["out_dir"] or Path("out") / name)
        if not checkpoint and (out / "metrics.jsonl").exists():
            go_on = "go on with it by --resume=True" if (out / "checkpoint.pt").exists() else "delete it"
            fail(f"--out_dir={out} already holds a run: {go_on}, or give another name")
        out.mkdir(parents=True, exist_ok=True)
        config["out_dir"] = str(out)
        print("\n".join(f"{key} = {value!r}" for key, value in config.items()))
    options = {key: config[key] for key in ("d_hidden", "variant", "k", "basis")}
    model = CrossCoder(data.n_models, data.d_model, **options).to(device)
    betas = (config["beta1"], config["beta2"])
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], betas=betas, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config))
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler)
    since_fired = torch.zeros(config["d_hidden"], dtype=torch.long, device=device)  # tokens, of each latent
    share = 1.0 if config["variant"] == "vanilla" else config["k"] / config["d_hidden"]  # of active latents
    start, batch_size, wandb_id = 0, config["batch_size"], os.urandom(4).hex()
    if checkpoint:
        try:
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            torch.set_rng_state(checkpoint["random_state"])
            since_fired.copy_(checkpoint["since_fired"])
            share, wandb_id = float(checkpoint["share"]), checkpoint["wandb_id"]
            start = int(checkpoint["step"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
            fail(f"the checkpoint does not fit this data and config: {' '.join(str(e).split())[:300]}")
    else:
        model.start_at(data.batch(0).to(device), data.scale.to(device))
    steps = start if config["report_only"] else config["steps"]
    log = Log(out, config, start, wandb_id) if rank == 0 else None
    some = torch.randn(min(batch_size // n_processes, model.rows_at_once), model.b_dec.numel(), device=device)
    timer = Timer("model.product(some)", globals=locals(), num_threads=torch.get_num_threads())
    floor = timer.timeit(3).median * batch_size / n_processes / len(some)  # seconds: no step can take less
    logged_at, logged_step = time.perf_counter(), start

    for step, x in prefetched(data, range(start, steps), device):
        l1_coeff, lr = config["l1_coeff"] * warmup_factor(step, config), scheduler.get_last_lr()[0]
        dead = (since_fired > config["dead_after"]).nonzero().flatten()
        terms = dict(l1_coeff=l1_coeff, aux_coeff=config["aux_coeff"], k_aux=config["k_aux"])
        auto = device.type == "cpu" and share < 0.04  # where the two steps cost the same
        sparse = auto if config["sparse"] == "auto" else config["sparse"] == "True"
        optimizer.zero_grad()
        losses = model.losses(x, **terms, dead=dead if config["aux_coeff"] else dead[:0], sparse=sparse)
        (losses["loss"] / n_processes).backward()
        for p in model.parameters():  # all are ready at once: there is nothing to overlap this with
            all_reduce(p.grad)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"])
        if not grad_norm.isfinite():
            norms = ", ".join(f"{norm:.3g}" for norm in x.double().norm(dim=-1).amax(1).topk(3).values)
            said = f"loss {losses['loss'].item():.3g}, --lr={lr:.3g}, largest norms of rows {norms}"
            go_on = "Lower --lr, or drop such rows, and go on from the last checkpoint, if there is one"
            fail(f"step {step}: the gradient is not finite ({said}). {go_on}: it is whole")
        optimizer.step()
        scheduler.step()
        flags = torch.cat([losses["fired"], torch.tensor([len(stop_signals) > 0], device=device)])
        flags = all_reduce(flags.int()) > 0  # of any process
        since_fired, stop = torch.where(flags[:-1], 0, since_fired + batch_size), flags[-1]
        if config["variant"] == "vanilla" and device.type == "cpu":
            share = losses["l0_loss"].item() / config["d_hidden"]
        step += 1
        due = lambda every, step=step: step == steps or (every and step % every == 0)

        if due(config["log_every"]):
            names = ["loss", "l2_loss", "l1_loss", "l0_loss", "aux_loss"]
            means = all_reduce(torch.stack([losses[name].detach() for name in names])) / n_processes
            row = dict(zip(names, means.tolist()))
            row |= explained_variance(model, all_reduce(moments(model, losses["x"], losses["error"])))
            row |= dict(l1_coeff=l1_coeff, lr=lr, dead_latents=len(dead), grad_norm=grad_norm.item())
            seconds = (time.perf_counter() - logged_at) / (step - logged_step)
            row |= dict(threshold=model.threshold.item(), tokens=step * batch_size)
            row |= dict(tokens_per_second=batch_size / seconds, floor_fraction=floor / seconds)
            if rank == 0:
                log(step, row)
            logged_at, logged_step = time.perf_counter(), step
        if rank == 0 and config["val_tokens"] and due(config["eval_every"]):
            validated = validate(model, data, l1_coeff)
            log(step, validated[0], "val/")
        if rank == 0 and (due(config["save_every"]) or stop):
            state = dict(step=step, config=config, since_fired=since_fired, share=share, wandb_id=wandb_id)
            state |= dict(random_state=torch.get_rng_state(), texts_read=getattr(data, "texts_read", 0))
            state |= {name: part.state_dict() for name, part in parts.items()}
            write_atomically(out / "checkpoint.pt", lambda part, state=state: torch.save(state, part))
        if stop and step < steps:
            if rank == 0:
                log.to_wandb(wandb.finish)
                print(f"stopped at step {step}: go on by --resume=True --out_dir={out}", file=sys.stderr)
            raise SystemExit(128 + (stop_signals or [signal.SIGTERM])[0])

    model.eval()
    if rank == 0:
        write_atomically(out / "crosscoder", model.save_pretrained)
        if config["val_tokens"]:
            metrics, *found = validated if start < steps else validate(model, data, config["l1_coeff"])
            if config["ce_eval"]:
                from collect import loss_recovered

                metrics |= (recovered := loss_recovered(model, data))
                log(steps, recovered, "val/")
            log.to_wandb(wandb.log, report(model, data, config, out, metrics, *found), step=steps)
            if config["data"] == "toy":
                print(*data.score(model, found[0]), sep="\n")
        print(f"weights: CrossCoder.from_pretrained({str(out / 'crosscoder')!r})")
        log.to_wandb(wandb.finish)
    return model


stop_signals = []  # received so far


def stop_soon(number, _):
    """Handler of a signal: training ends after its step, or at the second signal at once."""
    stop_signals.append(number)
    signal.signal(number, signal.SIG_DFL)


def read_config(argv):
    """The config as argv has it, for a stream with the keys of collect.py."""
    defaults, allowed = config, choices
    if "--data=stream" in argv:
        import collect

        defaults, allowed = collect.config | config, collect.choices | choices
    return defaults | read_command_line(defaults, allowed, argv, __file__)


def main(argv):
    settings, checkpoint = read_config(argv), None
    if settings["resume"] or settings["report_only"]:
        path = Path(settings["out_dir"]) / "checkpoint.pt"
        if not path.is_file():
            fail(f"there is no {path}: give the folder of a run by --out_dir")
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # which runs no code
            saved = dict(checkpoint["config"])
        except Exception as e:  # of many kinds
            fail(f"{path} is no checkpoint, or not whole: {first_line(e)}")
        saved.pop("trust_remote_code", None)  # nor lets any in
        saved_argv = [
            f"--{key}={value}" for key, value in saved.items() if str(value) != str(config.get(key))
        ]
        settings = read_config(saved_argv + argv)
        for key in ("data", "variant", "basis", "d_hidden", "seed"):
            if settings[key] != saved.get(key):
                fail(f"--{key}={settings[key]}: this run has {saved.get(key)}, and resuming cannot change it")
        if settings["report_only"]:
            require(settings, "val_tokens")
    return train(settings, checkpoint)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_soon)
    try:
        main(sys.argv[1:])
    except OSError as e:  # of a disk or a folder
        fail(f"{e}. What was saved before is whole")

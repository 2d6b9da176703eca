"""
Trains a CrossCoder: one sparse dictionary over the activations of a base model (A) and of the model
fine-tuned from it (B). A latent has a decoder vector per model: where one is 0, the other has it alone.

    python train.py --variant=batchtopk --k=32              # a toy with planted truth; ends with a score
    python train.py --data=acts --d_hidden=16384            # a store of activations, written by collect.py
    python train.py --resume=True --out_dir=out/RUN         # goes on, or reports again on a finished run
    torchrun --standalone --nproc_per_node=2 train.py ...   # the same over several processes

Any key of the config is set by --key=value. A run ends with OUT/report.html, what fine-tuning changed.
Crosscoders: Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders. BatchTopK: Bussmann et al. 2024,
arXiv 2412.06410. Auxiliary loss: Gao et al. 2024, arXiv 2406.04093.
"""

import ast
import contextlib
import difflib
import functools
import html
import io
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages save a tenth of a step; read by torch once

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
import torch.nn.functional as F
import wandb
from datasets import load_from_disk
from einops import einsum
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer

# --- Config -------------------------------------------------------------------------------------------------

config = dict(
    # I/O
    out_dir="",  # folder of the run; empty makes a new one, out/DATA-VARIANT-TIME
    resume=False,  # go on from out_dir's checkpoint, with its config and what is given beside it
    save_every=500,  # steps between checkpoints; 0: only at the end
    # logging
    log_every=50,  # steps between rows of metrics
    eval_every=500,  # steps between validations; 0: only at the end
    wandb_mode="offline",  # offline, online or disabled
    wandb_project="crosscoder",  # name of the project there
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
    steps=1500,  # batches to train on
    lr=0.0,  # peak learning rate; 0: 3e-3 * sqrt(512 / d_hidden)
    warmup=0.05,  # share of the steps in which lr and l1_coeff rise to their values
    decay=0.2,  # share of the steps, the last ones, in which lr falls to 0
    beta1=0.9,  # Adam's decay of the mean of the gradient
    beta2=0.999,  # and of its square
    grad_clip=1.0,  # largest norm of the gradient; 0: any
    # system
    device="auto",  # auto (cuda if there is one), cpu, cuda or cuda:1
    sparse="auto",  # exact sparse step: True, False, or auto (on the CPU, once few latents are active)
    seed=0,  # of the first weights, the order of the rows and the toy
)
allowed = dict(variant=["vanilla", "topk", "batchtopk"], basis=["plain", "delta"])
allowed |= dict(wandb_mode=["offline", "online", "disabled"], sparse=["auto", "True", "False"])
allowed |= dict.fromkeys(["steps", "batch_size", "d_hidden", "k", "k_aux", "log_every"], range(1, 10**15))


def fail(message):
    """Ends the program for a mistake of its user: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def first_line(e):
    """What an exception says, or else its kind."""
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def read_command_line(defaults, allowed, argv, file):
    """{key: value} of argv's --key=value, each of the type of its default. --help prints `file`'s config."""
    given = {}
    for argument in argv:
        key, _, text = argument.removeprefix("--").partition("=")
        if argument == "--help":
            _, usage, code = Path(file).read_text(encoding="utf-8").split('"""', 2)
            print(usage.strip(), code.partition("\nconfig = dict(")[2].partition("\n)\n")[0], sep="\n")
            raise SystemExit(0)
        if not argument.startswith(f"--{key}=") or key not in defaults:
            near = difflib.get_close_matches(key.lstrip("-"), defaults, 1, 0)[0]
            fail(f"{argument}: expected --key=value, the nearest key is --{near}")
        kind, expected = type(defaults[key]), allowed.get(key)
        with contextlib.suppress(Exception):  # literal_eval raises many kinds
            number = text if kind is str else ast.literal_eval(text)
            value = kind(number)  # 1e6 and 140_000 are integers too
            in_range = value in expected if expected else kind is str or min(defaults[key], 0) <= value < 1e15
            if in_range and value == number and (type(number) is bool) == (kind is bool):
                given[key] = value
                continue
        what = " or ".join(expected) if expected and kind is str else kind.__name__
        fail(f"--{key}={text}: expected {what}{', more than 0' if type(expected) is range else ''}")
    return given


# --- Processes: where there is one, these change nothing ----------------------------------------------------


def world():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_mean(x):
    """The mean of x over all processes, written into x."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= world()[1]
    return x


def gather(x):
    """[x of each process], of anything."""
    every = [x] * world()[1]
    if dist.is_initialized():
        dist.all_gather_object(every, x)
    return every


def set_up(config):
    """The device of this process, which joins the others if torchrun started it."""
    name, local_rank = config["device"], os.environ.get("LOCAL_RANK")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        x = torch.zeros(1, device=f"cuda:{local_rank}" if local_rank and name == "cuda" else name)
        x.item()
    except (RuntimeError, AssertionError) as e:  # no such name, no such hardware, or nothing in it
        fail(f"--device={name}: {first_line(e)}")
    if local_rank and not dist.is_initialized():
        if x.is_cuda:
            torch.cuda.set_device(x.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if x.is_cuda else "gloo")
    return x.device


# --- Data: n_models, d_model, scale, batch(step) and validation() of raw activations ------------------------


class Toy:
    """
    Activations of two models with planted features, endless, a function of (seed, step). Most are shared, the
    fine-tuned direction slightly rotated. The exclusive ones are sqrt(2) longer, to carry as much energy.
    """

    n_models, d_model, docs, meta, texts_read = 2, 128, None, {}, 0
    n_active = 28  # planted features active in a token, on average
    # Of each kind the number of planted features, and their size in A and in B.
    kinds = dict(shared=(192, 1, 1), base=(32, 2**0.5, 0), finetuned=(32, 0, 2**0.5))

    def __init__(self, config):
        self.config, g = config, torch.Generator().manual_seed(config["seed"])
        counts, *sizes = zip(*self.kinds.values())
        self.kind = np.repeat(list(self.kinds), counts)  # [feature]
        a, b = F.normalize(torch.randn(2, len(self.kind), self.d_model, generator=g), dim=-1)
        unit = torch.stack([a, F.normalize(a + 0.2 * b, dim=-1)], dim=1)
        self.directions = unit * torch.tensor(np.repeat(sizes, counts, axis=1)).float().T[..., None]
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
        for name, (n, *_) in self.kinds.items():
            found = near[:, self.kind == name].any(0).sum()
            yield f"{name}: {found} of {n} planted features recovered ({found / n:.0%})"
        exclusive = kind != "shared"
        yield f"{(exclusive & ~near.any(1)).sum()} of {exclusive.sum()} exclusive latents are false"
        yield f"{frequency.sum():.1f} latents are active in a token, and {self.n_active} planted features"


FLOATS = {pa.float16(), pa.float32(), pa.float64()}


class Store:
    """
    A store of activations: the Hugging Face datasets base and finetuned in one folder, row i of one being row
    i of the other. Batches are shuffled over the whole store, anew each epoch, and are a function of (seed,
    step). The last val_tokens rows are held out.
    """

    n_models, names, docs, texts_read = 2, ("base", "finetuned"), None, 0

    def __init__(self, config):
        path = self.path = Path(config["data"])
        self.config, self.meta = config, {}
        try:
            stored = [load_from_disk(path / name).with_format("arrow") for name in self.names]
            self.stored = [dataset.select_columns("activation") for dataset in stored]
            columns = [dataset.data.column("activation") for dataset in stored]
            sizes = {n for column in columns for n in pc.list_value_length(column).unique().to_pylist()}
            if len(sizes) != 1 or not {column.type.value_type for column in columns} <= FLOATS:
                raise ValueError(f"found {' and '.join(str(column.type) for column in columns)}")
            self.d_model, self.n_rows, other = *sizes, *map(len, columns)
            if self.n_rows != other:
                raise ValueError(f"base has {self.n_rows} rows, finetuned {other}")
            for name in {"token", "doc", "pos"}.intersection(*(dataset.column_names for dataset in stored)):
                a, b = (dataset.data.column(name) for dataset in stored)
                if not a.equals(b):
                    i = np.argmax([x != y for x, y in zip(a, b)])
                    raise ValueError(f"{name} first differs in row {i}, {a[i]} and {b[i]}")
            self.n_train = self.n_rows - config["val_tokens"]
            if self.n_train < config["batch_size"]:
                raise ValueError(f"{self.n_rows} rows are less than --val_tokens and one --batch_size")
            if (path / "meta.json").exists():
                self.meta = json.loads((path / "meta.json").read_text())
                self.docs = load_from_disk(path / "docs")["input_ids"]
                self.doc, self.pos = (stored[0].data.column(name).to_numpy() for name in ("doc", "pos"))
                self.scale = torch.tensor(self.meta["scale"], dtype=torch.float)
                if self.scale.shape != (2,) or not (self.scale > 0).all() or self.doc.max() >= len(self.docs):
                    raise ValueError(f"docs has {len(self.docs)} rows, scale is {self.meta['scale']}")
            else:
                x = self.read(np.linspace(0, self.n_train - 1, min(self.n_train, 65536)).astype(int))
                self.scale = self.d_model**0.5 / x.float().norm(dim=-1).mean(0)
        except Exception as e:  # datasets and pyarrow raise many kinds
            expected = "neither toy, nor stream, nor a store of aligned rows of floats, all of one length"
            fail(f"--data={path}: {expected}: {first_line(e)}")
        order = lambda epoch: np.random.default_rng([config["seed"], epoch]).permutation(self.n_train)
        self.order = functools.lru_cache(2)(order)

    def read(self, rows):
        """The activations [len(rows), n_models, d_model] of those rows, in the store's float type."""
        columns = [dataset[rows]["activation"].combine_chunks() for dataset in self.stored]
        x = torch.from_numpy(np.stack([column.flatten().to_numpy() for column in columns]))
        x = x.view(self.n_models, len(rows), self.d_model).transpose(0, 1)
        if not x.sum(dtype=torch.double).isfinite():
            i, model = (~x.isfinite()).any(-1).nonzero()[0].tolist()
            fail(f"{self.path / self.names[model]}: row {rows[i]} holds nan or inf: collect again without it")
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


def csr(row, col, values, shape):
    """The sparse matrix of that shape with those values, sorted by row."""
    starts = torch.searchsorted(row, torch.arange(shape[0] + 1, device=row.device))
    return torch.sparse_csr_tensor(starts, col, values, shape)


def times(sparse, dense, spare=()):
    """sparse @ dense, into memory out of the list `spare`: new memory can cost more than the product."""
    out = spare.pop() if spare else dense.new_empty(len(sparse), dense.shape[1])
    return torch.addmm(out, sparse, dense, beta=0, out=out)


class SparseDecode(torch.autograd.Function):
    """
    code @ W_dec for the code whose entries at (row, col), sorted by row, are f = x @ W_enc.T + b_enc there;
    whoever chose them has computed f. Exact: what ReLU or TopK set to 0 has no gradient, so all that is left
    out are dense autograd's products with 0. x [batch, d], W_enc and W_dec [d_hidden, d], row, col and f [n];
    row may be up to n_rows, a multiple of batch, over which x is repeated. The gradients of W_dec and W_enc
    are put into the memory in `spare`. Returns f and [n_rows, d].
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, row, col, f, n_rows, spare):
        ctx.spare = spare
        ctx.save_for_backward(x, W_dec, row, col, f)
        starts = torch.searchsorted(row, torch.arange(n_rows, device=row.device))
        return f.clone(), F.embedding_bag(col, W_dec, starts, per_sample_weights=f, mode="sum")

    @staticmethod
    def backward(ctx, grad_f, grad):
        x, W_dec, row, col, f = ctx.saved_tensors
        at = col.argsort(stable=True)  # the transpose: sorted by column
        row, col, f, grad_f = row[at], col[at], f[at], grad_f[at]
        code = csr(col, row, f, (len(W_dec), len(grad)))
        grad_f += torch.sparse.sampled_addmm(code, W_dec, grad.T, beta=0).values()
        grad_pre = csr(col, row % len(x), grad_f, (len(W_dec), len(x)))
        grad_b_enc = grad_f.new_zeros(len(W_dec)).index_add(0, col, grad_f)
        grad_W_dec, grad_W_enc = times(code, grad, ctx.spare), times(grad_pre, x, ctx.spare)
        return None, grad_W_enc, grad_b_enc, grad_W_dec, None, None, None, None, None


def largest(y, k):
    """A mask of the k largest of each row of y."""
    return torch.zeros_like(y, dtype=torch.bool).scatter(1, y.topk(min(k, y.shape[1])).indices, True)


class CrossCoder(nn.Module, PyTorchModelHubMixin):
    """
    A sparse dictionary over the activations of n_models models. encode, decode and forward take and return
    raw activations. save_pretrained(path) and push_to_hub(name) are huggingface_hub's.

    Parameters: W_enc, W_dec [d_hidden, n_models, d_model], b_enc [d_hidden], b_dec [n_models, d_model].
    Buffers: scale [n_models], sqrt(d_model) / mean norm of each model's activations; mix [n_models, n_models]
    from raw activations to what the parameters are of: diag(scale), or in the basis "delta" to A and to B - A
    made as large; threshold [], what a score f * norm must exceed in batchtopk's inference (eval mode), so
    that a token's code does not depend on its batch. The others are the state of training: smallest [], the
    last batch's smallest score; since_fired [d_hidden], the tokens since each latent fired; l0 [].
    """

    def __init__(self, n_models: int, d_model: int, d_hidden: int, variant="batchtopk", k=32, basis="plain"):
        super().__init__()
        self.variant, self.k, self.basis, self.spare = variant, k, basis, []
        self.rows_at_once = 1 + 10 * 2**20 // d_hidden  # 40 MB of pre-activations
        self.W_dec = nn.Parameter(0.5 * F.normalize(torch.randn(d_hidden, n_models, d_model), dim=-1))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(d_hidden))
        self.b_dec = nn.Parameter(torch.zeros(n_models, d_model))
        self.scale, self.mix = nn.Buffer(torch.ones(n_models)), nn.Buffer(torch.eye(n_models))
        self.threshold, self.smallest = nn.Buffer(torch.zeros(())), nn.Buffer(torch.zeros(()))
        self.since_fired = nn.Buffer(torch.zeros(d_hidden, dtype=torch.long))
        self.l0 = nn.Buffer(torch.tensor(float(d_hidden if variant == "vanilla" else k)))

    @classmethod
    def from_pretrained(cls, name, **options):
        """The crosscoder of a run's folder, of the folder of its weights, or of a name on the hub."""
        inside = Path(name) / "crosscoder"
        return super().from_pretrained(inside if inside.is_dir() else name, **options)

    @torch.no_grad()
    def start_at(self, x, scale):
        """Fits a new model to the data's scale [n_models] and to raw x, so that few latents die."""
        self.scale.copy_(scale)
        self.mix.copy_(scale.diag())
        if self.basis == "delta":
            size = all_mean((x[:, 1:].float() - x[:, :1]).norm(dim=-1).mean(0)) / x.shape[-1] ** 0.5
            self.mix[1:, 0], self.mix[1:, 1:] = -1 / size, (1 / size).diag()
        y = self.scaled(x)
        if not (y.var(0).sum(-1) > 1e-9 * y.square().sum(-1).mean(0)).all():  # nor if it is nan
            fail("nothing to explain: A or B is alike in every row or too large, or nothing changed (B - A)")
        self.b_dec.copy_(all_mean(y.mean(0)))
        self.b_enc.copy_(-einsum(self.W_enc, self.b_dec, "latent model d, model d -> latent"))
        some = y[:32].flatten(1)  # by which batchtopk knows where to look first: not at half of all scores
        self.pick(lambda: self.products(some), len(some), self.decoder_norm())

    def scaled(self, x):
        """Raw activations [batch, n_models, d_model] of any float type -> those the parameters are of."""
        return self.mix @ x.to(self.mix.dtype)

    def unscaled(self, y):
        """The inverse of `scaled`."""
        return self.mix.inverse() @ y

    def in_models(self, y):
        """Decoder vectors or their sums [n, n_models, d_model] as each model's, scaled by its own scale."""
        return self.unscaled(y) * self.scale[:, None]

    def decoder_norm(self):
        """[d_hidden]: sum over the models of the norms of a latent's decoder vectors."""
        return self.W_dec.norm(dim=-1).sum(1)

    def product(self, x):
        """Scaled x [batch, n_models * d_model] -> x @ W_enc.T [batch, d_hidden], on CUDA in bfloat16."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return (x @ self.W_enc.flatten(1).T).to(x.dtype)

    def products(self, x):
        """`product` a few rows at a time: [batch, d_hidden] is never whole, and the rows are still cached."""
        for rows in x.split(self.rows_at_once):
            yield from self.product(rows).split(128)

    def dense_code(self, product, norm):
        """f [batch, d_hidden] of x @ W_enc.T and the decoder norms."""
        f = F.relu(product + self.b_enc)
        if self.variant == "vanilla":
            return f
        row, col, _ = self.pick(lambda: product.split(128), len(product), norm.detach())[0]
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
    def entries(self, products, norm, cut, dead=(), k_aux=0):
        """
        The latents whose score f * norm is over `cut`, in topk the k best of each row that are, as (row, col,
        f), each [n]; alike, for the auxiliary loss, the k_aux of the latents `dead` with the largest
        pre-activations in each row. products() yields x @ W_enc.T [rows, d_hidden], a few rows at a time.
        """
        bound = 0.9999 * cut / norm - self.b_enc  # a hair low, for rounding; exact below
        best, aux, start = [], [], 0
        for product in products():
            if self.variant == "topk":
                mask = largest(torch.addcmul(self.b_enc * norm, product, norm), self.k)
            else:  # comparing into floats is faster on a CPU than into bools
                mask = torch.gt(product, bound, out=torch.empty_like(product)).bool()
            row, col = mask.nonzero(as_tuple=True)
            best.append((start + row, col, product[row, col] + self.b_enc[col]))
            if len(dead):
                pre, at = (product[:, dead] + self.b_enc[dead]).topk(min(k_aux, len(dead)))
                row = torch.arange(start, start + len(pre), device=pre.device).repeat_interleave(pre.shape[1])
                aux.append((row, dead[at].flatten(), pre.flatten()))
            start += len(product)
        best, aux = ([torch.cat(column) for column in zip(*parts)] for parts in (best, aux))
        keep = (best[2] * norm[best[1]] > cut).nonzero().flatten()
        return [column[keep] for column in best], aux

    def pick(self, products, n_rows, norm, dead=(), k_aux=0):
        """
        `entries` by variant and mode. In training, batchtopk keeps the k * batch largest scores of all
        processes' rows without sorting all: what is under 0.9 of the last batch's smallest is passed over and
        looked at again if too few are left. So the set is that of a full sort; equal ones are kept together.
        """
        if self.variant != "batchtopk" or not self.training:
            return self.entries(products, norm, self.threshold, dead, k_aux)
        n_keep = self.k * n_rows * world()[1]
        for share in (0.9, 0.5, 0.0):
            best, aux = self.entries(products, norm, share * self.smallest, dead, k_aux)
            own_score = best[2] * norm[best[1]]
            mine = own_score.cpu() if world()[1] > 1 else own_score
            score = torch.cat(gather(mine)).to(norm.device)
            if len(score) >= n_keep:
                break
        if len(score):
            self.smallest.copy_(score.kthvalue(max(len(score) - n_keep, 0) + 1).values)
        keep = (own_score >= self.smallest).nonzero().flatten()
        return [column[keep] for column in best], aux

    def losses(self, x, l1_coeff=0.0, aux_coeff=0.0, k_aux=64, dead_after=math.inf, sparse=True):
        """
        The losses of a batch x, raw [batch, n_models, d_model]: `loss`, to be minimised, and its parts, all
        means over the batch of sums over the rest, of scaled activations. It is l2, in vanilla + l1_coeff *
        l1, + aux_coeff * aux, in which the dead latents, those that have not fired for dead_after tokens,
        reconstruct what x_hat lacks. Beside them: x and error = x_hat - x, scaled [batch, n_models, d_model],
        the number of the dead, how often each latent fired, [d_hidden], and the code, in the sparse step its
        row, col and f, each [n]. In training mode the buffers move on.
        """
        x, norm, batch = self.scaled(x).flatten(1), self.decoder_norm(), len(x)
        W_enc, W_dec, e_hat = self.W_enc.flatten(1), self.W_dec.flatten(1), []
        dead = (self.since_fired > dead_after).nonzero().flatten()
        revived = dead if aux_coeff else dead[:0]
        if sparse:
            code, aux = self.pick(lambda: self.products(x), batch, norm.detach(), revived, k_aux)
            n, (row, col, f) = len(code[0]), code
            if aux:  # in rows after those of the code
                row, col, f = (torch.cat(pair) for pair in zip(code, (batch + aux[0], *aux[1:])))
            n_rows, weights = batch * (2 if aux else 1), (W_enc, self.b_enc, W_dec)
            f, x_hat = SparseDecode.apply(x, *weights, row, col, f, n_rows, self.spare)
            (x_hat, *e_hat), code = x_hat.view(-1, *x.shape).unbind(), (row[:n], col[:n], f[:n])
            fired = code[1].bincount(minlength=len(norm))
            mass = torch.zeros_like(norm).index_add(0, code[1], code[2])
        else:
            product = self.product(x)
            code = f = self.dense_code(product, norm)
            x_hat, fired, mass = f @ W_dec, (f > 0).sum(0), f.sum(0)
            if len(revived):
                pre = product[:, revived] + self.b_enc[revived]
                e_hat = [(pre * largest(pre, k_aux)) @ W_dec[revived]]
        error = x_hat + self.b_dec.flatten() - x
        mean_square = lambda y: y.norm(dim=1).square().mean()
        l2_loss, l1_loss, l0_loss = mean_square(error), mass @ norm / batch, fired.sum() / batch
        aux_loss = mean_square(error.detach() + e_hat[0]) if e_hat else torch.zeros_like(l2_loss)
        aux_loss = aux_loss * min(len(dead) / k_aux, 1)
        loss = l2_loss + aux_coeff * aux_loss + (l1_coeff * l1_loss if self.variant == "vanilla" else 0)
        if self.training:
            silent = all_mean(fired.float()) == 0  # in all processes
            self.since_fired.copy_((self.since_fired + batch * world()[1]) * silent)
            self.threshold.lerp_(self.smallest, torch.where(self.threshold == 0, 1.0, 0.02))  # no sentinel
            self.l0.copy_(l0_loss)
        parts = dict(loss=loss, l2_loss=l2_loss, l1_loss=l1_loss, l0_loss=l0_loss, aux_loss=aux_loss)
        parts |= dict(x=x.unflatten(1, self.b_dec.shape), error=error.unflatten(1, self.b_dec.shape))
        return parts | dict(dead=len(dead), fired=fired, code=code)


# --- Measures -----------------------------------------------------------------------------------------------

LOSSES = ["loss", "l2_loss", "l1_loss", "l0_loss", "aux_loss"]


@torch.no_grad()
def sums(losses):
    """What `metrics` needs of model.losses(...), in a vector that adds up over batches and processes."""
    gram = lambda y: einsum(y, y, "row i d, row j d -> row i j").double().sum(0)
    rows = len(losses["x"]) * torch.stack([torch.ones_like(losses["loss"]), *(losses[key] for key in LOSSES)])
    moments = gram(losses["error"]), gram(losses["x"]), losses["x"].sum(0)
    return torch.cat([y.flatten() for y in (rows, *moments)])


def metrics(model, sums):
    """
    The losses, means over rows, and explained variances: 1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, a
    ratio of sums over all rows; in scaled units over all, and of each model and the last's difference from A.
    """
    n, d = model.b_dec.shape
    rows, error, square, total = sums.split([1 + len(LOSSES), n * n, n * n, n * d])
    error, total = error.view(n, n), total.view(n, d)
    variance = square.view(n, n) - total @ total.T / rows[0]
    row = dict(zip(LOSSES, (rows[1:] / rows[0]).tolist()))
    row["explained_variance"] = (1 - error.trace() / variance.trace()).item()
    models = model.mix.double().inverse()  # each in terms of what error and variance are of
    for name, part in zip([*"ABCDEFGH"[:n], "difference"], [*models, models[-1] - models[0]]):
        if (of_part := part @ variance @ part) > 0:
            row[f"explained_variance_{name}"] = (1 - part @ error @ part / of_part).item()
    return row


def relative_norm(W):
    """Decoder vectors W [n, 2, d_model] -> ||W[:, 1]|| / (||W[:, 0]|| + ||W[:, 1]||)."""
    norm = W.norm(dim=-1)
    return norm[:, 1] / norm.sum(1)


def one_sided(relative_norm):
    """Masks of the relative norms of latents that the base model, and that the fine-tuned one has alone."""
    return relative_norm < 0.1, relative_norm > 0.9


@torch.no_grad()
def validate(model, data, l1_coeff):
    """
    Of held-out rows, in inference mode: metrics, how often each latent fires [d_hidden], and the code of each
    of the blocks of data.validation(), sparse [rows, d_hidden].
    """
    training, total, fired, codes = model.training, 0, 0, []
    model.eval()
    for x in data.validation():
        losses = model.losses(x.to(model.mix.device), l1_coeff)
        total, fired = total + sums(losses), fired + losses["fired"]
        codes.append(csr(*losses["code"], (len(x), len(fired))))
    model.train(training)
    row = metrics(model, total) | dict(dead_latents=(fired == 0).sum().item())
    del row["aux_loss"]  # there is none in inference
    return row, fired / sum(map(len, codes)), codes


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
        f, x = code.to_dense()[:, latents], model.scaled(x.to(D.device))
        x_hat = times(code, model.W_dec.flatten(1)).view_as(x) + model.b_dec
        y = torch.stack([model.in_models(x_hat), model.in_models(x - x_hat)])
        sums = sums + einsum(f, y, "row latent, kind row model d -> kind latent model d")
        squares = squares + f.square().sum(0)
    # All betas are over the same squares * ||d||^2, which nu does not need.
    beta = einsum(sums, D[n, own], "kind latent model d, latent d -> kind latent model")
    beta[1] += squares[:, None] * einsum(D, D[n, own], "latent model d, latent d -> latent model")
    return beta[:, n, 1 - own] / beta[:, n, own]


# --- Report -------------------------------------------------------------------------------------------------

STYLE = """:root { color-scheme: light dark } h1 { font-size: 1.3rem } h2 { font-size: 1.1rem }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
table, .pictures { border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px }
td, th { padding: .2rem .6rem; text-align: right; vertical-align: top; border-top: 1px solid #8884 }
.run { columns: 18rem; font-size: 13px; overflow-wrap: anywhere; margin-bottom: 1rem }
.texts { text-align: left; white-space: pre-wrap; min-width: 16rem }
mark { background: rgb(255 140 0 / var(--a)); color: inherit }"""


def pictures(table, shared, rows):
    """Histograms of the latents over curves of the training, as an SVG with the page's own text colour."""
    from matplotlib import pyplot, rc_context

    ends, cosine = "(0: base alone, 1: fine-tuned alone)", table.cosine[shared]
    histograms = {f"relative decoder norm {ends}": (table.relative_norm, (0, 1))}
    histograms |= {"cosine of d_A and d_B, of shared latents": (cosine, (-1, 1))}
    histograms |= {"log10 of firing frequency": (np.log10(table.frequency), (-6, 0))}
    curves = pd.DataFrame(rows, columns=["step", "loss", "explained_variance", "l0_loss"]).dropna()
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 8} | dict.fromkeys(ink, "#010203")
    with rc_context(style):
        figure, (above, below) = pyplot.subplots(2, 3, figsize=(11, 4.5), layout="constrained")
        for axes, (name, (values, span)) in zip(above, histograms.items()):
            axes.hist(values, bins=50, range=span, log=len(values) > 0)
            axes.set(xlabel=name, ylabel="latents", ylim=(0.5, None))
        for axes, name in zip(below, curves.columns[1:]):
            axes.plot(curves.step, curves[name])
            axes.set(xlabel="step", ylabel=name)
        figure.savefig(svg := io.StringIO(), format="svg", transparent=True, metadata=dict(Date=None))
        pyplot.close(figure)
    svg = svg.getvalue().replace("#010203", "currentColor")
    return f'<div class="pictures">{svg[svg.index("<svg") :]}</div>'


def examples(data, f, decode):
    """HTML of the texts around five tokens with the largest f [held-out rows], each of another text."""
    rows = pd.DataFrame(dict(doc=data.doc[data.n_train :], pos=data.pos[data.n_train :], f=f.cpu() / f.max()))
    rows = rows[rows.f > 0].sort_values("f", ascending=False, kind="stable")
    share, lines = dict(zip(zip(rows.doc, rows.pos), rows.f)), []
    for doc, pos in rows.drop_duplicates("doc")[["doc", "pos"]].head(5).to_numpy().tolist():
        around = list(enumerate(data.docs[doc]))[max(0, pos - 16) : pos + 9]
        tokens = [(html.escape(decode([i]).replace("\n", "↵")), share.get((doc, at), 0)) for at, i in around]
        lines.append("".join(f'<mark style="--a:{a:.2f}">{token}</mark>' for token, a in tokens))
    return f'<div class="texts">{"<br>".join(lines)}</div>'


@torch.no_grad()
def latent_table(model, data, frequency, codes):
    """A DataFrame of the alive latents; nu_r, nu_epsilon and what they confirm are of the exclusive ones."""
    D, raw = model.in_models(model.W_dec), model.unscaled(model.W_dec)
    columns = dict(relative_norm=relative_norm(D), cosine=F.cosine_similarity(D[:, 0], D[:, 1], dim=-1))
    columns["change"] = (raw[:, 1] - raw[:, 0]).norm(dim=-1) / raw.norm(dim=-1).sum(1)
    table = pd.DataFrame({name: y.cpu() for name, y in (columns | dict(frequency=frequency)).items()})
    table = table[table.frequency > 0].rename_axis("latent")
    exclusive = np.logical_or(*one_sided(table.relative_norm))
    if exclusive.any():
        latents = torch.tensor(table.index[exclusive], device=D.device)
        nu = latent_scaling(model, data.validation(), codes, latents)
        table.loc[exclusive, ["nu_r", "nu_epsilon"]] = nu.T.cpu().numpy()
        confirmed = np.where((table.nu_r < 0.5) & (table.nu_epsilon < 0.2), "yes", "no")
        table["confirmed"] = pd.Series(confirmed, table.index).where(exclusive)
        table = table.sort_values(["confirmed", "frequency"], ascending=False)
    return table


def report(model, data, config, log, row, frequency, codes):
    """Writes OUT/report.html, what the models share, what each has alone and what changed, and returns it."""
    table = latent_table(model, data, frequency, codes)
    (base, finetuned), shared = one_sided(table.relative_norm), table.relative_norm.between(0.4, 0.6)
    verdict = f"of {len(frequency):,} latents {len(table):,} are alive: {shared.sum():,} shared, "
    verdict += f"{base.sum():,} base-only, {finetuned.sum():,} fine-tuned-only"
    n_confirmed = (table.confirmed == "yes").sum() if "confirmed" in table else None
    verdict += ": no exclusive latents" if n_confirmed is None else f", {n_confirmed:,} of them confirmed"
    often = table.frequency >= min(20 / config["val_tokens"], 0.01)
    lists = {
        "Fine-tuned-only latents, confirmed first": table[finetuned],
        "Base-only latents, confirmed first": table[base],
        "Other latents that changed most": table[often & ~base & ~finetuned].sort_values("change")[::-1],
        "Shared latents that rotated most": table[often & shared].sort_values("cosine"),
    }
    lists = {title: latents.head(20).dropna(axis=1) for title, latents in lists.items() if len(latents)}
    if data.docs and lists:
        decode, safe = str, dict(local_files_only=True, trust_remote_code=False)  # a stranger's name
        with contextlib.suppress(Exception):  # of many kinds; ids are shown then
            decode = AutoTokenizer.from_pretrained(data.meta["tokenizer"], **safe).decode
        shown = pd.concat(
            lists.values()
        ).index.unique()  # one pass over the codes, for the latents of all lists
        f = torch.cat([code.to_dense()[:, shown] for code in codes])
        texts = dict(zip(shown, (examples(data, f_j, decode) for f_j in f.T)))
        for latents in lists.values():
            latents.insert(0, "texts", latents.index.map(texts))
    names = ("base", "finetuned", "hooks", "data", "variant", "basis", "k")
    facts = {key: value for key, value in (data.meta | config).items() if key in names}
    facts |= {key: f"{value:.4g}" for key, value in row.items()}
    page = ['<!doctype html><html lang="en"><meta charset="utf-8"><title>What fine-tuning changed</title>']
    page += ['<meta name="viewport" content="width=device-width">', f"<style>{STYLE}</style>"]
    page += [f'<h1>{verdict}</h1><div class="run">']
    with pd.option_context("display.max_colwidth", None, "display.float_format", "{:.4g}".format):
        page += [f"<div>{key}: {html.escape(str(value))}</div>" for key, value in facts.items()] + ["</div>"]
        page += [pictures(table, shared, log.rows)]
        for title, latents in lists.items():
            page += [f"<h2>{title}</h2>", latents.reset_index().to_html(index=False, escape=False, border=0)]
    page = "\n".join(page)
    write_atomically(log.out / "report.html", lambda part: part.write_text(page, encoding="utf-8"))
    print(f"{verdict}\nreport: {log.out / 'report.html'}")
    return page


# --- Training -----------------------------------------------------------------------------------------------


def warmup_factor(step, config):
    return min(1, (step + 1) / max(1, config["warmup"] * config["steps"]))


def lr_factor(step, config):
    """Linear warm-up, constant, linear to 0 at the end."""
    left = (config["steps"] - step) / max(1, config["decay"] * config["steps"])
    return min(warmup_factor(step, config), left)


def resolve(config):
    """The config with its by-rule values filled in; ends the program if two values do not go together."""
    config, tokens = dict(config), config["steps"] * config["batch_size"]
    if config["k"] > config["d_hidden"] and config["variant"] != "vanilla":
        fail(f"--k={config['k']} is larger than --d_hidden={config['d_hidden']}")
    if config["batch_size"] % world()[1]:
        fail(f"--batch_size={config['batch_size']} is no multiple of the number of processes, {world()[1]}")
    if config["aux_coeff"] < 0:
        config["aux_coeff"] = 0.0 if config["variant"] == "vanilla" else 1 / 32
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

    def __init__(self, config, state):
        when = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
        name = config["out_dir"] or f"out/{Path(config['data']).name}-{config['variant']}-{when}"
        self.out = out = Path(name)
        if not config["resume"] and (out / "metrics.jsonl").exists():
            go_on = "go on with it by --resume=True" if (out / "checkpoint.pt").exists() else "delete it"
            fail(f"--out_dir={out} already holds a run: {go_on}, or give another name")
        out.mkdir(parents=True, exist_ok=True)
        config["out_dir"], self.rows, self.has_wandb = str(out), state["rows"], True
        print("\n".join(f"{key} = {value!r}" for key, value in config.items()))
        text = "".join(json.dumps(row) + "\n" for row in self.rows)  # those after the checkpoint come again
        write_atomically(out / "metrics.jsonl", lambda part: part.write_text(text))
        os.environ.setdefault("WANDB_SILENT", "true")
        options = dict(project=config["wandb_project"], mode=config["wandb_mode"], name=out.name, dir=out)
        self.to_wandb(wandb.init, **options, config=config, id=state["wandb_id"], resume="allow")

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
        self.rows.append(dict(step=step) | {prefix + key: value for key, value in row.items()})
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        self.to_wandb(wandb.log, self.rows[-1], step=step)


def build(config, state, device):
    """The data, and a crosscoder with its optimiser and schedule, new or as the state of a run has them."""
    torch.manual_seed(config["seed"])
    if config["data"] == "stream":
        from collect import Stream

        data = Stream(config, state["texts_read"])
    else:
        data = Toy(config) if config["data"] == "toy" else Store(config)
    if config["ce_eval"] and not data.docs:
        fail("--ce_eval=True takes the texts of a store that collect.py wrote")
    try:
        options = {key: config[key] for key in ("d_hidden", "variant", "k", "basis")}
        model = CrossCoder(data.n_models, data.d_model, **options).to(device)
        groups = [dict(params=model.parameters(), lr=config["lr"], initial_lr=config["lr"])]
        optimizer = torch.optim.Adam(groups, betas=(config["beta1"], config["beta2"]), fused=True)
        if config["resume"]:  # of the optimiser only its moments: rates are the config's
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(optimizer.state_dict() | dict(state=state["moments"]))
            torch.set_rng_state(state["random_state"])
        else:
            model.start_at(data.batch(0).to(device), data.scale.to(device))
        factor = lambda step: lr_factor(step, config)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=state["step"] - 1)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        fail(f"data, config and checkpoint do not fit each other: {' '.join(str(e).split())[:300]}")
    return data, model, optimizer, scheduler


def train(config, checkpoint=None):
    """Trains by the config, from the checkpoint if one is given, and returns the crosscoder, in eval mode."""
    warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
    torch.backends.cuda.matmul.allow_tf32 = True
    device = set_up(config)
    state = checkpoint or dict(step=0, rows=[], texts_read=0, wandb_id=os.urandom(4).hex())
    config, rank = resolve(config), world()[0]
    data, model, optimizer, scheduler = build(config, state, device)
    start, steps, batch_size = state["step"], config["steps"], config["batch_size"]
    log = Log(config, state) if rank == 0 else None
    logged_at, logged_step, found = time.perf_counter(), start, None

    for step, x in prefetched(data, range(start, steps), device):
        l1_coeff, lr = config["l1_coeff"] * warmup_factor(step, config), scheduler.get_last_lr()[0]
        auto = device.type == "cpu" and model.l0 < 0.04 * config["d_hidden"]  # where the two cost the same
        sparse = auto if config["sparse"] == "auto" else config["sparse"] == "True"
        weights = (model.W_enc, model.W_dec) if sparse else ()
        model.spare = [p.grad.flatten(1) for p in weights if p.grad is not None]
        optimizer.zero_grad()
        losses = model.losses(x, l1_coeff, config["aux_coeff"], config["k_aux"], config["dead_after"], sparse)
        losses["loss"].backward()
        for p in model.parameters():  # all are ready at once: there is nothing to overlap this with
            all_mean(p.grad)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"] or math.inf)
        if not grad_norm.isfinite():
            largest, loss = x.double().norm(dim=-1).max(), losses["loss"].item()
            said = f"loss {loss:.3g}, --lr={lr:.3g}, largest norm of a row {largest:.3g}"
            fail(f"step {step}: the gradient is not finite ({said}); the last checkpoint is whole")
        optimizer.step()
        scheduler.step()
        step += 1
        stop = all_mean(torch.tensor(float(len(stop_signals)), device=device)) > 0  # of any process
        due = lambda every, step=step: step == steps or (every and step % every == 0)

        if due(config["log_every"]):
            speed = batch_size * (step - logged_step) / (time.perf_counter() - logged_at)
            row = metrics(model, all_mean(sums(losses)))
            row |= dict(l1_coeff=l1_coeff, lr=lr, dead_latents=losses["dead"], grad_norm=grad_norm.item())
            row |= dict(threshold=model.threshold.item(), tokens=step * batch_size, tokens_per_second=speed)
            if rank == 0:
                log(step, row)
            logged_at, logged_step = time.perf_counter(), step
        if rank == 0 and config["val_tokens"] and due(config["eval_every"]):
            found = validate(model, data, l1_coeff)
            log(step, found[0], "val/")
        if rank == 0 and (due(config["save_every"]) or stop):
            state |= dict(config=config, step=step, rows=log.rows, texts_read=data.texts_read)
            state |= dict(model=model.state_dict(), moments=optimizer.state_dict()["state"])
            state |= dict(random_state=torch.get_rng_state())
            write_atomically(log.out / "checkpoint.pt", functools.partial(torch.save, state))
        if stop and step < steps:
            if rank == 0:
                log.to_wandb(wandb.finish)
                print(f"stopped at step {step}: go on by --resume=True --out_dir={log.out}", file=sys.stderr)
            raise SystemExit(128 + (stop_signals or [signal.SIGTERM])[0])

    model.eval()
    if rank == 0:
        finish(model, data, config, log, found)
    return model


def finish(model, data, config, log, found):
    """Saves the weights and reports, by what validate found or, of a run that was finished before, finds."""
    write_atomically(log.out / "crosscoder", model.save_pretrained)
    if config["val_tokens"]:
        row, frequency, codes = found or validate(model, data, config["l1_coeff"])
        if config["ce_eval"]:
            from collect import loss_recovered

            log(config["steps"], recovered := loss_recovered(model, data), "val/")
            row |= recovered
        page = report(model, data, config, log, row, frequency, codes)
        log.to_wandb(lambda: wandb.log(dict(report=wandb.Html(page)), step=config["steps"]))
        if config["data"] == "toy":
            print(*data.score(model, frequency), sep="\n")
    print(f"weights: CrossCoder.from_pretrained({str(log.out)!r})")
    log.to_wandb(wandb.finish)


stop_signals = []  # received so far


def stop_soon(number, _):
    """Handler of a signal: training ends after its step, or at the second signal at once."""
    stop_signals.append(number)
    signal.signal(number, signal.SIG_DFL)


def read_config(argv):
    """The config as argv has it, for a stream with the keys of collect.py."""
    defaults, values = config, allowed
    if "--data=stream" in argv:
        import collect

        defaults, values = collect.config | config, collect.allowed | allowed
    return defaults | read_command_line(defaults, values, argv, __file__)


def main(argv):
    settings, checkpoint = read_config(argv), None
    if settings["resume"]:
        path = Path(settings["out_dir"]) / "checkpoint.pt"
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # which runs no code
            saved, rows = dict(checkpoint["config"]), [dict(row) for row in checkpoint["rows"]]
            ids = dict(wandb_id=str(checkpoint["wandb_id"]), texts_read=int(checkpoint["texts_read"]))
            checkpoint |= dict(rows=rows) | ids
        except Exception as e:  # of many kinds
            fail(f"--out_dir: {path} is no checkpoint, or not whole: {first_line(e)}")
        saved.pop("trust_remote_code", None)  # nor lets any in
        settings = read_config([f"--{key}={value}" for key, value in saved.items()] + argv)
        for key in ("data", "variant", "basis", "d_hidden", "seed"):
            if settings[key] != saved.get(key):
                fail(f"--{key}={settings[key]}: this run has {saved.get(key)}, and resuming cannot change it")
    return train(settings, checkpoint)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_soon)
    try:
        main(sys.argv[1:])
    except OSError as e:  # of a disk or a folder
        fail(f"{e}. What was saved before is whole")

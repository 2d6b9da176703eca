"""Trains a crosscoder: one sparse dictionary for the activations of a base model (A) and of the
model fine-tuned from it (B). Each latent has one decoder vector per model. If its vector in A is 0,
the latent is something that fine-tuning added.

    python train.py --variant=batchtopk --k=32              # a toy with planted features
    python train.py --data=acts --d_hidden=16384            # activations stored by collect.py
    python train.py --resume=True --out_dir=out/RUN         # continues a run
    torchrun --standalone --nproc_per_node=2 train.py ...   # the same on several processes

--key=value sets any key of the config below. A run writes one folder: metrics.jsonl,
checkpoint.pt, the weights (for CrossCoder.from_pretrained), wandb/ and the page of report.py.

Crosscoders: transformer-circuits.pub/2024/crosscoders. BatchTopK: arXiv 2412.06410. Auxiliary
loss: arXiv 2406.04093. Dedicated latents: arXiv 2602.11729.
"""

import ast
import contextlib
import difflib
import json
import os
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

# Huge pages save a tenth of a step. Torch reads this variable once, when it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
import wandb
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes, reduce
from datasets import load_from_disk
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import save_model
from torch import nn

# --- Config, command line, files ------------------------------------------------------------------

config = dict(
    # I/O and logging
    out_dir="",  # folder of the run; empty: a new one, out/DATA-VARIANT-TIME
    resume=False,  # continue the run in out_dir; other keys that are given override its own
    save_every=0,  # steps between checkpoints; 0: every ten minutes
    log_every=50,  # steps between rows of metrics
    eval_every=500,  # steps between validations (first 8,192 held-out rows); the last step has one
    wandb_mode="offline",  # offline, online or disabled
    wandb_project="crosscoder",  # name of the project in wandb
    # data
    data="toy",  # toy, a store's path, or stream (collects while training, takes collect.py's keys)
    places="base,finetuned",  # datasets of the store, such as base_7,finetuned_7; the first is A
    val_tokens=-1,  # rows held out; 0: none; -1: 1% (8,192 to 1M), or a tenth of a small store
    rows_together=1,  # rows shuffled as one: take 64 to 256 if the store is larger than memory
    batch_size=1024,  # tokens per step, over all processes
    # model and losses
    variant="batchtopk",  # vanilla (ReLU and L1), topk or batchtopk
    basis="plain",  # plain: (A, B); delta: (A, B - A); difference: B - A; scaled to the same norm
    d_hidden=512,  # number of latents
    dedicated=0.0,  # share of latents that only A may use; B gets the same share for itself
    k=32,  # active latents per token: at most (topk) or on average over the batch (batchtopk)
    l1_coeff=2.0,  # weight of the L1 loss (vanilla)
    aux_coeff=1 / 32,  # weight of the auxiliary loss, which revives dead latents
    k_aux=64,  # dead latents per token that the auxiliary loss uses
    dead_after=0,  # tokens without firing until a latent is dead; 0: 5% of all, at most 10M
    # optimiser
    steps=1500,  # number of batches
    lr=0.0,  # peak learning rate; 0: 3e-3 * sqrt(512 / d_hidden)
    beta1=0.9,  # Adam's decay of the mean gradient
    beta2=0.999,  # Adam's decay of the mean squared gradient
    grad_clip=1.0,  # largest norm of the gradient; 0: no limit
    # system
    device="auto",  # auto (cuda if there is one), cpu or cuda
    seed=0,  # seeds the weights, the order of the rows and the toy
)
# Allowed values. Other numbers are finite and at least 0, or at least 1 if they are whole and their
# default is at least 1.
below_1 = pd.Interval(0, 1, closed="left")
allowed = dict(
    batch_size=pd.Interval(2, 1e9, closed="left"),  # a variance takes two rows
    val_tokens=pd.Interval(-1, 1e7, closed="left"),
    dedicated=pd.Interval(0, 0.5, closed="both"),
    beta1=below_1,
    beta2=below_1,
    wandb_mode=["offline", "online", "disabled"],
    variant=["vanilla", "topk", "batchtopk"],
    basis=["plain", "delta", "difference"],
)

# Share of active latents above which dense products are faster than sparse ones. The CPU's is
# measured. CUDA's is estimated, from the bandwidth and arithmetic of an H100.
DENSE = dict(cpu=1 / 20, cuda=1 / 500)


def fail(message):
    """Ends the program because of a mistake of its user: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def explain(what, kind=Exception):
    """Turns an exception of a library, raised while reading user input, into a one-line error."""
    try:
        yield
    except kind as e:
        fail(f"{what}: {' '.join(str(e).split())[:300] or type(e).__name__}")


def read_command_line(argv, file):
    """Returns {key: text} for the --key=text in argv. --help prints `file` down to its config."""
    if "--help" in argv or "-h" in argv:
        print(Path(file).read_text(encoding="utf-8").partition("\n)\n")[0])
        raise SystemExit(0)
    given = {}
    for argument in argv:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            fail(f"{argument}: write --{key.lstrip('-')}=VALUE")
        given[key] = text
    return given


def checked(values, defaults, allowed):
    """Returns the defaults, updated with `values` {key: value or its text}. Ends the program at an
    unknown key, a value that is not of its default's type, or one that is not allowed.
    """
    settings = dict(defaults)
    for key, value in values.items():
        if key not in defaults:
            near = difflib.get_close_matches(key.strip("-"), defaults, n=1, cutoff=0)[0]
            fail(f"{key}: expected --key=value, the nearest key is --{near}")
        default = defaults[key]
        kind = type(default)
        what = f"--{key}={value}: expected {kind.__name__} {allowed.get(key, '')}"
        with explain(what):
            if kind is not str:
                value = ast.literal_eval(str(value))
            new = kind(value)  # --steps=1e6 is an int, too
            assert new == value and isinstance(value, bool) == (kind is bool), "another type"
            least = 1 if kind is int else 0
            assert kind is str or min(least, default) <= new < 1e15, "too small or too large"
            assert new in allowed.get(key, [new]), "not allowed"
        settings[key] = new
    return settings


def set_up(name):
    """Returns this process's device, and connects the processes that torchrun started."""
    device = PartialState(cpu=name == "cpu" or not torch.cuda.is_available()).device
    if name not in ("auto", device.type):
        fail(f"--device={name}: the device here is {device}")
    return device


def write_atomically(path, write):
    """Writes a file by write(temporary path), then renames it: `path` is never half-written."""
    part = path.with_name(path.name + ".part")
    try:
        with explain(f"{path} cannot be written (is there room on the disk?)"):
            write(part)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# --- Data: raw activations, as the models put them out --------------------------------------------

# For data of your own, call train(config, data=...) with an object that has n_models and d_model;
# held_out (batches [n, n_models, d_model], which each validation iterates over); and batch(step),
# which returns this process's rows [n, n_models, d_model]. A thread calls batch one step ahead. If
# the same step always gives the same rows, a resumed run ends as an uninterrupted one.


def share(rows):
    """Returns this process's part of the rows of a batch."""
    process = PartialState()
    n = len(rows) // process.num_processes
    return rows[n * process.process_index :][:n]


class Toy:
    """Sparse sums of 256 planted features: A and B share 192, and each has 32 of its own."""

    n_models = 2
    d_model = 128
    kind = ["shared"] * 192 + ["base-only"] * 32 + ["fine-tuned-only"] * 32  # [feature]

    def __init__(self, config):
        self.config = config
        g = torch.Generator().manual_seed(config["seed"])
        d = F.normalize(torch.randn(256, 2, self.d_model, generator=g), dim=-1)
        d[:, 1] = F.normalize(d[:, 0] + 0.2 * d[:, 1], dim=-1)  # B turns by 11 degrees
        d[192:] *= 2**0.5  # so that all features have the same norm over both models
        d[192:224, 1] = 0
        d[224:, 0] = 0
        self.directions = d  # [feature, model, d_model]
        self.held_out = self.rows(config["val_tokens"], key=0).split(1024)

    def rows(self, n, key):
        """Returns n rows [n, model, d_model], which depend on the seed and the key alone."""
        rng = np.random.default_rng([self.config["seed"], key])
        f = rng.lognormal(0, 0.25, (n, 256))
        f *= rng.random((n, 256)) < 28 / 256  # 28 features are active on average
        x = np.tensordot(f, self.directions, axes=1)
        return torch.from_numpy(x + 0.02 * rng.standard_normal(x.shape)).float()

    def batch(self, step):
        return share(self.rows(self.config["batch_size"], key=step + 1))


def view_of(lists):
    """Returns a numpy view [rows, d_model] of an Arrow array of lists, which copies nothing."""
    lengths = pc.list_value_length(lists).unique().to_pylist()  # reshape takes no more than one
    return lists.flatten().to_numpy().reshape(len(lists), *lengths)


class Store:
    """Reads a folder with one Hugging Face dataset per model. The column `activation` has lists of
    d_model floats. All other columns must be equal in the datasets, because row i is the same token
    in each. Random docs (texts, or pieces of long ones) are held out whole: val_tokens rows, or
    just over. Every epoch shuffles the training rows anew. It leaves out the last few, which do not
    fill a batch.
    """

    def __init__(self, config):
        self.config = config
        self.names = config["places"].split(",")
        self.n_models = len(self.names)
        self.path = Path(config["data"])
        what = f"--data={self.path}: neither toy, nor stream, nor a store of aligned rows of floats"
        with explain(what):
            tables = [load_from_disk(self.path / name).data.table for name in self.names]
            self.columns, *others = [table.drop_columns("activation") for table in tables]
            n = len(tables[0])
            for other in others:
                assert len(other) == n, f"{n} and {len(other)} rows"
                for name in set(self.columns.column_names) | set(other.column_names):
                    if self.columns[name] != other[name]:  # says where they first differ
                        np.testing.assert_array_equal(self.columns[name], other[name], name)
            activations = pa.table([table["activation"] for table in tables], names=self.names)
            batches = activations.to_batches()  # with the same rows of every model
            self.views = [[view_of(lists) for lists in batch.columns] for batch in batches]
            self.starts = np.cumsum([0] + [len(batch) for batch in batches])
            widths = {view.shape[1] for views in self.views for view in views}
            assert len(widths) == 1, f"activations of d_model {widths}"
            self.d_model = widths.pop()
            self.dtype = np.result_type(*self.views[0])
            if "doc" in self.columns.column_names:
                doc = self.columns["doc"].to_pandas()
            else:
                doc = pd.Series(np.arange(n) // 64)  # neighbours may be of one text
            n_held_out = config["val_tokens"]
            if n_held_out < 0:
                n_held_out = np.clip(n // 100, min(8192, n // 10), 1_000_000)
            sizes = doc.value_counts(sort=False).sample(frac=1, random_state=0)
            is_held_out = doc.isin(sizes.index[sizes.cumsum() - sizes < n_held_out])
            self.train_rows = np.flatnonzero(~is_held_out)
            self.val_rows = np.flatnonzero(is_held_out)
        left = len(self.train_rows)
        if left < config["batch_size"]:
            fail(f"{left} of {n} rows are left, fewer than --batch_size: docs are held out whole")
        passes = config["steps"] * config["batch_size"] / left
        if passes > 5:
            print(f"{passes:.0f} passes over {left:,} rows: more rows would tell more")

    @lru_cache(2)
    def shuffled(self, epoch):
        """Returns the training rows in the order of that epoch."""
        together = min(self.config["rows_together"], len(self.train_rows))
        rng = np.random.default_rng([self.config["seed"], epoch])
        padded = np.pad(self.train_rows, (0, -len(self.train_rows) % together), constant_values=-1)
        rows = rng.permutation(padded.reshape(-1, together)).ravel()
        return rows[rows >= 0]

    def read(self, rows, check=True):
        """Returns raw activations [n, model, d_model] of sorted rows, in the store's float type.
        Ends the program at a row with nan or inf. check=False does not look for them, because that
        takes longer than to read.
        """
        raw = np.empty((self.n_models, len(rows), self.d_model), self.dtype)
        at = rows.searchsorted(self.starts)
        for views, start, lo, hi in zip(self.views, self.starts, at, at[1:]):
            if lo < hi:
                for model, view in enumerate(views):
                    raw[model, lo:hi] = view[rows[lo:hi] - start]
        raw = torch.from_numpy(raw).transpose(0, 1)
        if check:
            bad = rows[~raw.isfinite().flatten(1).all(1).numpy()]
            if len(bad):
                fail(f"{self.path}: row {bad[0]} holds nan or inf")
        return raw

    @property
    def held_out(self):
        """Yields the held-out rows in batches, in the order of the store."""
        for rows in np.split(self.val_rows, range(1024, len(self.val_rows), 1024)):
            yield self.read(rows)

    def rows(self, step):
        """Returns the rows of this process's part of a batch. Sorted ones are read faster, and the
        order within a batch means nothing.
        """
        size = self.config["batch_size"]
        epoch, i = divmod(step, len(self.train_rows) // size)
        rows = np.sort(self.shuffled(epoch)[i * size : (i + 1) * size])
        return share(rows)

    def batch(self, step):
        return self.read(self.rows(step), check=False)


# --- Crosscoder -----------------------------------------------------------------------------------


def mean_size(x):
    """Returns the mean norm of x [batch, n, d], divided by sqrt(d): [n]."""
    return x.norm(dim=-1).mean(0) / x.shape[-1] ** 0.5


def topk_places(y, k):
    """Returns the places (rows, columns) of the k largest numbers in each row of y [batch, n]."""
    columns = y.topk(min(k, y.shape[1]), sorted=False).indices
    rows = torch.arange(len(y), device=y.device)[:, None].expand_as(columns)
    return rows.flatten(), columns.flatten()


def nth_largest(y, n):
    """Returns the n-th largest number of y [any], or 0 if fewer are over 0."""
    return F.pad(y, (0, n)).topk(n, sorted=False).values.min()


# coders: config.json takes numpy's numbers, too
class CrossCoder(nn.Module, PyTorchModelHubMixin, coders={np.generic: (np.generic.item, None)}):
    """A sparse dictionary for the activations of n_models models. encode, decode, forward and
    losses work on raw activations [batch, n_models, d_model], which they scale first.

    Parameters: W_enc and W_dec [d_hidden, n_models, d_model], b_enc [d_hidden] and b_dec [n_models,
    d_model]. Buffers: to_scaled [n_models, n_models] maps raw activations to scaled ones; in the
    basis "delta" it also subtracts A from B. scale [n_models] is sqrt(d_model) / mean norm of each
    model's activations; `in_models` uses it. The basis "difference" leaves A out: W_enc, W_dec,
    b_dec, mask and the rows of to_scaled are of the other n_models - 1. mask [d_hidden, n_models,
    1] is 0 for a model that a dedicated latent must not use. The first latents are A's own, the
    next ones B's. since_fired [d_hidden] counts the tokens since each latent fired. threshold [] is
    a running mean of the lowest score (pre-activation * decoder norm) that batchtopk keeps. In eval
    mode it keeps the scores >= threshold instead, so that a token's code does not depend on its
    batch.
    """

    def __init__(
        self, n_models, d_model, d_hidden, variant="batchtopk", k=32, basis="plain", dedicated=0.0
    ):
        super().__init__()
        assert variant in allowed["variant"]
        self.variant = variant
        self.k = k
        self.basis = basis
        self.dedicated = dedicated
        to_scaled = torch.eye(n_models)
        if basis != "plain":
            to_scaled[1:, 0] = -1  # B - A
        if basis == "difference":
            to_scaled = to_scaled[1:].clone()
        n = len(to_scaled)
        n_own = min(round(dedicated * d_hidden), d_hidden // n)
        mask = torch.ones(d_hidden, n, 1)
        mask[: n * n_own, :, 0] = torch.eye(n).repeat_interleave(n_own, dim=0)
        self.mask = nn.Buffer(mask, persistent=False)
        W = 0.5 * F.normalize(torch.randn(d_hidden, n, d_model), dim=-1) * mask
        self.W_dec = nn.Parameter(W)
        self.W_enc = nn.Parameter(W.clone())
        self.b_enc = nn.Parameter(torch.zeros(d_hidden))
        self.b_dec = nn.Parameter(torch.zeros(n, d_model))
        self.scale = nn.Buffer(torch.ones(n_models))
        self.to_scaled = nn.Buffer(to_scaled)
        self.threshold = nn.Buffer(torch.zeros(()))
        self.since_fired = nn.Buffer(torch.zeros(d_hidden, dtype=torch.long))

    def _save_pretrained(self, folder):
        write_atomically(folder / "model.safetensors", partial(save_model, self))

    @torch.no_grad()
    def start_at(self, raw):
        """Fits the scales and biases of a new model, in training mode, to the first batch, and its
        threshold to 32 rows of it. Each process uses the rows of all, so that the number of
        processes does not matter.
        """
        raw = gather(raw.to(self.scale))
        self.scale.copy_(1 / mean_size(raw))
        self.to_scaled /= mean_size(self.scaled(raw))[:, None]
        x = self.scaled(raw)
        if not (x.var(0).mean(-1) > 1e-9).all():  # this catches nan, too
            fail(
                "nothing to explain: rows are alike or too large, or the models do not differ here"
            )
        # start at the mean, pre = W_enc @ (x - mean): few latents die then
        self.b_dec.copy_(x.mean(0))
        self.b_enc.copy_(-self.W_enc.flatten(1) @ self.b_dec.flatten())
        self.encode(raw[:32])  # sets a first threshold
        self.since_fired.zero_()

    def scaled(self, raw):
        """Returns the scaled activations x, which the parameters work on. Both are [batch,
        n_models, d_model], x with one model less in the basis "difference". The product is in
        float64, because with TF32 CUDA would round A and B to ten bits before it takes B - A.
        """
        raw = raw.to(self.to_scaled.device).double()
        return (self.to_scaled.double() @ raw).to(self.to_scaled)

    def unscaled(self, x):
        """Returns raw activations, as the inverse of `scaled`. In the basis "difference", A is 0
        and B is B - A.
        """
        n, n_models = self.to_scaled.shape
        to_raw = self.to_scaled[:, -n:].double().inverse()  # [n, n]
        to_raw = F.pad(to_raw, (0, 0, n_models - n, 0))  # A is 0 where it is left out
        return (to_raw @ x.double()).to(x)

    def in_models(self, W):
        """Returns decoder vectors W, such as W_dec, as directions in each model's raw activations
        [d_hidden, n_models, d_model], times the model's scale, so that models can be compared.
        """
        return self.unscaled(W) * self.scale[:, None]

    def decoder_norm(self):
        """Returns the norms of each latent's decoder vectors, summed over models [d_hidden]."""
        return self.W_dec.norm(dim=-1).sum(1)

    def flat(self, W):
        """Returns W * mask as [d_hidden, n_models * d_model]: what is masked gets no gradient."""
        return (W * self.mask if self.dedicated else W).flatten(1)

    def activate(self, pre, latent):
        """Returns f. Change this for another activation. pre and latent are the values and
        latents of a SparseCode: [n] and [n], or [batch, d_hidden] and [d_hidden] if it is dense.
        Take a parameter p [d_hidden] as p.index_select(0, latent). f and its gradient must be 0
        where pre <= 0. Use thresholds, such as JumpReLU's, with vanilla: the others choose latents
        before this.
        """
        return F.relu(pre)

    def reconstruct(self, f):
        """Returns x_hat [batch, n_models, d_model], scaled, for f dense or as a SparseCode."""
        x_hat = f @ self.flat(self.W_dec) + self.b_dec.flatten()
        return x_hat.unflatten(1, self.b_dec.shape)

    def encode(self, raw):
        """Returns the latent activations f [batch, d_hidden]. Updates the buffers in training mode,
        as BatchNorm does.
        """
        code, _ = self.sparse_encode(
            self.scaled(raw).flatten(1), self.flat(self.W_enc), self.decoder_norm()
        )
        return code.dense()

    def decode(self, f):
        """Returns the raw reconstruction [batch, n_models, d_model] for f [batch, d_hidden]. In the
        basis "difference", A is 0 and B is B - A.
        """
        return self.unscaled(self.reconstruct(f))

    def forward(self, raw):
        """Returns the raw reconstruction. In the basis "difference", A's is A itself."""
        raw_hat = self.decode(self.encode(raw))
        if self.basis == "difference":
            raw_hat = raw_hat + raw[:, :1].to(raw_hat)
        return raw_hat

    def losses(self, raw, l1_coeff=0.0, aux_coeff=0.0, k_aux=64, dead_after=torch.inf):
        """Returns a dict with the losses of scaled activations: sums over models and d_model, means
        over the batch. Minimise `loss`. In aux_loss, latents that did not fire for over dead_after
        tokens reconstruct the error. Every number in the dict is logged. It also has scaled x and
        error = x_hat - x, and fired [d_hidden], in how many rows each latent is active.
        """
        x = self.scaled(raw)
        x_flat = x.flatten(1)
        norm = self.decoder_norm()
        W_enc = self.flat(self.W_enc)
        dead = (self.since_fired > dead_after).nonzero().flatten()
        f, fired = self.sparse_encode(x_flat, W_enc, norm)
        error = self.reconstruct(f) - x
        l2_loss = error.square().sum() / len(x)
        l1_loss = (f.value * norm.index_select(0, f.latent)).sum() / len(x)

        aux_loss = torch.zeros_like(l2_loss)
        if aux_coeff and len(dead):  # no ReLU: negative pre-activations get a gradient, too
            select = partial(topk_places, k=k_aux)
            code = entries_at(select, x_flat, W_enc[dead], self.b_enc[dead])
            # from places among the dead to latents; EncodeAt gives the values their gradient
            code = code._replace(latent=dead[code.latent], shape=f.shape)
            code = code._replace(value=EncodeAt.apply(code, x_flat, W_enc, self.b_enc))
            residual = -error.detach().flatten(1)
            aux_loss = (residual - code @ self.flat(self.W_dec)).square().sum() / len(x)
            aux_loss = aux_loss * min(len(dead) / k_aux, 1)

        loss = l2_loss + aux_coeff * aux_loss
        if self.variant == "vanilla":
            loss = loss + l1_coeff * l1_loss
        return dict(
            loss=loss,
            l0_loss=fired.sum() / len(x),
            dead_latents=len(dead),
            l2_loss=l2_loss,
            l1_loss=l1_loss,
            aux_loss=aux_loss,
            fired=fired,
            x=x,
            error=error,
        )

    # --- Sparse: latents that are 0 get no gradient. Leaving them out is exact, and fast ---

    def sparse_encode(self, x, W_enc, norm):
        """Encodes scaled x [batch, n_models * d_model], given flat(W_enc) and decoder_norm().
        Returns f as a SparseCode, and the number of rows in which each latent fires [d_hidden].
        """
        sample = F.linear(x[:8], W_enc, self.b_enc) > 0
        is_dense = sample.float().mean() > DENSE[x.device.type]
        if self.variant == "vanilla" and is_dense:  # early in training
            cut = self.threshold  # which stays 0
            row = torch.arange(len(x), device=x.device)[:, None]
            latent = torch.arange(len(norm), device=x.device)
            pre = F.linear(x, W_enc, self.b_enc)  # x @ W_enc.T + b_enc
            code = SparseCode(row, latent, pre, pre.shape)
        else:
            code, cut = self.choose(x, W_enc, norm)
            code = code._replace(value=EncodeAt.apply(code, x, W_enc, self.b_enc))
        f = code._replace(value=self.activate(code.value, code.latent))
        fired = f.count_active()
        if self.training:  # update the buffers, as BatchNorm does
            self.since_fired += len(x) * PartialState().num_processes
            self.since_fired[reduce(fired) > 0] = 0
            is_first = self.threshold == 0
            self.threshold.lerp_(cut, torch.where(is_first, 1.0, 0.1))
        return f, fired

    @torch.no_grad()
    def choose(self, x, W_enc, norm, margin=1):
        """Chooses the active latents by their scores, pre-activation * norm. Returns their
        pre-activations as a SparseCode, and the cut: scores >= cut are kept. In training, batchtopk
        looks only at scores over a floor, first 0.9 of its threshold. If they are too few, it calls
        itself with twice the margin. That call estimates a lower floor from about 32 rows, where
        margin * k scores a row exceed it.
        """
        norm = norm.clamp(min=1e-30)  # in vanilla, a latent whose decoder is 0 must recover
        is_searching = self.variant == "batchtopk" and self.training
        floor = self.threshold  # 0 in vanilla and topk
        if is_searching:
            floor = 0.9 * floor
        if margin > 1:
            sample = x[:: len(x) // 32 + 1]
            scores = F.relu(F.linear(sample, W_enc, self.b_enc) * norm).flatten()
            floor = gather(nth_largest(scores, margin * self.k * len(sample))).max()
        bound = 0.9999 * floor / norm  # for pre; slightly low, because of rounding

        def candidates(pre):  # [rows, d_hidden]
            if self.variant == "topk":
                return topk_places(pre * norm, self.k)
            return (pre > bound).nonzero(as_tuple=True)

        code = entries_at(candidates, x, W_enc, self.b_enc)
        score = code.value * norm[code.latent]
        cut = floor
        if is_searching:
            n = self.k * len(x) * PartialState().num_processes
            cut = nth_largest(gather(pad_across_processes(score)), n)
            if cut < floor:
                return self.choose(x, W_enc, norm, 2 * margin)
        keep = (score >= cut).nonzero().flatten()
        return SparseCode(code.row[keep], code.latent[keep], code.value[keep], code.shape), cut


class SparseCode(NamedTuple):
    """A sparse matrix [batch, d_hidden]. It has the values `value` [n] in the rows `row` [n], which
    are sorted, and the columns `latent` [n]. A dense one has row [batch, 1], latent [d_hidden] and
    value [batch, d_hidden], so that an expression like value * norm[latent] is right for both.
    """

    row: torch.Tensor
    latent: torch.Tensor
    value: torch.Tensor
    shape: torch.Size

    def dense(self):
        """Returns the matrix [batch, d_hidden]."""
        zeros = self.value.new_zeros(self.shape)
        return zeros.index_put((self.row, self.latent), self.value)

    def count_active(self):
        """Returns the number of rows in which each latent is active [d_hidden]."""
        is_active = (self.value > 0).float()
        if is_active.dim() == 2:
            return is_active.sum(0)
        return is_active.new_zeros(self.shape[1]).index_add(0, self.latent, is_active)

    def __matmul__(self, W):
        """Returns the product with W [d_hidden, d]: [batch, d]."""
        if self.value.numel() > DENSE[W.device.type] * self.shape.numel():
            return self.dense() @ W
        rows = torch.arange(self.shape[0], device=W.device)
        starts = torch.searchsorted(self.row, rows)
        f = self.value.to(W)
        return F.embedding_bag(self.latent, W, starts, per_sample_weights=f, mode="sum")


@torch.no_grad()
def entries_at(select, x, W, b):
    """Computes pre = x @ W.T + b in blocks of rows, because it is large. Returns the entries at the
    places select(pre), (rows, columns), as a SparseCode.
    """
    blocks = []
    for first in range(0, len(x), 1024):
        pre = F.linear(x[first : first + 1024], W, b)
        row, column = select(pre)
        blocks.append((first + row, column, pre[row, column]))
    row, column, value = map(torch.cat, zip(*blocks))
    return SparseCode(row, column, value, torch.Size([len(x), len(W)]))


class EncodeAt(torch.autograd.Function):
    """Returns the values of a SparseCode from entries_at, with their gradient by x, W and b."""

    @staticmethod
    def forward(ctx, code, x, W, b):
        ctx.save_for_backward(x, W, code.row, code.latent)
        ctx.shape = code.shape
        return code.value

    @staticmethod
    def backward(ctx, grad):
        x, W, row, latent = ctx.saved_tensors
        i = latent.int().argsort(stable=True)  # int32 sorts faster
        transposed = SparseCode(latent[i], row[i], grad[i], ctx.shape[::-1])
        grad_x = SparseCode(row, latent, grad, ctx.shape) @ W if ctx.needs_input_grad[1] else None
        grad_b = transposed @ x.new_ones(len(x), 1)
        return None, grad_x, transposed @ x, grad_b.squeeze(1)


# --- Metrics --------------------------------------------------------------------------------------


@torch.no_grad()
def sums(model, losses):
    """Returns {name: tensor}, sums over rows that add up over batches and processes: of each number
    in model.losses(raw), and of (x - x_hat)^2, x^2 and x for each explained variance. With more
    than two models, the difference is that of the last and the first.
    """
    x = losses["x"].double()
    n = x.new_tensor(len(x))
    total = {name: n * y for name, y in losses.items() if np.ndim(y) == 0}
    both = torch.stack([x, x + losses["error"]])  # x and x_hat, [2, row, model, d_model]
    raw = model.unscaled(both)
    views = {"": both, "_difference": raw[:, :, -1] - raw[:, :, 0]}
    if model.basis != "difference":
        views |= {f"_{letter}": y for letter, y in zip("ABCDEFGH", raw.unbind(2))}
    for name, (y, y_hat) in views.items():
        parts = [(y - y_hat).square(), y.square(), y]
        total[f"explained_variance{name}"] = torch.stack([part.sum(0) for part in parts])
    return total | dict(rows=n)


def metrics(total):
    """Returns {name: tensor []} for a total of `sums`: means over the rows, and explained variances
    of scaled activations, of the raw ones of each model (_A, _B), and of B - A (_difference).
    Explained variance is 1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, with sums over the rows.
    """
    row = {name: y / total["rows"] for name, y in total.items() if name != "rows"}
    for name, y in row.items():
        if y.dim():
            error, square, mean = y
            row[name] = 1 - error.sum() / (square - mean.square()).sum()
    return row


@torch.no_grad()
def validate(model, data, l1_coeff=0.0, dead_after=torch.inf, n_rows=torch.inf):
    """Puts the model into eval mode. Returns metrics of the held-out rows, without aux_loss, and
    the share of them in which each latent fires [d_hidden]. Stops after the batch in which row
    n_rows comes.
    """
    model.eval()
    total = Counter()
    for raw in data.held_out:
        losses = model.losses(raw, l1_coeff, dead_after=dead_after)
        total.update(sums(model, losses), fired=losses["fired"].double())  # adds, as Counters do
        if total["rows"] >= n_rows:
            break
    frequency = total.pop("fired") / total["rows"]
    del total["aux_loss"]
    return metrics(total), frequency


# --- Training -------------------------------------------------------------------------------------

stop_signals = []  # received so far


def stop_soon(number, _):
    """Handles a signal: training stops after its step, and at a second signal at once."""
    stop_signals.append(number)
    signal.signal(number, signal.SIG_DFL)


def lr_factor(step, steps):
    """Returns the factor of lr: warm-up over 5% of the steps, constant, linear to 0 over 20%."""
    return min(1, (step + 1) / (0.05 * steps), (steps - step) / (0.2 * steps))


def is_due(step, every, steps):
    """True at every `every`-th step and at the last one. every=0 means only at the last."""
    return step == steps or step % (every or steps) == 0


def resolve(config):
    """Returns the config with values filled in by rule. Ends the program if two do not fit."""
    if config["variant"] != "vanilla" and config["k"] > config["d_hidden"]:
        fail(f"--k={config['k']} is larger than --d_hidden={config['d_hidden']}")
    if config["batch_size"] % PartialState().num_processes:
        fail("--batch_size is not a multiple of the number of processes")
    if config["dedicated"] and config["basis"] != "plain":
        fail("--dedicated takes --basis=plain")
    if config["basis"] == "difference" and "," not in config["places"]:
        fail("--basis=difference takes two places or more")
    val_tokens = config["val_tokens"]
    if val_tokens < 0 and config["data"] in ("toy", "stream"):
        val_tokens = 8192
    name = f"{Path(config['data']).name}-{config['variant']}-{time.strftime('%Y%m%d-%H%M%S')}"
    tokens = config["steps"] * config["batch_size"]
    return config | dict(
        val_tokens=val_tokens,
        out_dir=config["out_dir"] or f"out/{name}-{os.urandom(2).hex()}",
        lr=config["lr"] or 3e-3 * (512 / config["d_hidden"]) ** 0.5,
        dead_after=config["dead_after"] or min(max(1, tokens // 20), 10_000_000),
    )


def open_data(config, docs_read=0):
    """Opens the data that config["data"] names. A stream continues after the texts already read."""
    if config["data"] == "stream":
        from collect import Stream

        return Stream(config, docs_read)
    return Toy(config) if config["data"] == "toy" else Store(config)


def new_model(config, data):
    """Returns a new CrossCoder for that config and data."""
    options = {key: config[key] for key in ("d_hidden", "variant", "k", "basis", "dedicated")}
    return CrossCoder(data.n_models, data.d_model, **options)


def read_checkpoint(out):
    """Returns the state that `train` saved in the folder `out`. Runs no code that is in it."""
    path = Path(out) / "checkpoint.pt"
    what = f"--out_dir or --run is {out or 'missing'}: checkpoint.pt is no checkpoint, or not whole"
    with explain(what):
        assert not zipfile.ZipFile(path).testzip(), "a checksum is wrong"
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["config"].pop("trust_remote_code", None)  # a file must not switch it on
    return state


def write_rows(out, rows, mode="a"):
    """Adds rows of metrics to metrics.jsonl in the folder `out`. mode="w" empties it first."""
    path = Path(out) / "metrics.jsonl"
    with explain(f"{path} cannot be written", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def log(out, rows, step, row, prefix=""):
    """Adds a row of metrics to `rows`, metrics.jsonl and wandb, and prints it."""
    row = {prefix + key: float(y) for key, y in row.items() if np.isfinite(float(y))}
    shown = "".join(f"  {key} {y:.4g}" for key, y in row.items())
    print(f"{step:7d}{shown}", flush=True)
    rows.append({"step": step} | row)
    write_rows(out, rows[-1:])
    wandb.log(row, step=step)


def fetch(data, step, device):
    """Returns a batch on the device. A thread calls it while the step before is computed."""
    raw = data.batch(step)
    if device.type == "cuda":
        raw = raw.pin_memory()
    return raw.to(device, non_blocking=True)


def check_batch(data, step):
    """Ends the program if that batch of a store has a row with nan or inf. Looking at every batch
    would take longer than reading it, so this is called when a gradient is not finite.
    """
    if isinstance(data, Store):
        data.read(data.rows(step))


def train(config, state=None, data=None):
    """Trains a crosscoder and returns it in eval mode. Give a `state` from read_checkpoint to
    continue a run, and a `data` object of your own to train on that instead of config["data"].
    """
    device = set_up(config["device"])
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    config = resolve(config)
    out = Path(config["out_dir"])
    steps = config["steps"]
    rank = PartialState().process_index
    if not state:
        if (out / "checkpoint.pt").exists():
            fail(f"--out_dir={out} holds a run already: continue it by --resume=True")
        state = dict(step=0, tokens=0, rows=[], docs_read=0, wandb_id=os.urandom(4).hex())
    for key in ("variant", "basis", "dedicated", "val_tokens"):
        if config[key] != state.get("config", config)[key]:
            fail(f"resuming cannot change --{key}")

    # data, model, optimiser
    torch.manual_seed(config["seed"])
    data = data or open_data(config, state.get("docs_read", 0))
    if config["val_tokens"] and not len(next(iter(data.held_out), [])):
        fail("no rows are held out: give --val_tokens=0, or more rows")
    model = new_model(config, data).to(device)
    betas = (config["beta1"], config["beta2"])
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], betas=betas, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps))
    if state["step"] == 0:
        check_batch(data, 0)
        model.start_at(data.batch(0))
    else:
        with explain("data, config and checkpoint do not fit each other"):
            model.load_state_dict(state["model"])
            moments = dict(state=state["moments"])  # learning rates are the config's
            optimizer.load_state_dict(optimizer.state_dict() | moments)
            for p, of_p in optimizer.state.items():  # other shapes would crash the fused step
                moments = [y for name, y in of_p.items() if name.startswith("exp_avg")]
                assert all(y.shape == p.shape for y in moments), "moments"
        warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")
    if state["step"] >= steps:
        print(f"finished already; its report: python report.py --run={out}")
        return model.eval()
    for _ in range(state["step"]):  # brings a scheduler of any kind to its place
        scheduler.step()
    rows = state["rows"]
    if rank == 0:
        print(json.dumps(config, indent=4))
        write_rows(out, rows, "w")  # drops rows that were logged after the checkpoint
        with explain(f"--wandb_mode={config['wandb_mode']}: wandb cannot start"):
            wandb.init(
                project=config["wandb_project"],
                name=out.name,
                id=state["wandb_id"],
                resume="allow",
                config=config,
                mode=config["wandb_mode"],
                dir=out,
                settings=wandb.Settings(silent=True),
            )

    tokens = state["tokens"]
    size = config["batch_size"]
    reader = ThreadPoolExecutor(1)
    # batches are counted by tokens: a run may be resumed with another batch_size
    coming = reader.submit(fetch, data, tokens // size, device)
    logged_at = saved_at = time.perf_counter()
    logged_tokens = tokens
    for step in range(state["step"] + 1, steps + 1):
        # batch: the next one is read while this one is trained on
        raw = coming.result()
        tokens += size
        if step < steps:
            coming = reader.submit(fetch, data, tokens // size, device)

        # forward and backward
        model.train()
        l1_coeff = config["l1_coeff"] * min(1, step / (0.05 * steps))  # warm-up
        losses = model.losses(
            raw, l1_coeff, config["aux_coeff"], config["k_aux"], config["dead_after"]
        )
        optimizer.zero_grad()
        losses["loss"].backward()
        if PartialState().num_processes > 1:  # no DDP: all gradients come at once, after backward
            for p in model.parameters():
                if p.grad is not None:
                    p.grad = reduce(p.grad, "mean")

        # clip and step
        lr = scheduler.get_last_lr()[0]
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        grad_norm = nn.utils.get_total_norm(grads.values())
        if not grad_norm.isfinite():
            check_batch(data, tokens // size - 1)
            names = [name for name, grad in grads.items() if not grad.isfinite().all()]
            fail(f"step {step}: gradient not finite, of {', '.join(names)}; --lr is {lr:.3g}")
        stop = reduce(grad_norm.new_tensor(len(stop_signals))) > 0
        largest = config["grad_clip"] or torch.inf
        nn.utils.clip_grads_with_norm_(model.parameters(), largest, grad_norm)
        optimizer.step()
        scheduler.step()

        # log
        if is_due(step, config["log_every"], steps):
            rate = (tokens - logged_tokens) / (time.perf_counter() - logged_at)
            row = metrics(reduce(sums(model, losses)))
            row["minutes_left"] = (steps - step) * size / rate / 60
            row |= dict(tokens=tokens, tokens_per_second=rate, lr=lr, l1_coeff=l1_coeff)
            row |= dict(grad_norm=grad_norm, threshold=model.threshold)
            if rank == 0:
                log(out, rows, step, row)
            logged_at = time.perf_counter()
            logged_tokens = tokens

        # validate (to stop early, append signal.SIGTERM to stop_signals: the next step saves)
        if rank == 0 and config["val_tokens"] and is_due(step, config["eval_every"], steps):
            row, _ = validate(model, data, l1_coeff, config["dead_after"], 8192)
            log(out, rows, step, row, "val/")

        # save (weights first, so that they are never older than the checkpoint), stop if signalled
        is_time = config["save_every"] == 0 and time.perf_counter() > saved_at + 600
        if rank == 0 and (stop or is_time or is_due(step, config["save_every"], steps)):
            saved_at = time.perf_counter()
            # not by save_pretrained, which deletes config.json first
            options = json.dumps(model._hub_mixin_config)
            write_atomically(out / "config.json", lambda part: part.write_text(options))
            model._save_pretrained(out)
            state |= dict(config=config, step=step, tokens=tokens, model=model.state_dict())
            state["moments"] = optimizer.state_dict()["state"]
            state["docs_read"] = getattr(data, "docs_read", 0)
            write_atomically(out / "checkpoint.pt", partial(torch.save, state))
        if stop and step < steps:
            if rank == 0:
                again = f"--resume=True --out_dir={out}"
                print(f"stopped at step {step}: continue by {again}", file=sys.stderr)
            # another process may have got the signal
            raise SystemExit(128 + (stop_signals or [signal.SIGTERM])[0])

    # report
    model.eval()
    if rank == 0:
        print(f"weights: CrossCoder.from_pretrained({str(out)!r})")
        if not Path(__file__).with_name("report.py").exists():
            print("no report: report.py is not beside train.py")
        elif config["val_tokens"]:
            from report import report

            page = report(model, data, config, rows)
            wandb.log(dict(report=wandb.Html(page)), step=steps)
        wandb.finish()
    return model


def settings_of(given):
    """Returns the whole config of a run from the {key: value or text} given, checked."""
    if given.get("data", config["data"]) != "stream":
        return checked(given, config, allowed)
    import collect

    return checked(given, collect.config | config, collect.allowed | allowed)


def main(argv):
    given = read_command_line(argv, __file__)
    state = None
    if given.get("resume") == "True":
        state = read_checkpoint(given.get("out_dir", ""))
        given = state["config"] | given
    return train(settings_of(given), state)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_soon)
    main(sys.argv[1:])
    PartialState().destroy_process_group()

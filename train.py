"""
Trains a CrossCoder: one sparse dictionary over the activations of a base model (A) and of the model
fine-tuned from it (B). A latent has a decoder vector per model: where one is 0, the other has it alone.

    python train.py --variant=batchtopk --k=32              # a toy with planted truth; ends with a score
    python train.py --data=acts --d_hidden=16384            # a store of activations, written by collect.py
    python train.py --resume=True --out_dir=out/RUN         # goes on, or reports again on a finished run
    torchrun --standalone --nproc_per_node=2 train.py ...   # the same over several processes

Any key of the config is set by --key=value. A run ends with OUT/report.html, what fine-tuning changed.
Lindsey et al. 2024 (transformer-circuits.pub/2024/crosscoders), BatchTopK: arXiv 2412.06410, auxiliary loss:
arXiv 2406.04093, latent scaling: arXiv 2504.02922.
"""

import ast
import contextlib
import difflib
import functools
import itertools
import json
import os
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages save a tenth of a step; read by torch once

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
import wandb
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from datasets import load_from_disk
from einops import einsum
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import save_file
from torch import nn

# --- Config, command line, processes ------------------------------------------------------------------------

config = dict(
    # I/O and logging
    out_dir="",  # folder of the run; empty makes a new one, out/DATA-VARIANT-TIME
    resume=False,  # go on from out_dir's checkpoint, with its config and what is given beside it
    save_every=500,  # steps between checkpoints; 0: only at the end
    log_every=50,  # steps between rows of metrics
    eval_every=500,  # steps between validations; 0: only at the end
    wandb_mode="offline",  # offline, online or disabled
    wandb_project="crosscoder",  # name of the project there
    ce_eval=False,  # with the report: splice into the models, for the loss recovered and a causal curve
    # data
    data="toy",  # toy, toy-hard, stream (harvest meanwhile; takes collect.py's keys too), or a store's path
    val_tokens=8192,  # rows held out at the end of the store, for validation; 0: none
    batch_size=1024,  # tokens per step, over all processes
    # model and losses
    variant="batchtopk",  # vanilla (ReLU and L1), topk or batchtopk
    basis="plain",  # plain: of (A, B); delta: of (A, B - A), made as large as A, for narrow fine-tunes
    d_hidden=512,  # latents
    dedicated=0.0,  # share of the latents that belong to A alone, and as many to B alone, by construction
    k=32,  # active latents per token: of each (topk), on average over the batch (batchtopk)
    l1_coeff=2.0,  # weight of the L1 term (vanilla)
    aux_coeff=-1.0,  # weight of the auxiliary loss on dead latents; -1: 1/32, or 0 for vanilla
    k_aux=64,  # dead latents per token that the auxiliary loss uses
    dead_after=0,  # tokens without firing that make a latent dead; 0: 5% of the run's, at most 10 million
    # optimiser
    steps=1500,  # batches to train on
    lr=0.0,  # peak learning rate; 0: 3e-3 * sqrt(512 / d_hidden)
    beta1=0.9,  # Adam's decay of the mean of the gradient
    beta2=0.999,  # and of its square
    grad_clip=1.0,  # largest norm of the gradient; 0: any
    # system
    device="auto",  # auto (cuda if there is one), cpu or cuda
    seed=0,  # of the first weights, the order of the rows and the toy
)
allowed = dict(variant=["vanilla", "topk", "batchtopk"], basis=["plain", "delta"])
allowed |= dict.fromkeys(["steps", "batch_size", "d_hidden", "k", "k_aux", "log_every"], range(1, 10**15))


def fail(message, unless=False):
    """Ends the program for a mistake of its user: one line, exit code 2. Does nothing if `unless` holds."""
    if not unless:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


@contextlib.contextmanager
def explain(what, kind=Exception):
    """Fails by one line if the block raises an exception of that kind: libraries raise many."""
    try:
        yield
    except kind as e:
        fail(f"{what}: {' '.join(str(e).split())[:300] or type(e).__name__}")


def read_command_line(defaults, allowed, argv, file):
    """{key: value} of argv's --key=value, each of the type of its default. --help prints `file`'s config."""
    given = {}
    for argument in argv:
        if argument == "--help":
            _, usage, code = Path(file).read_text(encoding="utf-8").split('"""', 2)
            print(usage.strip(), code.partition("\nconfig = dict(")[2].partition("\n)\n")[0], sep="\n")
            raise SystemExit(0)
        key, _, text = argument.removeprefix("--").partition("=")
        if not argument.startswith(f"--{key}=") or key not in defaults:
            near = difflib.get_close_matches(key.lstrip("-"), defaults, 1, 0)[0]
            fail(f"{argument}: expected --key=value, the nearest key is --{near}")
        kind = type(defaults[key])
        usual = [text] if kind is str else pd.Interval(min(0, defaults[key]), 1e15, closed="left")
        expected = allowed.get(key, usual)
        with contextlib.suppress(Exception):  # literal_eval raises many kinds
            number = text if kind is str else ast.literal_eval(text)
            value = kind(number)  # 1e6 and 140_000 are integers too
            if value in expected and value == number and (type(number) is bool) == (kind is bool):
                given[key] = value
                continue
        fail(f"--{key}={text}: expected {kind.__name__} in {expected}")
    return given


def set_up(name):
    """The device of this process, which joins the others if torchrun started it."""
    device = PartialState(cpu=name == "cpu" or not torch.cuda.is_available()).device
    fail(f"--device={name}: the device here is {device}", unless=name in ("auto", device.type))
    return device


def world():
    """(rank, number of processes)."""
    return PartialState().process_index, PartialState().num_processes


# --- Data: n_models, d_model, batch(step) and validation() of raw activations, meta, docs -------------------


class Toy:
    """Activations of two models with planted features, endless, a function of (seed, step)."""

    n_models, d_model, docs, meta, texts_read = 2, 128, None, {}, 0
    # Of each kind how many, their energy in A and in B, and the squared tangent by which B's direction turns.
    kinds = {"shared": (192, 1, 1, 0.04), "base-only": (32, 2, 0, 0), "fine-tuned-only": (32, 0, 2, 0)}
    often = torch.linspace(1, 3, 256) * 28 / 512  # share of tokens a feature is active in, by its rank
    n_free = 256  # later ranks are nested: active only where their parent is, one of the first 16

    def __init__(self, config):
        self.config, g = config, torch.Generator().manual_seed(config["seed"])
        counts, *numbers = zip(*self.kinds.values())
        self.kind = np.repeat(list(self.kinds), counts)  # [feature]
        in_a, in_b, turn = torch.tensor(np.repeat(numbers, counts, axis=1)).float().sqrt()[..., None]
        a, b = F.normalize(torch.randn(2, len(self.kind), self.d_model, generator=g), dim=-1)
        self.directions = torch.stack([in_a * a, in_b * F.normalize(a + turn * b, dim=-1)], dim=1)
        rank, parent = torch.randperm(len(a), generator=g), torch.randint(16, (len(a),), generator=g)
        nested = rank >= self.n_free
        self.parent = torch.where(nested, rank.argsort()[parent], torch.arange(len(a)))
        self.chance = self.often[rank] / torch.where(nested, self.often[parent], 1)

    def rows(self, step, n):
        seed = np.random.SeedSequence([self.config["seed"], step + 2]).generate_state(1)[0]
        g, shape = torch.Generator().manual_seed(int(seed)), (n, len(self.chance))
        size = torch.randn(shape, generator=g).mul(0.25).exp()  # lognormal
        active = torch.rand(shape, generator=g) < self.chance
        active = size * (active & active[:, self.parent])
        x = einsum(active, self.directions, "batch feature, feature model d -> batch model d")
        return x + 0.02 * torch.randn(x.shape, generator=g)

    def batch(self, step):
        return self.rows(step, self.config["batch_size"]).chunk(world()[1])[world()[0]]

    def validation(self):
        return self.rows(-2, self.config["val_tokens"]).split(1024)

    def score(self, model, table):
        """How many planted features of each kind are recovered: cosine > 0.9 in each model that has them."""
        W = model.in_models(model.W_dec.detach()).cpu()[table.index]
        unit = F.normalize(W, dim=-1), F.normalize(self.directions, dim=-1)
        near = einsum(*unit, "latent model d, feature model d -> latent feature model") > 0.9
        near = (near | ~self.directions.any(-1)).all(-1).numpy()
        near &= np.equal.outer(np.array(table.kind, str), [kind.split()[-1] for kind in self.kind])
        found = pd.DataFrame(dict(planted=1, recovered=near.any(0))).groupby(self.kind).sum()
        counts = dict(latents=1, false=~near.any(1), confirmed=table.confirmed.eq(True))
        return found.join(pd.DataFrame(counts, table.index).groupby(table.kind).sum()).fillna(0).astype(int)


class HardToy(Toy):
    """The toy with Zipf frequencies over two decades, groups of nested features, and some turned by 60°."""

    kinds = {"shared": (128, 1, 1, 0.04), "turned shared": (32, 1, 1, 3)}
    kinds |= {"base-only": (48, 1, 0, 0), "fine-tuned-only": (48, 0, 1, 0)}
    often, n_free = 0.5 / torch.linspace(1, 100, 256), 128


class Store:
    """
    A folder with the Hugging Face datasets base and finetuned, row i of one being row i of the other. Batches
    are shuffled over all, anew each epoch, a function of (seed, step); the last val_tokens rows are held out.
    """

    n_models, names, docs, texts_read = 2, ("base", "finetuned"), None, 0

    def __init__(self, config):
        self.config, self.path, self.meta = config, Path(config["data"]), {}
        what = f"--data={self.path}: neither toy, nor stream, nor a store of aligned rows of floats"
        with explain(what):
            self.stored = [load_from_disk(self.path / name).with_format("arrow") for name in self.names]
            base, finetuned = tables = [dataset.data for dataset in self.stored]
            lengths = [pc.list_value_length(table.column("activation")) for table in tables]
            np.testing.assert_array_equal(*lengths, "lengths of the lists in base and finetuned")
            for name in {"token", "doc", "pos"}.intersection(base.column_names, finetuned.column_names):
                np.testing.assert_array_equal(*(t.column(name).cast("int64") for t in tables), name)
            self.n_rows, (self.d_model,) = len(base), lengths[0].unique().to_pylist()
            self.n_train = self.n_rows - config["val_tokens"]
            fail(f"{what}: only {self.n_rows} rows", unless=self.n_train >= config["batch_size"])
            if (self.path / "meta.json").exists():
                self.meta = json.loads((self.path / "meta.json").read_text())
                self.docs = load_from_disk(self.path / "docs")["input_ids"]
                self.doc, self.pos = base.column("doc").to_numpy(), base.column("pos").to_numpy()
                scale, n_docs = self.meta["scale"], len(self.docs)
                good = len(scale) == 2 and all(0 < y < 1e9 for y in scale) and self.doc.max() < n_docs
                fail(f"{what}: docs has {n_docs} rows, scale is {scale}", unless=good)
        order = lambda epoch: np.random.default_rng([config["seed"], epoch]).permutation(self.n_train)
        self.order = functools.lru_cache(2)(order)

    def read(self, rows):
        """The activations [len(rows), n_models, d_model] of those rows, in the store's float type."""
        columns = [dataset[rows]["activation"].combine_chunks().flatten() for dataset in self.stored]
        x = np.stack([column.to_numpy().reshape(len(rows), self.d_model) for column in columns], axis=1)
        bad = rows[~np.isfinite(x).all((1, 2))]
        fail(f"{self.path}: row {bad[:1]} holds nan or inf: collect again without it", unless=not len(bad))
        return torch.from_numpy(x)

    def batch(self, step):
        size, (rank, n) = self.config["batch_size"], world()
        epoch, at = np.divmod(np.arange(step * size, (step + 1) * size)[rank::n], self.n_train)
        return self.read(np.where(epoch == epoch[0], self.order(epoch[0])[at], self.order(epoch[-1])[at]))

    def validation(self):
        rows = np.arange(self.n_train, self.n_rows)
        return map(self.read, np.array_split(rows, -(-len(rows) // 1024)))


def prefetched(data, steps):
    """(step, its batch) for each of the steps; a thread reads the next batch meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        batches = itertools.chain((thread.submit(data.batch, step) for step in steps), [None])
        for step, (batch, _) in zip(steps, itertools.pairwise(batches)):  # the next one is submitted
            yield step, batch.result()


# --- Crosscoder ---------------------------------------------------------------------------------------------


def matrix(row, col, values, shape):
    """The matrix of that shape with those values, sorted by row: CSR, or dense where that is as fast."""
    is_sparse = len(values) < 0.04 * shape[0] * shape[1]
    coo = torch.sparse_coo_tensor(torch.stack([row, col]), values, shape, is_coalesced=is_sparse)
    return coo.to_sparse_csr() if is_sparse else coo.to_dense()


def times(code, dense, spare):
    """code @ dense, into memory out of the list `spare`: new memory can cost more than the product."""
    out = spare.pop() if spare else dense.new_empty(len(code), dense.shape[1])
    return torch.addmm(out, code, dense, beta=0, out=out)


class SparseDecode(torch.autograd.Function):
    """
    code @ W_dec for the code whose entries at (row, col), sorted by row, are f = x @ W_enc.T + b_enc there;
    whoever chose them has computed f. Exact: what ReLU or TopK set to 0 has no gradient, so all that is left
    out are dense autograd's products with 0. x [batch, d], W_enc and W_dec [d_hidden, d], row, col and f [n];
    row may be up to n_rows, a multiple of batch, over which x is repeated. Returns f and [n_rows, d]. The
    gradients of W_enc and W_dec are put into the memory in `spare`.
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
        at = col.int().argsort(stable=True)  # the transpose: sorted by column
        row, col, f, grad_f = row[at], col[at], f[at], grad_f[at]
        code = matrix(col, row, f, (len(W_dec), len(grad)))
        if code.is_sparse_csr:
            grad_f += torch.sparse.sampled_addmm(code, W_dec, grad.T, beta=0).values()
        else:
            grad_f += (W_dec @ grad.T)[col, row]
        grad_W_enc = times(matrix(col, row % len(x), grad_f, (len(W_dec), len(x))), x, ctx.spare)
        grad_b_enc, grad_W_dec = col.bincount(grad_f, len(W_dec)), times(code, grad, ctx.spare)
        return None, grad_W_enc, grad_b_enc, grad_W_dec, None, None, None, None, None


def largest(y, k):
    """(row, col) of the k largest of each row of y, sorted."""
    col = y.topk(min(k, y.shape[1]), sorted=False).indices.sort().values
    return torch.arange(len(y), device=y.device).repeat_interleave(col.shape[1]), col.flatten()


class CrossCoder(nn.Module, PyTorchModelHubMixin):
    """
    A sparse dictionary over the activations of n_models models. encode, decode and forward take and return
    raw activations. from_pretrained("out/RUN"), save_pretrained and push_to_hub are huggingface_hub's.
    Parameters: W_enc, W_dec [d_hidden, n_models, d_model], b_enc [d_hidden], b_dec [n_models, d_model].
    Buffers: scale [n_models], sqrt(d_model) / mean norm of each model's activations; mix [n_models, n_models]
    from raw activations to what the parameters are of: diag(scale), or in the basis "delta" to A and to B - A
    made as large; threshold [], what a score f * norm must exceed in batchtopk's inference (eval mode), so
    that a token's code does not depend on its batch; and of training, smallest [], the last batch's smallest
    score, and since_fired [d_hidden], the tokens since each latent fired. The first dedicated * d_hidden
    latents are the first model's alone, as many the next one's: `owned` [d_hidden, n_models, 1] is 0 where a
    weight is 0 and stays so (Dedicated Feature Crosscoder, arXiv 2602.11729).
    """

    def __init__(self, n_models, d_model, d_hidden, variant="batchtopk", k=32, basis="plain", dedicated=0.0):
        super().__init__()
        self.variant, self.k, self.basis, self.spare = variant, k, basis, []
        own = torch.eye(n_models).repeat_interleave(round(dedicated * d_hidden), dim=0)
        every = F.pad(own, (0, 0, 0, d_hidden - len(own)), value=1)[..., None]
        self.owned = nn.Buffer(every, persistent=False)
        W_dec = 0.5 * F.normalize(torch.randn(d_hidden, n_models, d_model), dim=-1) * self.owned
        self.W_dec, self.W_enc = nn.Parameter(W_dec), nn.Parameter(W_dec.clone())

        def keep_owned(W):
            W.grad[: len(own)].mul_(self.owned[: len(own)])  # in place: new memory is a fifth of a step

        for W in (self.W_dec, self.W_enc) if dedicated else ():
            W.register_post_accumulate_grad_hook(keep_owned)
        self.b_enc = nn.Parameter(torch.zeros(d_hidden))
        self.b_dec = nn.Parameter(torch.zeros(n_models, d_model))
        self.scale, self.mix = nn.Buffer(torch.ones(n_models)), nn.Buffer(torch.eye(n_models))
        self.threshold, self.smallest = nn.Buffer(torch.zeros(())), nn.Buffer(torch.zeros(()))
        self.since_fired = nn.Buffer(torch.zeros(d_hidden, dtype=torch.long))

    def _save_pretrained(self, folder):
        write_atomically(folder / "model.safetensors", lambda part: save_file(self.state_dict(), part))

    @torch.no_grad()
    def start_at(self, x, scale=None):
        """Fits a new model to raw x, so that few latents die, and to the data's scale [n_models] if known."""
        size = lambda y: reduce(y.norm(dim=-1).mean(0)) / y.shape[-1] ** 0.5
        x = x.to(self.mix)
        self.scale.copy_(torch.tensor(scale) if scale else 1 / size(x))
        self.mix.copy_(self.scale.diag())
        if self.basis == "delta":
            per_size = 1 / size(x[:, 1:] - x[:, :1])
            self.mix[1:] = torch.cat([-per_size[:, None], per_size.diag()], dim=1)
        y = self.scaled(x)
        varies = (y.var(0).sum(-1) > 1e-9 * y.square().sum(-1).mean(0)).all()  # False also if it is nan
        fail("nothing to explain: A or B is alike in every row or too large, or B - A is 0", unless=varies)
        self.b_dec.copy_(reduce(y.mean(0)))
        self.b_enc.copy_(-einsum(self.W_enc, self.b_dec, "latent model d, model d -> latent"))
        self.encode(x[:32])  # by which batchtopk knows where to look first: not at half of all scores

    def scaled(self, x):
        """Raw activations [batch, n_models, d_model] of any float type -> those the parameters are of."""
        return self.mix @ x.to(self.mix)

    def unscaled(self, y):
        """The inverse of `scaled`."""
        return self.mix.inverse() @ y

    def in_models(self, y):
        """Decoder vectors or their sums [n, n_models, d_model] as each model's, scaled by its own scale."""
        return self.unscaled(y) * self.scale[:, None]

    def decoder_norm(self):
        """[d_hidden]: sum over the models of the norms of a latent's decoder vectors."""
        return self.W_dec.norm(dim=-1).sum(1)

    def encode(self, x):
        """Raw activations [batch, n_models, d_model] -> latent activations f [batch, d_hidden]."""
        product = self.scaled(x).flatten(1) @ self.W_enc.flatten(1).T
        _, row, col, _ = self.pick(lambda: product.split(128), self.decoder_norm(), self.since_fired[:0])
        return torch.zeros_like(product).index_put((row, col), product[row, col] + self.b_enc[col])

    def decode(self, f):
        """f [batch, d_hidden] -> raw activations [batch, n_models, d_model]."""
        return self.unscaled(einsum(f, self.W_dec, "b latent, latent model d -> b model d") + self.b_dec)

    def forward(self, x):
        """Raw activations -> reconstructed ones, [batch, n_models, d_model]."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def pick(self, products, norm, dead, k_aux=0):
        """
        The active latents by variant and mode: their number n, and as (row, col, f), each [n + m], they and,
        for the auxiliary loss, in rows after theirs, those of `dead` with the k_aux largest pre-activations
        of a row. products() yields x @ W_enc.T [rows, d_hidden] while it is in the cache. In training
        batchtopk keeps the k * batch largest scores f * norm of all processes, and their equals, without a
        full sort: what is under 0.9 of the last batch's smallest is passed over, and looked at again if too
        few are left.
        """
        search = self.variant == "batchtopk" and self.training
        for cut in self.smallest * self.smallest.new_tensor([0.9, 0.5, 0]) if search else [self.threshold]:
            bound = 0.9999 * cut / norm - self.b_enc  # a hair low, for rounding; exact below
            best, aux, n_rows = [], [], 0
            for product in products():
                if self.variant == "topk":
                    row, col = largest(torch.addcmul(self.b_enc * norm, product, norm), self.k)
                else:
                    row, col = (product > bound).nonzero(as_tuple=True)
                best.append((n_rows + row, col, product[row, col] + self.b_enc[col]))
                pre = product[:, dead] + self.b_enc[dead]
                row, col = largest(pre, k_aux)
                aux.append((n_rows + row, dead[col], pre[row, col]))
                n_rows += len(product)
            row, col, f = map(torch.cat, zip(*best))
            score, n_keep = f * norm[col], self.k * n_rows * world()[1]
            every = torch.cat(gather_object([score.cpu()])).to(score.device) if search else score
            if len(every) >= n_keep:
                break
        if search and len(every):
            self.smallest.copy_(every.kthvalue(max(len(every) - n_keep, 0) + 1).values)
        keep = (score >= self.smallest if search else score > cut).nonzero().flatten()
        code, (aux_row, *aux) = (row[keep], col[keep], f[keep]), map(torch.cat, zip(*aux))
        return len(keep), *(torch.cat(pair) for pair in zip(code, (n_rows + aux_row, *aux)))

    def losses(self, x, l1_coeff=0.0, aux_coeff=0.0, k_aux=64, dead_after=torch.inf):
        """
        The losses of raw x [batch, n_models, d_model]: `loss`, to be minimised, and its parts, means over the
        batch of sums over the rest, of scaled activations. It is l2, in vanilla + l1_coeff * l1, + aux_coeff
        * aux, in which the dead latents, silent for over dead_after tokens, reconstruct what x_hat lacks. And
        x, error = x_hat - x, scaled [batch, n_models, d_model], the number of the dead, and how often each
        latent fired, [d_hidden]. In training mode the buffers move on.
        """
        x, norm, batch = self.scaled(x).flatten(1), self.decoder_norm(), len(x)
        weights = self.W_enc.flatten(1), self.b_enc, self.W_dec.flatten(1)
        dead = (self.since_fired > dead_after).nonzero().flatten()
        blocks = x.split(1 + 10 * 2**20 // len(norm))  # 40 MB: [batch, d_hidden] is never whole
        products = lambda: (rows for block in blocks for rows in (block @ weights[0].T).split(128))
        n, row, col, f = self.pick(products, norm, dead if aux_coeff else dead[:0], k_aux)
        f, x_hat = SparseDecode.apply(x, *weights, row, col, f, batch * (1 + (len(f) > n)), self.spare)
        (x_hat, *e_hat), col = x_hat.split(batch), col[:n]
        error, fired = x_hat + self.b_dec.flatten() - x, col.bincount(minlength=len(norm))
        mean_square = lambda y: y.norm(dim=1).square().mean()
        losses = dict(l2_loss=mean_square(error), l0_loss=fired.sum() / batch, aux_loss=error.new_zeros(()))
        losses["l1_loss"] = torch.zeros_like(norm).index_add(0, col, f[:n]) @ norm / batch
        if e_hat:
            losses["aux_loss"] = mean_square(error.detach() + e_hat[0]) * min(len(dead) / k_aux, 1)
        l1_term = l1_coeff * losses["l1_loss"] if self.variant == "vanilla" else 0
        loss = losses["l2_loss"] + l1_term + aux_coeff * losses["aux_loss"]
        if self.training:
            self.since_fired.add_(batch * world()[1]).masked_fill_(reduce(fired.float()) > 0, 0)
            self.threshold.lerp_(self.smallest, torch.where(self.threshold == 0, 1.0, 0.02))  # no sentinel
        x, error = (y.view(-1, *self.b_dec.shape) for y in (x, error))
        return losses | dict(loss=loss, x=x, error=error, dead=len(dead), fired=fired)


# --- Measures and report ------------------------------------------------------------------------------------

LOSSES = ["l0_loss", "l2_loss", "l1_loss", "aux_loss", "loss"]
STYLE = """:root { color-scheme: light dark } .texts { text-align: left; white-space: pre-wrap }
body { font: 15px/1.5 system-ui; max-width: 76em; margin: 2em auto; padding: 0 1em } h1 { font-size: 1.4em }
table, .svg { display: block; overflow-x: auto; font-size: 13px; fill: currentColor; border-spacing: 0 }
td, th { padding: .2em .6em; text-align: right; vertical-align: top; border-top: 1px solid #8884 }"""


@torch.no_grad()
def sums(losses):
    """What `metrics` needs of model.losses(...), in a vector that adds up over batches and processes."""
    gram = lambda y: einsum(y, y, "row i d, row j d -> row i j").double().sum(0).flatten()
    rows = len(losses["x"]) * torch.stack([torch.ones_like(losses["loss"]), *(losses[key] for key in LOSSES)])
    return torch.cat([rows, gram(losses["error"]), gram(losses["x"]), losses["x"].sum(0).flatten()])


def metrics(model, sums):
    """
    The losses, means over rows, and explained variances: 1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, a
    ratio of sums over all rows; in scaled units over all, and of each model and the last's difference from A.
    """
    n, d = model.b_dec.shape
    rows, error, square, total = sums.split([1 + len(LOSSES), n * n, n * n, n * d])
    error, total = error.view(n, n), total.view(n, d)
    variance = square.view(n, n) - total @ total.T / rows[0]
    row = dict(explained_variance=(1 - error.trace() / variance.trace()).item())
    row |= zip(LOSSES, (rows[1:] / rows[0]).tolist())
    models = model.mix.double().inverse()  # each in terms of what error and variance are of
    for name, part in zip([*"ABCDEFGH"[:n], "difference"], [*models, models[-1] - models[0]]):
        if (of_part := part @ variance @ part) > 0:
            row[f"explained_variance_{name}"] = (1 - part @ error @ part / of_part).item()
    return row


@torch.no_grad()
def validate(model, data, l1_coeff):
    """Of held-out rows, in inference mode: metrics, and how often each latent fires [d_hidden]."""
    training, total, fired = model.training, 0, 0
    model.eval()
    for x in data.validation():
        losses = model.losses(x, l1_coeff)
        total, fired = total + sums(losses), fired + losses["fired"]
    model.train(training)
    return dict(dead_latents=(fired == 0).sum().item()) | metrics(model, total), fired / total[0]  # of rows


@torch.no_grad()
def compare(model, frequency):
    """A DataFrame of the latents whose firing frequency [d_hidden] is over 0, by their decoder vectors."""
    D = model.in_models(model.W_dec)
    norm, size = D.norm(dim=-1), (D[:, 1] - D[:, 0]).norm(dim=-1)
    columns = dict(relative_norm=norm[:, 1] / norm.sum(1), change=size / norm.sum(1), frequency=frequency)
    columns["cosine"] = F.cosine_similarity(D[:, 0], D[:, 1], dim=-1)
    columns["carries"] = frequency * (columns["change"] if model.basis == "delta" else size)
    table = pd.DataFrame({name: y.cpu() for name, y in columns.items()}).rename_axis("latent")
    kinds = ["base-only", "uneven", "shared", "uneven", "fine-tuned-only"]
    table["kind"] = np.array(kinds)[np.digitize(table.relative_norm, [0.1, 0.4, 0.6, 0.9])]
    return table[table.frequency > 0]


@torch.no_grad()
def latent_scaling(model, blocks, latents):
    """
    nu_r and nu_epsilon of those latents, a list, as a DataFrame: by them Minder, Dumas et al. 2025 (arXiv
    2504.02922) tell what one model alone has from what training only shrank in the other. beta is the least-
    squares factor of f * d, d being the decoder vector in the latent's own model, in a model's reconstruction
    (nu_r), or in its error with the latent's part left in (nu_epsilon); nu is beta of the other model over
    that of its own.
    """
    D = model.in_models(model.W_dec)[latents]
    n, own = torch.arange(len(D)), D.norm(dim=-1).argmax(dim=1)
    squares, sums = D.new_zeros(len(D)), D.new_zeros(2, *D.shape)
    for x in blocks if latents else ():
        f = model.encode(x := x.to(D))
        x_hat = model.decode(f)
        y = torch.stack([x_hat, x - x_hat]) * model.scale[:, None]
        sums += einsum(f[:, latents], y, "row latent, kind row model d -> kind latent model d")
        squares += f[:, latents].square().sum(0)
    beta = einsum(sums, D[n, own], "kind latent model d, latent d -> kind latent model")  # but for a factor
    beta[1] += squares[:, None] * einsum(D, D[n, own], "latent model d, latent d -> latent model")
    nu = beta[:, n, 1 - own] / beta[:, n, own]
    return pd.DataFrame(nu.T.cpu().numpy(), latents, ["nu_r", "nu_epsilon"])


def pictures(table, rows, curve, path):
    """Draws histograms of the latents, the causal curve if any, and curves of the training, as SVG."""
    from matplotlib import pyplot, rc_context

    shown = table[["relative_norm", "cosine"]].assign(log10_frequency=np.log10(table.frequency))
    names = ["loss", "explained_variance", "l0_loss", "dead_latents"][: 3 + (len(curve) > 0)]
    curves = pd.DataFrame(rows, columns=["step", *names]).dropna()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 8, "legend.frameon": False}):
        figure, (above, below) = pyplot.subplots(2, len(names), figsize=(11, 4.5), layout="constrained")
        shown.hist(ax=above[:3], bins=50, grid=False)
        pyplot.setp(above[:3], yscale="symlog", ylabel="latents")
        if len(curve):
            curve.plot(logx=True, marker="o", ax=above[3], xlabel="latents", title="change recovered")
        above[0].set(xlim=(0, 1), title="relative_norm (0: base, 1: fine-tuned)")
        curves.plot(x="step", subplots=True, ax=below)
        figure.savefig(path, transparent=True, metadata=dict(Date=None))
        pyplot.close(figure)
    return path.read_text(encoding="utf-8").replace("#000000", "currentColor").partition('.dtd">')[2]


@torch.no_grad()
def report(model, data, config, log, row, frequency):
    """Writes OUT/report.html: what the models share, what each has alone, what changed, with its texts."""
    table = compare(model, frequency)
    exclusive = table.kind.str.endswith("only")
    table = table.join(latent_scaling(model, data.validation(), list(table.index[exclusive])))
    table["confirmed"] = ((table.nu_r < 0.5) & (table.nu_epsilon < 0.2)).where(exclusive)
    verdict = f"of {len(frequency):,} latents {len(table):,} are alive"
    for kind in ("shared", "base-only", "fine-tuned-only"):
        verdict += f", {(table.kind == kind).sum():,} {kind}"
    in_delta = model.basis == "delta"
    ranked = table.iloc[np.lexsort([-table.carries, ~exclusive | in_delta])]  # in plain, exclusive ones first
    none = "" if in_delta else ": no exclusive latents"
    verdict += f", {table.confirmed.sum():,} confirmed" if exclusive.any() else none
    if in_delta:
        half = 1 + np.searchsorted(ranked.carries.cumsum(), ranked.carries.sum() / 2)
        verdict += f"; {half:,} of them carry half of the change"
    if config["dedicated"]:
        own = table.confirmed[~model.owned.all(1).flatten().cpu().numpy()[table.index]]
        verdict += f"; of {len(own):,} dedicated ones that are alive {own.sum():,} are confirmed"
    often = table[table.frequency >= min(20 / config["val_tokens"], 0.01)]
    top = often.sort_values(["confirmed", "change"], ascending=False).groupby("kind").head(20)
    curve = pd.DataFrame()
    if data.docs:
        import collect

        top.insert(0, "texts", list(collect.examples(model, data, top.index)))
    if config["ce_eval"]:
        orders = dict(chosen=ranked.index, random=table.sample(frac=1, random_state=0).index)
        sizes = sorted({min(n, len(table)) for n in (1, 5, 20, 100, len(table))})
        latents = {f"{name}_{n}": list(order[:n]) for name, order in orders.items() for n in sizes}
        log(config["steps"], found := collect.splice(model, data, latents), "val/")
        curve = pd.DataFrame({name: {n: found[f"recovered_{name}_{n}"] for n in sizes} for name in orders})
        row, n = row | found, sizes[len(sizes) // 2]
        verdict += f"; {n} latents carry {curve.chosen[n]:.0%} of what this layer changed"
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>What fine-tuning changed</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style><h1>{verdict}</h1>
<div class="svg">{pictures(table, log.rows, curve, log.out / "report.svg")}</div>"""
    with pd.option_context("display.max_colwidth", None, "display.float_format", "{:.4g}".format):
        top = top.dropna(axis=1, how="all").reset_index()
        page += top.to_html(index=False, escape=False, border=0, na_rep="")
        page += pd.Series(data.meta | config | row).drop("resume").to_frame("the run").to_html(border=0)
    write_atomically(log.out / "report.html", lambda part: part.write_text(page, encoding="utf-8"))
    log.wandb(lambda: wandb.log(dict(report=wandb.Html(page)), step=config["steps"]))
    print(f"{verdict}\nreport: {log.out / 'report.html'}")
    if isinstance(data, Toy):
        print(data.score(model, table))


# --- Training -----------------------------------------------------------------------------------------------

stop_signals = []  # received so far


def schedule(step, config):
    """Factors of l1_coeff: linear from 0 in 5% of the steps; and of lr: that, and to 0 in the last 20%."""
    warm = min(1, (step + 1) / (0.05 * config["steps"]))
    return warm, min(warm, (config["steps"] - step) / (0.2 * config["steps"]))


def resolve(config):
    """The config with its by-rule values filled in; ends the program if two values do not go together."""
    config, tokens = dict(config), config["steps"] * config["batch_size"]
    enough = config["variant"] == "vanilla" or config["k"] <= config["d_hidden"]
    fail(f"--k={config['k']} is larger than --d_hidden={config['d_hidden']}", unless=enough)
    fail("--batch_size is no multiple of the processes", unless=config["batch_size"] % world()[1] == 0)
    if config["aux_coeff"] < 0:
        config["aux_coeff"] = 0.0 if config["variant"] == "vanilla" else 1 / 32
    plain = config["basis"] == "plain"
    fail("--dedicated is at most 0.5, in the plain basis only", unless=config["dedicated"] <= 0.5 * plain)
    config["dead_after"] = config["dead_after"] or min(-(-tokens // 20), 10_000_000)
    config["lr"] = config["lr"] or 3e-3 * (512 / config["d_hidden"]) ** 0.5
    when = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    config["out_dir"] = config["out_dir"] or f"out/{Path(config['data']).name}-{config['variant']}-{when}"
    return config


def write_atomically(path, write):
    """write(another path), which then takes the place of `path`, never half-written."""
    part = path.with_name(path.name + ".part")
    with explain(f"{path} cannot be written; make room on the disk"), contextlib.ExitStack() as at_the_end:
        at_the_end.callback(part.unlink, missing_ok=True)
        write(part)
        with open(part, "rb") as written:
            os.fsync(written)  # a power cut must not find the new name before what it names
        os.replace(part, path)


class Log:
    """Rows of metrics: one short line on the terminal, all of it in OUT/metrics.jsonl and wandb."""

    def __init__(self, config, state):
        self.out, self.rows = Path(config["out_dir"]), state["rows"]
        with explain(f"--out_dir={self.out}: a run that is there goes on by --resume=True"):
            self.out.mkdir(parents=True, exist_ok=True)
            self.file = open(self.out / "metrics.jsonl", "w" if config["resume"] else "x", buffering=1)
        print("\n".join(f"{key} = {value!r}" for key, value in config.items()))
        self.file.writelines(json.dumps(row) + "\n" for row in self.rows)  # later ones come again
        options = dict(project=config["wandb_project"], mode=config["wandb_mode"], name=self.out.name)
        options |= dict(id=state.get("wandb_id"), resume="allow", settings=wandb.Settings(silent=True))
        self.wandb(wandb.init, **options, config=config, dir=self.out)

    def wandb(self, call, *args, **options):
        """call(...), a function of wandb's. A run goes on without wandb after one that fails."""
        try:
            call(*args, **options)
        except Exception as e:  # of many kinds, and none is worth a run
            print(f"warning: going on without wandb: {e}", file=sys.stderr)
            self.wandb = lambda *args, **options: None

    def __call__(self, step, row, prefix=""):
        shown = "  ".join(f"{key} {value:.4g}" for key, value in list(row.items())[:8])
        print(f"{step:7d} {prefix or 'train/'}  {shown}", flush=True)
        self.rows.append(dict(step=step) | {prefix + key: value for key, value in row.items()})
        self.file.write(json.dumps(self.rows[-1]) + "\n")
        self.wandb(wandb.log, self.rows[-1], step=step)


def build(config, state, device):
    """The data, and a crosscoder with its optimiser and schedule, new or as the state of a run has them."""
    torch.manual_seed(config["seed"])
    if config["data"] == "stream":
        from collect import Stream

        data = Stream(config, state["texts_read"])
    else:
        data = {"toy": Toy, "toy-hard": HardToy}.get(config["data"], Store)(config)
    fail("--ce_eval=True takes a store that collect.py wrote", unless=data.docs or not config["ce_eval"])
    with explain("data, config and checkpoint do not fit each other"):
        options = {key: config[key] for key in ("d_hidden", "variant", "k", "basis", "dedicated")}
        model = CrossCoder(data.n_models, data.d_model, **options).to(device)
        betas = config["beta1"], config["beta2"]
        optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], betas=betas, fused=True)
        if config["resume"]:  # of the optimiser only its moments: rates are the config's
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(optimizer.state_dict() | dict(state=state["moments"]))
        else:
            model.start_at(data.batch(0), data.meta.get("scale"))
        factor = lambda done, start=state["step"]: schedule(start + done, config)[1]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return data, model, optimizer, scheduler


def train(config, state=None):
    """Trains by the config, on from a run's state if one is given; returns the crosscoder, in eval mode."""
    warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    device = set_up(config["device"])
    config, rank = resolve(config), world()[0]
    state = state or dict(step=0, rows=[], texts_read=0, wandb_id=os.urandom(4).hex())
    data, model, optimizer, scheduler = build(config, state, device)
    log = Log(config, state) if rank == 0 else lambda *row: None
    steps, batch_size, found = config["steps"], config["batch_size"], None
    logged_at, logged_step = time.perf_counter(), state["step"]

    for step, x in prefetched(data, range(state["step"], steps)):
        l1_coeff, lr = config["l1_coeff"] * schedule(step, config)[0], scheduler.get_last_lr()[0]
        model.spare = [p.grad.flatten(1) for p in (model.W_enc, model.W_dec) if p.grad is not None]
        optimizer.zero_grad()
        losses = model.losses(x, l1_coeff, config["aux_coeff"], config["k_aux"], config["dead_after"])
        losses["loss"].backward()
        for p in model.parameters() if world()[1] > 1 else ():
            p.grad = reduce(p.grad)  # all are ready at once: there is nothing to overlap this with
        largest = config["grad_clip"] or torch.inf
        with explain(f"step {step}, --lr={lr:.3g}, loss {losses['loss']:.3g}; the last checkpoint is whole"):
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), largest, error_if_nonfinite=True)
        optimizer.step()
        scheduler.step()
        step += 1
        stop = reduce(model.scale.new_tensor(len(stop_signals))) > 0  # of any process
        due = lambda every, step=step: step == steps or (every and step % every == 0)
        if due(config["log_every"]):
            speed = batch_size * (step - logged_step) / (time.perf_counter() - logged_at)
            row = dict(tokens_per_second=speed, dead_latents=losses["dead"])
            row |= metrics(model, reduce(sums(losses))) | dict(threshold=model.threshold.item())
            row |= dict(lr=lr, l1_coeff=l1_coeff, tokens=step * batch_size, grad_norm=grad_norm.item())
            log(step, row)
            logged_at, logged_step = time.perf_counter(), step
        if rank == 0 and config["val_tokens"] and due(config["eval_every"]):
            found = validate(model, data, l1_coeff)
            log(step, found[0], "val/")
        if rank == 0 and (due(config["save_every"]) or stop):
            state |= dict(config=config, step=step, rows=log.rows, texts_read=data.texts_read)
            state |= dict(model=model.state_dict(), moments=optimizer.state_dict()["state"])
            write_atomically(log.out / "checkpoint.pt", functools.partial(torch.save, state))
        if stop and step < steps:
            if rank == 0:
                print(f"stopped at step {step}: go on by --resume=True --out_dir={log.out}", file=sys.stderr)
            raise SystemExit(128 + (stop_signals or [signal.SIGTERM])[0])

    model.eval()
    if rank == 0:
        model.save_pretrained(log.out)
        if config["val_tokens"]:
            report(model, data, config, log, *(found or validate(model, data, config["l1_coeff"])))
        print(f"weights: CrossCoder.from_pretrained({str(log.out)!r})")
        log.wandb(wandb.finish)
    return model


def stop_soon(number, _):
    """Handler of a signal: training ends after its step, or at the second signal at once."""
    stop_signals.append(number)
    signal.signal(number, signal.SIG_DFL)


def main(argv, state=None):
    defaults, values = config, allowed
    if "--data=stream" in argv:
        import collect

        defaults, values = collect.config | config, collect.allowed | allowed
    settings = defaults | read_command_line(defaults, values, argv, __file__)
    if settings["resume"] and not state:
        out = Path(settings["out_dir"])
        with explain(f"--out_dir={out}: its checkpoint.pt is no checkpoint, or not whole"):  # runs no code:
            state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
            saved = {key: value for key, value in state["config"].items() if key != "trust_remote_code"}
            state |= dict(rows=[dict(row) for row in state["rows"]], texts_read=int(state["texts_read"]))
        return main([f"--{key}={value}" for key, value in saved.items()] + argv, state)
    config_then = defaults | (state["config"] if state else settings)
    same = all(settings[key] == config_then[key] for key in ("basis", "dedicated"))
    fail("--basis or --dedicated is not this run's, and resuming cannot change it", unless=same)
    return train(settings, state)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_soon)
    with explain("what was saved before is whole", OSError):
        main(sys.argv[1:])

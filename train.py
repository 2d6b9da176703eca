"""
Trains a CrossCoder: one sparse dictionary over the activations of a base model (A) and of the
model fine-tuned from it (B). A latent has a decoder vector per model: where one is 0, the other
has it alone.

    python train.py --variant=batchtopk --k=32              # a toy with planted truth, and a score
    python train.py --data=acts --d_hidden=16384            # activations stored by collect.py
    python train.py --resume=True --out_dir=out/RUN         # goes on, with what is given beside
    torchrun --standalone --nproc_per_node=2 train.py ...   # the same over several processes

Any key of the config is set by --key=value. A run is a folder: metrics.jsonl (an object a row:
step, loss, l0_loss, explained_variance_A, ..., of held-out rows val/loss, ...), checkpoint.pt, the
weights as model.safetensors with config.json, wandb/, and what report.py says fine-tuning changed.
Lindsey et al. 2024 (transformer-circuits.pub/2024/crosscoders), BatchTopK: arXiv 2412.06410,
auxiliary loss: arXiv 2406.04093, dedicated latents: arXiv 2602.11729.
"""

import ast
import contextlib
import difflib
import functools
import json
import os
import signal
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Huge pages save a tenth of a step. Torch reads this once, when it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of what is imported

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
import wandb
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes, reduce
from datasets import load_from_disk
from einops import einsum
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import save_model
from torch import nn

# --- Config, command line, processes --------------------------------------------------------------

config = dict(
    # I/O and logging
    out_dir="",  # folder of the run; empty makes a new one, out/DATA-VARIANT-TIME
    resume=False,  # go on from out_dir's checkpoint, with its config and what is given beside it
    save_every=500,  # steps between checkpoints; 0: only at the end
    log_every=50,  # steps between rows of metrics
    eval_every=500,  # steps between validations; 0: only at the end
    wandb_mode="offline",  # offline, online or disabled
    wandb_project="crosscoder",  # name of the project there
    # data
    data="toy",  # toy, toy-hard, stream (harvests meanwhile; collect.py's keys), or a store's path
    val_tokens=8192,  # rows held out for validation: those of the last texts; 0: none
    batch_size=1024,  # tokens per step, over all processes
    # model and losses
    variant="batchtopk",  # vanilla (ReLU and L1), topk or batchtopk
    basis="plain",  # plain: of (A, B); delta: of (A, B - A made as large), for narrow fine-tunes
    d_hidden=512,  # latents
    dedicated=0.0,  # share of the latents that belong to A alone, and as many to B alone
    k=32,  # active latents per token: of each (topk), on average over the batch (batchtopk)
    l1_coeff=2.0,  # weight of the L1 term (vanilla)
    aux_coeff=-1.0,  # weight of the auxiliary loss on dead latents; -1: 1/32, or 0 for vanilla
    k_aux=64,  # dead latents per token that the auxiliary loss uses
    dead_after=0,  # tokens without firing: then it is dead; 0: 5% of the run's, at most 10 million
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
# What a value must be in, beside being of its default's type.
at_least_0 = pd.Interval(0, 1e15, closed="left")
at_least_1 = pd.Interval(1, 1e15, closed="left")
from_0 = ["save_every", "eval_every", "l1_coeff", "dead_after", "lr", "grad_clip", "seed"]
allowed = dict.fromkeys(from_0, at_least_0)
allowed |= dict.fromkeys(["steps", "d_hidden", "k", "k_aux", "log_every"], at_least_1)
allowed["aux_coeff"] = pd.Interval(-1, 1e15, closed="left")
allowed["batch_size"] = pd.Interval(2, 1e9, closed="left")
allowed["val_tokens"] = pd.Interval(0, 1e7, closed="left")
allowed["wandb_mode"] = ["offline", "online", "disabled"]
allowed["variant"] = ["vanilla", "topk", "batchtopk"]
allowed["basis"] = ["plain", "delta"]
allowed["dedicated"] = pd.Interval(0, 0.5, closed="both")
allowed["beta1"] = allowed["beta2"] = pd.Interval(0, 1, closed="left")


def fail(message):
    """Ends the program for a mistake of its user: one line, exit code 2."""
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first or torch.distributed.is_initialized():  # before, all processes say the same
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def explain(what, kind=Exception):
    """Fails by one line if reading what a user gave raises that kind: libraries raise many."""
    try:
        yield
    except kind as e:
        fail(f"{what}: {' '.join(str(e).split())[:300] or type(e).__name__}")


def read_command_line(argv, file):
    """{key: text} of argv's --key=text. --help prints that file down to the end of its config."""
    if "--help" in argv:
        print(Path(file).read_text(encoding="utf-8").partition("\n)\n")[0])
        raise SystemExit(0)
    return dict(argument.removeprefix("--").partition("=")[::2] for argument in argv)


def checked(values, defaults, allowed):
    """
    The defaults with those values, each of its default's type; of texts what Python reads in them.
    Ends the program at a key that is none, or a value that is not allowed.
    """
    settings = dict(defaults)
    for key, value in values.items():
        if key not in defaults:
            near = difflib.get_close_matches(key.strip("-"), defaults, 1, 0)[0]
            fail(f"{key}: expected --key=value, the nearest key is --{near}")
        kind = type(defaults[key])
        what = f"--{key}={value}: expected {kind.__name__} {allowed.get(key, '')}"
        with explain(what):
            if kind is not str and isinstance(value, str):
                value = ast.literal_eval(value)
            settings[key] = kind(value)  # 1e6 is an integer, too
            is_allowed = key not in allowed or value in allowed[key]
        is_switch = isinstance(value, bool)  # which Python would take for a number
        if settings[key] != value or is_switch != (kind is bool) or not is_allowed:
            fail(what)
    return settings


def set_up(name):
    """The device of this process, which joins the others if torchrun started it."""
    device = PartialState(cpu=name == "cpu" or not torch.cuda.is_available()).device
    if name not in ("auto", device.type):
        fail(f"--device={name}: the device here is {device}")
    return device


def world():
    """(rank, number of processes): the place of this process among those that torchrun started."""
    state = PartialState()
    return state.process_index, state.num_processes


def write_atomically(path, write):
    """write(another path), which then takes the place of `path`, never half-written."""
    part = path.with_name(path.name + ".part")
    try:
        with explain(f"{path} cannot be written (is there room on the disk?)"):
            write(part)
            with open(part, "rb") as written:
                os.fsync(written)  # a power cut must not find the new name before what it names
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# --- Data: n_models, d_model, batch(step) and validation() of raw activations [rows, model, d] ----

# batch(step), this process's rows, must depend on (seed, step) alone: a run that goes on starts in
# the middle. It is called by another thread, while the step before is trained.


class Toy:
    """Activations of two models with planted features, endless, a function of (seed, step)."""

    n_models = 2
    d_model = 128
    # Of each kind how many, their size in A and in B, and about the tangent by which B's turns.
    kinds = {
        "shared": (192, 1, 1, 0.2),
        "base-only": (32, 2**0.5, 0, 0),
        "fine-tuned-only": (32, 0, 2**0.5, 0),
    }
    often = np.linspace(1, 3, 256) * 28 / 512  # share of tokens a feature is active in, by rank
    n_free = 256  # later ranks are active only where their parent is, one of the first 16

    def __init__(self, config):
        self.config = config
        g = torch.Generator().manual_seed(config["seed"])
        self.kind = []  # [feature]
        directions = []
        for kind, (n, size_a, size_b, turn) in self.kinds.items():
            a, b = F.normalize(torch.randn(2, n, self.d_model, generator=g), dim=-1)
            b = F.normalize(a + turn * b, dim=-1)
            directions.append(torch.stack([size_a * a, size_b * b], dim=1))
            self.kind += [kind] * n
        self.directions = torch.cat(directions)  # [feature, model, d_model]

        rng = np.random.default_rng(config["seed"])
        rank = rng.permutation(len(self.kind))
        parent_rank = np.where(rank < self.n_free, rank, rng.integers(16, size=len(rank)))
        self.parent = rank.argsort()[parent_rank]  # a feature of that rank; often itself
        self.chance = self.often[rank] / np.where(rank < self.n_free, 1, self.often[parent_rank])

    def rows(self, n, key):
        """n rows, a function of (seed, key)."""
        rng = np.random.default_rng([self.config["seed"], key])
        active = rng.random((n, len(self.kind))) < self.chance
        active &= active[:, self.parent]
        f = torch.tensor(active * rng.lognormal(0, 0.25, active.shape), dtype=torch.float)
        x = einsum(f, self.directions, "batch feature, feature model d -> batch model d")
        return x + 0.02 * torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))

    def batch(self, step):
        rank, n_processes = world()
        return self.rows(self.config["batch_size"], step + 1).chunk(n_processes)[rank]

    def validation(self):
        return self.rows(self.config["val_tokens"], 0).split(1024)


class HardToy(Toy):
    """The toy with Zipf frequencies over two decades, nested features, and some turned by 60°."""

    kinds = {
        "shared": (128, 1, 1, 0.2),
        "turned shared": (32, 1, 1, 3**0.5),
        "base-only": (48, 1, 0, 0),
        "fine-tuned-only": (48, 0, 1, 0),
    }
    often = 0.5 / np.linspace(1, 100, 256)
    n_free = 128


class Store:
    """
    A folder with a Hugging Face dataset for each model, row i of one being row i of the others:
    `activation` (floats, lists of one length) and, if collect.py wrote it, token, doc and pos, docs
    and meta.json. Batches are shuffled over all rows, anew each epoch, a function of (seed, step);
    rows too few for another batch are left out of an epoch. The last docs are held out, as many as
    have val_tokens rows, so that no row of theirs is trained on; without docs the last rows.
    """

    n_models = 2
    names = ("base", "finetuned")
    docs = None

    def __init__(self, config):
        self.config = config
        self.path = Path(config["data"])
        what = f"--data={self.path}: neither toy, nor stream, nor a store of aligned rows of floats"
        with explain(what):
            self.stored = [
                load_from_disk(self.path / name).with_format("arrow") for name in self.names
            ]
            indices = [self.index(dataset.data) for dataset in self.stored]
            of_a = indices[0]
            for of_b in indices[1:]:
                for name in of_a.keys() & of_b:
                    np.testing.assert_array_equal(of_a[name], of_b[name], name)
            (self.d_model,) = of_a["length of activation"].unique().to_pylist()
            self.doc = np.arange(len(self.stored[0]))  # each row as if it were a text
            if (self.path / "meta.json").exists():
                self.read_meta(of_a)
        last_of_doc = np.bincount(self.doc).cumsum()
        later = len(self.doc) - last_of_doc[self.doc]  # of each row, how many are of later docs
        is_held_out = later < config["val_tokens"]  # whole docs: val_tokens rows or just over
        self.train_rows = np.flatnonzero(~is_held_out)
        self.val_rows = np.flatnonzero(is_held_out)
        if len(self.train_rows) < config["batch_size"]:
            fail(f"{what}: of {len(self.doc)} rows {len(self.train_rows)} are left to train on")

    def index(self, table):
        """The columns that must be alike in all models, {name: integers [n_rows]}."""
        columns = {"length of activation": pc.list_value_length(table.column("activation"))}
        for name in {"token", "doc", "pos"}.intersection(table.column_names):
            columns[name] = table.column(name).cast("int64")
        return columns

    def read_meta(self, index):
        """What collect.py says of the models, the texts, and which token a row is."""
        self.meta = json.loads((self.path / "meta.json").read_text())
        docs = load_from_disk(self.path / "docs")
        self.docs = docs["input_ids"]
        self.sources = docs["source"]
        self.doc = index["doc"].to_numpy()
        self.pos = index["pos"].to_numpy()
        ids = docs.data.column("input_ids").combine_chunks()
        n = ids.value_lengths().to_numpy()
        place = (n.cumsum() - n)[self.doc] + self.pos  # among the tokens of all docs
        ids = ids.flatten().cast("int64").to_numpy()
        np.testing.assert_array_equal(ids[place], index["token"], "tokens, of docs")
        if np.bincount(place).max() > 1:
            raise ValueError("a token of docs has two rows")

    @functools.lru_cache(2)
    def shuffled(self, epoch):
        """The rows to train on, in the order of that epoch."""
        return np.random.default_rng([self.config["seed"], epoch]).permutation(self.train_rows)

    def read(self, rows):
        """The activations [len(rows), model, d_model] of those rows, in the store's float type."""
        columns = [
            dataset[rows]["activation"].combine_chunks().flatten() for dataset in self.stored
        ]
        parts = [column.to_numpy().reshape(len(rows), self.d_model) for column in columns]
        x = np.stack(parts, axis=1)
        bad = rows[~np.isfinite(x).all((1, 2))]
        if len(bad):
            fail(f"{self.path}: row {bad[0]} holds nan or inf")
        return torch.from_numpy(x)

    def batch(self, step):
        size = self.config["batch_size"]
        rank, n_processes = world()
        epoch, i = divmod(step, len(self.train_rows) // size)
        rows = self.shuffled(epoch)[i * size : (i + 1) * size]
        return self.read(rows[rank::n_processes])

    def validation(self):
        for start in range(0, len(self.val_rows), 1024):
            yield self.read(self.val_rows[start : start + 1024])


def prefetched(data, first, end):
    """Yields (step, its batch), from first to before end; a thread reads the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(data.batch, first)
        for step in range(first, end):
            x = coming.result()
            if step + 1 < end:
                coming = thread.submit(data.batch, step + 1)
            yield step, x


# --- Crosscoder -----------------------------------------------------------------------------------


def mean_size(y):
    """Mean norm of y [batch, n, d] over sqrt(d), of all processes' batches: [n]."""
    return reduce(y.norm(dim=-1).mean(0)) / y.shape[-1] ** 0.5


def mean_square(y):
    """Mean over the batch of the sum of the squares of y [batch, d]."""
    return y.norm(dim=1).square().mean()


def among_largest(y, k):
    """Which of y [batch, n] are among the k largest of their row, or as large: [batch, n]."""
    return y >= y.topk(min(k, y.shape[1])).values[:, -1:]


class CrossCoder(nn.Module, PyTorchModelHubMixin):
    """
    A sparse dictionary over the activations of n_models models. encode, decode and forward take and
    return raw ones. from_pretrained("out/RUN"), save_pretrained, push_to_hub are huggingface_hub's.
    Parameters: W_enc, W_dec [d_hidden, n_models, d_model], b_enc [d_hidden], b_dec [n_models,
    d_model]. Buffers: scale [n_models], sqrt(d_model) / mean norm of each model's activations; mix
    [n_models, n_models] from raw activations to what the parameters are of: diag(scale), or in the
    basis "delta" to A and to B - A made as large; owned [d_hidden, n_models, 1], 0 where a latent
    has no weights: of dedicated * d_hidden for each model, the first model's come first. And those
    that training moves, in `track`.
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
        n_own = min(round(dedicated * d_hidden), d_hidden // n_models)
        owned = torch.ones(d_hidden, n_models, 1)
        owned[: n_models * n_own, :, 0] = torch.eye(n_models).repeat_interleave(n_own, dim=0)
        self.owned = nn.Buffer(owned, persistent=False)
        W = 0.5 * F.normalize(torch.randn(d_hidden, n_models, d_model), dim=-1) * owned
        self.W_dec = nn.Parameter(W)
        self.W_enc = nn.Parameter(W.clone())
        self.b_enc = nn.Parameter(torch.zeros(d_hidden))
        self.b_dec = nn.Parameter(torch.zeros(n_models, d_model))
        self.scale = nn.Buffer(torch.ones(n_models))
        self.mix = nn.Buffer(torch.eye(n_models))
        self.threshold = nn.Buffer(torch.zeros(()))
        self.since_fired = nn.Buffer(torch.zeros(d_hidden, dtype=torch.long))

    def activate(self, pre, latent=...):
        """
        f of the pre-activations `pre` [batch, d_hidden], or of some [n] that are of the latents
        `latent` [n], by which to index a parameter of the latents. f and its gradient must be 0
        where pre <= 0. Whatever f is, topk and batchtopk choose by pre, and vanilla takes all that
        are over 0: an activation that makes some of them 0, such as JumpReLU, goes with vanilla.
        """
        return F.relu(pre)

    def _save_pretrained(self, folder):
        path = folder / "model.safetensors"
        write_atomically(path, lambda part: save_model(self, part))

    @torch.no_grad()
    def start_at(self, x):
        """Fits scales and biases of a new model to raw x [batch, n_models, d_model]."""
        x = x.to(self.mix)
        self.scale.copy_(1 / mean_size(x))
        self.mix.copy_(self.scale.diag())
        if self.basis == "delta":
            per_size = 1 / mean_size(x[:, 1:] - x[:, :1])
            self.mix[1:, 0] = -per_size
            self.mix[1:, 1:] = per_size.diag()
        y = self.scaled(x)
        varies = y.var(0).sum(-1) > 1e-9 * y.square().sum(-1).mean(0)  # False where it is nan, too
        if not varies.all():
            fail("nothing to explain: rows alike, too large, or the models do not differ here")
        self.b_dec.copy_(reduce(y.mean(0)))  # so that few latents die
        self.b_enc.copy_(-einsum(self.W_enc, self.b_dec, "latent model d, model d -> latent"))
        self.encode(x[:32])  # for a threshold: near it `choose` looks first
        self.since_fired.zero_()

    def scaled(self, x):
        """Raw activations [batch, n_models, d_model] -> those that the parameters are of."""
        return self.mix @ x.to(self.mix)

    def unscaled(self, y):
        """The inverse of `scaled`."""
        return self.mix.double().inverse().to(y) @ y

    def in_models(self, y):
        """Decoder vectors or their sums [n, n_models, d_model] as each model's, times its scale."""
        return self.unscaled(y) * self.scale[:, None]

    def decoder_norm(self):
        """[d_hidden]: sum over the models of the norms of a latent's decoder vectors."""
        return self.W_dec.norm(dim=-1).sum(1)

    def own(self, W):
        """The weights W, but that those that a dedicated latent does not have are and stay 0."""
        return W * self.owned if self.dedicated else W

    def batch_cut(self, score, batch):
        """The least of the k * batch largest scores of all processes; 0 if too few are over 0."""
        every = gather(pad_across_processes(score.flatten()))
        every = F.pad(every, (0, 1))  # a 0, the least if there are no more
        n = min(self.k * batch * world()[1], len(every))
        return every.topk(n, sorted=False).values.min()

    def encode(self, x):
        """
        Raw activations [batch, n_models, d_model] -> latent activations f [batch, d_hidden]. In
        training mode it moves on what `track` says.
        """
        x = self.scaled(x)
        W_enc = self.own(self.W_enc)
        pre = einsum(x, W_enc, "batch model d, latent model d -> batch latent") + self.b_enc
        f = self.activate(pre)
        score = (F.relu(pre) * self.decoder_norm()).detach()
        if self.variant == "topk":
            is_active = among_largest(score, self.k)
        elif self.variant == "batchtopk" and self.training:
            is_active = score >= self.batch_cut(score, len(x))
        else:
            is_active = score >= self.threshold  # which is 0 in vanilla
        f = f * is_active
        if self.training:
            row, latent = f.nonzero(as_tuple=True)
            self.track(score[row, latent], latent, len(x))
        return f

    def decode(self, f):
        """f [batch, d_hidden] -> raw activations [batch, n_models, d_model]."""
        W_dec = self.own(self.W_dec)
        x_hat = einsum(f, W_dec, "batch latent, latent model d -> batch model d") + self.b_dec
        return self.unscaled(x_hat)

    def forward(self, x):
        """Raw activations -> reconstructed ones, [batch, n_models, d_model]."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def track(self, score, latent, batch):
        """
        Moves on what training moves, as BatchNorm does, by the scores, pre-activation * decoder
        norm, of what fires in a batch [n] and the latents that do [n]: threshold [], a running mean
        of the least score, which one must reach in batchtopk's eval mode, so that a token's code
        does not depend on its batch; and since_fired [d_hidden], the tokens since each one fired.
        """
        fired = reduce(latent.bincount(minlength=len(self.since_fired)).float())
        self.since_fired += batch * world()[1]
        self.since_fired[fired > 0] = 0
        if self.variant == "batchtopk" and fired.any():
            least = F.pad(score, (0, 1), value=torch.inf).min()  # a process may have none
            least = -reduce(-least, "max")  # of all processes
            is_first = self.threshold == 0  # it starts there, from no sentinel
            self.threshold.lerp_(least, torch.where(is_first, 1.0, 0.1))

    # --- The same, fast: what is 0 in f has no gradient, so that leaving it out is exact ---

    @torch.no_grad()
    def choose(self, x, W_enc, norm, dead, k_aux, look_over=0.9):
        """
        Two codes: the Entries that are active for scaled x [batch, n_models * d_model] by W_enc
        [d_hidden, n_models * d_model], and those of the k_aux largest pre-activations of the `dead`
        latents in each row. Training of batchtopk looks at scores over 0.9 of its threshold, and
        again at all of them if the cut turns out lower.
        """
        is_searching = self.variant == "batchtopk" and self.training
        cut = self.threshold  # 0 in other variants
        if is_searching:
            cut = look_over * cut
        bound = 0.9999 * cut / norm  # in terms of the pre-activation; a hair low, for rounding
        active, revived = [], []
        first = 0
        for block in x.split(1024):  # [batch, d_hidden] is never whole
            pre = F.linear(block, W_enc, self.b_enc)
            if self.variant == "topk":
                is_active = among_largest(pre * norm, self.k)
            else:
                is_active = pre > bound
            row, latent = is_active.nonzero(as_tuple=True)
            active.append((first + row, latent, pre[row, latent]))
            row, i = among_largest(pre[:, dead], k_aux).nonzero(as_tuple=True)
            revived.append((first + row, dead[i], pre[row, dead[i]]))
            first += len(pre)
        row, latent, pre = map(torch.cat, zip(*active))
        score = pre * norm[latent]
        if is_searching:
            least = self.batch_cut(score, len(x))
            if least < cut:
                return self.choose(x, W_enc, norm, dead, k_aux, look_over=0)
            cut = least
        keep = (score >= cut) & (pre > 0)
        revived = Entries(*map(torch.cat, zip(*revived)))
        return Entries(row[keep], latent[keep], pre[keep]), revived

    def losses(self, x, l1_coeff=0.0, aux_coeff=0.0, k_aux=64, dead_after=torch.inf):
        """
        The losses of raw x [batch, n_models, d_model]: `loss`, to be minimised, and its parts, of
        scaled activations, means over the batch of sums over the rest. It is l2, in vanilla
        + l1_coeff * l1, + aux_coeff * aux, in which the latents that are dead, silent for over
        dead_after tokens, reconstruct what x_hat lacks. Any number put beside them is logged. And x
        and error = x_hat - x, scaled, and `fired` [d_hidden], how often each latent did. x gets no
        gradient.
        """
        x = self.scaled(x).detach()
        y = x.flatten(1)
        W_enc = self.own(self.W_enc).flatten(1)
        W_dec = self.own(self.W_dec).flatten(1)
        is_dead = self.since_fired > dead_after
        dead = (is_dead & (aux_coeff > 0)).nonzero().flatten()
        norm = self.decoder_norm()
        active, revived = self.choose(y, W_enc, norm, dead, k_aux)
        latent = active.latent

        pre = EncodeAt.apply(y, W_enc, self.b_enc, active)
        f = self.activate(pre, latent)
        x_hat = DecodeAt.apply(active, f, W_dec, len(x))
        error = x_hat + self.b_dec.flatten() - y
        l2_loss = mean_square(error)
        l1_loss = (f * norm[latent]).sum() / len(x)
        aux_loss = torch.zeros_like(l2_loss)
        if len(dead):  # by pre-activations, so that it reaches those that are negative everywhere
            pre_dead = EncodeAt.apply(y, W_enc, self.b_enc, revived)
            e_hat = DecodeAt.apply(revived, pre_dead, W_dec, len(x))
            aux_loss = mean_square(error.detach() + e_hat) * min(len(dead) / k_aux, 1)
        loss = l2_loss + aux_coeff * aux_loss
        if self.variant == "vanilla":
            loss = loss + l1_coeff * l1_loss

        fires = f > 0
        fired = latent[fires].bincount(minlength=len(norm))
        if self.training:
            self.track((pre * norm[latent])[fires], latent[fires], len(x))
        losses = dict(loss=loss, l2_loss=l2_loss, l1_loss=l1_loss, aux_loss=aux_loss)
        losses |= dict(l0_loss=fired.sum() / len(x), dead_latents=is_dead.sum())
        return losses | dict(x=x, error=error.view_as(x), fired=fired)


class Entries(NamedTuple):
    """Some entries of a matrix [batch, d_hidden], sorted by row, with pre-activations, each [n]."""

    row: torch.Tensor
    latent: torch.Tensor
    pre: torch.Tensor


def product(row, latent, f, W, n_rows):
    """f @ W [n_rows, d] of a code that has the values f [n] at its entries, sorted by row."""
    starts = torch.searchsorted(row, torch.arange(n_rows, device=W.device))
    return F.embedding_bag(latent, W, starts, per_sample_weights=f.to(W), mode="sum")


def transposed_product(row, latent, f, x, d_hidden):
    """code.T @ x [d_hidden, d] of x [batch, d] and such a code [batch, d_hidden]."""
    order = latent.int().argsort(stable=True)
    return product(latent[order], row[order], f[order], x, d_hidden)


class EncodeAt(torch.autograd.Function):
    """
    The pre-activations [n] that `choose` found at the Entries of a code, as x @ W_enc.T + b_enc
    of x [batch, d], W_enc [d_hidden, d] and b_enc [d_hidden]. x gets no gradient.
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, code):
        ctx.save_for_backward(x, b_enc, code.row, code.latent)
        return code.pre.clone()

    @staticmethod
    def backward(ctx, grad):
        x, b_enc, row, latent = ctx.saved_tensors
        grad_W = transposed_product(row, latent, grad, x, len(b_enc))
        return None, grad_W, latent.bincount(grad, len(b_enc)), None


class DecodeAt(torch.autograd.Function):
    """
    `product` of values f [n] at the Entries of a code and W [d_hidden, d], but that its gradients
    read each row of W once: worth 7% of a step.
    """

    @staticmethod
    def forward(ctx, code, f, W, n_rows):
        ctx.save_for_backward(code.row, code.latent, f, W)
        return product(code.row, code.latent, f, W, n_rows)

    @staticmethod
    def backward(ctx, grad):
        row, latent, f, W = ctx.saved_tensors
        f = f.detach().requires_grad_()
        with torch.enable_grad():
            grad_W = transposed_product(row, latent, f, grad, len(W))
        # <grad, code @ W> = <code.T @ grad, W>: that is a way to the gradient of its values
        (grad_f,) = torch.autograd.grad(grad_W, f, W)
        return None, grad_f, grad_W.detach(), None


# --- Measures -------------------------------------------------------------------------------------


@torch.no_grad()
def sums(losses):
    """What `metrics` needs of model.losses(x): sums over rows, which add up over batches."""
    rows = losses["loss"].new_tensor(len(losses["x"]), dtype=torch.double)
    found = {name: rows * y for name, y in losses.items() if np.ndim(y) == 0}
    y = torch.stack([losses["x"], losses["error"]]).double()
    found |= dict(rows=rows, fired=losses["fired"].double(), x=y[0].sum(0))
    found["squares"] = einsum(y, y, "which row i d, which row j d -> which i j")
    return found


def metrics(model, parts):
    """
    Of a list of `sums` the numbers, as means over rows, with explained variances, and how often
    each latent fires [d_hidden]. Explained variance, 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2,
    is a ratio of sums over all rows: of scaled x, of each model, of the last's difference from A.
    """
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    n = total.pop("rows")
    frequency = total.pop("fired") / n
    x = total.pop("x")
    square, error = total.pop("squares")
    variance = square - x @ x.T / n
    row = {name: (y / n).item() for name, y in total.items()}
    row["explained_variance"] = (1 - error.trace() / variance.trace()).item()
    models = model.mix.double().inverse()  # row m: model m's activation by those that x is of
    views = dict(zip("ABCDEFGH", models), difference=models[-1] - models[0])
    for name, view in views.items():
        of_view = view @ variance @ view
        if of_view > 0:
            row[f"explained_variance_{name}"] = (1 - view @ error @ view / of_view).item()
    return row, frequency


@torch.no_grad()
def validate(model, data, l1_coeff):
    """Of held-out rows, in eval mode: metrics, and how often each latent fires [d_hidden]."""
    model.eval()
    parts = [sums(model.losses(x, l1_coeff)) for x in data.validation()]
    row, frequency = metrics(model, parts)
    row["dead_latents"] = (frequency == 0).sum().item()
    return row, frequency


# --- Training -------------------------------------------------------------------------------------

stop_signals = []  # received so far


def stop_soon(number, _):
    """Handler of a signal: training ends after its step, or at its second time at once."""
    stop_signals.append(number)
    signal.signal(number, signal.SIG_DFL)


def warm_up(step, steps):
    """Factor of l1_coeff: linear from 0 in the first 5% of the steps."""
    return min(1, (step + 1) / (0.05 * steps))


def lr_factor(step, steps):
    """Factor of lr: warm-up, constant, linear to 0 over the last 20% of the steps."""
    return min(warm_up(step, steps), (steps - step) / (0.2 * steps))


def is_due(step, every, steps):
    """Whether to do now what is done every so many steps, and at the last one; 0: only at that."""
    return step == steps or (every > 0 and step % every == 0)


def resolve(config, is_new=True):
    """The config with its by-rule values; ends the program if two values do not go together."""
    if config["variant"] != "vanilla" and config["k"] > config["d_hidden"]:
        fail(f"--k={config['k']} is larger than --d_hidden={config['d_hidden']}")
    if config["batch_size"] % world()[1]:
        fail("--batch_size is no multiple of the processes")
    if is_new and Path(config["out_dir"], "checkpoint.pt").exists():
        fail(f"--out_dir={config['out_dir']} holds a run already, which goes on by --resume=True")
    if config["dedicated"] and config["basis"] != "plain":
        fail("--dedicated is for the plain basis only")
    when = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    name = f"out/{Path(config['data']).name}-{config['variant']}-{when}"
    tokens = config["steps"] * config["batch_size"]
    config = dict(config)
    config["out_dir"] = config["out_dir"] or name
    config["lr"] = config["lr"] or 3e-3 * (512 / config["d_hidden"]) ** 0.5
    config["dead_after"] = config["dead_after"] or min(-(-tokens // 20), 10_000_000)
    if config["aux_coeff"] < 0:
        config["aux_coeff"] = 0.0 if config["variant"] == "vanilla" else 1 / 32
    return config


def open_data(config, texts_read=0):
    """The data that config["data"] names; of a stream what comes after the texts already read."""
    if config["data"] == "stream":
        from collect import Stream

        return Stream(config, texts_read)
    kinds = {"toy": Toy, "toy-hard": HardToy}
    return kinds.get(config["data"], Store)(config)


def new_model(config, data):
    """The CrossCoder of that config for that data."""
    options = {key: config[key] for key in ("d_hidden", "variant", "k", "basis", "dedicated")}
    return CrossCoder(data.n_models, data.d_model, **options)


def read_checkpoint(out):
    """The state of the run in the folder `out`, as `train` saves it. Runs no code that is in it."""
    path = Path(out) / "checkpoint.pt"
    what = f"--out_dir or --run is {out or 'missing'}: checkpoint.pt is no checkpoint, or not whole"
    with explain(what):
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("step", "texts_read"):
            if type(state[name]) is not int or not 0 <= state[name] < 10**12:
                raise ValueError(f"{name} is {state[name]}")
        for name, y in state["model"].items():
            if not y.isfinite().all():
                raise ValueError(f"{name} holds nan or inf")
        json.dumps([dict(state["config"]), [dict(row) for row in state["rows"]]])
        state["config"].pop("trust_remote_code", None)  # only a command line switches that on
    return state


class Log:
    """Rows of metrics: one short line on the terminal, all of it in OUT/metrics.jsonl and wandb."""

    def __init__(self, config, state):
        self.out = Path(config["out_dir"])
        self.rows = state["rows"]
        with explain(f"--out_dir={self.out} cannot be made", OSError):
            self.out.mkdir(parents=True, exist_ok=True)
            self.file = open(self.out / "metrics.jsonl", "w", buffering=1)
            for row in self.rows:  # later ones come again
                self.file.write(json.dumps(row) + "\n")
        print(json.dumps(config, indent=4))
        self.has_wandb = True
        options = dict(project=config["wandb_project"], mode=config["wandb_mode"], config=config)
        options |= dict(id=state.get("wandb_id"), resume="allow", name=self.out.name, dir=self.out)
        self.to_wandb(wandb.init, **options, settings=wandb.Settings(silent=True))

    def to_wandb(self, call, *args, **options):
        """call(...), a function of wandb's. A run goes on without wandb after one that fails."""
        try:
            if self.has_wandb:
                call(*args, **options)
        except Exception as e:  # of many kinds, and none is worth a run
            print(f"warning: going on without wandb: {' '.join(str(e).split())}", file=sys.stderr)
            self.has_wandb = False

    def __call__(self, step, row, prefix=""):
        shown = "  ".join(f"{key} {value:.4g}" for key, value in list(row.items())[:8])
        print(f"{step:7d} {prefix or 'train/'}  {shown}", flush=True)
        named = {"step": step} | {prefix + key: value for key, value in row.items()}
        text = json.dumps(named, default=float)  # numbers of any library
        self.rows.append(json.loads(text))
        with explain(f"{self.out}/metrics.jsonl cannot be written", OSError):
            self.file.write(text + "\n")
        self.to_wandb(wandb.log, self.rows[-1], step=step)


def train(config, state=None):
    """Trains by the config, on from a run's state if given; returns the model, in eval mode."""
    device = set_up(config["device"])
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    is_new = state is None
    config = resolve(config, is_new)
    steps = config["steps"]
    rank, n_processes = world()
    if is_new:
        state = dict(step=0, rows=[], texts_read=0, wandb_id=os.urandom(4).hex())

    # data, model, optimiser
    torch.manual_seed(config["seed"])
    data = open_data(config, state["texts_read"])
    model = new_model(config, data).to(device)
    betas = (config["beta1"], config["beta2"])
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], betas=betas, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps))
    if is_new:
        model.start_at(data.batch(0))
    else:
        with explain("data, config and checkpoint do not fit each other"):
            model.load_state_dict(state["model"])
            moments = dict(state=state["moments"])  # rates are the config's
            optimizer.load_state_dict(optimizer.state_dict() | moments)
            model.mix.inverse()
            if "amsgrad" in optimizer.defaults:  # the fused step of Adam, or AdamW, would not look
                for p, of_p in optimizer.state.items():
                    assert of_p["exp_avg"].shape == of_p["exp_avg_sq"].shape == p.shape
        warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")
    if state["step"] >= steps:
        if rank == 0:
            model.save_pretrained(config["out_dir"])
            print(f"finished already; its report: python report.py --run={config['out_dir']}")
        return model.eval()
    for _ in range(state["step"]):  # a scheduler of any kind gets there so
        scheduler.step()
    if rank == 0:
        log = Log(config, state)

    logged_at, logged_step = time.perf_counter(), state["step"]
    for step, x in prefetched(data, state["step"], steps):
        # forward and backward
        model.train()
        l1_coeff = config["l1_coeff"] * warm_up(step, steps)
        aux = {key: config[key] for key in ("aux_coeff", "k_aux", "dead_after")}
        losses = model.losses(x, l1_coeff, **aux)
        optimizer.zero_grad()
        losses["loss"].backward()
        if n_processes > 1:  # all are ready at once: there is nothing to overlap this with
            for p in model.parameters():
                p.grad = reduce(p.grad)

        # clip and step
        lr = scheduler.get_last_lr()[0]
        largest = config["grad_clip"] or torch.inf
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
        if not grad_norm.isfinite():
            fail(f"step {step}: a non-finite gradient, by --lr={lr:.3g}; no checkpoint has it")
        optimizer.step()
        scheduler.step()
        step += 1

        # log
        if is_due(step, config["log_every"], steps):
            row, _ = metrics(model, [reduce(sums(losses))])
            seconds = time.perf_counter() - logged_at
            row["tokens_per_second"] = config["batch_size"] * (step - logged_step) / seconds
            row |= dict(tokens=step * config["batch_size"], lr=lr, l1_coeff=l1_coeff)
            row |= dict(grad_norm=grad_norm.item(), threshold=model.threshold.item())
            if rank == 0:
                log(step, row)
            logged_at, logged_step = time.perf_counter(), step

        # validate (what stops early, by this row, belongs below what is saved)
        if rank == 0 and config["val_tokens"] and is_due(step, config["eval_every"], steps):
            row, _ = validate(model, data, l1_coeff)
            log(step, row, "val/")

        # save, and stop if any process was asked to
        stop = reduce(grad_norm.new_tensor(len(stop_signals))) > 0
        if rank == 0 and (stop or is_due(step, config["save_every"], steps)):
            state |= dict(config=config, step=step, rows=log.rows)
            state["texts_read"] = getattr(data, "texts_read", 0)
            state |= dict(model=model.state_dict(), moments=optimizer.state_dict()["state"])
            write_atomically(log.out / "checkpoint.pt", lambda part: torch.save(state, part))
            model.save_pretrained(log.out)
        if stop and step < steps:
            if rank == 0:
                again = f"--resume=True --out_dir={log.out}"
                print(f"stopped at step {step}: go on by {again}", file=sys.stderr)
            raise SystemExit(128 + (stop_signals or [signal.SIGTERM])[0])

    # report
    model.eval()
    if rank == 0:
        print(f"weights: CrossCoder.from_pretrained({str(log.out)!r})")
        if not Path(__file__).with_name("report.py").exists():
            print("no report: report.py is not beside train.py")
        elif config["val_tokens"]:
            from report import report

            page = report(model, data, config, log.rows)
            log.to_wandb(lambda: wandb.log(dict(report=wandb.Html(page)), step=steps))
        log.to_wandb(wandb.finish)
    return model


def settings_of(given):
    """The whole config of a run, of which some {key: value or text} are given; checked."""
    if given.get("data") != "stream":
        return checked(given, config, allowed)
    import collect

    return checked(given, collect.config | config, collect.allowed | allowed)


def main(argv):
    texts = read_command_line(argv, __file__)
    state = None
    saved = {}
    if texts.get("resume") == "True":
        state = read_checkpoint(texts.get("out_dir", ""))
        saved = state["config"]
    settings = settings_of(saved | texts)
    for key in {"variant", "basis", "dedicated"}.intersection(saved):
        if settings[key] != saved[key]:
            fail(f"--{key} is not this run's, and resuming cannot change it")
    return train(settings, state)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_soon)
    main(sys.argv[1:])

"""Reports on a run of train.py: what did fine-tuning change? train.py calls `report` at its end.

    python report.py --run=out/RUN                # makes the page again
    python report.py --run=out/RUN --splice=True  # also patches the models, to measure the effects

Any key of the config can be set by --key=value. The folder of the run gets

    report.html    a page that fetches nothing: how large the change is, by source and position, how
                   many latents both models share or one has alone, and every latent with its texts
    report.svg     its pictures
    latents.csv    all latents that are alive: columns of `compare`, `latent_scaling`, `attribution`
    latents.jsonl  the texts of the page, one a line: tokens, and the latent's activations on them
    metrics.jsonl  after splicing, one more row: val/COLUMN_PATCH for each figure of `curve_of`,
                   such as val/kl_clean_A, and all of validation. Resuming drops it

Figures are of held-out rows: of whole docs (texts, or pieces of long ones) if the store has docs.
Only nats_per_token, the fit of the baselines and the curves of training are of training rows.

Latent scaling: Minder, Dumas et al. 2025, arXiv 2504.02922. Attribution patching: Nanda 2023; Syed
et al. 2023, arXiv 2310.10348. Reduced-rank regression: Izenman 1975.
"""

import html
import json
import signal
import sys
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback

import train  # before torch: it sets how torch takes memory
from train import explain, fail

# isort: split

import itables
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate.utils import tqdm
from datasets import load_from_disk
from einops import einsum
from itables.javascript import generate_init_offline_itables_html
from matplotlib import rc_context
from matplotlib.figure import Figure

# --- Config ---------------------------------------------------------------------------------------

config = dict(
    run="",  # folder of the run, which train.py calls out_dir
    splice=False,  # patch the models of collect.py's store: loss recovered, effects of latents
    generate=False,  # splice, and let the base model write with the first latents' changes added
    n_texts=16,  # held-out texts to patch; half as many training texts rank the latents
    device="auto",  # auto (cuda if there is one), cpu or cuda
)
progress = partial(tqdm, delay=1, leave=False)

# --- Texts ----------------------------------------------------------------------------------------


class Texts:
    """The texts of a store that collect.py wrote: meta, its meta.json, and rows, a DataFrame of the
    doc, pos, token and source of each row. Other data has no texts, and meta is empty.
    """

    meta = {}

    def __init__(self, data):
        self.store = data
        path = getattr(data, "path", None)
        if not path or not (path / "meta.json").exists():
            return
        with explain(f"--data={path}: its docs do not fit its rows"):
            self.meta = json.loads((path / "meta.json").read_text())
            docs = load_from_disk(path / "docs")
            rows = data.columns.select(["doc", "pos", "token"]).to_pandas()
            rows["source"] = pd.Categorical(docs["source"])[rows.doc]
            self.rows = rows
            self.ids = docs.data.column("input_ids").combine_chunks()
            place = self.ids.offsets.to_numpy()[rows.doc] + rows.pos  # among the tokens of all docs
            np.testing.assert_array_equal(self.ids.values.to_numpy()[place], rows.token)
            assert place.is_unique, "a token of docs has two rows"

    def doc(self, i):
        """Returns the token ids of a doc, as a list."""
        return self.ids[i].as_py()

    @cached_property
    def held_out(self):
        """The held-out rows, a DataFrame of their columns in `rows`, and of change, the norm of
        B - A, and base, that of A.
        """
        parts = []
        for raw in self.store.held_out:
            a, b = raw.double().unbind(1)
            norms = dict(change=(b - a).norm(dim=1), base=a.norm(dim=1))
            parts.append(pd.DataFrame(norms))
        norms = pd.concat(parts, ignore_index=True)
        if not self.meta:
            return norms.assign(source="all")
        return self.rows.iloc[self.store.val_rows].reset_index(drop=True).join(norms)

    @cached_property
    def decode(self):
        """A function from token ids to text. It shows ids if there is no tokenizer here."""
        from transformers import AutoTokenizer

        options = dict(local_files_only=True, trust_remote_code=False)
        options["clean_up_tokenization_spaces"] = False
        try:
            return AutoTokenizer.from_pretrained(self.meta["tokenizer"], **options).decode
        except Exception:  # a stranger named it, and there are many ways to fail
            return lambda ids: " ".join(map(str, ids))

    def pieces(self, ids):
        """Returns the text of each token, as a list. A letter may be split over tokens: then the
        last of these has it, and the others have "". If ids begin within a letter, the token after
        it has the rest.
        """
        pieces = []
        done = ""
        for end in range(len(ids)):
            text = self.decode(ids[: end + 1]).rstrip("\ufffd")
            pieces.append(text.removeprefix(done))
            done = text
        return pieces

    def evenly(self, rows, n_texts):
        """Returns up to n_texts docs of these rows, one of each source in turn, so that there are
        as many of each while they last.
        """
        docs = self.rows.iloc[rows].drop_duplicates("doc")
        turn = docs.groupby("source").cumcount()
        return docs.doc.iloc[turn.argsort(kind="stable")[:n_texts]].tolist()


# --- Latents --------------------------------------------------------------------------------------


def compare(model, frequency, dead_after=torch.inf):
    """Returns a DataFrame of the latents that are alive: they fired in training, in the last
    dead_after tokens. `frequency` [d_hidden] is the share of held-out rows in which each fires. d_A
    and d_B are its decoder vectors, each in its model's scale. The columns:
    change_per_token  frequency * change
    relative_norm     ||d_B|| / (||d_A|| + ||d_B||): 0 is base only, 1 is fine-tuned only
    change            ||d_B - d_A|| / (||d_A|| + ||d_B||)
    cosine            of d_A and d_B
    kind              base-only, uneven, shared or fine-tuned-only, by relative_norm
    In the basis "difference" there is no d_A. Columns that need it are empty, kind is "none", and
    change is ||d_B|| over its mean.
    """
    frequency = frequency.cpu()
    d = model.in_models(model.W_dec).detach().cpu()
    a, b = d.unbind(1)  # [latent, d_model]
    norms = d.norm(dim=2).sum(1)
    change = (b - a).norm(dim=1) / norms
    if model.basis == "difference":
        change = norms / norms.mean()
        a = a * torch.nan
    relative_norm = b.norm(dim=1) / (a.norm(dim=1) + b.norm(dim=1))
    kinds = ["base-only", "uneven", "shared", "uneven", "fine-tuned-only", "none"]
    bins = np.digitize(relative_norm, [0.1, 0.4, 0.6, 0.9, 1.1])  # nan comes last
    columns = dict(
        change_per_token=frequency * change,
        relative_norm=relative_norm,
        change=change,
        frequency=frequency,
        cosine=torch.cosine_similarity(a, b),
        kind=np.take(kinds, bins),
    )
    table = pd.DataFrame(columns).rename_axis("latent")
    return table[(model.since_fired <= dead_after).cpu().numpy()]


@torch.no_grad()
def latent_scaling(model, batches):
    """Returns a DataFrame of nu_r and nu_epsilon of every latent, over batches of raw activations.
    Both are small if the other model lacks the latent (Minder, Dumas et al. 2025). A latent's own
    model has the longer decoder vector d. beta is the least-squares coefficient of f * d, fitted to
    a model's reconstruction (nu_r), or to its error plus the latent's contribution (nu_epsilon). nu
    is beta in the other model, divided by beta in its own.
    """
    d = model.in_models(model.W_dec)  # [latent, model, d_model]
    n = torch.arange(len(d))
    own = d.norm(dim=2).argmax(1)
    d_own = d[n, own]
    beta = d.new_zeros(2, len(d), 2)  # [nu, latent, model], but for a factor that cancels
    for raw in batches:
        raw = raw.to(d)
        f = model.encode(raw)
        raw_hat = model.decode(f)
        y = torch.stack([raw_hat, raw - raw_hat]) * model.scale[:, None]
        beta += einsum(f, y, d_own, "row latent, nu row model d, latent d -> nu latent model")
        own_part = "row latent, latent model d, latent d -> latent model"
        beta[1] += einsum(f.square(), d, d_own, own_part)
    nu = beta[:, n, 1 - own] / beta[:, n, own]
    return pd.DataFrame(nu.T.cpu(), columns=["nu_r", "nu_epsilon"])


def latents_of(model, data, frequency, dead_after, n_rows):
    """Returns `compare` with the columns of `latent_scaling` and with `confirmed`, the model that
    alone has the latent, or "". For that nu_r and nu_epsilon must be small. The kind must not be
    shared: nu is also small if d_A and d_B are equally long, but point elsewhere. The latent must
    fire in 20 of the n_rows held-out rows, or in 1% if they are fewer than 2,000.
    """
    table = compare(model, frequency, dead_after)
    table["confirmed"] = ""
    if model.basis == "difference":
        return table
    table = table.join(latent_scaling(model, data.held_out))
    least = min(20 / n_rows, 0.01)
    small = "nu_r < 0.5 and nu_epsilon < 0.2 and kind != 'shared'"
    sure = table.query(f"{small} and frequency >= {least}")
    table.loc[sure.index, "confirmed"] = np.where(sure.relative_norm > 0.5, "fine-tuned", "base")
    return table


def toy_score(toy, model, table):
    """Returns a DataFrame of counts by kind. A latent matches a feature if its cosine is > 0.9 in
    each model that has it. A feature is recovered if a latent of its kind matches it, and confirmed
    if a confirmed latent matches it. A latent of these kinds that recovers no feature is false.
    """
    d = F.normalize(model.in_models(model.W_dec).cpu()[table.index], dim=2)
    planted = F.normalize(toy.directions, dim=2)
    cosine = einsum(d, planted, "latent model d, feature model d -> latent feature model")
    near = ((cosine > 0.9) | ~planted.any(2)).all(2).numpy()  # [latent, feature]
    recovers = near & (table.kind.to_numpy()[:, None] == toy.kind)
    features = pd.DataFrame(dict(kind=toy.kind, planted=1, recovered=recovers.any(0)))
    features["confirmed"] = near[table.confirmed != ""].any(0)
    score = features.groupby("kind", sort=False).sum()
    score["latents"] = table.kind.value_counts()
    score["false"] = table.kind[~recovers.any(1)].value_counts()
    return score.fillna(0).astype(int)


# --- Splicing -------------------------------------------------------------------------------------


class Hooked:
    """A language model with a hook, the path of one of its modules. Activations are what the module
    puts out, divided by `divided_by`, as in the store.
    """

    def __init__(self, model, hook, divided_by):
        from nnsight import NNsight
        from transformers import GenerationConfig

        # its own settings, such as a penalty, would change what it writes: keep the end of a text
        ends = getattr(model.generation_config, "eos_token_id", None)
        model.generation_config = GenerationConfig(eos_token_id=ends)
        self.model = NNsight(model.requires_grad_(False))
        self.hook = hook
        self.divided_by = divided_by
        self.skipped = []
        ids = torch.arange(8, device=model.device)[None]
        raw = self.read(ids)
        expected = self.logits(ids, raw)
        # Blocks up to the hook can be skipped, because a patch replaces their output. But some
        # models read more of an earlier block, such as its keys. So skip, and compare the logits.
        blocks, _, i = hook.rpartition(".")
        if i.isdigit():
            self.skipped = [f"{blocks}.{j}" for j in range(int(i) + 1)]
            try:
                error = self.logits(ids, raw) - expected
                assert error.norm() <= 0.01 * expected.norm()
            except Exception:  # whatever a model raises
                self.skipped = []

    def read(self, ids):
        """Returns the activations [position, d_model] at the hook for a text, ids [1, position]."""
        from collect import activations

        (raw,) = activations(self.model, [self.hook], ids, torch.ones_like(ids))
        return raw[0].float() / self.divided_by

    def logits(self, ids, raw):
        """Returns the logits [position, vocabulary] with raw [position, d_model] at the hook."""
        from collect import hidden

        with self.model.trace(input_ids=ids, use_cache=False):
            for path in self.skipped:
                block = self.model.get(path)
                block.skip(block.input)
            hidden(self.model.get(self.hook).output)[0] = raw * self.divided_by
            logits = self.model.output.logits.save()
        return logits[0].float()


def load_models(texts, device):
    """Returns the store's two models, Hooked, base first. Ends the program if one is not there."""
    import collect

    with explain(f"{texts.store.path}/meta.json does not name two models and a hook in each"):
        meta = collect.config | texts.meta | dict(trust_remote_code=False)
        hooks = {}
        for name in texts.store.names:
            hook = meta["hooks"][meta["places"].index(name)]
            hooks[name.partition("_")[0]] = str(hook)
        assert list(hooks) == ["base", "finetuned"], f"places {texts.store.names}"
        divided_by = float(meta["divided_by"])
    models = []
    for key, hook in hooks.items():
        models.append(Hooked(collect.load(key, meta, device)[0], hook, divided_by))
    sizes = {hooked.model.config.get_text_config().vocab_size for hooked in models}
    if len(sizes) > 1:
        fail("--splice=True: the models have vocabularies of different sizes")
    return models


def read_texts(texts, models, rows, n_texts):
    """Yields (source, ids [1, position], positions with rows [n], raw [position, model, d_model])
    of n_texts docs of those rows. Ends the program if the models do not give the store's rows.
    """
    for doc in progress(texts.evenly(rows, n_texts), "texts"):
        of_doc = texts.rows[texts.rows.doc == doc]
        stored = texts.store.read(of_doc.index.to_numpy()).float()
        ids = torch.tensor([texts.doc(doc)], device=models[0].model.device)
        kept = ids.new_tensor(of_doc.pos.tolist())
        of_models = [model.read(ids) for model in models]
        with explain(f"{texts.store.path}: its models, at its hooks, do not give its rows"):
            raw = torch.stack(of_models, dim=1)
            error = (raw[kept].cpu() - stored).norm() / stored.norm()
            assert error <= 0.1, f"they are off by {error:.0%}"
        yield of_doc.source.iloc[0], ids, kept, raw


@torch.no_grad()
def decoder_change(crosscoder):
    """Returns raw d_B - d_A of the latents [d_hidden, d_model], and of the biases [d_model]."""
    d = crosscoder.unscaled(crosscoder.W_dec)
    b = crosscoder.unscaled(crosscoder.b_dec)
    return d[:, 1] - d[:, 0], b[1] - b[0]


def attribution(crosscoder, texts, models, n_texts):
    """Returns each latent's first-order effect [d_hidden]: by how many nats per token of n_texts
    training texts it lowers the KL divergence from the fine-tuned model. That is f (d_B - d_A)
    times minus the gradient of the divergence at the base's activation.
    """
    d_change, _ = decoder_change(crosscoder)
    total = 0
    n_tokens = 0
    for _, ids, kept, raw in read_texts(texts, models, texts.store.train_rows, n_texts):
        f = crosscoder.encode(raw[kept]).detach()
        p = models[1].logits(ids, raw[:, 1]).softmax(-1)
        a = raw[:, 0].requires_grad_()
        logits = models[0].logits(ids, a)
        grad = logits.detach().softmax(-1) - p  # of the KL divergence, by the logits
        logits.backward(grad)
        effect = f * (a.grad[kept] @ d_change.T)
        total -= effect.sum(0)
        n_tokens += len(p)
    return (total / n_tokens).cpu().numpy()


def ridge(x, y, penalty):
    """Fits y = x @ W + bias by ridge regression, for x [n_rows, d] and y [n_rows, d_out]. Returns
    W [d, d_out] and bias [d_out]. The penalty is in units of the mean variance of x.
    """
    centered = x - x.mean(0)
    gram = centered.T @ centered
    gram.diagonal().add_(penalty * gram.diagonal().mean())
    # in float64: in float32, the pseudo-inverse would drop many directions as rounding
    W = (torch.linalg.pinv(gram.double(), hermitian=True) @ (centered.T @ y).double()).to(x)
    return W, y.mean(0) - x.mean(0) @ W


class Estimate(NamedTuple):
    """An estimate of B - A: y[..., columns] @ W + bias. `features` says what y is: "a", the
    activations of the base model, "f", the latents, or "b-a", B - A itself. If `columns` is empty,
    it is the bias everywhere.
    """

    features: str
    W: torch.Tensor
    bias: torch.Tensor
    columns: object = slice(None)  # all

    def of(self, y):
        """Returns the estimate [..., d_model] for the features y [..., n]."""
        return y[..., self.columns] @ self.W + self.bias


@torch.no_grad()
def estimates_of(crosscoder, store, order):
    """Fits estimates of B - A to up to 50,000 training rows. Returns {name: Estimate}. `order` has
    the latents, those with the largest effect first. The names:
    directions_n  the part of B - A in its n largest singular directions
    map, rank_1   an affine map of A by ridge regression; the mean change, and the map's part in
                  one output direction
    constant      the difference of b_dec
    chosen_n      the constant, and the first n latents with their d_B - d_A; random_n: n at random
    refitted_n    the first n latents, with directions and a constant that are fitted to B - A
    """
    raw = store.read(np.sort(store.shuffled(0)[:50_000])).to(crosscoder.scale)
    a, b = raw.unbind(1)
    change = b - a
    estimates = {}
    V = torch.linalg.eigh(change.T @ change).eigenvectors.flip(1)
    for n in (1, 5, 20, 100):
        estimates[f"directions_{n}"] = Estimate("b-a", V[:, :n] @ V[:, :n].T, 0)
    W, bias = ridge(a, change, 0.01)
    of_map = (a - a.mean(0)) @ W
    written = torch.linalg.eigh(of_map.T @ of_map).eigenvectors[:, -1]
    W_1 = W @ written.outer(written)
    estimates["rank_1"] = Estimate("a", W_1, change.mean(0) - a.mean(0) @ W_1)
    estimates["map"] = Estimate("a", W, bias)
    d_change, constant = decoder_change(crosscoder)
    random = np.random.default_rng(0).permutation(order)
    sets = dict(constant=order[:0], random_20=random[:20], random_100=random[:100])
    sets |= {f"chosen_{n}": order[:n] for n in (1, 5, 20, 100)} | dict(chosen_all=order)
    for name, latents in sets.items():
        estimates[name] = Estimate("f", d_change[latents], constant, latents)
    f = torch.cat([crosscoder.encode(part)[:, order[:100]] for part in raw.split(1024)])
    for n in (20, 100):
        estimates[f"refitted_{n}"] = Estimate("f", *ridge(f[:, :n], change, 1e-6), order[:n])
    return estimates


def patches(crosscoder, raw, estimates):
    """Yields patches for raw activations [n_rows, model, d_model], as (name, model to patch, how
    many latents or directions of B - A it takes, summed over rows, values [n_rows, d_model]). Both
    models get their own values (clean), their reconstructions (spliced) and zeros. The base also
    gets B, and estimates of it. The first patch is clean_B.
    """
    raw_hat = crosscoder(raw)
    for m, letter in [(1, "B"), (0, "A")]:
        yield f"clean_{letter}", m, 0, raw[:, m]
        yield f"spliced_{letter}", m, 0, raw_hat[:, m]
        yield f"zero_{letter}", m, 0, 0 * raw[:, m]
    a, b = raw.unbind(1)
    yield "all_of_B", 0, b.numel(), b
    features = {"a": a, "f": crosscoder.encode(raw), "b-a": b - a}
    for name, estimate in estimates.items():
        y = features[estimate.features]
        active = 0
        if estimate.features == "f":
            active = (y[:, estimate.columns] > 0).sum().item()
        if estimate.features == "b-a":  # as many as directions: the trace of a projection
            active = len(y) * round(estimate.W.trace().item())
        yield name, 0, active, a + estimate.of(y)


@torch.no_grad()
def splice_in(crosscoder, texts, models, n_texts, estimates):
    """Patches n_texts held-out texts, at the positions that the store has, by each of `patches`.
    Returns a DataFrame with a row for each text and patch: text (its number), source, name (of the
    patch), and sums over the text: l0 (active latents, or directions), ce and kl (cross-entropy and
    KL divergence from the fine-tuned model, in nats), and n_l0, n_ce, n_kl, the positions that they
    are sums over.
    """
    found = []
    read = read_texts(texts, models, texts.store.val_rows, n_texts)
    for text, (source, ids, kept, raw) in enumerate(read):
        n = ids.numel()
        of_text = dict(text=text, source=source, n_l0=len(kept), n_ce=n - 1, n_kl=n)
        for name, m, active, values in patches(crosscoder, raw[kept], estimates):
            patched = raw[:, m].index_copy(0, kept, values)
            logits = models[m].logits(ids, patched)
            log_p = torch.log_softmax(logits, -1, out=logits)  # in place: fresh memory is slow
            if name == "clean_B":  # the first patch
                p_b = log_p.exp()
            ce = F.nll_loss(log_p[:-1], ids[0, 1:], reduction="sum").item()
            kl = -torch.tensordot(p_b, log_p).item()
            found.append(of_text | dict(name=name, l0=active, ce=ce, kl=kl))
    found = pd.DataFrame(found)
    found.kl -= found.groupby("text").kl.transform("first")  # the entropy of B
    return found


def curve_of(found, least=0.01):
    """Returns a DataFrame by name of patch, for the rows of splice_in: l0 per patched position, ce
    and kl in nats per token, and recovered: the drop in kl from clean_A, over the drop by
    `all_of_B`. There is no column recovered if that drop is below `least`, and it is nan for
    patches of B and for zero_A.
    """
    sums = found.groupby("name", sort=False).sum(numeric_only=True)
    names = ["l0", "ce", "kl"]
    curve = sums[names] / sums[[f"n_{name}" for name in names]].to_numpy()
    gap = curve.kl.clean_A - curve.kl.all_of_B
    if gap >= least:
        of_base = curve.kl.drop(["clean_B", "spliced_B", "zero_B", "zero_A"], errors="ignore")
        curve["recovered"] = (curve.kl.clean_A - of_base) / gap
    return curve


def spread_of(found):
    """Returns the standard errors of the figures of curve_of, by the jackknife over texts."""
    n = found.text.nunique()
    if n == 1:
        return curve_of(found) * np.nan  # one text has no spread
    curves = pd.concat(curve_of(found[found.text != text], -np.inf) for text in range(n))
    return curves.groupby(level=0, sort=False).std() * (n - 1) / n**0.5


# --- Page -----------------------------------------------------------------------------------------

STYLE = """:root { color-scheme: light dark; font: 14px/1.45 system-ui } h1 { font-size: 1.4em }
body { max-width: 96em; margin: 1.5em auto; padding: 0 1em } .wide, .svg { overflow-x: auto }
.svg svg, td, th { fill: currentColor; font-size: 12px } p { margin: .3em 0; max-width: 60em }
td, th { vertical-align: top; padding: 2px 5px !important; text-align: left }
.dt-container, #latents, #latents td { background: none !important; color: inherit !important }
#latents th { white-space: normal; font-size: 10px } #latents .dt-column-order { display: none }
#latents td { font-size: 11px } #latents td:has(> br) { white-space: nowrap }
.texts { white-space: pre-wrap; width: 29em; max-width: 80vw; overflow-wrap: anywhere }
details .texts { width: 14em }
.texts b { font-weight: normal; color: light-dark(black, white) }
.texts b { background: light-dark(rgb(255 150 0/var(--s)), rgb(170 75 0/var(--s))) }
meter { width: 20em }"""

COLUMNS = dict(  # of the list of latents, and the names of patches: what each means
    latent="number of the latent",
    texts="the five texts, of the first 100 batches of held-out rows, in which it is strongest; "
    "the darker, the stronger",
    source="the source that has many more of its 20 strongest rows than of all rows: both shares",
    promoted="for the first 20 latents: tokens whose probability rises most if A gets its change "
    "where it is strongest; writes: what A writes if it gets that change everywhere (first 10)",
    opening="opening: nearly all of its 20 strongest rows are at positions up to 10 of a text",
    position="median position in the text of its 20 strongest rows",
    nats_per_token="estimate, from training texts: by how much its change, put into A, lowers the "
    "KL divergence from B; positive: it takes A towards B",
    change_per_token="change times frequency",
    relative_norm="share of B in its decoder norm: 0 is of the base model, 0.5 of both alike, 1 of "
    "the fine-tuned one",
    change="norm of d_B - d_A, its decoder vectors, over the sum of their norms (with "
    "--basis=difference, over the mean of that norm)",
    frequency="share of held-out rows in which it fires",
    cosine="of its decoder vectors in the two models",
    kind="by relative_norm: base-only under 0.1, shared (though it may have turned) 0.4 to 0.6, "
    "fine-tuned-only over 0.9, uneven between these",
    nu_r="latent scaling on reconstructions: 1 if the other model has as much of it; small: little",
    nu_epsilon="the same on what the other model's reconstruction misses: large if it is in there",
    confirmed="the model that alone has it: nu_r < 0.5, nu_epsilon < 0.2, kind not shared, in "
    "enough rows",
    latents="of a crosscoder, a dictionary that is trained on the activations of both models: each "
    "is active on few tokens, and then adds its decoder vector in A to A, and that in B to B",
    alive="a latent that fired in the last part of training (--dead_after)",
    clean="patch: the model's own activation is put back",
    spliced="patch: its reconstruction",
    zero="patch: zeros",
    all_of_B="patch: B's activation, put into A; what that takes away of the KL divergence is 100%",
    random_n="patch: as chosen_n, with n latents at random",
    l0="active latents, or directions, per patched token",
)

EXPLAINED = dict(  # patches of A that the page shows as bars; * needs B's activation
    constant="the same vector everywhere: the difference of the decoder biases",
    rank_1="the mean change, and one direction whose strength an affine map reads from A",
    map="an affine map of A, fitted to B - A",
    chosen_20="the constant and 20 latents *",
    refitted_20="the same 20 latents, with directions that are fitted to B - A *",
    chosen_100="the constant and 100 latents *",
    chosen_all="the constant and all latents *",
    directions_20="20 singular directions of B - A *",
)


def shaded(tokens, shade):
    """Returns HTML of a text. The darker a token is, the larger its shade, from 0 to 1."""
    spans = ""
    for token, y in zip(tokens, shade):
        part = html.escape(token.replace("\n", "↵"))
        if part and y:
            part = f'<b style="--s:{y:.2f}">{part}</b>'
        spans += part
    return spans


@torch.no_grad()
def active_rows(model, texts, latents):
    """Returns a DataFrame of where latents are active in the first 100 held-out batches: latent,
    row (of the held-out ones), strength, doc, pos and source. The strongest come first.
    """
    latents = np.array(latents)
    parts = []
    n = 0
    for raw in islice(texts.store.held_out, 100):
        f = model.encode(raw)[:, latents].cpu().numpy()
        row, column = f.nonzero()
        part = dict(latent=latents[column], row=n + row, strength=f[row, column])
        parts.append(pd.DataFrame(part))
        n += len(raw)
    active = pd.concat(parts)
    active = active.sort_values("strength", ascending=False, kind="stable", ignore_index=True)
    return active.join(texts.held_out[["doc", "pos", "source"]], on="row")


def examples_of(texts, active, n=5):
    """Returns the n texts in which each latent of active_rows is strongest, as a DataFrame: latent,
    doc, source, pos (of the strongest token), tokens (the texts of those around it, a list) and
    activations (of these tokens, a list).
    """
    best = active.drop_duplicates(["latent", "doc"]).groupby("latent", sort=False).head(n)
    near = best.merge(active, on=["latent", "doc"], suffixes=("", "_near"))
    near = near[(near.pos_near - near.pos).between(-16, 8)]
    examples = []
    keys = ["latent", "doc", "source", "pos"]
    for values, of_text in near.groupby(keys, sort=False):
        _, doc, _, pos = values
        first = max(0, pos - 16)
        ids = texts.doc(doc)[first : pos + 9]
        activations = np.zeros(len(ids))
        activations[of_text.pos_near - first] = of_text.strength_near
        examples.append(values + (texts.pieces(ids), activations.tolist()))
    return pd.DataFrame(examples, columns=keys + ["tokens", "activations"])


def as_texts(lines):
    """Returns HTML of lines of HTML, in a column that is wide enough for texts."""
    return f'<div class="texts">{"".join(f"<p>{line}" for line in lines)}</div>'


def described(texts, active, examples):
    """Returns a DataFrame by latent in active_rows: texts (HTML), source, opening and position, and
    strength, the mean over the 20 rows in which it is strongest.
    """
    largest = active.groupby("latent").strength.max()
    lines = []
    for example in examples.itertuples():
        shade = np.divide(example.activations, largest[example.latent])
        lines.append(shaded(example.tokens, shade))
    shown = examples.assign(texts=lines).groupby("latent").texts.agg(as_texts).to_frame()

    strongest = active.groupby("latent").head(20)
    share = pd.crosstab(strongest.latent, strongest.source, normalize="index")
    usual = texts.held_out.source.value_counts(normalize=True)
    if len(usual) > 1:
        excess = share - usual
        of_source = excess.idxmax(axis=1)[excess.max(axis=1) > 0.2]  # two standard deviations
        for latent, source in of_source.items():
            shares = f"{share.loc[latent, source]:.0%} (usual: {usual[source]:.0%})"
            shown.loc[latent, "source"] = f"{html.escape(source)} {shares}"
    of_latent = strongest.groupby("latent")
    shown["position"] = of_latent.pos.median()
    shown["strength"] = of_latent.strength.mean()
    early = (strongest.pos <= 10).groupby(strongest.latent).mean()
    is_opening = (early >= 0.9) & (early > 2 * (texts.held_out.pos <= 10).mean())
    shown["opening"] = np.where(is_opening, "opening", "")
    return shown


def promoted_at(texts, row, base, change):
    """Returns how much each next token's probability rises [vocabulary] if `change` [d_model] is
    added to the base model's activation at a row, which has its doc and pos.
    """
    ids = texts.doc(row.doc)[: row.pos + 1]
    ids = torch.tensor([ids], device=change.device)
    raw = base.read(ids)
    before = base.logits(ids, raw)[-1].softmax(-1)
    raw[-1] += change
    return base.logits(ids, raw)[-1].softmax(-1) - before


def promoted_by(texts, examples, base, changes):
    """Returns {latent: HTML}: the tokens that its change promotes most, where it is strongest."""
    strongest = examples.drop_duplicates("latent").set_index("latent")
    shown = {}
    for latent, change in progress(changes.items(), "promoted tokens"):
        rise, token = promoted_at(texts, strongest.loc[latent], base, change).topk(5)
        lines = [f"{texts.decode([t])[:20]!r} {y:+.2g}" for t, y in zip(token.tolist(), rise)]
        shown[latent] = "<br>".join(map(html.escape, lines))
    return shown


def generate_with(hooked, ids, change, n_tokens=40):
    """Returns token ids [prompt, n_tokens]: what a Hooked model writes, greedily, after the prompts
    ids [prompt, position]. `change` is added at every position: an Estimate from "a", or one
    without columns.
    """
    from collect import hidden

    def add(module, inputs, output):
        raw = hidden(output).float() / hooked.divided_by
        hidden(output).add_(hooked.divided_by * change.of(raw))

    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1)
    options |= dict(max_new_tokens=n_tokens, min_new_tokens=n_tokens, pad_token_id=0)
    with hooked.model.get_submodule(hooked.hook).register_forward_hook(add):
        return hooked.model.generate(ids, **options)[:, ids.shape[1] :]


def write_all(texts, models, changes):
    """Returns what the models write after the beginnings of three held-out docs, as a DataFrame by
    prompt: base, finetuned, and the base model with each of `changes` {name: Estimate}.
    """
    docs = [texts.doc(doc) for doc in texts.evenly(texts.store.val_rows, 100)]
    n = min(12, max(map(len, docs)))
    prompts = list(dict.fromkeys(tuple(ids[:n]) for ids in docs if len(ids) >= n))[:3]
    ids = torch.tensor(prompts, device=models[0].model.device)
    nothing = Estimate("a", torch.zeros(0, 1).to(ids.device), 0, [])
    changes = dict(base=nothing, finetuned=nothing) | changes
    written = dict(prompt=map(texts.decode, prompts))
    for name, change in progress(changes.items(), "generate"):
        hooked = models[name == "finetuned"]
        written[name] = map(texts.decode, generate_with(hooked, ids, change).tolist())
    return pd.DataFrame(written).replace("\n", "↵", regex=True).set_index("prompt")


def by_group(rows, group):
    """Returns the number of rows, and ||B - A|| / ||A||, of each group, as a DataFrame."""
    groups = rows.groupby(group)
    mean = groups[["change", "base"]].mean()
    return pd.DataFrame({"rows": groups.size(), "||B - A|| / ||A||": mean.change / mean.base})


def add_splicing(by_source, found, figures):
    """Adds figures of splicing, of each source, to the DataFrame by_source, in place. Leaves out
    those that `figures`, the curve of all texts, lacks.
    """
    sources = found.groupby("source")
    by_source["texts"] = sources.text.nunique()
    curves = sources.apply(curve_of).unstack()
    shown = {"CE of A": ("ce", "clean_A"), "CE of B": ("ce", "clean_B"), "KL": ("kl", "clean_A")}
    for name in ("constant", "chosen_20", "chosen_all"):
        shown[f"{name} recovers"] = ("recovered", name)
    for title, (figure, name) in shown.items():
        if figure in figures and figure in curves:
            by_source[title] = curves[figure, name]


def verdict(d_hidden, table, row, by_source, found, curve, spread, shares):
    """Returns sentences: how large the change is, latents by kind, and what explains the change."""
    change = row["relative_difference"]
    differs = change > row["noise"]
    said = ["The models do not differ here"]
    if differs:
        said = [f"The activations of B and A here differ by {change:.2g} of A's norm"]
        if len(by_source) > 1:
            of_sources = by_source["||B - A|| / ||A||"].map("{:.2g}".format)
            said[0] += f" ({', '.join(f'{name} {y}' for name, y in of_sources.items())})"
    if "rounding" in row:
        said[0] += f"; rounding alone moves B - A by {row['rounding']:.2g} of A"
    kinds = f"Of {d_hidden:,} latents {len(table):,} are alive. "
    if len(table) and (table.kind == "none").all():
        said.append(f"{kinds}They are of B - A: none is of one model")
    else:
        kinds += "By their decoder norms "
        for kind in ("shared", "uneven", "base-only", "fine-tuned-only"):
            kinds += f"{(table.kind == kind).sum():,} {kind}, "
        n_confirmed = (table.confirmed != "").sum()
        said.append(f"{kinds}{n_confirmed:,} confirmed to be of one model alone")
    if "opening" in table and table.opening.any():
        n = (table.opening == "opening").sum()
        said.append(f"{n:,} latents are openings: strongest in the first ten tokens of texts")
    if len(curve):
        kl = curve.kl
        of = f"{found.text.nunique()} texts, {found.n_kl[found.name == 'clean_A'].sum():,} tokens"
        size = f"{kl.clean_A:.2g} ± {spread.kl.clean_A:.1g}".removesuffix(" ± nan")  # one text
        start = f"KL(B || A) is {size} nats a token ({of})"
        if shares:
            part = 1 - kl.all_of_B / kl.clean_A
            said.append(f"{start}. B's activations, put into A here, take away {part:.0%} of it")
            line = "Taking that as 100%, a constant vector recovers {constant}, one direction "
            line += "{rank_1}, an affine map of A {map}; the constant and 20 latents {chosen_20} "
            line += "(refitted {refitted_20}), 100 latents {chosen_100}, all {chosen_all}"
            said.append(line.format(**shares))
            if curve.recovered["map"] > curve.recovered.chosen_20:
                said.append("The map reads A alone, and recovers more than the 20 latents")
        else:
            why = "B's activations, put into A here, change it by less than 0.01"
            if not differs:
                why = f"B - A is not above {row['noise']:.1g} of A, which counts as noise"
            said.append(f"{start}. No shares of it are given: {why}")
        if row["ranking_texts"] < 8:
            said.append("Latents are ranked by fewer than 8 texts: their order is uncertain")
    if not differs:
        said.append("There is nothing to rank latents by: their figures show the noise of training")
    if by_source.rows.sum() < 2000:
        said.append(f"Only {by_source.rows.sum():,} rows are held out: rare latents are uncertain")
    return said


def bars(curve, shares):
    """Returns HTML of what it takes to explain the change, as bars."""
    lines = "<tr><th>patch<th>what is added to A<th>recovers<th>L0"
    for name, meaning in EXPLAINED.items():
        bar = f'<meter value="{curve.recovered[name]:.2f}"></meter>'
        lines += f"<tr><td>{name}<td>{meaning}<td>{bar} {shares[name]}<td>{curve.l0[name]:.2g}"
    lines += "</table><p>* needs B's activation. ± is the standard error over texts. "
    return f"<table>{lines}L0: active latents, or directions, per token."


def pictures(table, rows, curve, path):
    """Draws latents, training and splicing into an SVG file. Returns it as HTML."""
    names = ["loss", "explained_variance", "explained_variance_difference", "dead_latents"]
    training = pd.DataFrame(rows, columns=["step", *names], dtype=float).dropna(subset="loss")
    log10_frequency = np.log10(table.frequency.where(table.frequency > 0))
    shown = {  # column, and its smallest and largest number
        "relative norm (0: base, 1: fine-tuned)": (table.relative_norm, (0, 1)),
        "cosine": (table.cosine, (-1, 1)),
        "log10 of frequency": (log10_frequency, (-6, 0)),
    }
    style = {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 8, "legend.frameon": False}
    with rc_context(style):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        above, below = figure.subplots(2, 4)
        titles = [f"training: {name}" for name in names]
        training.plot("step", subplots=True, ax=above, marker=".", legend=False, title=titles)
        for axes, (label, (column, ends)) in zip(below, shown.items()):
            axes.set_visible(column.notna().any())  # the basis difference has no cosine
            for kind, of_kind in column.groupby(table.kind):
                axes.hist(of_kind, bins=50, range=ends, label=kind)
            axes.set(yscale="symlog", ylabel="latents", xlabel=label)
        if len(table):
            below[0].legend(loc="upper left", fontsize=6)
        axes = below[3]
        axes.set_visible("recovered" in curve)
        if "recovered" in curve:
            for name in ("chosen", "refitted", "random", "directions"):
                line = curve.filter(like=name, axis=0)
                axes.plot(line.l0, line.recovered, marker="o", label=f"{name} *")
            for name, line in {"constant": ":", "rank_1": "-.", "map": "--"}.items():
                axes.axhline(curve.recovered[name], label=name, color="grey", linestyle=line)
            axes.set(xscale="log", ylim=(0, 1), xlabel="active a token (* needs B)")
            axes.set_title("KL recovered")
            figure.legend(handles=axes.lines, loc="outside lower right", ncols=7)
        save = partial(figure.savefig, format="svg", transparent=True, metadata=dict(Date=None))
        train.write_atomically(path, save)
    return path.read_text(encoding="utf-8").replace("#000000", "currentColor")


def to_html(table, **options):
    """Returns a DataFrame as HTML, with three digits of each float."""
    options |= dict(border=0, index_names=False, na_rep="", float_format="{:.3g}".format)
    return table.to_html(**options)


def folded(tables, attribute=""):
    """Returns HTML of tables {title: HTML} that fold. attribute="open" unfolds them."""
    lines = ""
    for title, table in tables.items():
        table = f'<div class="wide">{table}</div>'
        lines += f"<details {attribute}><summary>{title}</summary>{table}</details>"
    return lines


def page_of(said, meta, names, above, latents, svg, below):
    """Returns the page, a file that fetches nothing: the verdict, the names of A and B, tables
    {title: HTML}, the list of latents, the pictures, and more tables.
    """
    options = dict(connected=False, maxBytes=0, allow_html=True, table_id="latents", order=[])
    options |= dict(showIndex=False, pageLength=25, classes="compact", style="width: 100%")
    options |= dict(text_in_header_can_be_selected=False)
    columns = {name: html.escape(y) for name, y in (COLUMNS | EXPLAINED).items()}

    def explained(name):
        return f'<span title="{columns[name]}">{name.replace("_", "<wbr>_")}</span>'

    every = itables.to_html_datatable(latents.rename(columns=explained), **options)
    glossary = "".join(f"<dt>{name}</dt><dd>{y}</dd>" for name, y in columns.items())
    said = [html.escape(line) for line in said]
    lines = "".join(f"<p>{line}.</p>" for line in said[1:])
    what = html.escape(f"A is {names[0]}, B is {names[1]}")
    of = html.escape(f"{meta.get('base', '')} → {meta.get('finetuned', '')}")
    order = "nats_per_token" if "nats_per_token" in latents else "change_per_token"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>What fine-tuning changed</title><meta name="viewport" content="width=device-width">
{generate_init_offline_itables_html(itables.options.dt_bundle)}<style>{STYLE}</style>
<h1>{said[0]}</h1><p>{what}: activations of a base model, and of the model fine-tuned from it. A
crosscoder was trained on both. {of}</p>{lines}
{folded(above, "open")}<h2>Latents</h2>
<p>Sorted by {order}. Search finds words of the texts, too; !opening leaves openings out. Hover
explains columns.</p>
<div class="wide">{every}</div><div class="svg">{svg}</div>{folded(below)}
<details><summary>What the columns mean</summary><dl>{glossary}</dl><p>Latent scaling: arXiv
2504.02922. Attribution patching: arXiv 2310.10348. Crosscoders:
transformer-circuits.pub/2024/crosscoders.</p></details>"""


def report(model, data, config, rows, splice=False, generate=False, n_texts=16):
    """Writes the files named at the top of this file into config["out_dir"]. `config` and `rows` of
    metrics are the run's. Splicing patches n_texts texts. Generating splices, too. Returns the
    page, or "" if there is none.
    """
    if data.n_models != 2 or not config["val_tokens"]:
        print("no report: it compares two models, on rows that are held out (val_tokens)")
        return ""
    torch.set_float32_matmul_precision("highest")  # fits of B - A do not go with TF32
    texts = Texts(data)
    splice = splice or generate
    if splice and not texts.meta:
        fail("--splice=True takes a store that collect.py wrote")
    out = Path(config["out_dir"])

    # how large the change is, and a table of the latents
    dead_after = config["dead_after"]
    row, frequency = train.validate(model, data, config["l1_coeff"], dead_after)
    row = {key: float(y) for key, y in row.items() if np.isfinite(float(y))}
    by_source = by_group(texts.held_out, "source")
    size = texts.held_out.base.mean()
    row["relative_difference"] = texts.held_out.change.mean() / size
    # up to this share of A, B - A counts as no change: float16 alone moves it by 3e-4
    row["noise"] = 5e-4
    if texts.meta.get("rounding") and data.names[0] in texts.meta["places"]:
        layer = texts.meta["places"].index(data.names[0]) // 2  # each has base and finetuned
        row["rounding"] = texts.meta["rounding"][layer]
        row["noise"] = max(row["noise"], 1.5 * row["rounding"])
    table = latents_of(model, data, frequency, dead_after, len(texts.held_out))
    table = table.sort_values("change_per_token", ascending=False, kind="stable")
    above = {}
    below = {}

    # what carries the change
    found = curve = spread = pd.DataFrame()
    shares = {}  # of the drop in KL, by patch, as text; empty if that, or B - A, is too small
    if splice:
        models = load_models(texts, frequency.device)
        row["ranking_texts"] = len(texts.evenly(data.train_rows, -(-n_texts // 2)))
        effect = attribution(model, texts, models, row["ranking_texts"])
        table.insert(0, "nats_per_token", effect[table.index])
        table = table.sort_values("nats_per_token", ascending=False, kind="stable")
        estimates = estimates_of(model, data, table.index)
        found = splice_in(model, texts, models, n_texts, estimates)
        curve = curve_of(found)
        if row["relative_difference"] <= row["noise"]:
            curve = curve[["l0", "ce", "kl"]]
        spread = spread_of(found)[curve.columns]
        if "recovered" in curve:
            for name, y in curve.recovered.items():
                shares[name] = f"{y:.0%} ± {spread.recovered[name]:.0%}".removesuffix(" ± nan%")
            above["What it takes to recover that"] = bars(curve, shares)
        for m in "AB"[model.basis == "difference" :]:  # in that basis A is passed on as it is
            clean, spliced, zero = curve.ce[[f"clean_{m}", f"spliced_{m}", f"zero_{m}"]]
            row[f"loss_recovered_{m}"] = (zero - spliced) / (zero - clean)
        of_curve = {f"{column}_{name}": y for (column, name), y in curve.unstack().items()}
        of_curve = {f"val/{key}": y for key, y in (row | of_curve).items() if np.isfinite(y)}
        train.write_rows(out, [dict(step=config["steps"]) | of_curve])
        add_splicing(by_source, found, curve)
        below["All patches"] = to_html(curve.join(spread.add_suffix(" ±")))
    above["By source"] = to_html(by_source)
    train.write_atomically(out / "latents.csv", table.to_csv)

    # the texts of the first 5,000 latents, and of all that one model has alone
    alone = table.index[table.kind.str.endswith("only") | (table.confirmed != "")]
    first = table.index[:5000].union(alone, sort=False)
    if texts.meta:
        names = ["up to 3", "4 to 10", "11 to 20", "21 to 50", "later"]
        position = pd.cut(texts.held_out.pos, [-1, 3, 10, 20, 50, 10**9], labels=names)
        above["By position in the text"] = to_html(by_group(texts.held_out, position))
        active = active_rows(model, texts, first)
        examples = examples_of(texts, active)
        to_json = partial(examples.to_json, orient="records", lines=True)
        train.write_atomically(out / "latents.jsonl", to_json)
        table = table.join(described(texts, active, examples))
    if shares:
        d_change, _ = decoder_change(model)
        changing = table.index[:20].union(alone[:40], sort=False)
        strength = table.strength[changing].dropna()
        changes = {latent: y * d_change[latent] for latent, y in strength.items()}
        promoted = promoted_by(texts, examples, models[0], changes)
        if generate:
            constant = estimates["constant"]
            steered = {name: estimates[name] for name in ("constant", "rank_1", "map")}
            listed = list(changes)[:10]
            steered |= {latent: constant._replace(bias=changes[latent]) for latent in listed}
            written = write_all(texts, models, steered)
            of_models = written.drop(columns=listed).T
            above["What the models write after beginnings of texts (greedily)"] = to_html(of_models)
            for latent in listed:
                of_size = changes[latent].norm() / size
                hover = f"a change of {of_size:.2g} of A's mean norm, added to A everywhere"
                lines = [f"{prompt} → {text}" for prompt, text in written[latent].items()]
                lines = as_texts(map(html.escape, lines))
                promoted[latent] += folded({"writes": lines}, f'title="{hover}"')
        table["promoted"] = table.index.map(promoted).fillna("")
    said = verdict(len(frequency), table, row, by_source, found, curve, spread, shares)

    # the page
    run = pd.json_normalize(config | dict(store=texts.meta, val=row), sep="/").T
    run = run.drop(["resume", "trust_remote_code"], errors="ignore")
    below["The run"] = to_html(run, header=False)
    svg = pictures(table, rows, curve, out / "report.svg")
    latents = table.loc[first].reset_index()
    latents = latents.reindex(columns=list(COLUMNS)).replace(["", "none"], np.nan)
    latents = latents.dropna(axis=1, how="all")
    words = latents.select_dtypes("str")
    latents[words.columns] = words.fillna("")
    names = getattr(data, "names", ["base", "finetuned"])
    with pd.option_context("display.float_format", "{:.3g}".format):
        page = page_of(said, texts.meta, names, above, latents, svg, below)
    train.write_atomically(out / "report.html", lambda part: part.write_bytes(page.encode()))
    print("\n".join(said), f"\nreport: {out / 'report.html'}")
    if hasattr(data, "directions") and model.basis != "difference":
        print(toy_score(data, model, table))
    return page


def open_run(run, device="auto"):
    """Returns a run's model, data, config and rows of metrics. `run` is its folder."""
    place = train.set_up(device)
    state = train.read_checkpoint(run)
    here = dict(out_dir=str(run), steps=state["step"], device=device)
    config = train.settings_of(state["config"] | here)
    data = train.open_data(config)
    with explain(f"--run={run}: its weights are not of its config and data"):
        model = train.new_model(config, data).to(place)
        model.load_state_dict(state["model"])
    return model.eval(), data, config, state["rows"]


def texts_of(run, latent, n=5):
    """Returns the n held-out texts of a run in which a latent is strongest, as `examples_of` does,
    with the text around the strongest token.
    """
    model, data, _, _ = open_run(run)
    texts = Texts(data)
    if not texts.meta:
        fail(f"{run}: its data has no texts")
    examples = examples_of(texts, active_rows(model, texts, [latent]), n)
    return examples.assign(text=examples.tokens.map("".join))


def main(argv):
    options = train.checked(train.read_command_line(argv, __file__), config, {})
    run = options.pop("run")
    device = options.pop("device")
    if not run:
        fail("--run is missing: give the folder of a run, such as --run=out/RUN")
    return report(*open_run(run, device), **options)


if __name__ == "__main__":
    main(sys.argv[1:])

"""
Reports on a run of train.py: what did fine-tuning change? train.py calls `report` when it ends.

    python report.py --run=out/RUN                # the same page again
    python report.py --run=out/RUN --splice=True  # and what its latents do to what the models say

Any key of the config is set by --key=value. It writes RUN/report.html, a page that fetches nothing:
how large the change is, how many latents both models share and each has alone, and of those that
carry most of it the texts that they fire on; RUN/latents.csv, all that are alive, with what
`compare`, `latent_scaling` and `attribution` say of them; RUN/report.svg, the picture; and, of
splicing, a row of RUN/metrics.jsonl, val/COLUMN_NAME of `splice_in`, until the run goes on. Figures
are of rows held out: of a store that knows its texts, of docs (texts, or pieces of long ones) no
row of which was trained on. Of training rows are the curves of training, the fit of maps and
directions, and nats_per_token, by which latents are ranked.
Latent scaling: Minder, Dumas et al. 2025, arXiv 2504.02922. Attribution patching: Nanda 2023; Syed
et al. 2023, arXiv 2310.10348. Reduced-rank regression: Izenman 1975.
"""

import html
import json
import signal
import sys
from collections import Counter
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback, of what is imported or later

import train  # before torch, which reads once how it is to take memory
from train import explain, fail

# isort: split

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from einops import einsum
from matplotlib import rc_context
from matplotlib.figure import Figure

# --- Config ---------------------------------------------------------------------------------------

config = dict(
    run="",  # folder of the run, which train.py calls out_dir
    splice=False,  # splice into the models of collect.py's store: loss recovered, a causal curve
    n_texts=16,  # held-out texts to splice into; latents are ranked by half as many training texts
    device="auto",  # auto (cuda if there is one), cpu or cuda
)
allowed = dict(n_texts=train.at_least_1)

# --- Latents --------------------------------------------------------------------------------------


def compare(model, frequency):
    """
    A DataFrame of the latents that fire, frequency [d_hidden] > 0, by their decoder vectors d_A and
    d_B in each model's scale: relative_norm, ||d_B|| / (||d_A|| + ||d_B||), and by it the kind;
    change, ||d_B - d_A|| / (||d_A|| + ||d_B||); cosine; and carries, frequency * change.
    """
    d = model.in_models(model.W_dec).detach().cpu()
    a, b = d.unbind(1)  # [latent, d_model]
    norms = a.norm(dim=1) + b.norm(dim=1)
    columns = dict(
        relative_norm=b.norm(dim=1) / norms,
        change=(b - a).norm(dim=1) / norms,
        frequency=frequency.cpu(),
        cosine=torch.cosine_similarity(a, b),
    )
    table = pd.DataFrame(columns)
    table["carries"] = table.frequency * table.change
    kinds = ["base-only", "uneven", "shared", "uneven", "fine-tuned-only"]
    bins = np.digitize(table.relative_norm, [0.1, 0.4, 0.6, 0.9])
    table["kind"] = np.take(kinds, bins)
    return table.query("frequency > 0")


@torch.no_grad()
def latent_scaling(model, batches):
    """
    nu_r and nu_epsilon of every latent over batches of raw x, as a DataFrame: by them Minder, Dumas
    et al. 2025 (arXiv 2504.02922) tell what one model alone has from what training only shrank in
    the other. beta is the least-squares factor of f * d, d being the decoder vector in the latent's
    own model, in a model's reconstruction (nu_r), or in its error with the latent's part left in
    (nu_epsilon); nu is beta of the other model over that of its own.
    """
    d = model.in_models(model.W_dec)  # [latent, model, d_model]
    n = torch.arange(len(d))
    own = d.norm(dim=2).argmax(1)
    d_own = d[n, own]
    beta = d.new_zeros(2, len(d), 2)  # [nu, latent, model], but for a factor
    for x in batches:
        x = x.to(d)
        f = model.encode(x)
        x_hat = model.decode(f)
        y = torch.stack([x_hat, x - x_hat]) * model.scale[:, None]
        beta += einsum(f, y, d_own, "row latent, nu row model d, latent d -> nu latent model")
        left_in = "row latent, latent model d, latent d -> latent model"
        beta[1] += einsum(f.square(), d, d_own, left_in)
    nu = beta[:, n, 1 - own] / beta[:, n, own]
    return pd.DataFrame(nu.T.cpu().numpy(), columns=["nu_r", "nu_epsilon"])


def toy_score(data, model, table):
    """
    Of a toy, by kind, the planted features, those recovered by a latent of their kind with cosine >
    0.9 in each model that has them, and those by a confirmed latent; and the latents of that kind,
    and those that recover none (false), turned ones among the shared: a DataFrame of numbers.
    """
    d = model.in_models(model.W_dec).cpu()[table.index]
    is_false = True
    recovered = Counter()
    confirmed = Counter()
    for kind, planted in zip(data.kind, data.directions):  # [model, d_model]
        near = (torch.cosine_similarity(d, planted, dim=2) > 0.9) | ~planted.any(-1)
        is_near = near.all(1).numpy()
        recovers = is_near & (table.kind == kind.removeprefix("turned "))
        recovered[kind] += recovers.any()
        confirmed[kind] += (is_near & table.confirmed).any()
        is_false &= ~recovers
    score = dict(
        planted=Counter(data.kind),
        recovered=recovered,
        confirmed=confirmed,
        latents=Counter(table.kind),
        false=Counter(table.kind[is_false]),
    )
    return pd.DataFrame(score).query("planted > 0").fillna(0).astype(int)


# --- Splicing -------------------------------------------------------------------------------------


class Hooked:
    """A language model and the place `hook` in it, of a module's path."""

    def __init__(self, model, hook):
        from nnsight import NNsight

        self.model = NNsight(model.requires_grad_(False))
        self.hook = hook
        # Where all of a block's output is put in, that block and those before it need not run, and
        # hand on their input; if that can stand for an output, and later ones read nothing else.
        self.skipped = []
        ids = torch.arange(8, device=model.device)[None]
        x = self.read(ids)
        with self.model.trace(input_ids=ids, use_cache=False):
            output = self.model.get(hook).output.save()
            logits = self.model.output.logits.save()
        blocks, _, i = hook.rpartition(".")
        if i.isdigit() and isinstance(output, torch.Tensor):
            self.skipped = [f"{blocks}.{j}" for j in range(int(i) + 1)]
            error = self.logits(ids, x) - logits[0]
            if error.norm() > 0.01 * logits.norm():
                self.skipped = []

    def read(self, ids):
        """Its activations [position, d_model] of a text, ids [1, position]."""
        from collect import activations

        return activations(self.model, self.hook, ids, torch.ones_like(ids))[0].float()

    def logits(self, ids, x):
        """Its logits [position, vocabulary] of a text, with x put in as those."""
        from collect import hidden

        with self.model.trace(input_ids=ids, use_cache=False):
            for path in self.skipped:
                block = self.model.get(path)
                block.skip(block.input)
            hidden(self.model.get(self.hook).output)[0] = x
            logits = self.model.output.logits.save()
        return logits[0].float()


def load_models(data, device):
    """[A, B], Hooked, of the Store `data`. Ends the program if one cannot be loaded."""
    import collect

    meta = collect.config | data.meta | dict(trust_remote_code=False)
    with explain(f"{data.path}/meta.json does not name two models and a hook in each"):
        hooks = dict(zip(data.names, map(str, meta["hooks"]), strict=True))
    models = []
    for key, hook in hooks.items():
        model, _ = collect.load(key, meta, device)
        models.append(Hooked(model, hook))
    if len({hooked.model.config.get_text_config().vocab_size for hooked in models}) > 1:
        fail("--splice=True: the models have vocabularies of different sizes")
    return models


def read_texts(data, models, rows, n_texts):
    """
    Yields of the first n_texts docs of those rows: ids [1, position]; `kept`, the positions [n] of
    which the store has rows; and activations x [position, model, d_model].
    """
    for doc in np.unique(data.doc[rows])[:n_texts].tolist():
        of_doc = np.flatnonzero(data.doc == doc)
        stored = data.read(of_doc).float()
        ids = torch.tensor([data.docs[doc]], device=models[0].model.device)
        kept = ids.new_tensor(data.pos[of_doc])
        x = [model.read(ids) for model in models]
        with explain(f"{data.path}: its models, at its hooks, do not give its rows"):
            x = torch.stack(x, dim=1)
            difference = (x[kept].cpu() - stored).norm() / stored.norm()
            if difference > 0.1:
                raise ValueError(f"they are off by {difference:.0%}")
        yield ids, kept, x


@torch.no_grad()
def in_b_more(crosscoder):
    """d_B - d_A of the latents [d_hidden, d_model], and b_dec's [d_model], in raw units."""
    d, b = [crosscoder.unscaled(W) for W in (crosscoder.W_dec, crosscoder.b_dec)]
    return d[:, 1] - d[:, 0], b[1] - b[0]


def attribution(crosscoder, data, models, n_texts):
    """
    How far each latent takes the base model to the fine-tuned one to first order, in nats of KL
    divergence per token of n_texts training texts [d_hidden]: over positions the sum of f (d_B -
    d_A) times minus the gradient of KL at the base's activation.
    """
    more, _ = in_b_more(crosscoder)
    total = 0
    n_tokens = 0
    for ids, kept, x in read_texts(data, models, data.train_rows, n_texts):
        with torch.no_grad():
            f = crosscoder.encode(x[kept])
            p = models[1].logits(ids, x[:, 1]).softmax(-1)
        a = x[:, 0].requires_grad_()
        logits = models[0].logits(ids, a)
        slope = logits.detach().softmax(-1) - p  # of KL divergence, by logits
        logits.backward(slope)
        effect = f * (a.grad[kept] @ more.T)
        total -= effect.sum(0)
        n_tokens += len(p)
    return (total / n_tokens).cpu().numpy()


@torch.no_grad()
def fit_yardsticks(crosscoder, data, held_out):
    """
    What takes no dictionary, of up to 50,000 training rows. Affine maps of A to B - A, {name: (W
    [d_model, d_model], b [d_model])}: `map` by ridge regression; `rank_1`, the mean of B - A and
    that part of `map` that writes one direction; `constant`, b_dec's difference. The singular
    vectors of B - A, a column each, largest first [d_model, d_model]. And R^2 of `map`, held out.
    """
    rows = np.sort(data.shuffled(0)[:50_000])
    a, b = data.read(rows).to(crosscoder.scale).unbind(1)
    change = b - a
    centered = a - a.mean(0)
    gram = centered.T @ centered
    ridge = 0.01 * gram.diag().mean() * torch.eye(len(gram), device=gram.device)
    W = torch.linalg.solve(gram + ridge, centered.T @ change)
    of_map = torch.linalg.eigh(W.T @ gram @ W)
    written = of_map.eigenvectors[:, -1]  # the direction of most of what `map` says
    maps = dict(constant=(0 * W, in_b_more(crosscoder)[1]))
    for name, weights in dict(rank_1=W @ written.outer(written), map=W).items():
        maps[name] = weights, change.mean(0) - a.mean(0) @ weights
    directions = torch.linalg.eigh(change.T @ change).eigenvectors.flip(1)
    a, b = held_out.to(a).unbind(1)
    change = b - a
    whole = change.var(dim=0, correction=0).sum()
    error = change - a @ W - maps["map"][1]
    left = error.square().mean(dim=0).sum()
    return maps, directions, 1 - (left / whole).item()


def additions(a, f, more, maps, sets):
    """
    Yields what each of the maps and of the `sets` {name: latents} says that B has more than A, at
    rows with a [n_rows, d_model] in A and f [n_rows, latent], `more` [latent, d_model] being d_B -
    d_A: (name, how many numbers that takes, over all rows, [n_rows, d_model]).
    """
    for name, (W, b) in maps.items():
        yield name, 0, a @ W + b
    for name, few in sets.items():
        numbers = (f[:, few] > 0).sum().item()
        yield name, numbers, f[:, few] @ more[few]


def patches(crosscoder, x, maps, directions, sets):
    """
    Of rows x [n_rows, model, d_model] yields what to put in their place, each (name, model, how
    many numbers it takes, values [n_rows, d_model]): into both models, B first, x, reconstructions
    and 0; into A what directions, a map of A, or the constant and a set of latents say that B is.
    """
    x_hat = crosscoder(x)
    for m, letter in [(1, "B"), (0, "A")]:
        yield f"clean_{letter}", m, 0, x[:, m]
        yield f"spliced_{letter}", m, 0, x_hat[:, m]
        yield f"zero_{letter}", m, 0, 0 * x[:, m]
    a, b = x.unbind(1)
    yield "all_of_B", 0, b.numel(), b
    for n in (1, 5, 20, 100):
        V = directions[:, :n]
        yield f"directions_{n}", 0, n * len(a), a + (b - a) @ V @ V.T
    more, constant = in_b_more(crosscoder)
    for name, numbers, added in additions(a, crosscoder.encode(x), more, maps, sets):
        yield name, 0, numbers, a + added + constant * (name in sets)


def sets_of(order):
    """Of latents in an order the first n, and n at random: {name: latents} to put in."""
    random = np.random.default_rng(0).permutation(order)
    sets = {f"chosen_{n}": order[:n] for n in (1, 5, 20, 100)}
    sets |= {f"random_{n}": random[:n] for n in (20, 100)}
    return sets | dict(chosen_all=order)


@torch.no_grad()
def splice_in(crosscoder, data, models, n_texts, maps, directions, sets):
    """
    Puts each of `patches`, alone, into the rows that the store has of n_texts held-out texts.
    Returns a DataFrame by name: numbers per row; ce, cross-entropy, and kl, divergence from the
    fine-tuned model, in nats per token; and recovered, by how much kl is less than the base model's
    as a share of by how much all of B's activation there makes it less, unless that is < 0.01. And
    how far each of the maps raises the next tokens' probabilities, {name: mean [vocabulary]}.
    """
    found = []
    sizes = []
    rises = dict.fromkeys(maps, 0)
    for ids, kept, x in read_texts(data, models, data.val_rows, n_texts):
        n_tokens = ids.numel()
        sizes.append((len(kept), n_tokens - 1, n_tokens))  # of which numbers, ce and kl are sums
        for name, m, numbers, values in patches(crosscoder, x[kept], maps, directions, sets):
            logits = models[m].logits(ids, x[:, m].index_copy(0, kept, values))
            log_p = torch.log_softmax(logits, -1, out=logits)  # in place: fresh memory is slow
            if name == "clean_B":  # the first
                p = log_p.exp()
            if name == "clean_A":  # before the maps
                p_a = log_p.exp()
            if name in maps:
                rises[name] += (log_p.exp() - p_a).sum(0)
            ce = F.nll_loss(log_p[:-1], ids[0, 1:], reduction="sum").item()
            cross_entropy = -torch.tensordot(p, log_p).item()
            found.append(dict(name=name, numbers=numbers, ce=ce, kl=cross_entropy))
    curve = pd.DataFrame(found).groupby("name", sort=False).sum()
    total = np.sum(sizes, axis=0)
    curve /= total
    curve.kl -= curve.kl.clean_B  # which is the entropy
    of_layer = curve.kl.clean_A - curve.kl.all_of_B
    if of_layer >= 0.01:
        curve["recovered"] = (curve.kl.clean_A - curve.kl) / of_layer
    return curve, {name: rise / total[2] for name, rise in rises.items()}


# --- Page -----------------------------------------------------------------------------------------

STYLE = """:root { color-scheme: light dark } h1 { font-size: 1.4em }
body { font: 15px/1.5 system-ui; max-width: 76em; margin: 2em auto; padding: 0 1em }
table, .svg { display: block; overflow-x: auto; font-size: 13px; fill: currentColor }
table { border-spacing: 0 } .texts { text-align: left; white-space: pre-wrap; min-width: 36em }
td, th { padding: .2em .6em; text-align: right; vertical-align: top }
td, th { border-top: 1px solid #8884; white-space: nowrap }"""


def verdict(d_hidden, table, row, curve):
    """Two sentences: how large the change is and what carries it; and of what kinds latents are."""
    said = "the models do not differ here"
    if row["relative_difference"] > 1e-4:
        said = f"B - A is {row['relative_difference']:.2g} of A"
    if len(curve):
        kl = curve.kl
        said += f"; KL {kl.clean_A:.2g} nats a token, of which this layer "
        if "recovered" in curve:
            share = curve.recovered.map("{:.0%}".format)
            said += f"{1 - kl.all_of_B / kl.clean_A:.0%}. Of that: constant {share.constant}, "
            said += f"one direction {share.rank_1}, affine map {share['map']}; with the constant "
            said += f"20 latents {share.chosen_20}, 100 {share.chosen_100}, all {share.chosen_all}"
        else:
            said += "less than 0.01, too little to be shared out"
    kinds = f"of {d_hidden:,} latents {len(table):,} are alive"
    for kind in ("shared", "uneven", "base-only", "fine-tuned-only"):
        kinds += f", {(table.kind == kind).sum():,} {kind}"
    kinds += f", {table.confirmed.sum():,} confirmed"
    return said, kinds


def find_decoder(data):
    """The function from ids to text; it shows ids if the tokenizer is not on this machine."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            data.meta["tokenizer"], local_files_only=True, trust_remote_code=False
        )
        return partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    except Exception:  # of many kinds; it is what a stranger named, and ids will do
        return lambda ids: " ".join(map(str, ids))


def snippet(ids, shade, decode):
    """HTML of the tokens ids around where shade is deepest, a Series of 0 to 1 by position."""
    spans = ""
    text = ""
    pos = shade.idxmax()
    first = max(0, pos - 16)
    for i in range(len(ids))[first : pos + 9]:
        so_far = decode(ids[first : i + 1])
        if not so_far.endswith("\ufffd"):  # else the rest of a letter is in the next token
            more = html.escape(so_far.removeprefix(text).replace("\n", "↵"))
            spans += f'<span style="background: rgb(255 140 0/{shade.get(i, 0):.2f})">{more}</span>'
            text = so_far
    return spans


def examples(data, rows, decode):
    """
    Of held-out rows, a DataFrame of doc, pos, source and size: HTML of the texts around the five
    largest, each of another text; and of the 20 largest, or more that tie, the most frequent
    source, with its share of them and of all rows.
    """
    largest = rows[rows["size"] > 0].sort_values("size", ascending=False, kind="stable")
    lines = []
    for doc in largest.doc.unique()[:5].tolist():
        of_doc = largest[largest.doc == doc].set_index("pos")
        shade = of_doc["size"] / rows["size"].max()
        lines.append(snippet(data.docs[doc], shade, decode))
    first_20 = largest.nlargest(20, "size", keep="all")  # all rows of the constant, alike in each
    share = first_20.source.value_counts(normalize=True)
    first = share.idxmax()
    usual = (rows.source == first).mean()
    source = html.escape(f"{first} {share[first]:.0%} (of all {usual:.0%})")
    return dict(texts=f'<div class="texts">{"<br>".join(lines)}</div>', source=source)


@torch.no_grad()
def rise_at(data, row, base, added):
    """
    How far adding `added` [d_model] to the base model's activation at that row raises the next
    token's probabilities [vocabulary].
    """
    doc = data.docs[int(data.doc[row])]
    ids = torch.tensor([doc[: data.pos[row] + 1]], device=added.device)
    a = base.read(ids)
    before = base.logits(ids, a)[-1].softmax(-1)
    a[-1] += added
    return base.logits(ids, a)[-1].softmax(-1) - before


@torch.no_grad()
def described(model, data, held_out, top, models, maps, rises):
    """
    The table `top` of latents with the texts that they fire on and, with models, the five tokens
    that they make likelier in their strongest row; and before them the same of the maps, but the
    tokens that they make likelier on average, by `rises`.
    """
    decode = find_decoder(data)
    doc = data.doc[data.val_rows]
    source = np.array(data.sources)[doc]
    rows = pd.DataFrame(dict(doc=doc, pos=data.pos[data.val_rows], source=source))
    parts = held_out.split(1024)
    f = torch.cat([model.encode(x)[:, top.index] for x in parts])
    more = in_b_more(model)[0][top.index]
    one_each = {j: [i] for i, j in enumerate(top.index)}
    found = {}
    a = held_out[:, 0].to(f)
    for name, _, added in additions(a, f, more, maps, one_each):
        rows["size"] = added.norm(dim=1).cpu().numpy()
        i = rows["size"].argmax()
        if rows["size"].iloc[i] > 0:  # it is 0 of maps, of the same model twice
            found[name] = examples(data, rows, decode)
            if models:
                if name in maps:
                    rise = rises[name]
                else:
                    rise = rise_at(data, data.val_rows[i], models[0], added[i])
                rise, token = rise.topk(5)
                lines = [f"{decode([t])!r} {y:+.2g}" for t, y in zip(token.tolist(), rise)]
                found[name]["likelier"] = "<br>".join(map(html.escape, lines))
    shown = pd.DataFrame(found).T.join(top)
    if rows.source.nunique() == 1:
        shown = shown.drop(columns="source", errors="ignore")
    return shown


def pictures(table, rows, curve, path):
    """
    Draws histograms of the latents, curves of the training, by its rows of metrics, and what
    splicing finds, if any, into an SVG file; returns it as HTML.
    """
    latents = table[["relative_norm", "cosine", "change"]]
    latents = latents.assign(log10_frequency=np.log10(table.frequency))
    latents = latents.astype(float).round(6)  # no range too narrow for 50 bins
    names = ["step", "loss", "explained_variance", "l0_loss", "dead_latents"]
    training = pd.DataFrame(rows, columns=names, dtype=float).dropna()
    style = {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 8, "legend.frameon": False}
    with rc_context(style):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        above, below = figure.subplots(2, 4)
        for axes in latents.hist(ax=above, bins=50, grid=False):
            axes.set(yscale="symlog", ylabel="latents")
        above[0].set(xlim=(0, 1), title="relative_norm (0: base, 1: fine-tuned)")
        if "recovered" in curve:
            axes = above[2]
            axes.clear()
            for name in ("chosen", "random", "directions"):
                line = curve.filter(like=name, axis=0)
                axes.semilogx(line.numbers, line.recovered, marker="o", label=name)
            for name, line in {"constant": ":", "rank_1": "-.", "map": "--"}.items():
                axes.axhline(curve.recovered[name], label=name, color="grey", linestyle=line)
            axes.set(xlabel="numbers per token", title="change recovered")
            axes.legend(loc="lower right")
        training.plot(x="step", subplots=True, ax=below, marker=".")
        options = dict(format="svg", transparent=True, metadata=dict(Date=None))
        train.write_atomically(path, partial(figure.savefig, **options))
    svg = path.read_text(encoding="utf-8").replace("#000000", "currentColor")
    return svg[svg.index("<svg") :]


def report(model, data, config, rows, splice=False, n_texts=16):
    """
    Writes report.html, report.svg and latents.csv into config["out_dir"] of the run's config: how
    large the change is, what the models share and what each has alone, and by the run's rows of
    metrics how it was trained. With splice also what splicing n_texts texts finds, and a row of it
    in metrics.jsonl. Returns the page or, if there is nothing to report, says so and returns "".
    """
    if data.n_models != 2 or not config["val_tokens"]:
        print("no report: it compares two models, on rows that are held out (val_tokens)")
        return ""
    docs = getattr(data, "docs", None)
    if splice and not docs:
        fail("--splice=True takes a store that collect.py wrote")
    out = Path(config["out_dir"])

    # how large the change is, and a table of the latents
    row, frequency = train.validate(model, data, config["l1_coeff"])
    held_out = torch.cat(list(data.validation())).float()  # [row, model, d_model]
    a, b = held_out.unbind(1)
    size = (b - a).norm(dim=1).mean()
    size_of_a = a.norm(dim=1).mean()
    row["relative_difference"] = (size / size_of_a).item()
    table = compare(model, frequency).join(latent_scaling(model, held_out.split(1024)))
    least = min(20 / len(held_out), 0.01)  # fewer rows would not tell
    table["confirmed"] = table.eval(f"nu_r < 0.5 and nu_epsilon < 0.2 and frequency >= {least}")

    # what carries it
    order = "carries"
    models = []
    maps = {}
    rises = {}
    curve = pd.DataFrame()
    if splice:
        models = load_models(data, frequency.device)
        order = "nats_per_token"
        effect = attribution(model, data, models, -(-n_texts // 2))
        table.insert(0, order, effect[table.index])
    table = table.sort_values(order, ascending=False, kind="stable")
    train.write_atomically(out / "latents.csv", partial(table.to_csv, index_label="latent"))
    if splice:
        maps, directions, row["map_r2"] = fit_yardsticks(model, data, held_out)
        sets = sets_of(table.index)
        curve, rises = splice_in(model, data, models, n_texts, maps, directions, sets)
        for m in "AB":
            clean, spliced, zero = curve.ce[[f"clean_{m}", f"spliced_{m}", f"zero_{m}"]]
            row[f"loss_recovered_{m}"] = (zero - spliced) / (zero - clean)
        found = {f"{column}_{name}": y for (column, name), y in curve.unstack().items()}
        named = {f"val/{key}": y for key, y in (row | found).items() if y == y}  # no nan in JSON
        path = out / "metrics.jsonl"
        with explain(f"{path} cannot be written", OSError), open(path, "a") as file:
            file.write(json.dumps({"step": config["steps"]} | named) + "\n")

    # the page: the first 20, and the first 40 of those that are one model's alone
    alone = table.kind.str.endswith("only") | table.confirmed
    is_first = np.arange(len(table)) < 20
    is_listed = is_first | (alone & (alone.cumsum() <= 40))
    top = table[is_listed]
    if docs:
        top = described(model, data, held_out, top, models, maps, rises)
    top = top.dropna(axis=1, how="all").reset_index(names="latent")
    said, kinds = verdict(len(frequency), table, row, curve)
    parts = config | dict(store=getattr(data, "meta", {}), val=row)
    run = pd.json_normalize(parts, sep="/").iloc[0]
    run = run.drop(["resume", "trust_remote_code"], errors="ignore")
    svg = pictures(table, rows, curve, out / "report.svg")
    with pd.option_context("display.max_colwidth", None, "display.float_format", "{:.4g}".format):
        page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>What fine-tuning changed</title><meta name="viewport" content="width=device-width">
<style>{STYLE}</style><h1>{said}</h1><p>{kinds}</p><div class="svg">{svg}</div>
{top.to_html(index=False, escape=False, border=0, na_rep="")}
{curve.to_html(border=0)}{run.to_frame("the run").to_html(border=0)}"""
    train.write_atomically(out / "report.html", lambda part: part.write_bytes(page.encode()))
    print(f"{said}\n{kinds}\nreport: {out / 'report.html'}")
    if hasattr(data, "directions"):
        print(toy_score(data, model, table))
    return page


def main(argv):
    options = train.checked(train.read_command_line(argv, __file__), config, allowed)
    run = options["run"]
    device = train.set_up(options["device"])
    state = train.read_checkpoint(run)
    here = dict(out_dir=run, steps=state["step"], device=options["device"])
    of_run = train.settings_of(state["config"] | here)
    data = train.open_data(of_run)
    with explain(f"--run={run}: its weights are not of its config and data"):
        model = train.new_model(of_run, data).to(device)
        model.load_state_dict(state["model"])
    return report(model, data, of_run, state["rows"], options["splice"], options["n_texts"])


if __name__ == "__main__":
    main(sys.argv[1:])

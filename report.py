"""Reports on a run of train.py: what did fine-tuning change? train.py calls `report` at its end.

    python report.py --run=out/RUN                # makes the page again
    python report.py --run=out/RUN --splice=True  # also patches the models, to measure the effects

Any key of the config can be set by --key=value. The folder of the run gets

    report.html    a page that fetches nothing: how large the change is, how many latents both
                   models share or one has alone, and texts of those with most of the change
    report.svg     its pictures
    latents.csv    all latents that are alive: columns of `compare`, `latent_scaling`, `attribution`
    metrics.jsonl  after splicing, one more row: val/COLUMN_NAME of `splice_in`. Resuming drops it

Figures are of held-out rows: of whole docs (texts, or pieces of long ones) if the store has docs.
Only nats_per_token, the fit of the baselines and the curves of training are of training rows.

Latent scaling: Minder, Dumas et al. 2025, arXiv 2504.02922. Attribution patching: Nanda 2023; Syed
et al. 2023, arXiv 2310.10348. Reduced-rank regression: Izenman 1975.
"""

import html
import json
import signal
import sys
from functools import partial
from itertools import islice
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback

import train  # before torch: it sets how torch takes memory
from train import explain, fail

# isort: split

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from datasets import load_from_disk
from einops import einsum
from matplotlib import rc_context
from matplotlib.figure import Figure

# --- Config ---------------------------------------------------------------------------------------

config = dict(
    run="",  # folder of the run, which train.py calls out_dir
    splice=False,  # patch the models of collect.py's store: loss recovered, effects of latents
    n_texts=16,  # held-out texts to patch; half as many training texts rank the latents
    device="auto",  # auto (cuda if there is one), cpu or cuda
)
allowed = dict(n_texts=train.at_least_1)

# --- Texts ----------------------------------------------------------------------------------------


class Texts:
    """The texts of a store that collect.py wrote: meta, its meta.json; docs, the token ids of each;
    rows, a DataFrame of doc, pos, token and source of each row. Other data has no docs.
    """

    meta = {}
    docs = []

    def __init__(self, data):
        self.store = data
        path = getattr(data, "path", None)
        if not path or not (path / "meta.json").exists():
            return
        with explain(f"--data={path}: its docs do not fit its rows"):
            self.meta = json.loads((path / "meta.json").read_text())
            docs = load_from_disk(path / "docs")
            self.docs = docs["input_ids"]
            rows = data.columns.to_pandas()
            source = pd.Categorical(docs["source"])
            self.rows = rows.assign(source=source[rows.doc])
            ids = docs.data.column("input_ids").combine_chunks()
            place = ids.offsets.to_numpy()[rows.doc] + rows.pos  # among the tokens of all docs
            np.testing.assert_array_equal(ids.values.to_numpy()[place], rows.token)
            assert place.is_unique, "a token of docs has two rows"


# --- Latents --------------------------------------------------------------------------------------


def compare(model, frequency, dead_after=torch.inf):
    """Returns a DataFrame of the latents that are alive: they fired in training, in the last
    dead_after tokens. `frequency` [d_hidden] is the share of held-out rows in which each does. d_A
    and d_B are its decoder vectors, each in its model's scale. The columns:
    change_per_token  frequency * change
    relative_norm     ||d_B|| / (||d_A|| + ||d_B||): 0 is base only, 1 is fine-tuned only
    change            ||d_B - d_A|| / (||d_A|| + ||d_B||)
    cosine            of d_A and d_B
    kind              base-only, uneven, shared or fine-tuned-only, by relative_norm
    """
    frequency = frequency.cpu()
    d = model.in_models(model.W_dec).detach().cpu()
    a, b = d.unbind(1)  # [latent, d_model]
    norms = d.norm(dim=2).sum(1)
    change = (b - a).norm(dim=1) / norms
    relative_norm = b.norm(dim=1) / norms
    kinds = ["base-only", "uneven", "shared", "uneven", "fine-tuned-only"]
    bins = np.digitize(relative_norm, [0.1, 0.4, 0.6, 0.9])
    columns = dict(
        change_per_token=frequency * change,
        relative_norm=relative_norm,
        change=change,
        frequency=frequency,
        cosine=torch.cosine_similarity(a, b),
        kind=np.take(kinds, bins),
    )
    return pd.DataFrame(columns)[(model.since_fired <= dead_after).cpu().numpy()]


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


def toy_score(toy, model, table):
    """Returns a DataFrame of counts by kind. A latent matches a feature if its cosine is > 0.9 in
    each model that has it. A feature is recovered if a latent of its kind matches it, and confirmed
    if a confirmed latent does. A latent that recovers no feature is false.
    """
    d = model.in_models(model.W_dec).cpu()[table.index]
    features = []
    is_false = True
    for kind, planted in zip(toy.kind, toy.directions):  # [model, d_model]
        near = (torch.cosine_similarity(d, planted, dim=2) > 0.9) | ~planted.any(1)
        is_near = near.all(1).numpy()
        recovers = is_near & (table.kind == kind)
        confirms = is_near & table.confirmed
        found = dict(kind=kind, planted=1, recovered=recovers.any(), confirmed=confirms.any())
        features.append(found)
        is_false &= ~recovers
    score = pd.DataFrame(features).groupby("kind", sort=False).sum()
    score["latents"] = table.kind.value_counts()
    score["false"] = table.kind[is_false].value_counts()
    return score.fillna(0).astype(int)


# --- Splicing -------------------------------------------------------------------------------------


class Hooked:
    """A language model with a hook, the path of one of its modules. Activations are what the module
    puts out, divided by `divided_by`, as in the store.
    """

    def __init__(self, model, hook, divided_by):
        from nnsight import NNsight

        self.model = NNsight(model.requires_grad_(False))
        self.hook = hook
        self.divided_by = divided_by
        self.skipped = []
        ids = torch.arange(8, device=model.device)[None]
        raw = self.read(ids)
        expected = self.logits(ids, raw)
        # Blocks up to the hook can be skipped, because a patch replaces their output. This is
        # tried here, because later blocks may read more of them, such as shared keys.
        with self.model.trace(input_ids=ids, use_cache=False):
            output = self.model.get(hook).output.save()
        blocks, _, i = hook.rpartition(".")
        if i.isdigit() and isinstance(output, torch.Tensor):
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
        meta = collect.config | dict(divided_by=1.0) | texts.meta | dict(trust_remote_code=False)
        places = meta.get("places", ["base", "finetuned"])
        hooks = dict(zip(places, map(str, meta["hooks"]), strict=True))
        hooks = {name.partition("_")[0]: hooks[name] for name in texts.store.names}
        assert list(hooks) == ["base", "finetuned"], f"places {texts.store.names}"
    models = []
    for key, hook in hooks.items():
        models.append(Hooked(collect.load(key, meta, device)[0], hook, meta["divided_by"]))
    sizes = {hooked.model.config.get_text_config().vocab_size for hooked in models}
    if len(sizes) > 1:
        fail("--splice=True: the models have vocabularies of different sizes")
    return models


def read_texts(texts, models, rows, n_texts):
    """Yields (ids [1, position], positions with rows [n], raw [position, model, d_model]) of the
    first n_texts docs of those rows. Ends the program if the models do not give the store's rows.
    """
    for doc, of_doc in islice(texts.rows.iloc[rows].groupby("doc"), n_texts):
        stored = texts.store.read(of_doc.index.to_numpy()).float()
        ids = torch.tensor([texts.docs[doc]], device=models[0].model.device)
        kept = ids.new_tensor(of_doc.pos.tolist())
        of_models = [model.read(ids) for model in models]
        with explain(f"{texts.store.path}: its models, at its hooks, do not give its rows"):
            raw = torch.stack(of_models, dim=1)
            error = (raw[kept].cpu() - stored).norm() / stored.norm()
            assert error <= 0.1, f"they are off by {error:.0%}"
        yield ids, kept, raw


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
    for ids, kept, raw in read_texts(texts, models, texts.store.train_rows, n_texts):
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


def fit_baselines(crosscoder, store):
    """Fits baselines for B - A to up to 50,000 training rows. Returns maps {name: (W [d_model,
    d_model], bias [d_model])} that predict B - A as a @ W + bias: `map` by ridge regression,
    `rank_1`, its part in its largest output direction, and `constant`, the difference of b_dec.
    Also the singular vectors of B - A [d_model, d_model], by column, and the R^2 of `map` in the
    first 8,192 held-out rows.
    """
    rows = np.sort(store.shuffled(0)[:50_000])
    a, b = store.read(rows).to(crosscoder.scale).unbind(1)
    change = b - a
    centered = a - a.mean(0)
    gram = centered.T @ centered
    ridge = 0.01 * gram.diag().mean() * torch.eye(len(gram)).to(gram)
    W = torch.linalg.solve(gram + ridge, centered.T @ change)
    of_map = torch.linalg.eigh(W.T @ gram @ W)
    written = of_map.eigenvectors[:, -1]
    maps = dict(constant=(0 * W, decoder_change(crosscoder)[1]))
    for name, weights in dict(rank_1=W @ written.outer(written), map=W).items():
        maps[name] = weights, change.mean(0) - a.mean(0) @ weights
    directions = torch.linalg.eigh(change.T @ change).eigenvectors.flip(1)
    a, b = torch.cat(list(islice(store.held_out, 8))).to(a).unbind(1)
    change = b - a
    error = F.mse_loss(a @ W + maps["map"][1], change)
    r2 = 1 - error / change.var(0, correction=0).mean()
    return maps, directions, r2.item()


def patches(crosscoder, raw, maps, directions, sets):
    """Yields patches for raw activations [n_rows, model, d_model], as (name, model to patch, number
    of active latents summed over rows, values [n_rows, d_model]). Both models get their own values
    (clean), their reconstructions (spliced) and zeros. The base also gets estimates of B: by
    directions of B - A (each counts as a latent), a map of A, or the constant and some latents.
    """
    raw_hat = crosscoder(raw)
    for m, letter in [(1, "B"), (0, "A")]:
        yield f"clean_{letter}", m, 0, raw[:, m]
        yield f"spliced_{letter}", m, 0, raw_hat[:, m]
        yield f"zero_{letter}", m, 0, 0 * raw[:, m]
    a, b = raw.unbind(1)
    yield "all_of_B", 0, b.numel(), b
    for n in (1, 5, 20, 100):
        V = directions[:, :n]
        yield f"directions_{n}", 0, n * len(a), a + (b - a) @ V @ V.T
    for name, (W, bias) in maps.items():
        yield name, 0, 0, a + a @ W + bias
    f = crosscoder.encode(raw)
    d_change, constant = decoder_change(crosscoder)
    for name, latents in sets.items():
        active = (f[:, latents] > 0).sum().item()
        change = f[:, latents] @ d_change[latents]
        yield name, 0, active, a + constant + change


def sets_of(order):
    """Returns sets {name: latents}: the first n latents in that order, n random ones, and all."""
    random = np.random.default_rng(0).permutation(order)
    sets = {f"chosen_{n}": order[:n] for n in (1, 5, 20, 100)}
    sets |= {f"random_{n}": random[:n] for n in (20, 100)}
    return sets | dict(chosen_all=order)


@torch.no_grad()
def splice_in(crosscoder, texts, models, n_texts, maps, directions, sets):
    """Patches n_texts held-out texts, at the positions that the store has, by each of `patches`.
    Returns a DataFrame by name of patch, and {name: mean change of each next token's probability
    [vocabulary]}. The columns:
    l0         active latents, or directions, per patched position
    ce, kl     nats per token of cross-entropy, and of KL divergence from the fine-tuned model
    recovered  drop in kl from clean_A, over the drop by `all_of_B`, if that is at least 0.01
    """
    found = []
    n = np.zeros(3)  # positions over which l0, ce and kl are sums
    p = {}  # each next token's probability, summed over positions, by patch
    for ids, kept, raw in read_texts(texts, models, texts.store.val_rows, n_texts):
        n += [len(kept), ids.numel() - 1, ids.numel()]
        for name, m, active, values in patches(crosscoder, raw[kept], maps, directions, sets):
            patched = raw[:, m].index_copy(0, kept, values)
            logits = models[m].logits(ids, patched)
            log_p = torch.log_softmax(logits, -1, out=logits)  # in place: fresh memory is slow
            if name == "clean_B":  # the first patch
                p_b = log_p.exp()
            ce = F.nll_loss(log_p[:-1], ids[0, 1:], reduction="sum").item()
            cross_entropy = -torch.tensordot(p_b, log_p).item()
            found.append(dict(name=name, l0=active, ce=ce, kl=cross_entropy))
            p[name] = p.get(name, 0) + log_p.exp_().sum(0)
    curve = pd.DataFrame(found).groupby("name", sort=False).sum() / n
    curve.kl -= curve.kl.clean_B  # the entropy of B
    gap = curve.kl.clean_A - curve.kl.all_of_B
    if gap >= 0.01:
        curve["recovered"] = (curve.kl.clean_A - curve.kl) / gap
    return curve, {name: (y - p["clean_A"]) / n[2] for name, y in p.items()}


# --- Page -----------------------------------------------------------------------------------------

STYLE = """:root { color-scheme: light dark } h1 { font-size: 1.4em }
body { font: 15px/1.5 system-ui; max-width: 76em; margin: 2em auto; padding: 0 1em }
table, .svg { display: block; overflow-x: auto; font-size: 13px; fill: currentColor }
table { border-spacing: 0 } .texts { text-align: left; white-space: pre-wrap; min-width: 36em }
td, th { padding: .2em .6em; text-align: right; vertical-align: top }
td, th { border-top: 1px solid #8884; white-space: nowrap }"""


def verdict(d_hidden, table, row, curve):
    """Returns two sentences: how large the change is and what carries it, and latents by kind."""
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
            said += "less than 0.01, too little to attribute"
    kinds = f"of {d_hidden:,} latents {len(table):,} are alive"
    for kind in ("shared", "uneven", "base-only", "fine-tuned-only"):
        kinds += f", {(table.kind == kind).sum():,} {kind}"
    kinds += f", {table.confirmed.sum():,} confirmed"
    return said, kinds


def find_decoder(texts):
    """Returns a function from token ids to text. It shows ids if there is no tokenizer here."""
    from transformers import AutoTokenizer

    options = dict(local_files_only=True, trust_remote_code=False)
    options["clean_up_tokenization_spaces"] = False
    try:
        return AutoTokenizer.from_pretrained(texts.meta["tokenizer"], **options).decode
    except Exception:  # a stranger named it, and there are many ways to fail
        return lambda ids: " ".join(map(str, ids))


def snippet(ids, shade, decode):
    """Returns HTML of the tokens around the deepest shade, a Series of 0 to 1 by position."""
    spans = ""
    text = ""
    pos = shade.idxmax()
    first = max(0, pos - 16)
    for i in range(len(ids))[first : pos + 9]:
        so_far = decode(ids[first : i + 1])
        if not so_far.endswith("\ufffd"):  # else the next token has the rest of a letter
            more = html.escape(so_far.removeprefix(text).replace("\n", "↵"))
            spans += f'<span style="background: rgb(255 140 0/{shade.get(i, 0):.2f})">{more}</span>'
            text = so_far
    return spans


def examples(texts, rows, decode):
    """Returns HTML of the five texts with the strongest shades. With several sources, it also
    returns the commonest source of the 20 strongest rows, and its shares of these and of all rows.
    `rows` is a DataFrame of doc, pos, source and shade, from 0 to 1.
    """
    deepest = rows[rows.shade > 0].sort_values("shade", ascending=False, kind="stable")
    lines = []
    for doc, of_doc in islice(deepest.groupby("doc", sort=False), 5):
        shade = of_doc.set_index("pos").shade
        lines.append(snippet(texts.docs[doc], shade, decode))
    shown = dict(texts=f'<div class="texts">{"<br>".join(lines)}</div>')
    if rows.source.nunique() > 1:
        first_20 = deepest.nlargest(20, "shade", keep="all")  # the constant is alike in all rows
        share = first_20.source.value_counts(normalize=True)
        first = share.idxmax()
        usual = (rows.source == first).mean()
        shown["source"] = html.escape(f"{first} {share[first]:.0%} (of all {usual:.0%})")
    return shown


def promoted_at(texts, row, base, change):
    """Returns how much each next token's probability rises [vocabulary] if `change` [d_model] is
    added to the base model's activation at a row of texts.rows.
    """
    ids = texts.docs[row.doc][: row.pos + 1]
    ids = torch.tensor([ids], device=change.device)
    raw = base.read(ids)
    before = base.logits(ids, raw)[-1].softmax(-1)
    raw[-1] += change
    return base.logits(ids, raw)[-1].softmax(-1) - before


@torch.no_grad()
def described(model, texts, top, models, maps, promoted):
    """Returns the table `top` of latents with the held-out texts where each is strongest. The maps
    come first, a row each. If there are models, it also has the tokens that each promotes most:
    latents where they are strongest, maps on average, by `promoted` {name: [vocabulary]}.
    """
    decode = find_decoder(texts)
    rows = texts.rows.iloc[texts.store.val_rows]
    d_change, _ = decoder_change(model)
    strength = []  # of maps and latents, [row, name]
    for raw in texts.store.held_out:
        f = model.encode(raw)[:, top.index]
        a = raw[:, 0].to(model.b_dec)
        of_maps = [(a @ W + bias).norm(dim=1, keepdim=True) for W, bias in maps.values()]
        strength.append(torch.cat([*of_maps, f], dim=1))
    strength = dict(zip([*maps, *top.index], torch.cat(strength).T))
    found = {}
    for name, y in strength.items():
        i = y.argmax().item()
        if y[i] == 0:  # maps, if both models are the same
            continue
        shade = (y / y[i]).cpu().numpy()
        found[name] = examples(texts, rows.assign(shade=shade), decode)
        if models:
            if name in maps:
                rise = promoted[name]
            else:
                change = y[i] * d_change[name]
                rise = promoted_at(texts, rows.iloc[i], models[0], change)
            rise, token = rise.topk(5)
            lines = [f"{decode([t])!r} {y:+.2g}" for t, y in zip(token.tolist(), rise)]
            found[name]["promoted"] = "<br>".join(map(html.escape, lines))
    return pd.DataFrame(found).T.join(top)


def pictures(table, rows, curve, path):
    """Draws latents, training and splicing into an SVG file. Returns it as HTML."""
    latents = table[["relative_norm", "cosine", "change"]].astype(float)
    latents["log10_frequency"] = np.log10(table.frequency.replace(0, np.nan))
    latents = latents.round(6)  # no range too narrow for 50 bins
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
                line.plot("l0", "recovered", ax=axes, logx=True, marker="o", label=name)
            for name, line in {"constant": ":", "rank_1": "-.", "map": "--"}.items():
                axes.axhline(curve.recovered[name], label=name, color="grey", linestyle=line)
            axes.set_title("change recovered")
            axes.legend()
        training.plot("step", subplots=True, ax=below, marker=".")
        save = partial(figure.savefig, format="svg", transparent=True, metadata=dict(Date=None))
        train.write_atomically(path, save)
    svg = path.read_text(encoding="utf-8").replace("#000000", "currentColor")
    return svg[svg.index("<svg") :]


def report(model, data, config, rows, splice=False, n_texts=16):
    """Writes the files that are named above into config["out_dir"]. `config` and `rows` of metrics
    are the run's. Splicing patches n_texts texts. Returns the page, or "" if there is none.
    """
    if data.n_models != 2 or not config["val_tokens"]:
        print("no report: it compares two models, on rows that are held out (val_tokens)")
        return ""
    torch.set_float32_matmul_precision("highest")  # fits of B - A do not go with TF32
    texts = Texts(data)
    if splice and not texts.docs:
        fail("--splice=True takes a store that collect.py wrote")
    out = Path(config["out_dir"])

    # how large the change is, and a table of the latents
    dead_after = config["dead_after"]
    row, frequency = train.validate(model, data, config["l1_coeff"], dead_after)
    size = []  # norms of B - A and of A, [row, 2]
    for raw in data.held_out:
        a, b = raw.float().unbind(1)
        size.append(torch.stack([b - a, a], dim=1).norm(dim=2))
    size = torch.cat(size)
    row["relative_difference"] = size[:, 0].mean() / size[:, 1].mean()
    row = {key: float(y) for key, y in row.items() if np.isfinite(float(y))}
    table = compare(model, frequency, dead_after).join(latent_scaling(model, data.held_out))
    least = min(20 / len(size), 0.01)  # 20 rows, or 1% of fewer than 2,000
    table["confirmed"] = table.eval(f"nu_r < 0.5 and nu_epsilon < 0.2 and frequency >= {least}")

    # what carries the change
    models = []
    maps = {}
    promoted = {}
    curve = pd.DataFrame()
    if splice:
        models = load_models(texts, frequency.device)
        effect = attribution(model, texts, models, -(-n_texts // 2))
        table.insert(0, "nats_per_token", effect[table.index])
    table = table.sort_values(table.columns[0], ascending=False, kind="stable")
    train.write_atomically(out / "latents.csv", table.rename_axis("latent").to_csv)
    if splice:
        maps, directions, row["map_r2"] = fit_baselines(model, data)
        sets = sets_of(table.index)
        curve, promoted = splice_in(model, texts, models, n_texts, maps, directions, sets)
        for m in "AB":
            clean, spliced, zero = curve.ce[[f"clean_{m}", f"spliced_{m}", f"zero_{m}"]]
            row[f"loss_recovered_{m}"] = (zero - spliced) / (zero - clean)
        found = {f"{column}_{name}": y for (column, name), y in curve.unstack().items()}
        found = {f"val/{key}": y for key, y in (row | found).items() if np.isfinite(y)}
        train.write_rows(out, [dict(step=config["steps"]) | found])

    # the page lists the first 20 latents, and the first 40 that one model has alone
    alone = table[table.kind.str.endswith("only") | table.confirmed]
    top = table.loc[table.index[:20].union(alone.index[:40], sort=False)]
    if texts.docs:
        top = described(model, texts, top, models, maps, promoted)
    top = top.reset_index(names="latent")
    said, kinds = verdict(len(frequency), table, row, curve)
    run = pd.json_normalize(config | dict(store=texts.meta, val=row), sep="/").iloc[0]
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

"""
Reports on a run of train.py: what did fine-tuning change? train.py calls `report` when it ends.

    python report.py --run=out/RUN                # the same page again
    python report.py --run=out/RUN --splice=True  # and what its latents do to what the models say

Any key of the config is set by --key=value. It writes RUN/report.html, a page that fetches nothing:
how many latents both models share and each has alone, which of them changed most, and the texts
that these fire on; RUN/report.svg, its picture; and, of splicing, a row of RUN/metrics.jsonl.
Latent scaling: Minder, Dumas et al. 2025, arXiv 2504.02922.
"""

import html
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from einops import einsum
from matplotlib import rc_context
from matplotlib.figure import Figure

import train
from train import explain, fail

# --- Config ---------------------------------------------------------------------------------------

config = dict(
    run="",  # folder of the run, which train.py calls out_dir
    splice=False,  # splice into the models of collect.py's store: loss recovered, a causal curve
    n_texts=16,  # held-out texts to splice into
    device="auto",  # auto (cuda if there is one), cpu or cuda
)
allowed = dict(n_texts=train.at_least_1)

# --- Latents --------------------------------------------------------------------------------------


def compare(model, frequency):
    """
    A DataFrame of the latents that fire, frequency [d_hidden] > 0, by their decoder vectors d_A and
    d_B in each model's scale: relative_norm, ||d_B|| / (||d_A|| + ||d_B||), and by it the kind;
    change, ||d_B - d_A|| / (||d_A|| + ||d_B||); cosine; and how much of all change a latent
    carries, frequency * ||d_B - d_A|| or, in the delta basis, frequency * change.
    """
    a, b = model.in_models(model.W_dec).detach().cpu().unbind(1)  # [latent, d_model]
    norms = a.norm(dim=1) + b.norm(dim=1)
    size = (b - a).norm(dim=1)
    columns = dict(
        relative_norm=b.norm(dim=1) / norms,
        change=size / norms,
        frequency=frequency.cpu(),
        cosine=torch.cosine_similarity(a, b),
    )
    if model.basis == "delta":
        size = columns["change"]
    columns["carries"] = columns["frequency"] * size
    table = pd.DataFrame(columns)
    kinds = ["base-only", "uneven", "shared", "uneven", "fine-tuned-only"]
    table["kind"] = np.take(kinds, np.digitize(table.relative_norm, [0.1, 0.4, 0.6, 0.9]))
    return table.query("frequency > 0")


@torch.no_grad()
def latent_scaling(model, batches, latents):
    """
    nu_r and nu_epsilon of those latents, a list, over batches of raw x, as a DataFrame: by them
    Minder, Dumas et al. 2025 (arXiv 2504.02922) tell what one model alone has from what training
    only shrank in the other. beta is the least-squares factor of f * d, d being the decoder vector
    in the latent's own model, in a model's reconstruction (nu_r), or in its error with the latent's
    part left in (nu_epsilon); nu is beta of the other model over that of its own.
    """
    d = model.in_models(model.W_dec)[latents]  # [latent, model, d_model]
    n = torch.arange(len(d))
    own = d.norm(dim=2).argmax(1)
    d_own = d[n, own]
    beta = d.new_zeros(2, len(d), 2)  # [nu, latent, model], but for a factor
    if not len(d):
        batches = []
    for x in batches:
        x = x.to(d)
        f = model.encode(x)
        x_hat = model.decode(f)
        f = f[:, latents]
        y = torch.stack([x_hat, x - x_hat]) * model.scale[:, None]
        beta += einsum(f, y, d_own, "row latent, nu row model d, latent d -> nu latent model")
        left_in = "row latent, latent model d, latent d -> latent model"
        beta[1] += einsum(f.square(), d, d_own, left_in)
    nu = beta[:, n, 1 - own] / beta[:, n, own]
    return pd.DataFrame(nu.T.cpu().numpy(), latents, ["nu_r", "nu_epsilon"])


def verdict(model, table):
    """What the table says of the model, in a sentence."""
    said = f"of {len(model.b_enc):,} latents {len(table):,} are alive"
    for kind in ("shared", "base-only", "fine-tuned-only"):
        said += f", {(table.kind == kind).sum():,} {kind}"
    if table.confirmed.notna().any():
        said += f", {table.confirmed.sum():,} confirmed"
    elif model.basis == "plain":
        said += ": no exclusive latents"
    if model.basis == "delta":
        half = 1 + (table.carries.cumsum() < table.carries.sum() / 2).sum()
        said += f"; {half:,} of them carry half of the change"
    if model.dedicated:
        is_dedicated = ~model.owned[table.index].flatten(1).all(1)
        own = table.confirmed[is_dedicated.tolist()]
        said += f"; of {len(own):,} dedicated ones that are alive {own.sum():,} are confirmed"
    return said


def toy_score(data, model, table):
    """
    Of a toy, by kind, the planted features, those recovered by a latent of their kind with cosine >
    0.9 in each model that has them; and the latents of that kind, those that recover none (false),
    and the confirmed: a DataFrame of numbers.
    """
    d = model.in_models(model.W_dec).cpu()[table.index]
    is_false = True
    recovered = Counter()
    for kind, planted in zip(data.kind, data.directions):  # [model, d_model]
        near = (torch.cosine_similarity(d, planted, dim=2) > 0.9) | ~planted.any(-1)
        recovers = near.all(1).numpy() & (table.kind == kind.removeprefix("turned "))
        recovered[kind] += recovers.any()
        is_false &= ~recovers
    score = dict(
        planted=Counter(data.kind),
        recovered=recovered,
        latents=Counter(table.kind),
        false=Counter(table.kind[is_false]),
        confirmed=Counter(table.query("confirmed == True").kind),
    )
    return pd.DataFrame(score).query("planted > 0").fillna(0).astype(int)


# --- Splicing -------------------------------------------------------------------------------------


def log_probabilities(model, hook, input_ids, where, values):
    """
    Next-token log-probabilities [position - 1, vocabulary] of an NNsight model on a text, input_ids
    [1, position], with values [n, d_model] put into the output of the module `hook` at the
    positions `where` [n].
    """
    from collect import hidden

    with model.trace(input_ids=input_ids, use_cache=False):
        hidden(model.get(hook).output)[0][where] = values
        logits = model.output.logits.save()
    return logits[0, :-1].float().log_softmax(-1)


def to_splice(crosscoder, x, kept, latents):
    """
    Yields for each figure of `splice` that is a loss its name, the model, 0 for A or 1 for B, where
    to put what into it: positions [n] and values [n, d_model]. x are the models' outputs, two of
    [position, d_model], and kept [n] the positions of which the store has rows.
    """
    y = torch.stack(x, dim=1)[kept]  # [n, model, d_model]
    f = crosscoder.encode(y)
    x_hat = crosscoder.decode(f)
    for m, letter in enumerate("AB"):
        yield f"ce_clean_{letter}", m, kept, y[:, m]
        yield f"ce_spliced_{letter}", m, kept, x_hat[:, m]
        yield f"ce_zero_{letter}", m, kept, 0
    yield "kl_clean_A", 0, kept, y[:, 0]
    yield "kl_all_of_B", 0, ..., x[1]
    d = crosscoder.unscaled(crosscoder.W_dec)
    for name, j in latents.items():
        more = f[:, j] @ (d[j, 1] - d[j, 0])
        yield f"kl_{name}", 0, kept, y[:, 0] + more


@torch.no_grad()
def splice(crosscoder, data, latents, n_texts=16):
    """
    What splicing into the models at the hook does to them, in nats per token of texts of held-out
    rows of the Store `data`. Of both, cross-entropy as they are (ce_clean), with the crosscoder's
    reconstruction (ce_spliced) and with 0 (ce_zero); loss_recovered is (zero - spliced) / (zero -
    clean). And how far the base model is from the fine-tuned one, by KL divergence, as it is
    (kl_clean_A), with all of B's activation (kl_all_of_B), and for each {name: list} of latents
    with what those say that B has more, the sum of f (d_B - d_A), added (kl_NAME); recovered_NAME
    is (clean_A - NAME) / (clean_A - all_of_B). Where the store has no row, as at the first
    position, no reconstruction, 0 or sum is put. Ends the program if a model cannot be loaded.
    """
    from nnsight import NNsight

    from collect import activations, load

    device = crosscoder.scale.device
    meta = data.meta | dict(trust_remote_code=False)
    models = []
    for key, hook in zip(data.names, meta["hooks"]):
        model, _ = load(key, meta, device)
        models.append((NNsight(model), hook))

    sums = Counter()
    n_tokens = 0
    for doc in np.unique(data.doc[data.n_train :])[:n_texts]:
        ids = torch.tensor([data.docs[int(doc)]], device=device)
        kept = ids.new_tensor(data.pos[data.doc == doc])
        x = [activations(*pair, ids, torch.ones_like(ids))[0] for pair in models]
        finetuned = log_probabilities(*models[1], ids, ..., x[1])
        for name, m, where, values in to_splice(crosscoder, x, kept, latents):
            log_p = log_probabilities(*models[m], ids, where, values)
            loss = -log_p.gather(1, ids[0, 1:, None])
            if name.startswith("kl"):
                loss = finetuned.exp() * (finetuned - log_p)
            sums[name] += loss.sum().item()
        n_tokens += len(finetuned)

    row = pd.Series(sums) / n_tokens
    for m in "AB":
        zero = row[f"ce_zero_{m}"]
        row[f"loss_recovered_{m}"] = (zero - row[f"ce_spliced_{m}"]) / (zero - row[f"ce_clean_{m}"])
    recovered = (row.kl_clean_A - row) / (row.kl_clean_A - row.kl_all_of_B)
    for name in latents:
        row[f"recovered_{name}"] = recovered[f"kl_{name}"]
    return row


def causal_curve(model, data, table, n_texts):
    """
    What `splice` finds of the first n latents of the table, and of n at random, for several n; and
    of it what they recover, {chosen or random: {n: share}}.
    """
    sizes = [n for n in (1, 5, 20, 100, len(table)) if n <= len(table)]
    latents = {}
    for n in sizes:
        latents[f"chosen_{n}"] = table.index[:n]
        latents[f"random_{n}"] = table.sample(n, random_state=0).index
    row = splice(model, data, latents, n_texts)
    curve = {}
    for name in ("chosen", "random"):
        curve[name] = {n: row[f"recovered_{name}_{n}"] for n in sizes}
    return row, curve


# --- Page -----------------------------------------------------------------------------------------

STYLE = """:root { color-scheme: light dark } .texts { text-align: left; white-space: pre-wrap }
body { font: 15px/1.5 system-ui; max-width: 76em; margin: 2em auto; padding: 0 1em }
table, .svg { display: block; overflow-x: auto; font-size: 13px; fill: currentColor }
table { border-spacing: 0 } h1 { font-size: 1.4em }
td, th { padding: .2em .6em; text-align: right; vertical-align: top }
td, th { border-top: 1px solid #8884 }"""


@torch.no_grad()
def examples(crosscoder, data, latents):
    """
    For each latent, HTML of the texts around five held-out tokens with the largest f, each of
    another text. Tokens are shown as ids if the tokenizer is not on this machine.
    """
    from transformers import AutoTokenizer

    try:
        decode = AutoTokenizer.from_pretrained(
            data.meta["tokenizer"], local_files_only=True, trust_remote_code=False
        ).decode
    except Exception:  # of many kinds; it is what a stranger named, and ids will do
        decode = str
    index = pd.DataFrame(dict(doc=data.doc, pos=data.pos))[data.n_train :]
    codes = [crosscoder.encode(x)[:, latents].cpu() for x in data.validation()]
    for f in torch.cat(codes).T.numpy():
        rows = index.assign(f=f / f.max()).query("f > 0")
        rows = rows.sort_values("f", ascending=False, kind="stable")
        lines = []
        for doc in rows.doc.unique()[:5].tolist():
            shade = rows[rows.doc == doc].set_index("pos").f
            lines.append(snippet(data.docs[doc], shade, decode))
        yield f'<div class="texts">{"<br>".join(lines)}</div>'


def snippet(ids, shade, decode):
    """HTML of the tokens ids around where shade is deepest, a Series of 0 to 1 by position."""
    spans = ""
    pos = shade.idxmax()
    for i in range(len(ids))[max(0, pos - 16) : pos + 9]:
        token = html.escape(decode([ids[i]]).replace("\n", "↵"))
        spans += f'<span style="background: rgb(255 140 0/{shade.get(i, 0):.2f})">{token}</span>'
    return spans


def pictures(table, rows, curve, path):
    """
    Draws histograms of the latents, curves of the training, by its rows of metrics, and the causal
    curve if any, into an SVG file; returns it as HTML.
    """
    latents = table[["relative_norm", "cosine"]].assign(log10_frequency=np.log10(table.frequency))
    names = ["loss", "explained_variance", "l0_loss"]
    if curve:
        names.append("dead_latents")  # there is room for it below the causal curve
    training = pd.DataFrame(rows).dropna(subset=names)
    style = {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 8, "legend.frameon": False}
    with rc_context(style):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        above, below = figure.subplots(2, len(names))
        for axes in latents.hist(ax=above[:3], bins=50, grid=False):
            axes.set(yscale="symlog", ylabel="latents")
        above[0].set(xlim=(0, 1), title="relative_norm (0: base, 1: fine-tuned)")
        if curve:
            pd.DataFrame(curve).plot(
                ax=above[3], logx=True, marker="o", xlabel="latents", title="change recovered"
            )
        training.plot(x="step", y=names, subplots=True, ax=below)
        figure.savefig(path, transparent=True, metadata=dict(Date=None))
    svg = path.read_text(encoding="utf-8").replace("#000000", "currentColor")
    return svg[svg.index("<svg") :]


def report(model, data, config, rows, splice=False, n_texts=16):
    """
    Writes OUT/report.html and report.svg, OUT being config["out_dir"] of the run's config: what the
    models share, what each has alone, what changed, and by its rows of metrics how it was trained.
    With splice also what splicing n_texts texts finds, which is added to OUT/metrics.jsonl. Returns
    the page, or, if there is nothing to report, says so and returns "".
    """
    if data.n_models != 2 or not config["val_tokens"]:
        print("no report: it compares two models, on rows that are held out (val_tokens)")
        return ""
    docs = getattr(data, "docs", None)
    if splice and not docs:
        fail("--splice=True takes a store that collect.py wrote")

    # the latents; those that carry most come first, in the plain basis after the exclusive ones
    row, frequency = train.validate(model, data, config["l1_coeff"])
    table = compare(model, frequency)
    exclusive = table.kind.str.endswith("only")
    table = table.join(latent_scaling(model, data.validation(), table.index[exclusive]))
    table["confirmed"] = table.eval("nu_r < 0.5 and nu_epsilon < 0.2").where(exclusive)
    is_later = ~exclusive & (model.basis == "plain")
    table = table.iloc[np.lexsort([-table.carries, is_later])]
    said = verdict(model, table)

    # the causal curve
    out = Path(config["out_dir"])
    curve = {}
    if splice:
        found, curve = causal_curve(model, data, table, n_texts)
        row |= found
        n = min(20, len(table))
        said += f"; {n} latents carry {curve['chosen'][n]:.0%} of what this layer changed"
        with open(out / "metrics.jsonl", "a") as file:
            named = {"step": config["steps"]} | found.add_prefix("val/").to_dict()
            file.write(json.dumps(named) + "\n")

    # the page
    often = table[table.frequency >= min(20 / config["val_tokens"], 0.01)]
    top = often.sort_values(["confirmed", "change"], ascending=False).groupby("kind").head(20)
    if docs:
        top.insert(0, "texts", list(examples(model, data, top.index)))
    top = top.dropna(axis=1, how="all").reset_index(names="latent")
    run = pd.Series(getattr(data, "meta", {}) | config | row).drop("resume")
    svg = pictures(table, rows, curve, out / "report.svg")
    with pd.option_context("display.max_colwidth", None, "display.float_format", "{:.4g}".format):
        page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>What fine-tuning changed</title><meta name="viewport" content="width=device-width">
<style>{STYLE}</style><h1>{said}</h1><div class="svg">{svg}</div>
{top.to_html(index=False, escape=False, border=0, na_rep="")}
{run.to_frame("the run").to_html(border=0)}"""
    train.write_atomically(out / "report.html", lambda part: part.write_bytes(page.encode()))
    print(f"{said}\nreport: {out / 'report.html'}")
    if hasattr(data, "directions"):
        print(toy_score(data, model, table))
    return page


def main(argv):
    options = train.checked(train.read_command_line(argv, __file__), config, allowed)
    run = options["run"]
    if not run:
        fail("--run is missing: expected the folder of a run")
    device = train.set_up(options["device"])
    state = train.read_checkpoint(run)
    of_run = state["config"]
    of_run["out_dir"] = run
    if "trust_remote_code" in of_run:
        of_run["trust_remote_code"] = False  # only a command line switches that on
    with explain(f"--run={run}: its weights are not there, or not whole"):
        model = train.CrossCoder.from_pretrained(run).to(device)
    data = train.open_data(of_run)
    if model.b_dec.shape[1] != data.d_model:
        fail(f"--run={run}: its data is of another d_model than its weights")
    return report(model, data, of_run, state["rows"], options["splice"], options["n_texts"])


if __name__ == "__main__":
    main(sys.argv[1:])

"""
Collects the activations of a base model and of the model fine-tuned from it: the same tokens through both, at
the same place, into a store that train.py reads.

    python collect.py --base=PATH_OR_HUB --finetuned=PATH_OR_HUB --layer=15 --text=PATH_OR_HUB --out_dir=acts
    torchrun --standalone --nproc_per_node=2 collect.py ...   # texts split over processes, one store

    OUT/base, OUT/finetuned   Hugging Face datasets, a row per token, row i of one being row i of the other:
                              activation (raw, float16[d_model]), token (id), doc (row in docs), pos (in it)
    OUT/docs                  a row per text, or per seq_len tokens of a longer one: input_ids, source, text
                              (its number there)
    OUT/meta.json             models, hooks, d_model, tokens, scales, tokens dropped by reason, versions

What is not finished is OUT.building, a store of the shards so far, and the same command goes on with it.
"""

import contextlib
import html
import itertools
import json
import sys
from collections import Counter
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from accelerate.utils import gather_object
from datasets import Dataset, load_dataset, load_from_disk
from nnsight import NNsight
from peft import PeftConfig
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import has_file

from train import explain, fail, read_command_line, set_up, world, write_atomically

# --- Config -------------------------------------------------------------------------------------------------

config = dict(
    # what
    base="",  # the base model: a folder or a hub name; empty: the one that the adapter's config names
    finetuned="",  # the model fine-tuned from it, or a LoRA adapter; its tokenizer (else base's) is for both
    layer=0,  # index of the block
    site="resid",  # resid (output of the block) or mlp (output of its MLP)
    hook="",  # any module's path, such as model.layers.3.self_attn, instead of layer and site
    text="",  # a .txt (by paragraph), .jsonl, .csv, .parquet, save_to_disk folder or hub dataset; or A,B
    text_share="",  # of A,B the shares of the tokens, such as 0.7,0.3; empty: equal ones
    text_column="",  # empty: text, or messages, which go through the chat template
    split="train",  # of a hub dataset
    # how much, and which
    n_tokens=1_000_000,  # rows to write
    seq_len=512,  # tokens of context; longer texts are cut into pieces of that length
    skip_positions=1,  # positions at the start of each text to drop: the first is an attention sink
    max_norm_ratio=10.0,  # drop tokens whose norm is over so many times the median, in either model
    # system
    out_dir="acts",  # folder of the store
    texts_per_batch=8,  # rows of a forward pass
    shuffle_rows=100_000,  # tokens per process that are shuffled together, and written at once
    dtype="float32",  # of the models: float32, bfloat16 or float16
    device="auto",  # auto (cuda if there is one), cpu or cuda
    trust_remote_code=False,  # run code that comes with the models
    seed=0,  # of the order of the rows
)
allowed = dict(site=["resid", "mlp"], dtype=["float32", "bfloat16", "float16"])
allowed |= dict.fromkeys(["n_tokens", "seq_len", "texts_per_batch", "shuffle_rows"], range(1, 10**15))

# --- Models and texts ---------------------------------------------------------------------------------------


def with_base(config):
    """The config with the base that the adapter `finetuned` was trained on, if no base is given."""
    name = config["finetuned"]
    with explain(f"--base is missing, and --finetuned={name} is no adapter that names one"):
        return config | dict(base=config["base"] or PeftConfig.from_pretrained(name).base_model_name_or_path)


def load(key, config, device):
    """The model and the tokenizer of config[key]; base's tokenizer if that has none, as many an adapter."""
    fail(f"--{key} is missing: expected a path or a hub name", unless=config[key])
    remote = dict(trust_remote_code=config["trust_remote_code"])
    with explain(f"--{key}={config[key]} cannot be loaded"):
        model = AutoModelForCausalLM.from_pretrained(config[key], dtype=config["dtype"], **remote)
        own = any(has_file(config[key], name) for name in ("tokenizer_config.json", "tokenizer.json"))
        tokenizer = AutoTokenizer.from_pretrained(config[key if own else "base"], **remote)
        return model.eval().to(device), tokenizer


def find_hook(model, config):
    """The path of the module to hook: `hook`, or by structure, as the blocks are the largest ModuleList."""
    modules, hook = dict(model.named_modules()), config["hook"]
    if not hook:
        lists = [path for path, module in modules.items() if isinstance(module, nn.ModuleList)]
        fail("the model has no list of blocks: give a module's path by --hook", unless=lists)
        blocks = max(lists, key=lambda path: sum(p.numel() for p in modules[path].parameters()))
        layer, n = config["layer"], len(modules[blocks])
        fail(f"--layer={layer}: the model has {n} layers, the first is 0", unless=layer < n)
        hook = f"{blocks}.{layer}" + (".mlp" if config["site"] == "mlp" else "")
    near = get_close_matches(hook, modules, 3, 0)
    fail(f"the model has no module {hook}; near: {', '.join(near)}", unless=hook in modules)
    return hook


def hidden(output):
    """A module's output as one tensor: those of attention are tuples."""
    return output if isinstance(output, torch.Tensor) else output[0]


@torch.no_grad()
def activations(model, hook, input_ids, attention_mask):
    """Output of `hook` of an NNsight model [batch, position, d_model], of texts padded on the right."""
    with explain(f"--hook={hook} has no output [batch, position, d_model]"):  # as a list of blocks
        with model.trace(input_ids=input_ids, attention_mask=attention_mask, use_cache=False) as tracer:
            out = model.get(hook).output.save()
            tracer.stop()  # the forward pass ends there
        np.testing.assert_equal((*hidden(out).shape[:2], hidden(out).ndim), (*input_ids.shape, 3))
    return hidden(out)


@torch.no_grad()
def log_probabilities(model, hook, input_ids, output):
    """
    Next-token log-probabilities [position - 1, vocabulary] of an NNsight model on a text, input_ids [1,
    position], with `output` [position, d_model] in place of that of the module `hook`.
    """
    with model.trace(input_ids=input_ids, use_cache=False):
        hidden(model.get(hook).output)[0] = output
        logits = model.output.logits.save()
    return logits[0, :-1].float().log_softmax(-1)


@torch.no_grad()
def splice(crosscoder, data, latents, n_docs=16):
    """
    What splicing into the models at the hook does to them, in nats per token of texts of held-out rows of the
    Store `data`. Of both, cross-entropy as they are (ce_clean), with the crosscoder's reconstruction
    (ce_spliced) and with 0 (ce_zero); loss_recovered is (zero - spliced) / (zero - clean). And how far the
    base model is from the fine-tuned one, by KL divergence, as it is (kl_clean_A), with all of B's activation
    (kl_all_of_B), and for each {name: list} of latents with what those say that B has more, the sum of
    f (d_B - d_A), added (kl_NAME); recovered_NAME is (clean_A - NAME) / (clean_A - all_of_B). Where the
    store has no row, as at the first position, no reconstruction, 0 or sum is put.
    """
    config, device = data.meta | dict(trust_remote_code=False), crosscoder.scale.device
    hooks = zip(("base", "finetuned"), data.meta["hooks"])
    models = [(NNsight(load(key, config, device)[0]), hook) for key, hook in hooks]
    D, sums, n_tokens = crosscoder.unscaled(crosscoder.W_dec), Counter(), 0
    for doc in np.unique(data.doc[data.n_train :])[:n_docs]:
        ids = torch.tensor([data.docs[int(doc)]], device=device)
        kept = torch.tensor(data.pos[data.doc == doc].astype(int), device=device)
        x = torch.stack([activations(*pair, ids, torch.ones_like(ids))[0] for pair in models], dim=1)
        f, spliced, zero = crosscoder.encode(x[kept]), x.clone(), x.clone()  # [position, model, d_model]
        spliced[kept], zero[kept] = crosscoder.decode(f).to(x.dtype), 0
        whole = dict(clean=x, spliced=spliced, zero=zero)
        runs = {f"{name}_{'AB'[m]}": (m, y[:, m]) for m in (1, 0) for name, y in whole.items()}
        runs["all_of_B"] = 0, x[:, 1]
        for name, j in latents.items():
            runs[name] = 0, x[:, 0].clone()
            runs[name][1][kept] += (f[:, j] @ (D[j, 1] - D[j, 0])).to(x.dtype)
        for name, (m, output) in runs.items():
            log_p = log_probabilities(*models[m], ids, output)
            if name == "clean_B":  # the first
                finetuned = log_p
            ce = nn.functional.nll_loss(log_p, ids[0, 1:], reduction="sum").item()
            kl = nn.functional.kl_div(log_p, finetuned, log_target=True, reduction="sum").item()
            sums[name] += np.array([ce, kl])
        n_tokens += len(log_p)
    table = pd.DataFrame(sums, ["ce", "kl"]) / n_tokens
    ce, kl = table.loc["ce"][:6], table.loc["kl"][["clean_A", "all_of_B", *latents]]
    clean, spliced, zero = ce.to_numpy().reshape(2, 3).T
    row = dict(zip(("loss_recovered_B", "loss_recovered_A"), ((zero - spliced) / (zero - clean)).tolist()))
    change = (kl.clean_A - kl[[*latents]]) / (kl.clean_A - kl.all_of_B)
    named = change.add_prefix("recovered_"), ce.add_prefix("ce_"), kl.add_prefix("kl_")
    return row | pd.concat(named).to_dict()


@torch.no_grad()
def examples(crosscoder, data, latents):
    """For each latent, HTML of the texts around five held-out tokens with the largest f, each of another."""
    decode, safe = str, dict(local_files_only=True, trust_remote_code=False)  # a stranger's name
    with contextlib.suppress(Exception):  # of many kinds; ids are shown then
        decode = AutoTokenizer.from_pretrained(data.meta["tokenizer"], **safe).decode
    index = pd.DataFrame(dict(doc=data.doc, pos=data.pos))[data.n_train :]
    codes = [crosscoder.encode(x)[:, latents].cpu() for x in data.validation()]
    for f in torch.cat(codes).T.numpy():
        rows = index.assign(f=f / f.max())[f > 0].sort_values("f", ascending=False, kind="stable")
        share, lines = rows.set_index(["doc", "pos"]).f, []
        for doc, pos in rows.drop_duplicates("doc")[["doc", "pos"]].head(5).to_numpy().tolist():
            lines.append("")
            for at, i in list(enumerate(data.docs[doc]))[max(0, pos - 16) : pos + 9]:
                token, shade = html.escape(decode([i]).replace("\n", "↵")), share.get((doc, at), 0)
                lines[-1] += f'<span style="background: rgb(255 140 0/{shade:.2f})">{token}</span>'
        yield f'<div class="texts">{"<br>".join(lines)}</div>'


def read_docs(config, tokenizer, dropped):
    """(source, row in it, ids): each time of the source that lacks most of its share of tokens so far."""
    names = [config["text"]] if Path(config["text"]).exists() else config["text"].split(",")
    given = config["text_share"].split(",") if config["text_share"] else [1] * len(names)
    with explain(f"--text_share={config['text_share']}: expected {len(names)} numbers over 0"):
        share = pd.Series(given, names, float)
        np.testing.assert_array_less(0, share)
    sources = {name: read_source(name, config, tokenizer, dropped) for name in names}
    taken = dict.fromkeys(names, 0)
    while sources:
        name = min(sources, key=taken.get)
        if doc := next(sources[name], None):
            taken[name] += len(doc[1]) / share[name]
            yield name, *doc
        else:  # the others go on
            del sources[name]


def read_source(name, config, tokenizer, dropped):
    """(row, ids) of a source's texts in pieces of up to seq_len tokens; counts the dropped rows."""
    path = Path(name)
    options = dict(truncation=True, max_length=config["seq_len"], return_overflowing_tokens=True)
    with explain(f"--text={name} cannot be read"):
        if path.is_file():
            suffix = name.lower().removesuffix(".gz").rpartition(".")[2]
            kind = dict(txt="text", csv="csv", parquet="parquet").get(suffix, "json")
            by = dict(sample_by="paragraph") if kind == "text" else {}
            rows = load_dataset(kind, data_files=name, split="train", streaming=True, **by)
        elif (path / "state.json").exists():
            rows = load_from_disk(name)
        else:
            rows = load_dataset(name, split=config["split"], streaming=True)
        for number, row in enumerate(rows):
            where = f"--text={name}: row {number}"
            column = config["text_column"] or ("text" if "text" in row else "messages")
            fail(f"{where} has no {column}, but {', '.join(row)}: give a --text_column", unless=column in row)
            text, is_chat = row[column], isinstance(row[column], list)
            if not text:
                dropped["empty_text"] += 1
                continue
            with explain(where):
                text = tokenizer.apply_chat_template(text, tokenize=False) if is_chat else text
            fail(f"{where} is neither a text nor messages: {text!r:.50}", unless=isinstance(text, str))
            for start in range(0, len(text), 10_000):  # no tokenizer is given a book at once
                pieces = tokenizer([text[start : start + 10_000]], add_special_tokens=not is_chat, **options)
                yield from ((number, ids) for ids in pieces["input_ids"] if ids)


# --- Harvest ------------------------------------------------------------------------------------------------


class Harvest:
    """The activations of both models on the same tokens, less those that none should learn from."""

    def __init__(self, config):
        self.device, self.bar, self.nothing = set_up(config["device"]), tqdm(disable=True), []
        pair = [load(key, config, self.device) for key in ("base", "finetuned")]
        self.models = [(NNsight(model), find_hook(model, config)) for model, _ in pair]
        longest = min(getattr(model.config, "max_position_embeddings", 10**9) for model, _ in pair)
        if longest < config["seq_len"]:
            print(f"--seq_len={longest} is used: the models have no more positions", file=sys.stderr)
        self.config = config | dict(seq_len=min(config["seq_len"], longest))
        ids_of_base, self.tokenizer = pair[0][1].get_vocab(), pair[1][1]
        differ = [t for t, i in self.tokenizer.get_vocab().items() if ids_of_base.get(t, i) != i]
        fail(f"the models have different vocabularies: {', '.join(sorted(differ)[:5])}", unless=not differ)
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.special = torch.tensor(sorted(special.union(self.tokenizer.all_special_ids)), dtype=torch.long)
        self.largest_norm = torch.full((2,), torch.inf)
        runs = (self.run(docs)[0] for docs in self.shards(lambda: 4096))
        rows = next((rows for rows in runs if len(rows["norm"])), None)  # to take the median by
        fail(f"--text={config['text']}: no token of its texts is left", unless=rows)
        self.largest_norm = config["max_norm_ratio"] * rows["norm"].median(dim=0).values
        self.nothing, self.d_model = [{name: y[:0] for name, y in rows.items()}], rows["x"].shape[2]

    def shards(self, size, first_doc=0):
        """From that doc on, lists of docs (source, row, ids) of size() tokens or just over, the last less."""
        self.empty, shard, n = Counter(), [], 0  # rows without a text, counted from the first
        for doc in itertools.islice(read_docs(self.config, self.tokenizer, self.empty), first_doc, None):
            shard.append(doc)
            n += len(doc[2])
            if n >= size():
                yield shard
                shard, n = [], 0
        if shard:
            yield shard

    def run(self, docs, first_doc=0, rank=0, n_processes=1):
        """
        Of this process's share of docs [(source, row, ids)], whose numbers start at first_doc, the rows that
        are kept: x [row, model, d_model] float16, norm [row, model], token, doc and pos [row]; and how many
        are not, by the first reason that holds. Docs of like length go through the models together.
        """
        docs = [(i, torch.tensor(ids)) for i, (*_, ids) in enumerate(docs, first_doc)][rank::n_processes]
        docs.sort(key=lambda doc: len(doc[1]))
        parts, dropped, size = list(self.nothing), Counter(), self.config["texts_per_batch"]
        for start in range(0, len(docs), size):
            numbers, texts = zip(*docs[start : start + size])
            ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
            pos = torch.arange(ids.shape[1]).expand_as(ids)
            mask = pos < torch.tensor([len(text) for text in texts])[:, None]
            inputs = ids.to(self.device), mask.long().to(self.device)
            outs = [activations(*pair, *inputs).float().cpu() for pair in self.models]
            with explain("base and finetuned are of different size at the hook"):
                x = torch.stack(outs, dim=2)  # [batch, position, model, d_model]
            norm, keep = x.norm(dim=-1), mask.clone()
            reasons = dict(
                special_token=torch.isin(ids, self.special),
                skipped_position=pos < self.config["skip_positions"],
                over_float16=~(x.abs().amax((2, 3)) <= torch.finfo(torch.float16).max),  # nan and inf too
                outlier_norm=(norm > self.largest_norm).any(-1),
            )
            for reason, drop in reasons.items():
                dropped[reason] += (keep & drop).sum().item()
                keep &= ~drop
            doc = torch.tensor(numbers)[:, None].expand_as(ids)
            columns = dict(x=x.half(), norm=norm, token=ids, doc=doc, pos=pos)
            parts.append({name: column[keep] for name, column in columns.items()})
            self.bar.update(keep.sum().item())
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, dropped


class Stream:
    """What train.py trains on without a disk: the rows of a Harvest, shuffled in memory. Data of train.py."""

    n_models, docs, meta = 2, None, {}

    def __init__(self, config, texts_read=0):
        self.config, self.texts_read, self.harvest = config, texts_read, Harvest(with_base(config))
        self.d_model, self.generator = self.harvest.d_model, torch.Generator().manual_seed(config["seed"])
        self.rows = torch.empty(0, self.n_models, self.d_model, dtype=torch.half)
        self.shards = self.read(texts_read)
        self.held_out = self.take(config["val_tokens"])

    def read(self, first_doc):
        """The shards of this process, from that doc on; those of all texts again when they end."""
        while True:
            self.texts_read = first_doc
            for docs in self.harvest.shards(lambda: self.config["shuffle_rows"] * world()[1], first_doc):
                self.texts_read += len(docs)
                yield self.harvest.run(docs, 0, *world())[0]["x"]
            enough = self.texts_read >= world()[1]  # or a process would wait for rows for ever
            fail(f"--text={self.config['text']}: too few texts for {world()[1]} processes", unless=enough)
            print(f"all {self.texts_read} texts are read: they come again", file=sys.stderr)
            first_doc = 0

    def take(self, n):
        """The next n rows [n, n_models, d_model]; half a shard stays behind, to be shuffled with the next."""
        while len(self.rows) < n + self.config["shuffle_rows"] // 2:
            rows = torch.cat([self.rows, next(self.shards)])
            self.rows = rows[torch.randperm(len(rows), generator=self.generator)]
        x, self.rows = self.rows[:n], self.rows[n:]
        return x

    def batch(self, step):
        return self.take(self.config["batch_size"] // world()[1])

    def validation(self):
        return self.held_out.split(1024)


# --- Store --------------------------------------------------------------------------------------------------


def write_arrow(table, path):
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def write_shard(building, name, tables):
    """A file of that name in each of the folders of the store or, to leave room, in none if one fails."""
    with contextlib.ExitStack() as undo:
        for path, table in ((building / folder / name, table) for folder, table in tables.items()):
            path.parent.mkdir(exist_ok=True)
            undo.callback(path.unlink, missing_ok=True)
            write_atomically(path, lambda part, table=table: write_arrow(pa.table(table), part))
        undo.pop_all()


def list_files(folder):
    """Makes a Hugging Face dataset, as of save_to_disk, of the Arrow files in the folder."""
    files = sorted(folder.glob("*.arrow"))
    Dataset.from_file(str(files[0])).info.write_to_directory(folder)
    unset = "_fingerprint _format_columns _format_type _output_all_columns _split"
    state = dict.fromkeys(unset.split())
    state |= dict(_data_files=[dict(filename=file.name) for file in files], _format_kwargs={})
    write_atomically(folder / "state.json", lambda part: part.write_text(json.dumps(state)))


def collect(config):
    """
    Writes the store config["out_dir"], whole or not at all, going on where an earlier try ended. A shard is
    the docs of the next shuffle_rows tokens for each process, of which each runs its share. All that is known
    of those that are done is in the building folder's meta.json.
    """
    set_up(config["device"])
    config, (rank, n_processes), out = with_base(config), world(), Path(config["out_dir"])
    fail(f"--out_dir={out} exists already: give another name", unless=not out.exists())
    building, same = out.with_name(out.name + ".building"), config | dict(processes=n_processes)
    meta = same | dict(shards=0, docs=0, tokens=0, counts={})
    if (building / "meta.json").exists():
        meta = json.loads((building / "meta.json").read_text())
        fail(f"{building} is of other arguments: delete it or give another", unless=meta == meta | same)
    harvest = Harvest(config)
    versions = {name: version(name) for name in ("torch", "transformers", "nnsight", "datasets")}
    meta |= dict(hooks=[hook for _, hook in harvest.models], d_model=harvest.d_model, versions=versions)
    meta["tokenizer"] = harvest.tokenizer.name_or_path
    building.mkdir(parents=True, exist_ok=True)
    left = (config["n_tokens"] - meta["tokens"]) // n_processes
    harvest.bar = tqdm(total=left, unit="tok", unit_scale=True, disable=rank > 0)
    size = lambda: min(config["shuffle_rows"] * n_processes, config["n_tokens"] - meta["tokens"])
    shards = harvest.shards(size, meta["docs"])
    while meta["tokens"] < config["n_tokens"] and (docs := next(shards, None)):
        meta = add_shard(harvest, building, docs, meta)
    harvest.bar.close()
    if rank == 0:
        building.replace(out)
        print(f"{out}: {meta['tokens']} of {meta['n_tokens']} tokens, of {meta['hooks'][0]}")
        print(f"dropped: {meta['dropped']}\nscale: {meta['scale']}")


def add_shard(harvest, building, docs, meta):
    """Runs this process's share of the docs, writes what is kept of it, and returns the next meta.json."""
    (rank, n_processes), shard = world(), meta["shards"]
    rows, dropped = harvest.run(docs, meta["docs"], rank, n_processes)
    before = meta["tokens"] + sum(gather_object([len(rows["pos"])])[:rank])
    kept = min(len(rows["pos"]), max(0, meta["n_tokens"] - before))
    order = np.random.default_rng([meta["seed"], rank, shard]).permutation(len(rows["pos"]))[:kept]
    rows = {name: column[order] for name, column in rows.items()}
    tables, index = {}, {name: rows[name].int().numpy() for name in ("token", "doc", "pos")}
    for model, name in enumerate(("base", "finetuned")):
        flat = pa.array(rows["x"][:, model].flatten().numpy())
        tables[name] = dict(activation=pa.FixedSizeListArray.from_arrays(flat, harvest.d_model)) | index
    if rank == 0:
        tables["docs"] = dict(zip(("source", "text", "input_ids"), map(list, zip(*docs))))
    write_shard(building, f"data-{shard:05d}-{rank:03d}.arrow", tables)
    norms = dict(zip(("norm_base", "norm_finetuned"), rows["norm"].double().sum(0).tolist()))
    counts = sum(gather_object([Counter(tokens=kept, **norms, **dropped)]), Counter(meta["counts"]))
    meta |= dict(shards=shard + 1, docs=meta["docs"] + len(docs), counts=counts, tokens=counts["tokens"])
    meta["dropped"] = {reason: counts[reason] for reason in dropped} | harvest.empty
    meta["scale"] = [harvest.d_model**0.5 * counts["tokens"] / (counts[name] or 1) for name in norms]
    if rank == 0:
        for name in ("base", "finetuned", "docs"):
            list_files(building / name)
        write_atomically(building / "meta.json", lambda part: part.write_text(json.dumps(meta, indent=1)))
    return meta


if __name__ == "__main__":
    with explain("stopped: the same command goes on", (OSError, KeyboardInterrupt)):
        collect(config | read_command_line(config, allowed, sys.argv[1:], __file__))

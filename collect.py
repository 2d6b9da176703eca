"""
Collects the activations of a base model and of the model fine-tuned from it: the same tokens through both, at
the same place, into a store that train.py reads.

    python collect.py --base=PATH_OR_HUB --finetuned=PATH_OR_HUB --layer=15 --text=PATH_OR_HUB --out_dir=acts
    torchrun --standalone --nproc_per_node=2 collect.py ...   # texts split over processes, one store

    OUT/base, OUT/finetuned   Hugging Face datasets, a row per token, row i of one being row i of the other:
                              activation (raw, float16[d_model]), token (id), doc (row in docs), pos (in it)
    OUT/docs                  a row per text or per seq_len tokens of a longer one: input_ids, text (number)
    OUT/meta.json             models, hooks, d_model, tokens, scales, tokens dropped by reason, versions

`stream` yields the same rows as shuffled batches without a disk; `train.py --data=stream` trains on them.
"""

import importlib.metadata
import itertools
import json
import os
import shutil
import sys
from collections import Counter
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from datasets import Dataset, disable_progress_bars, load_dataset, load_from_disk
from nnsight import NNsight
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from train import all_reduce, fail, first_line, read_command_line, require, set_up, world, write_atomically

# --- Config -------------------------------------------------------------------------------------------------

config = dict(
    # what
    base="",  # the base model: a folder or a hub name
    finetuned="",  # the model fine-tuned from it; its tokenizer and chat template are used for both
    layer=0,  # index of the block
    site="resid",  # resid (output of the block) or mlp (output of its MLP)
    hook="",  # any module's path, such as model.layers.3.self_attn, instead of layer and site
    text="",  # a hub dataset, a folder of save_to_disk, or a .txt (by paragraph), .jsonl or .parquet file
    text_column="",  # empty: text, or messages, which go through the chat template
    split="train",  # of a hub dataset
    # how much, and which
    n_tokens=1_000_000,  # rows to write
    seq_len=512,  # tokens of context; longer texts are cut into pieces of that length
    skip_positions=1,  # positions at the start of each text to drop: the first is an attention sink
    max_norm_ratio=10.0,  # drop tokens whose norm is over so many times the median, in either model
    # system
    out_dir="acts",
    texts_per_batch=8,  # rows of a forward pass
    shuffle_rows=100_000,  # rows shuffled together before they are written, or streamed
    dtype="float32",  # of the models: float32, bfloat16 or float16
    device="auto",  # auto (cuda if there is one), cpu, cuda or cuda:1
    trust_remote_code=False,  # run code that comes with the models
    seed=0,
)
choices = dict(site=["resid", "mlp"], dtype=["float32", "bfloat16", "float16"])

# --- Models -------------------------------------------------------------------------------------------------


def load(key, config):
    """The model and the tokenizer of config[key]."""
    remote = dict(trust_remote_code=config["trust_remote_code"])
    try:
        model = AutoModelForCausalLM.from_pretrained(config[key], dtype=config["dtype"], **remote)
        return model.eval(), AutoTokenizer.from_pretrained(config[key], **remote)
    except Exception as e:  # of many kinds, for a name, a folder or a network that is not there
        fail(f"--{key}={config[key]} cannot be loaded: {first_line(e)}")


def find_hook(model, config):
    """The path of the module to hook: `hook`, or by structure, as the blocks are the largest ModuleList."""
    modules, hook = dict(model.named_modules()), config["hook"]
    if not hook:
        lists = [path for path, module in modules.items() if isinstance(module, nn.ModuleList)]
        if not lists:
            fail("the model has no list of blocks: give a module's path by --hook")
        blocks = max(lists, key=lambda path: sum(p.numel() for p in modules[path].parameters()))
        if config["layer"] >= len(modules[blocks]):
            fail(f"--layer={config['layer']}: the model has {len(modules[blocks])} layers, the first is 0")
        hook = f"{blocks}.{config['layer']}" + (".mlp" if config["site"] == "mlp" else "")
    if hook not in modules:
        fail(f"the model has no module {hook}; near: {', '.join(get_close_matches(hook, modules, 3, 0))}")
    return hook


def hidden(output):
    """A module's output as one tensor: those of attention are tuples."""
    return output if isinstance(output, torch.Tensor) else output[0]


@torch.no_grad()
def activations(model, hook, input_ids, attention_mask):
    """
    Output of the module `hook` of an NNsight model, [batch, position, d_model]. The forward pass ends there.
    input_ids and attention_mask [batch, position], padded on the right.
    """
    module = model.get(hook)
    with model.trace(input_ids=input_ids, attention_mask=attention_mask, use_cache=False) as tracer:
        out = module.output.save()
        tracer.stop()
    return hidden(out)


@torch.no_grad()
def cross_entropy(model, hook, input_ids, replacement=None):
    """
    Mean next-token cross-entropy in nats of an NNsight model on a text, input_ids [1, position]; if
    `replacement` [position, d_model] is given, with that as the output of the module `hook`.
    """
    module = model.get(hook)
    with model.trace(input_ids=input_ids, use_cache=False):
        if replacement is not None:
            hidden(module.output)[0] = replacement
        logits = model.output.logits.save()
    return nn.functional.cross_entropy(logits[0, :-1].double(), input_ids[0, 1:])


def loss_recovered(crosscoder, data, n_docs=16):
    """
    Metrics of both models on texts of held-out rows of the Store `data`: cross-entropy per token as it is
    (clean), with the crosscoder's reconstruction spliced in at the hook, and with 0 there; loss_recovered is
    (zero - spliced) / (zero - clean). Positions that the store left out, as the first, stay as they are.
    """
    device, config = crosscoder.scale.device, data.meta | dict(trust_remote_code=False)
    models = [NNsight(load(key, config)[0].to(device)) for key in ("base", "finetuned")]
    models, sums, n_targets = list(zip(models, data.meta["hooks"])), torch.zeros(2, 3), 0
    for doc in np.unique(data.doc[data.n_train :])[:n_docs]:
        ids = torch.tensor([data.docs[int(doc)]], device=device)
        kept = torch.tensor(data.pos[data.doc == doc].astype(int), device=device)
        x = torch.stack([activations(*pair, ids, torch.ones_like(ids))[0] for pair in models], dim=1)
        spliced, zero = x.clone(), x.clone()  # [position, model, d_model]
        spliced[kept], zero[kept] = crosscoder(x[kept]).to(x.dtype), 0
        for m, pair in enumerate(models):
            losses = [cross_entropy(*pair, ids, y) for y in (None, spliced[:, m], zero[:, m])]
            sums[m] += torch.stack(losses).cpu() * (ids.shape[1] - 1)
        n_targets += ids.shape[1] - 1
    found = {}
    for name, (clean, spliced, zero) in zip("AB", (sums / n_targets).tolist()):
        found |= {f"ce_clean_{name}": clean, f"ce_spliced_{name}": spliced, f"ce_zero_{name}": zero}
        found[f"loss_recovered_{name}"] = (zero - spliced) / (zero - clean)
    return found


# --- Text ---------------------------------------------------------------------------------------------------


def read_texts(config, tokenizer):
    """(number of the text, text, whether it has its special tokens), in parts of 10,000 characters."""
    kinds = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    name, path, number = config["text"], Path(config["text"]), 0
    try:
        if path.suffix in kinds:
            options = dict(sample_by="paragraph") if path.suffix == ".txt" else {}
            rows = load_dataset(kinds[path.suffix], data_files=name, split="train", streaming=True, **options)
        elif path.is_dir() and (path / "state.json").exists():
            rows = load_from_disk(name)
        else:
            rows = load_dataset(name, split=config["split"], streaming=True)
        first = next(iter(rows), None)
        if first is None:
            fail(f"--text={name} holds no text")
        column = config["text_column"] or ("text" if "text" in first else "messages")
        if column not in first:
            fail(f"--text={name} has no column {column}, but {', '.join(first)}: say which by --text_column")
        for number, row in enumerate(rows):
            text, is_chat = row[column] or "", isinstance(row[column], list)
            if is_chat:
                text = tokenizer.apply_chat_template(row[column], tokenize=False)
            for start in range(0, len(text), 10_000):
                yield number, text[start : start + 10_000], is_chat
    except Exception as e:  # datasets and tokenizers raise many kinds for a name, a network, a file or a row
        fail(f"--text={name} cannot be read at row {number}: {first_line(e)}")


def tokenize(tokenizer, texts, seq_len):
    """[(number of the text, its ids)] of such texts, those of over seq_len tokens in pieces."""
    options = dict(truncation=True, max_length=seq_len, return_overflowing_tokens=True)
    pieces = []
    for number, text, is_chat in texts:
        found = tokenizer([text], add_special_tokens=not is_chat, **options)["input_ids"]
        pieces += [(number, ids) for ids in found if ids]
    return pieces


# --- Harvest ------------------------------------------------------------------------------------------------


class Harvest:
    """The activations of both models on the same tokens, less those that none should learn from."""

    texts_at_once = 32  # tokenised together and sorted by length, so that batches hold little padding

    def __init__(self, config):
        self.config, self.dropped = config, Counter()
        require(config, "n_tokens seq_len texts_per_batch shuffle_rows max_norm_ratio")
        for key in ("base", "finetuned", "text"):
            if not config[key]:
                fail(f"--{key} is missing: expected a path or a hub name")
        self.device = set_up(config)
        (base, base_tokenizer), (finetuned, self.tokenizer) = load("base", config), load("finetuned", config)
        self.hooks = [find_hook(model, config) for model in (base, finetuned)]
        self.models = [NNsight(model.to(self.device)) for model in (base, finetuned)]
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.special = torch.tensor(sorted(special.union(self.tokenizer.all_special_ids)), dtype=torch.long)
        texts = list(itertools.islice(read_texts(config, self.tokenizer), self.texts_at_once))
        docs, docs_of_base = (tokenize(t, texts, config["seq_len"]) for t in (self.tokenizer, base_tokenizer))
        for (number, ids), (_, ids_of_base) in zip(docs, docs_of_base):
            if ids != ids_of_base:
                said = f"{ids_of_base[:8]}... in base and {ids[:8]}... in finetuned"
                fail(f"the two models have different vocabularies: text {number} is {said}")
        self.largest_norm = torch.full((2,), torch.inf)
        blocks = self.run(docs[: self.texts_at_once], 0)
        norms = torch.cat([torch.empty(0, 2), *(block["norm"] for block in blocks)])
        if not len(norms):
            fail(f"--text={config['text']}: no token of its first texts is left: {dict(self.dropped)}")
        self.largest_norm = config["max_norm_ratio"] * norms.median(dim=0).values
        self.d_model, self.dropped = blocks[0]["x"].shape[-1], Counter()

    def groups(self, first_text=0, first_doc=0):
        """
        From that text on, a few texts at a time, which the processes share out: (texts read, docs made, rows,
        docs). rows are those of `run`, docs the (number of the text, ids) of this group.
        """
        texts = itertools.islice(read_texts(self.config, self.tokenizer), first_text, None)
        while group := list(itertools.islice(texts, self.texts_at_once)):
            docs, (rank, n) = tokenize(self.tokenizer, group, self.config["seq_len"]), world()
            blocks = self.run(docs, first_doc) if first_text // self.texts_at_once % n == rank else []
            first_text, first_doc = first_text + len(group), first_doc + len(docs)
            yield first_text, first_doc, blocks, docs

    def run(self, docs, first_doc):
        """
        Blocks of kept rows of the docs, whose numbers start at first_doc: dicts of x [row, model, d_model]
        float16, norm [row, model], token, doc and pos [row]. What is dropped is counted by the first reason
        that holds.
        """
        by_length = sorted(range(len(docs)), key=lambda i: len(docs[i][1]))
        size, blocks = self.config["texts_per_batch"], []
        for batch in (by_length[i : i + size] for i in range(0, len(docs), size)):
            tensors = [torch.tensor(docs[i][1]) for i in batch]
            ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
            pos = torch.arange(ids.shape[1]).expand_as(ids)
            mask = pos < torch.tensor([len(t) for t in tensors])[:, None]
            inputs = ids.to(self.device), mask.long().to(self.device)
            outs = [activations(*pair, *inputs).float().cpu() for pair in zip(self.models, self.hooks)]
            if outs[0].shape != outs[1].shape:
                fail(f"d_model is {outs[0].shape[-1]} in base and {outs[1].shape[-1]} in finetuned")
            x = torch.stack(outs, dim=2)  # [batch, position, model, d_model]
            norm, keep = x.norm(dim=-1), torch.ones_like(mask)
            reasons = dict(
                padding=~mask,
                special_token=torch.isin(ids, self.special),
                skipped_position=pos < self.config["skip_positions"],
                over_float16=~(x.abs().amax((2, 3)) <= torch.finfo(torch.float16).max),  # nan and inf too
                outlier_norm=(norm > self.largest_norm).any(-1),
            )
            for reason, drop in reasons.items():
                self.dropped[reason] += (keep & drop).sum().item()
                keep &= ~drop
            doc = (first_doc + torch.tensor(batch))[:, None].expand_as(ids)
            columns = dict(x=x, norm=norm, token=ids, doc=doc, pos=pos)
            rows = {name: column[keep] for name, column in columns.items()}
            blocks.append(rows | dict(x=rows["x"].half()))
        return blocks


class Stream:
    """What train.py trains on without a disk: the rows of a Harvest, shuffled in memory. Data of train.py."""

    n_models = 2

    def __init__(self, config, first_text=0):
        self.config, self.texts_read, self.harvest = config, first_text, Harvest(config)
        self.d_model, self.rows = self.harvest.d_model, self.shuffled()
        size = config["batch_size"] // world()[1]  # of a batch of this process, of which one validates
        held_out = [next(self.rows) for _ in range(-(-config["val_tokens"] // size))]
        self.held_out = torch.cat(held_out or [next(self.rows)[:0]])[: config["val_tokens"]]

    def shuffled(self):
        """
        Yields batches [batch, n_models, d_model] of raw activations out of a buffer of shuffle_rows, which is
        filled up whenever it is half empty. Sets scale by the first fill. Texts are read again when they end.
        """
        size = self.config["batch_size"] // world()[1]
        capacity, blocks, n = max(self.config["shuffle_rows"], 2 * size), [], 0
        generator = torch.Generator().manual_seed(self.config["seed"])
        groups = self.harvest.groups(self.texts_read)
        while True:
            while n < capacity:
                group = next(groups, None)
                if group is None:
                    print(f"all {self.texts_read} texts are read: they come again", file=sys.stderr)
                    self.texts_read, groups = 0, self.harvest.groups()
                    continue
                self.texts_read = group[0]
                blocks += [block["x"] for block in group[2]]
                n = sum(len(x) for x in blocks)
            x = torch.cat(blocks)
            if not hasattr(self, "scale"):
                mean = x.float().norm(dim=-1).double().mean(0)
                self.scale = (self.d_model**0.5 / (all_reduce(mean) / world()[1])).float()
            x = x[torch.randperm(n, generator=generator)]
            while len(x) >= max(capacity // 2, size):
                yield x[:size]
                x = x[size:]
            blocks, n = [x], len(x)

    def batch(self, step):
        return next(self.rows)

    def validation(self):
        return self.held_out.split(1024)


# --- Store --------------------------------------------------------------------------------------------------


def write_part(path, rows, docs, state):
    """One shard of each of the store's datasets, and where to go on; whole when `path` is there."""

    def write(part):
        index = {name: rows[name].int().numpy() for name in ("token", "doc", "pos")}
        for model, name in enumerate(("base", "finetuned")):
            flat = pa.array(rows["x"][:, model].flatten().numpy())
            x = pa.FixedSizeListArray.from_arrays(flat, rows["x"].shape[-1])
            Dataset(pa.table(dict(activation=x) | index)).save_to_disk(part / name, num_shards=1)
        docs_table = dict(input_ids=[ids for _, ids in docs], text=[number for number, _ in docs])
        Dataset.from_dict(docs_table).save_to_disk(part / "docs", num_shards=1)
        (part / "state.json").write_text(json.dumps(state))

    write_atomically(path, write)


def join(parts, out):
    """Makes the dataset folder `out` of several, by moving their files; if cut off, can be done again."""
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    shutil.copytree(parts[0], out, ignore=shutil.ignore_patterns("*.arrow"), dirs_exist_ok=True)
    for part, name in zip(parts, names):
        if (part / "data-00000-of-00001.arrow").exists():
            os.replace(part / "data-00000-of-00001.arrow", out / name)
    state = json.loads((out / "state.json").read_text())
    state["_data_files"] = [dict(filename=name) for name in names]
    (out / "state.json").write_text(json.dumps(state))


def collect(config):
    """Writes the store config["out_dir"], whole or not at all, going on where an earlier try ended."""
    disable_progress_bars()
    set_up(config)
    (rank, n_processes), out = world(), Path(config["out_dir"])
    if out.exists():
        fail(f"--out_dir={out} exists already: give another name")
    building, same = out.with_name(out.name + ".building"), config | dict(processes=n_processes)
    if (building / "config.json").exists() and json.loads((building / "config.json").read_text()) != same:
        fail(f"{building} holds an unfinished store of other arguments: delete it, or give another --out_dir")
    harvest = Harvest(config)
    need = config["n_tokens"] * 2 * (2 * harvest.d_model + 12)  # bytes
    free = shutil.disk_usage(next(folder for folder in out.absolute().parents if folder.exists())).free
    if need > free:
        fail(f"--n_tokens={config['n_tokens']} takes {need / 1e9:.1f} GB; free: {free / 1e9:.1f} GB")
    building.mkdir(parents=True, exist_ok=True)
    write_atomically(building / "config.json", lambda part: part.write_text(json.dumps(same)))

    done = sorted(building.glob(f"*-{rank:03d}"))
    state = dict(texts=0, docs=0, tokens=0, norm_sum=[0.0, 0.0], dropped={})
    state = json.loads((done[-1] / "state.json").read_text()) if done else state
    harvest.dropped.update(state["dropped"])
    quota = config["n_tokens"] // n_processes + (rank < config["n_tokens"] % n_processes)
    groups = harvest.groups(state["texts"], state["docs"])
    bar = tqdm(total=quota, initial=state["tokens"], unit="tok", unit_scale=True, disable=rank > 0)
    for part in itertools.count(len(done)):
        blocks, docs, n_rows, wanted = [], [], 0, min(config["shuffle_rows"], quota - state["tokens"])
        while n_rows < wanted and (group := next(groups, None)):
            state |= dict(texts=group[0], docs=group[1])
            blocks, docs = blocks + group[2], docs + group[3]
            new = sum(len(block["doc"]) for block in group[2])
            bar.update(min(new, quota - state["tokens"] - n_rows))
            n_rows += new
        if not n_rows:
            break
        kept = min(n_rows, quota - state["tokens"])
        order = np.random.default_rng([config["seed"], rank, part]).permutation(kept)
        rows = {name: torch.cat([block[name] for block in blocks])[order] for name in blocks[0]}
        norm_sum = (torch.tensor(state["norm_sum"]).double() + rows["norm"].double().sum(0)).tolist()
        state |= dict(tokens=state["tokens"] + kept, norm_sum=norm_sum, dropped=dict(harvest.dropped))
        write_part(building / f"{part:06d}-{rank:03d}", rows, docs, state)
    bar.close()
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        finish(config, harvest, building, out)


def finish(config, harvest, building, out):
    """Makes the store of its finished parts."""
    parts = sorted(building.glob("*-[0-9][0-9][0-9]"))
    last = {path.name[-3:]: json.loads((path / "state.json").read_text()) for path in parts}  # by process
    tokens = sum(state["tokens"] for state in last.values())
    dropped = sum((Counter(state["dropped"]) for state in last.values()), Counter())
    if not tokens:
        fail(f"--text={config['text']} yields no token to keep; dropped: {dict(harvest.dropped)}")
    furthest = max(last, key=lambda rank: last[rank]["docs"])  # each process lists all docs up to its last
    for name in ("base", "finetuned"):
        join([part / name for part in parts], building / "store" / name)
    join([part / "docs" for part in parts if part.name.endswith(furthest)], building / "store" / "docs")
    norm_sum = np.sum([state["norm_sum"] for state in last.values()], axis=0)
    scale = (harvest.d_model**0.5 / (norm_sum / tokens)).tolist()
    names = ("torch", "transformers", "nnsight", "datasets")
    versions = {name: importlib.metadata.version(name) for name in names}
    meta = config | dict(hooks=harvest.hooks, d_model=harvest.d_model, tokens=tokens, scale=scale)
    meta |= dict(dropped=dropped, tokenizer=config["finetuned"], versions=versions)
    (building / "store" / "meta.json").write_text(json.dumps(meta, indent=1))
    os.replace(building / "store", out)
    shutil.rmtree(building)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {tokens} tokens, {size / 1e9:.2f} GB, of {harvest.hooks[0]}")
    print("dropped:", ", ".join(f"{count} {reason}" for reason, count in dropped.items()))
    print("scale:", ", ".join(f"{y:.5g}" for y in scale))
    if tokens < config["n_tokens"]:
        print(f"the texts ended before --n_tokens={config['n_tokens']}")


if __name__ == "__main__":
    try:
        collect(config | read_command_line(config, choices, sys.argv[1:], __file__))
    except KeyboardInterrupt:
        print("stopped: the same command goes on where the last finished part ends", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as e:  # of a disk or a folder
        fail(f"{e}. The same command goes on where the last finished part ends")

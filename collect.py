"""Collects the activations of a base model and of the model fine-tuned from it: the same tokens
through both, at the same place. It writes a store, which train.py reads.

    python collect.py --base=PATH_OR_HUB --finetuned=PATH_OR_HUB --layer=15 --text=PATH_OR_HUB
    torchrun --standalone --nproc_per_node=2 collect.py ...  # texts split over processes, one store

Any key of the config can be set by --key=value. A store is a folder, OUT:

    OUT/base/       a Hugging Face dataset (load_from_disk), one row per token: activation (float16
                    [d_model], divided by divided_by), token (its id), doc (its row in OUT/docs) and
                    pos (its position in that doc)
    OUT/finetuned/  the same for the other model. Row i of both is the same token. Rows are shuffled
    OUT/docs/       a Hugging Face dataset, one row per text, or per piece of a text of over seq_len
                    tokens or 10,000 characters: input_ids, source (in --text), text (its row there)
    OUT/meta.json   the config; processes; hooks, the module's path in each model; d_model; tokens,
                    rows of base; docs, rows of docs; dropped, tokens left out by reason, and rows
                    without a text; divided_by, a power of two, 1 unless rows are too large for
                    float16; scale, sqrt(d_model) / mean norm of each model's rows;
                    tokenizer; versions of packages; shards and counts, for continuing

A token is left out if it is padding, special, or among the first skip_positions of its doc, if its
norm in either model is over max_norm_ratio times the median, or if it is not finite.

While it runs, the store is called OUT.building. If it is killed, run the same command again: it
continues. Memory holds both models, at 4 bytes a weight (2 in bfloat16), and two copies of a shard
of shuffle_rows tokens. A token takes 4 bytes times d_model, in memory and on the disk.
"""

import fcntl
import json
import signal
import sys
import warnings
from collections import Counter
from difflib import get_close_matches
from importlib.metadata import version
from itertools import islice
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("stopped: the same command goes on"))

import train  # before torch: it sets how torch takes memory
from train import checked, explain, fail, read_command_line, set_up, write_atomically

# isort: split

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, tqdm
from datasets import Dataset, load_dataset, load_from_disk
from datasets.utils.logging import CRITICAL, set_verbosity
from nnsight import NNsight
from nnsight.intervention.interleaver import OutOfOrderError
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import has_file, logging

# --- Config ---------------------------------------------------------------------------------------

config = dict(
    # what
    base="",  # the base model, a folder or hub name; empty: the one that the adapter's config names
    finetuned="",  # fine-tuned from it, or a LoRA adapter; its tokenizer (else base's) is for both
    layer=0,  # index of the block
    site="resid",  # resid (output of the block) or mlp (output of its MLP)
    hook="",  # any module's path, such as model.layers.3.self_attn, instead of layer and site
    text="",  # .txt (by paragraph), .jsonl, .csv, .parquet, save_to_disk folder or hub name; or A,B
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
    device="auto",  # auto (cuda if there is one; if there are two, one a model), cpu or cuda
    device_map="",  # auto: accelerate splits models that are too large over GPUs, CPU and disk
    trust_remote_code=False,  # run code that comes with the models
    seed=0,  # of the order of the rows
)
# Allowed values, as in train.py.
from_1 = ["n_tokens", "seq_len", "texts_per_batch", "shuffle_rows", "max_norm_ratio"]
allowed = dict.fromkeys(from_1, train.at_least_1)
allowed |= dict(site=["resid", "mlp"], dtype=["float32", "bfloat16", "float16"])

# --- Models ---------------------------------------------------------------------------------------


def with_base(config):
    """Returns the config. If it has no base, it gets the one that the adapter was trained on."""
    name = config["finetuned"]
    with explain(f"--base is missing, and --finetuned={name} is no adapter that names one"):
        base = config["base"] or PeftConfig.from_pretrained(name).base_model_name_or_path
    return config | dict(base=base)


def load(key, config, device):
    """Returns the model config[key], in eval mode, and its tokenizer. `key` is base or finetuned.
    Many adapters have no tokenizer: then it is the base's. Ends the program if the model cannot be
    loaded, or not whole.
    """
    name = config[key]
    options = dict(trust_remote_code=config["trust_remote_code"])
    of_model = options | dict(dtype=config["dtype"], device_map=config["device_map"] or device)
    logging.set_verbosity_error()  # missing weights get one line from `explain`
    with explain(f"--{key}={name} cannot be loaded"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft uses what transformers deprecates
        warnings.filterwarnings("error", "Found missing adapter keys")
        is_adapter = key == "finetuned" and has_file(name, "adapter_config.json")
        whole = config["base"] if is_adapter else name
        of_model["output_loading_info"] = True
        model, found = AutoModelForCausalLM.from_pretrained(whole, **of_model)
        modules = dict(model.named_modules())
        unused = {path for path in found["unexpected_keys"] if path.rpartition(".")[0] in modules}
        wrong = unused.union(found["missing_keys"])
        assert not wrong, f"its weights are not those of its config: {min(wrong)}"
        if is_adapter:
            model = PeftModel.from_pretrained(model, name).merge_and_unload()
        if not any(has_file(name, file) for file in ("tokenizer_config.json", "tokenizer.json")):
            name = config["base"]
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        assert tokenizer.is_fast, "a slow tokenizer, which would drop the ends of long texts"
    return model.eval(), tokenizer


def find_hook(model, config):
    """Returns the path of the module to hook: `hook`, a block, or the MLP of a block. The blocks
    are the largest ModuleList. Ends the program if there is no such module.
    """
    modules = dict(model.named_modules())
    hook = config["hook"]
    if not hook:
        lists = [path for path, module in modules.items() if isinstance(module, nn.ModuleList)]
        if not lists:
            fail("the model has no list of blocks: give a module's path by --hook")
        blocks = max(lists, key=lambda path: sum(p.numel() for p in modules[path].parameters()))
        n_layers = len(modules[blocks])
        if config["layer"] >= n_layers:
            fail(f"--layer={config['layer']}: the model has {n_layers} layers, the first is 0")
        hook = f"{blocks}.{config['layer']}" + ".mlp" * (config["site"] == "mlp")
    if hook not in modules:
        fail(f"the model has no module {hook}; near: {get_close_matches(hook, modules, 3, 0)}")
    return hook


def hidden(output):
    """Returns a module's output as one tensor: attention puts out a tuple, for example."""
    return output if isinstance(output, torch.Tensor) else output[0]


@torch.no_grad()
def activations(model, hook, input_ids, attention_mask):
    """Returns the output [batch, position, d_model] of the module `hook` of an NNsight model.
    input_ids and attention_mask [batch, position] are padded on the right. Ends the program if the
    module has no such output.
    """
    what = f"--hook={hook} has no output [batch, position, d_model]"
    inputs = dict(input_ids=input_ids.to(model.device), use_cache=False)
    inputs["attention_mask"] = attention_mask.to(model.device)
    # no such module, a module that is never called (a list of blocks), a token without embedding
    with explain(what, (AttributeError, OutOfOrderError, LookupError)):
        with model.trace(**inputs) as tracer:
            raw = hidden(model.get(hook).output).save()
            tracer.stop()  # the forward pass ends there
    if raw.shape[:-1] != input_ids.shape:
        fail(f"{what}, but {list(raw.shape)}")
    return raw


# --- Texts ----------------------------------------------------------------------------------------


def read_docs(config, tokenizer, dropped):
    """Yields docs (source, row in it, token ids) of the sources in --text. The next one is of the
    source with the fewest tokens for its share. When one ends, the others continue. Counts rows
    without a text in the Counter `dropped`. Ends the program at a source or row it cannot read.
    """
    text = config["text"]
    names = [text] if Path(text).exists() else text.split(",")
    given = config["text_share"] or ",".join("1" * len(names))
    what = f"--text={','.join(names)} --text_share={given}: expected each once, shares over 0"
    with explain(what, ValueError):
        share = dict(zip(names, map(float, given.split(",")), strict=True))
    if len(share) < len(names) or "" in share or not all(0 < y < np.inf for y in share.values()):
        fail(what)
    sources = {name: read_source(name, config, tokenizer, dropped) for name in names}
    taken = dict.fromkeys(names, 0)  # tokens so far, divided by the share
    while sources:
        name = min(sources, key=taken.get)
        doc = next(sources[name], None)
        if doc:
            taken[name] += len(doc[2]) / share[name]
            yield doc
        else:
            del sources[name]


def read_source(name, config, tokenizer, dropped):
    """Yields the docs of one source: its texts, in pieces of up to seq_len tokens."""
    options = dict(truncation=True, max_length=config["seq_len"], return_overflowing_tokens=True)
    for number, row in enumerate(read_rows(name, config)):
        where = f"--text={name}: row {number}"
        is_text = row.get("text") or "messages" not in row
        column = config["text_column"] or ("text" if is_text else "messages")
        if column not in row:
            fail(f"{where} has no {column}, but {', '.join(row)}: give a --text_column")
        text = row[column]
        if not text:
            dropped["empty_text"] += 1
            continue
        is_chat = isinstance(text, list)
        if is_chat:
            with explain(where):
                text = tokenizer.apply_chat_template(text, tokenize=False)
        if not isinstance(text, str):
            fail(f"{where} is neither a text nor messages: {text!r:.50}")
        for start in range(0, len(text), 10_000):  # tokenizers are slow on a whole book
            part = [text[start : start + 10_000]]
            pieces = tokenizer(part, add_special_tokens=not is_chat, **options)
            yield from ((name, number, ids) for ids in pieces["input_ids"] if ids)


def read_rows(name, config):
    """Yields the rows of a source as dicts. Ends the program where it cannot be read."""
    suffix = name.lower().removesuffix(".gz").rpartition(".")[2]
    of_file = dict(data_files=name, split="train", streaming=True)
    set_verbosity(CRITICAL)  # a damaged file gets one line from `explain`
    with explain(f"--text={name} cannot be read"):
        if Path(name, "state.json").exists():
            rows = load_from_disk(name)
        elif not Path(name).is_file():
            rows = load_dataset(name, split=config["split"], streaming=True)
        elif suffix == "txt":
            rows = load_dataset("text", sample_by="paragraph", **of_file)
        else:
            kind = suffix if suffix in ("csv", "parquet") else "json"
            rows = load_dataset(kind, **of_file)
        yield from rows


def take_docs(docs, n_tokens):
    """Takes docs from an iterator until they have n_tokens tokens, or until it ends."""
    taken = []
    while n_tokens > 0 and (doc := next(docs, None)):
        taken.append(doc)
        n_tokens -= len(doc[2])
    return taken


# --- Harvest --------------------------------------------------------------------------------------


class Harvest:
    """Runs both models on the same tokens, and drops the rows that a crosscoder should not learn.
    Attributes: models [(NNsight model, path of its hook)], base first; tokenizer; d_model.
    """

    def __init__(self, config):
        """Ends the program if the models do not fit each other, or if no token can be kept."""
        self.bar = tqdm(disable=True)  # counts rows that are kept; `collect` shows one
        device = other = set_up(config["device"])
        self.n_processes = PartialState().num_processes
        if other.type == "cuda" and torch.cuda.device_count() == 2 and self.n_processes == 1:
            other = "cuda:1"
        base, tokenizer_of_base = load("base", config, device)
        finetuned, self.tokenizer = load("finetuned", config, other)
        self.models = [(NNsight(m), find_hook(m, config)) for m in (base, finetuned)]

        positions = [getattr(m.config, "max_position_embeddings", 10**9) for m in (base, finetuned)]
        seq_len = min(config["seq_len"], *positions)
        self.config = config | dict(seq_len=seq_len)
        of_models = base.get_memory_footprint() + finetuned.get_memory_footprint()
        row = 4 * base.config.get_text_config().hidden_size  # bytes, float16 of both
        sizes = np.array([of_models, 2 * row * config["shuffle_rows"], row * 1e6]) / 1e9
        print(f"texts of up to {seq_len} tokens; in GB models, a shard, 1M rows: {sizes.round(2)}")
        if device.type == "cuda":  # highest is float32, high is TF32
            print(f"precision of float32 products: {torch.get_float32_matmul_precision()}")

        ids_of_base = tokenizer_of_base.get_vocab()
        differ = [t for t, i in self.tokenizer.get_vocab().items() if ids_of_base.get(t, i) != i]
        if differ:
            fail(f"the models have different vocabularies: {', '.join(sorted(differ)[:5])}")
        special = [i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        self.special = torch.tensor(special + self.tokenizer.all_special_ids)

        # the median norm is of the first rows, which are the same in every process
        self.largest_norm = self.divided_by = torch.inf
        docs = self.read()
        while shard := take_docs(docs, 4096):
            rows, _ = self.run(shard)
            if len(rows["raw"]):
                break
        else:
            fail(f"--text={config['text']}: no token of its texts is left")
        median = rows["norm"].median(dim=0).values  # [model]
        self.largest_norm = config["max_norm_ratio"] * median.to(self.models[0][0].device)
        largest = min(config["max_norm_ratio"], 1000) * median.max().item()
        self.divided_by = 2.0 ** max(0, int(np.ceil(np.log2(largest / 65504))))
        self.no_rows = {name: column[:0] for name, column in rows.items()}
        self.d_model = rows["raw"].shape[2]

    def read(self, first_doc=0):
        """Returns an iterator over the docs from that one on."""
        self.empty = Counter()  # rows without a text, counted from the first doc
        return islice(read_docs(self.config, self.tokenizer, self.empty), first_doc, None)

    def run(self, docs):
        """Returns the rows that are kept, as columns, and a Counter of the dropped tokens, each by
        its first reason. Columns: raw [row, model, d_model] float16, divided by divided_by, norm
        [row, model] before that, token (its id), doc (index in docs) and pos [row].
        """
        if not docs:  # the last shard may have fewer docs than there are processes
            return self.no_rows, Counter()
        device = self.models[0][0].device
        length = torch.tensor([len(ids) for _, _, ids in docs])
        parts = []
        dropped = Counter()
        for batch in length.argsort(stable=True).split(self.config["texts_per_batch"]):
            texts = [torch.tensor(docs[i][2]) for i in batch]
            ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
            doc = batch.to(device)[:, None].expand_as(ids)
            pos = torch.arange(ids.shape[1], device=device).expand_as(ids)
            keep = pos < length[batch].to(device)[:, None]  # [batch, position], without padding
            both = [activations(*pair, ids, keep.long()).to(device) for pair in self.models]
            norm = torch.stack([raw.norm(dim=-1, dtype=torch.float32) for raw in both], dim=-1)

            reasons = dict(
                special_token=torch.isin(ids, self.special.to(device)),
                skipped_position=pos < self.config["skip_positions"],
                outlier_norm=(norm > self.largest_norm).any(-1),
                over_float16=~(norm <= 65504 * self.divided_by).all(-1),  # nan is, too
            )
            for reason, drop in reasons.items():
                dropped[reason] += (keep & drop).sum().item()
                keep &= ~drop
            with explain("base and finetuned are of different size at the hook", RuntimeError):
                raw = torch.stack([raw[keep].div_(self.divided_by).half() for raw in both], dim=1)
            columns = dict(norm=norm[keep], token=ids[keep], doc=doc[keep], pos=pos[keep], raw=raw)
            parts.append({name: column.cpu() for name, column in columns.items()})
            self.bar.update(len(raw))
        return {name: torch.cat([part[name] for part in parts]) for name in columns}, dropped


class Stream:
    """Data of train.py that needs no disk: rows of a Harvest, shuffled in memory."""

    n_models = 2

    def __init__(self, config, texts_read=0):
        """Takes the first docs of 2 * val_tokens tokens, and holds out val_tokens of their rows.
        Starts after these docs, or after the `texts_read` docs that a resumed run has read.
        """
        self.config = config
        self.harvest = Harvest(with_base(config))
        self.d_model = self.harvest.d_model
        self.generator = torch.Generator().manual_seed(config["seed"])
        self.rows = self.harvest.no_rows["raw"]
        self.shards = self.read()
        docs = take_docs(self.harvest.read(), 2 * config["val_tokens"])
        raw = self.harvest.run(docs)[0]["raw"]  # sorted by length: hold out random ones
        order = np.random.default_rng(0).permutation(len(raw))
        self.held_out = raw[order[: config["val_tokens"]]].split(1024)
        self.first = len(docs)  # doc to train on
        self.texts_read = max(texts_read, self.first)

    def read(self):
        """Yields this process's raw activations of one shard after the other, again and again."""
        n_processes = self.harvest.n_processes
        while True:
            docs = self.harvest.read(self.texts_read)
            while shard := take_docs(docs, self.config["shuffle_rows"] * n_processes):
                self.texts_read += len(shard)
                rows, _ = self.harvest.run(shard[PartialState().process_index :: n_processes])
                yield rows["raw"]
            # with fewer texts than processes, one process would wait for rows for ever
            if self.texts_read - self.first < n_processes:
                fail(f"--text={self.config['text']}: too few are left for {n_processes} processes")
            print(f"all {self.texts_read} texts are read: they come again", file=sys.stderr)
            self.texts_read = self.first

    def batch(self, step):
        """Returns this process's rows of a step [batch_size / processes, n_models, d_model]. Half a
        shard stays, to be mixed with the next one.
        """
        n = self.config["batch_size"] // self.harvest.n_processes
        while len(self.rows) < n + self.config["shuffle_rows"] // 2:
            rows = torch.cat([self.rows, next(self.shards)])
            self.rows = rows[torch.randperm(len(rows), generator=self.generator)]
        raw, self.rows = self.rows.tensor_split([n])
        return raw


# --- Store ----------------------------------------------------------------------------------------


def write_arrow(table, path):
    """Writes an Arrow table as a stream, the format of a Hugging Face dataset."""
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def write_json(value, path):
    write_atomically(path, lambda part: part.write_text(json.dumps(value, indent=1)))


def list_files(folder):
    """Makes a Hugging Face dataset, as save_to_disk does, from the Arrow files in the folder."""
    files = sorted(folder.glob("*.arrow"))
    Dataset.from_file(str(files[0])).info.write_to_directory(folder)
    unset = "_fingerprint _format_columns _format_type _output_all_columns _split"
    state = dict.fromkeys(unset.split())
    state |= dict(_data_files=[dict(filename=file.name) for file in files], _format_kwargs={})
    write_json(state, folder / "state.json")


def collect(config):
    """Writes the store config["out_dir"], whole or not at all. It continues where an earlier try
    ended. A shard is the docs of the next shuffle_rows tokens per process, and each process runs
    its share. meta.json, in the building folder, has all that is known of the shards so far.
    """
    set_up(config["device"])
    config = with_base(config)
    out = Path(config["out_dir"])
    if out.exists():
        fail(f"--out_dir={out} exists already: give another name")

    building = out.with_name(out.name + ".building")
    arguments = config | dict(processes=PartialState().num_processes)
    meta = arguments | dict(shards=0, docs=0, tokens=0, counts={})
    if (building / "meta.json").exists():
        meta = json.loads((building / "meta.json").read_text())
        if meta != meta | arguments:
            fail(f"{building} has other arguments: delete it, or change --out_dir")

    harvest = Harvest(config)
    meta["hooks"] = [hook for _, hook in harvest.models]
    meta |= dict(d_model=harvest.d_model, tokenizer=harvest.tokenizer.name_or_path)
    meta["divided_by"] = harvest.divided_by
    meta["versions"] = {p: version(p) for p in ("torch", "transformers", "nnsight", "datasets")}
    building.mkdir(parents=True, exist_ok=True)
    with open(building / "lock", "w") as lock:
        with explain(f"{building} is being written already", BlockingIOError):
            if PartialState().is_main_process:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        docs = harvest.read(meta["docs"])
        left = config["n_tokens"] - meta["tokens"]
        harvest.bar = tqdm(total=left // harvest.n_processes, unit="tok", unit_scale=True)
        while shard := take_docs(docs, min(left, config["shuffle_rows"] * harvest.n_processes)):
            add_shard(harvest, building, shard, meta)
            left = config["n_tokens"] - meta["tokens"]
        harvest.bar.close()
    if PartialState().is_main_process:
        (building / "lock").unlink()
        building.replace(out)
        print(f"{out}: {meta['tokens']} of {meta['n_tokens']} tokens, of {meta['hooks'][0]}")
        print(f"dropped: {meta['dropped']}\nscale: {meta['scale']}")


def add_shard(harvest, building, docs, meta):
    """Runs this process's share of the docs, writes the rows kept, and updates `meta`."""
    rank = PartialState().process_index
    rows, dropped = harvest.run(docs[rank :: harvest.n_processes])

    # rows in random order; of the last shard as many as n_tokens needs, lower ranks first
    before = meta["tokens"] + sum(gather_object([len(rows["raw"])])[:rank])
    rng = np.random.default_rng([meta["seed"], rank, meta["shards"]])
    order = rng.permutation(len(rows["raw"]))[: max(0, meta["n_tokens"] - before)]
    rows = {name: column[order] for name, column in rows.items()}
    rows["doc"] = meta["docs"] + rank + harvest.n_processes * rows["doc"]  # in the store's docs

    index = {name: rows[name].int().numpy() for name in ("token", "doc", "pos")}
    tables = {}
    for name, raw in zip(("base", "finetuned"), rows["raw"].unbind(dim=1)):
        activation = pa.FixedSizeListArray.from_arrays(raw.flatten().numpy(), harvest.d_model)
        tables[name] = dict(activation=activation) | index
    if rank == 0:
        tables["docs"] = dict(zip(("source", "text", "input_ids"), zip(*docs)))
    for name, table in tables.items():
        (building / name).mkdir(exist_ok=True)
        path = building / name / f"data-{meta['shards']:05d}-{rank:03d}.arrow"
        write_atomically(path, lambda part: write_arrow(pa.table(table), part))

    # Sums over all shards and processes. They are gathered when each process has written its files,
    # so that meta.json counts only whole shards.
    norms = dict(zip(("norm_base", "norm_finetuned"), rows["norm"].double().sum(dim=0).tolist()))
    counts = Counter(dropped, tokens=len(order), **norms)
    counts = sum(gather_object([counts]), Counter(meta["counts"]))
    meta |= dict(counts=counts, tokens=counts["tokens"], docs=meta["docs"] + len(docs))
    meta["shards"] += 1
    meta["dropped"] = {reason: counts[reason] for reason in dropped} | harvest.empty
    unit = harvest.divided_by * harvest.d_model**0.5
    meta["scale"] = [unit * counts["tokens"] / (counts[n] or 1) for n in norms]
    if rank == 0:
        for name in tables:
            list_files(building / name)
        write_json(meta, building / "meta.json")


if __name__ == "__main__":
    with explain("stopped: the same command goes on", OSError):
        collect(checked(read_command_line(sys.argv[1:], __file__), config, allowed))

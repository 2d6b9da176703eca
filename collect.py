"""Collects the activations of a base model and of the model fine-tuned from it: the same tokens
through both, at the same place. It writes a store, which train.py reads.

    python collect.py --base=PATH_OR_HUB --finetuned=PATH_OR_HUB --layer=15 --text=PATH_OR_HUB
    torchrun --standalone --nproc_per_node=2 collect.py ...  # texts split over processes, one store

Any key of the config can be set by --key=value. A store is a folder, OUT:

    OUT/base/       a Hugging Face dataset (load_from_disk), one row per token: activation (float16
                    [d_model], divided by divided_by), token (its id), doc (its row in OUT/docs) and
                    pos (its position in that doc)
    OUT/finetuned/  the same for the other model. Row i of both is the same token. Rows are shuffled
                    by shard. With --layer=7,13 the datasets are base_7, finetuned_7, base_13 and
                    finetuned_13
    OUT/docs/       a Hugging Face dataset, one row per text, or per piece of a text of over seq_len
                    tokens: input_ids, source (the row's, or the name in --text), text (its number
                    there, as shuffled)
    OUT/meta.json   the config, and
      places        names of the datasets
      hooks         path of the module, of each place
      scale         sqrt(d_model) / mean norm of the rows, of each place
      tokens, docs  numbers of rows of base and of docs
      dropped       by reason: numbers of tokens (unknown_token: of whole texts), and of rows of
                    --text (empty_text, refused_row)
      divided_by    a power of two: 1 unless rows are too large for float16
      rounding      if dtype is not float32, by layer: the error of B - A that the dtype makes, over
                    the norm of A; [] if that could not be measured
      d_model, tokenizer, processes, versions; shards and counts, for continuing

A token is left out if it is padding or a first BOS (with --keep_special=False any special token),
if it is among the first skip_positions of its doc, if its norm at a place is over max_norm_ratio
times the median, or if it is not finite.

While it runs, the store is called OUT.building. If it is killed, run the same command again: it
continues. Memory holds both models, at 4 bytes a weight (2 in bfloat16), and two copies of a shard
of shuffle_rows tokens. A token takes 4 bytes times d_model a layer, in memory and on the disk.
"""

import fcntl
import gc
import glob
import json
import os
import re
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

# before torch: it sets how torch takes memory
from train import checked, explain, fail, read_command_line, set_up, write_atomically

# isort: split

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, get_max_memory, tqdm
from datasets import load_dataset_builder, load_from_disk
from datasets.packaged_modules import _EXTENSION_TO_MODULE
from datasets.utils.logging import CRITICAL, set_verbosity
from nnsight import NNsight
from nnsight.intervention.interleaver import OutOfOrderError
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto import modeling_auto
from transformers.utils import has_file, logging

# --- Config ---------------------------------------------------------------------------------------

config = dict(
    # what
    base="",  # the base model, a folder or hub name; empty: the one that the adapter's config names
    finetuned="",  # fine-tuned from it, or a LoRA adapter; its tokenizer (else base's) is for both
    layer="0",  # index of the block; 7,13: several in one pass, each with its datasets
    site="resid",  # resid (output of the block) or mlp (output of its MLP)
    hook="",  # any module's path, such as model.layers.3.self_attn, instead of layer and site
    text="",  # .txt (by paragraph), .jsonl, .csv, .tsv, .parquet, a folder, a dataset of the hub
    # (NAME, or NAME:CONFIGURATION), or several of these, separated by commas
    text_share="",  # share of tokens from each of several texts, such as 0.7,0.3; empty: equal
    text_column="",  # empty: text, messages or conversations; chats go through the chat template
    split="train",  # of a hub dataset
    # how much, and which
    n_tokens=1_000_000,  # rows to write
    seq_len=512,  # tokens of context; longer texts are cut into pieces of that length
    skip_positions=1,  # positions at the start of each doc to drop: the first is an attention sink
    keep_special=True,  # keep special tokens, such as those of chat templates; not the first BOS
    max_norm_ratio=5.0,  # drop tokens whose norm is over so many times the median, in either model
    # system
    out_dir="acts",  # folder of the store
    texts_per_batch=8,  # rows of a forward pass
    shuffle_rows=100_000,  # tokens per process that are shuffled together, and written at once
    dtype="float32",  # of the models: float32, bfloat16 or float16
    device="auto",  # auto (cuda if there is one; if there are two, one a model), cpu or cuda
    device_map="",  # auto: accelerate splits models that are too large over GPUs, CPU and disk
    trust_remote_code=False,  # run code that comes with the models
    seed=0,  # of the order of the texts and rows
)
# Allowed values, as in train.py.
allowed = dict(
    seq_len=pd.Interval(8, 1e15, closed="left"),
    max_norm_ratio=pd.Interval(1, 1e15, closed="left"),
    site=["resid", "mlp"],
    dtype=["float32", "bfloat16", "float16"],
)

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
    logging.set_verbosity_error()  # missing weights get one line from `explain`
    with explain(f"--{key}={name} cannot be loaded"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft uses what transformers deprecates
        warnings.filterwarnings("error", "Found missing adapter keys")
        has_tokenizer = any(has_file(name, f"tokenizer{end}.json") for end in ("", "_config"))
        below = config["base"]
        if not has_file(name, "adapter_config.json"):
            auto = AutoModelForCausalLM
            kind = AutoConfig.from_pretrained(name, **options).model_type
            if kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                if kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
                    auto = modeling_auto.AutoModelForImageTextToText
            model, found = auto.from_pretrained(
                name,
                dtype=config["dtype"],
                device_map=config["device_map"] or device,
                output_loading_info=True,
                **options,
            )
            missing = found["missing_keys"]
            assert not missing, f"its weights are not those of its config: no {min(missing)}"
            for unused in sorted(found["unexpected_keys"])[:1]:
                print(f"--{key}={name} has weights that the model does not use: {unused}")
            if has_tokenizer:
                below = name
            return model.eval(), AutoTokenizer.from_pretrained(below, **options)

        if name == below:  # the base is an adapter, too: take the model under it
            below = PeftConfig.from_pretrained(name).base_model_name_or_path
        model, tokenizer = load("base", config | dict(base=below), device)
        if has_tokenizer:
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if len(tokenizer) > len(model.get_input_embeddings().weight):
            model.resize_token_embeddings(len(tokenizer))
        kind = PeftConfig.from_pretrained(name)
        head = model.get_output_embeddings()
        # It may share its weights with the embedding: untie them. New tokens are trained in both.
        if head is not None and not getattr(kind, "trainable_token_indices", None):
            model.config.tie_word_embeddings = False
            head.weight = nn.Parameter(head.weight.clone())
        adapted = PeftModel.from_pretrained(model, name)
        for weight in adapted.load_adapter(name, "default").unexpected_keys:
            assert ".lora_" not in weight, f"its config does not name its weight {weight}"
        what = f"an adapter of kind {kind.peft_type.value} that cannot be merged"
        with explain(f"--{key}={name} is {what}"):
            assert not getattr(kind, "layer_replication", None)
            return adapted.merge_and_unload(), tokenizer


def layers_of(config):
    """Returns the layers in --layer, in their order in the model."""
    with explain(f"--layer={config['layer']}: expected a number, or several such as 7,13"):
        return sorted({int(layer) for layer in config["layer"].split(",")})


def find_hooks(model, config):
    """Returns the paths of the modules to hook: `hook`, or the blocks of `layer`, or their MLPs.
    The blocks are the largest ModuleList of the text model. Ends the program if one is missing.
    """
    modules = dict(model.named_modules())
    hooks = [config["hook"]]
    if not config["hook"]:
        decoder = set(model.get_decoder().modules())  # without a vision tower
        sizes = {}
        for path, module in modules.items():
            if isinstance(module, nn.ModuleList) and module in decoder:
                sizes[path] = sum(p.numel() for p in module.parameters())
        if not sizes:
            fail("the model has no list of blocks: give a module's path by --hook")
        blocks = max(sizes, key=sizes.get)
        layers = layers_of(config)
        n_layers = len(modules[blocks])
        if layers[0] < 0 or layers[-1] >= n_layers:
            fail(f"--layer={config['layer']}: the model has {n_layers} layers, the first is 0")
        hooks = [f"{blocks}.{layer}" + ".mlp" * (config["site"] == "mlp") for layer in layers]
    for hook in hooks:
        if hook not in modules:
            fail(f"the model has no module {hook}; near: {get_close_matches(hook, modules, 3, 0)}")
    return hooks


def hidden(output):
    """Returns a module's output as one tensor: attention puts out a tuple, for example."""
    return output if isinstance(output, torch.Tensor) else output[0]


@torch.no_grad()
def activations(model, hooks, input_ids, attention_mask):
    """Returns a list of the outputs [batch, position, d_model] of the modules `hooks` of an NNsight
    model. The hooks must come in the order in which the modules run. input_ids and attention_mask
    [batch, position] are padded on the right. Ends the program if a module has no such output.
    """
    what = f"--hook={','.join(hooks)} has no output [batch, position, d_model]"
    ids = input_ids.to(model.device)
    mask = attention_mask.to(model.device)
    # no such module, or a module that is never called (a list of blocks)
    with explain(what, (AttributeError, OutOfOrderError, LookupError)):
        outputs = []
        with model.trace(input_ids=ids, attention_mask=mask, use_cache=False) as tracer:
            for hook in hooks:
                outputs.append(hidden(model.get(hook).output).save())
            tracer.stop()  # the forward pass ends there
    for raw in outputs:
        if raw.shape[:-1] != input_ids.shape:
            fail(f"{what}, but {list(raw.shape)}")
    return outputs


# --- Texts ----------------------------------------------------------------------------------------


# the beginning of a chat that is written as JSON
CHAT_IN_TEXT = re.compile(r"""\s*\[\s*\{.*?["'](role|from)["']\s*:""", re.DOTALL)


def read_docs(config, tokenizer, dropped):
    """Yields docs, dicts of source, text (its number there, as shuffled) and input_ids, of the
    sources in --text. The next one is of the source with the fewest tokens for its share. When one
    ends, the others continue. Counts in the Counter `dropped` what `read_source` leaves out.
    """
    text = config["text"]
    names = [text] if os.path.exists(text) else text.split(",")
    given = config["text_share"] or ",".join("1" * len(names))
    what = f"--text={','.join(names)} --text_share={given}: expected each once, shares over 0"
    with explain(what):
        share = pd.Series(given.split(","), names, dtype=float)
        are_shares = share.between(0, np.inf, inclusive="neither").all()
        assert are_shares and share.index.is_unique and all(names), share.tolist()
    sources = {name: read_source(name, config, tokenizer, dropped) for name in names}
    taken = dict.fromkeys(names, 0)  # tokens so far, divided by the share
    while sources:
        name = min(sources, key=taken.get)
        doc = next(sources[name], None)
        if doc:
            taken[name] += len(doc["input_ids"]) / share[name]
            yield doc
        else:
            del sources[name]


def read_source(name, config, tokenizer, dropped):
    """Yields the docs of one source: its texts, in pieces of up to seq_len tokens. Each piece
    begins as the tokenizer begins a text, with BOS for example. Chats are rendered. Leaves out and
    counts in `dropped` texts that are empty, that the template refuses, or that use a token one
    model lacks (the number of their tokens). Ends the program at a row without the column, or if
    the template refuses more than 10 rows, and more than 1% of them.
    """
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    begin = [i for i in tokenizer("")["input_ids"] if i not in ends] or [tokenizer.bos_token_id]
    file = Path(name).name
    if not Path(name).exists() or config["text"].count(file) > 1:
        file = name
    usual = ("text", "messages", "conversations")
    n_refused = 0
    for number, row in enumerate(read_rows(name, config)):
        where = f"--text={name}: the row {str(row)[:80]}"
        filled = [column for column in usual if row.get(column)]
        there = [column for column in usual if column in row]
        column = config["text_column"] or (filled + there + ["text"])[0]
        if column not in row:
            fail(f"{where} has no {column}, but {', '.join(row)}: give a --text_column")
        text = row[column] or ""
        is_chat = not isinstance(text, str) or CHAT_IN_TEXT.match(text)
        try:
            if is_chat:
                text = render(read_json(text), read_json(row.get("tools") or None), tokenizer)
        except Exception as e:  # whatever a template raises
            dropped["refused_row"] += 1
            n_refused += 1
            message = f"{where} is left out: {' '.join(str(e).split())[:300]}"
            if n_refused > max(10, number / 100):
                fail(f"{message}. So are {n_refused - 1} others, more than 1%")
            if n_refused == 1:
                print(message, file=sys.stderr)
            continue
        # chat templates write BOS themselves
        has_begin = is_chat or text.startswith(tokenizer.bos_token or "\0")
        ids = tokenizer(text, add_special_tokens=not has_begin)["input_ids"]
        if not set(ids).difference(begin, ends):
            dropped["empty_text"] += 1
            continue
        if max(ids) >= config["n_embeddings"]:
            dropped["unknown_token"] += len(ids)
            continue
        n = len(begin) if ids[: len(begin)] == begin else 0
        step = config["seq_len"] - n
        for start in range(n, len(ids), step):
            piece = ids[:n] + ids[start : start + step]
            yield dict(source=str(row.get("source") or file), text=number, input_ids=piece)


def without_nulls(y):
    """Returns a dict without its nulls: Arrow adds one for each key that only other rows have."""
    return {key: value for key, value in y.items() if value is not None}


def read_json(y):
    """Returns nested lists and dicts, which may be written as JSON, without_nulls."""
    text = y if isinstance(y, str) else json.dumps(y, default=str)
    return json.loads(text, object_hook=without_nulls)


# what templates call who speaks in a chat
ROLES = dict(human="user", user="user", system="system", assistant="assistant")
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")


def render(chat, tools, tokenizer):
    """Returns the text of a chat, a list of turns with role and content, or with from and value, as
    ShareGPT has. Raises an error if the template does, or if the last 30 characters that a user or
    the assistant says, or the name of a tool that is called, are not in the text.
    """
    is_chat = isinstance(chat, list) and all(isinstance(turn, dict) for turn in chat)
    assert is_chat, f"neither a text nor messages: {chat!r:.50}"
    turns = []
    in_parts = []  # the same turns, as some templates take them
    said = []  # (role, words that must be in the text)
    for turn in chat:
        role = turn.get("role", turn.get("from"))
        role = ROLES.get(str(role).lower(), role)
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):
            parts = [dict(text=part) if isinstance(part, str) else part for part in content]
            content = "".join(part.get("text", "") for part in parts) or None
        if content is None and "tool_calls" in turn:
            content = ""
        assert isinstance(content, str), f"a turn has no content: {turn}"
        turns.append(turn | dict(role=role, content=content))
        in_parts.append(turns[-1] | dict(content=[dict(type="text", text=content)]))
        for call in turn.get("tool_calls", []):
            said.append((role, call.get("function", call)["name"]))
        if role not in ("system", "tool", "ipython"):  # templates may rewrite these
            said.append((role, content.strip()[-30:]))  # reasoning before it may be left out
    forms = [turns]
    if "'type'" in str(tokenizer.chat_template):  # it may read the parts of a content
        forms.append(in_parts)
    for form in forms:
        text = tokenizer.apply_chat_template(form, tools=tools or None, tokenize=False)
        left_out = [role for role, words in said if words not in text]
        if not left_out:
            return text
    raise ValueError(f"the chat template leaves out what {left_out[0]} says")


def read_rows(name, config):
    """Yields the rows of a source as dicts, shuffled by the seed in a buffer of 10,000 rows. Ends
    the program where it cannot be read.
    """
    path = Path(name)
    set_verbosity(CRITICAL)  # a damaged file gets one line from `explain`
    with explain(f"--text={name} cannot be read"):
        if (path / "state.json").exists():
            rows = load_from_disk(name).with_format(None)
            rows = rows.to_iterable_dataset(num_shards=min(1000, len(rows)))
        else:
            split = config["split"]
            if path.is_file() or "://" in name:
                kind = ("json", {})
                for suffix in path.suffixes:  # .zst may follow
                    kind = _EXTENSION_TO_MODULE.get(suffix.lower(), kind)
                here = name if "://" in name else glob.escape(name)
                builder = load_dataset_builder(kind[0], data_files=here, **kind[1])
                split = "train"
            elif path.exists():
                builder = load_dataset_builder(name)
                n_read = len(builder.config.data_files.get(split, []))
                n_files = sum(file.is_file() for file in path.rglob("*"))
                print(f"--text={name}: split {split} has {n_read} of {n_files} files")
            else:  # of the hub, perhaps with a configuration
                builder = load_dataset_builder(*name.split(":", 1))
            if hasattr(builder.config, "sample_by"):  # of .txt, also in a folder
                builder.config.sample_by = "paragraph"
            rows = builder.as_streaming_dataset(split)
        yield from rows.shuffle(config["seed"], buffer_size=10_000)


def take_docs(docs, n_tokens):
    """Takes docs from an iterator until they have n_tokens tokens, or until it ends."""
    taken = []
    while n_tokens > 0 and (doc := next(docs, None)):
        taken.append(doc)
        n_tokens -= len(doc["input_ids"])
    return taken


# --- Harvest --------------------------------------------------------------------------------------


# why tokens are left out: the first reason that holds is counted
REASONS = ["special_token", "skipped_position", "outlier_norm", "over_float16"]


class Harvest:
    """Runs both models on the same tokens, and drops the rows that a crosscoder should not learn.
    Attributes: models [(NNsight model, paths of its hooks)], base first; tokenizer; d_model;
    places, the names of what is collected, such as base and finetuned; hooks, the path of each;
    sample, the first docs of 4,096 tokens, or the next ones if all of these tokens are dropped;
    no_rows, what `run` returns without docs.
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
        self.models = [(NNsight(m), find_hooks(m, config)) for m in (base, finetuned)]
        of_places = np.transpose([hooks for _, hooks in self.models])  # [layer, model]
        self.hooks = of_places.flatten().tolist()
        self.places = ["base", "finetuned"]
        if len(self.hooks) > 2:
            self.places = [f"{name}_{i}" for i in layers_of(config) for name in self.places]

        seq_len = config["seq_len"]
        n_embeddings = []
        for model in (base, finetuned):
            of_text = model.config.get_text_config()
            seq_len = min(seq_len, getattr(of_text, "max_position_embeddings", seq_len))
            rope = getattr(of_text, "rope_parameters", None) or {}
            if rope.get("rope_type") == "longrope":  # texts would depend on the longest in a batch
                seq_len = min(seq_len, rope["original_max_position_embeddings"])
            n_embeddings.append(len(model.get_input_embeddings().weight))
        self.config = config | dict(seq_len=seq_len, n_embeddings=min(n_embeddings))
        self.n_bytes = base.get_memory_footprint() + finetuned.get_memory_footprint()
        row = 2 * len(self.places) * of_text.hidden_size / 1e9  # GB of float16
        print(f"texts of up to {seq_len} tokens; models of {self.n_bytes / 1e9:.2f} GB")
        print(f"{1e6 * row:.2f} GB per 1M rows, {2 * row * config['shuffle_rows']:.2f} per shard")
        if device.type == "cuda":  # highest is float32, high is TF32
            print(f"precision of float32 products: {torch.get_float32_matmul_precision()}")

        vocabulary = self.tokenizer.get_vocab()
        ids_of_base = tokenizer_of_base.get_vocab()
        differ = [t for t, i in vocabulary.items() if ids_of_base.get(t, i) != i]
        if differ:
            fail(f"the models have different vocabularies: {', '.join(sorted(differ)[:5])}")
        new = [t for t, i in vocabulary.items() if i >= min(n_embeddings)]
        if new:
            print(f"texts with {new[0]} are left out: the models know {n_embeddings} tokens")
        special = [i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        self.special = special + self.tokenizer.all_special_ids

        # The median norm is of the first docs, which are the same in every process. This first run
        # knows no limits yet. Its norms alone are used. In it, over_float16 means nan or inf.
        self.largest_norm = self.divided_by = torch.inf
        docs = self.read()
        while sample := take_docs(docs, 4096):
            raw, rows = self.run(sample)
            kept = rows[rows.dropped.isna()]
            not_finite = (rows.dropped == "over_float16").mean()
            if len(kept) and not_finite < 0.5:
                break
            if not_finite:
                fail(f"activations are not finite: another --dtype than {config['dtype']}?")
        else:
            fail(f"--text={config['text']}: no token is left; dropped: {self.left_out}")
        median = kept[self.places].median()
        self.largest_norm = config["max_norm_ratio"] * median.to_numpy()
        largest = min(config["max_norm_ratio"], 1000) * median.max()
        self.divided_by = 2.0 ** int(np.ceil(np.log2(max(1, largest / 65504))))
        self.sample = sample
        self.no_rows = (raw[:0], rows[:0])
        self.d_model = raw.shape[2]

    def read(self, first_doc=0):
        """Returns an iterator over the docs from that one on."""
        self.left_out = Counter()  # by `read_source`, since the first doc
        return islice(read_docs(self.config, self.tokenizer, self.left_out), first_doc, None)

    def run(self, docs):
        """Returns all tokens of the docs as raw [token, place, d_model], float16, divided by
        divided_by, and as a DataFrame of the norm at each place before that, token (its id), doc
        (index in docs), pos and dropped: the first of the REASONS to leave it out, or None.
        """
        if not docs:  # the last shard may have fewer docs than there are processes
            return self.no_rows
        device = self.models[0][0].device
        length = torch.tensor([len(doc["input_ids"]) for doc in docs])
        raws = []
        tables = []
        for batch in length.argsort(stable=True).split(self.config["texts_per_batch"]):
            texts = [torch.tensor(docs[i]["input_ids"]) for i in batch]
            ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-1)
            is_token = ids >= 0  # [batch, position]
            i, pos = is_token.numpy().nonzero()
            token = ids.numpy()[i, pos]
            of_models = [activations(*pair, ids.clamp(0), is_token.long()) for pair in self.models]
            of_layers = zip(*of_models)
            places = [raw[i, pos].to(device) for of_layer in of_layers for raw in of_layer]
            with explain("base and finetuned are of different size at the hook", RuntimeError):
                raw = torch.stack(places, dim=1)
            norm = raw.norm(dim=2, dtype=torch.float64).cpu().numpy()

            is_special = np.isin(token, self.special)
            if self.config["keep_special"]:
                is_special = (token == self.tokenizer.bos_token_id) & (pos == 0)
            conditions = [
                is_special,
                pos < self.config["skip_positions"],
                (norm > self.largest_norm).any(1),
                ~(norm < 65504 * self.divided_by).all(1),  # true of nan, too
            ]
            dropped = np.select(conditions, REASONS, None)
            rows = pd.DataFrame(norm, columns=self.places)
            rows = rows.assign(token=token, doc=batch.numpy()[i], pos=pos, dropped=dropped)
            tables.append(rows)
            raws.append(raw.div_(self.divided_by).half().cpu())
            self.bar.update(rows.dropped.isna().sum())
        return torch.cat(raws), pd.concat(tables, ignore_index=True)

    def run_kept(self, docs):
        """Returns raw of the tokens that are kept, [row, place, d_model]."""
        raw, rows = self.run(docs)
        return raw[np.flatnonzero(rows.dropped.isna())]


def measure_rounding(harvest):
    """Runs the first docs in the models' dtype, and again in float32. Returns a list by layer: the
    mean norm of the error of B - A, over that of A. Returns [] if there is too little memory for
    the models in float32 (up to twice the bytes) and their activations.
    """
    free = get_max_memory()  # {index of the GPU, or "cpu": bytes}
    if free.get(harvest.models[0][0].device.index, free["cpu"]) < 3 * harvest.n_bytes:
        print("rounding is not measured: there is no room for the models in float32, too")
        return []
    in_float32 = Harvest(harvest.config | dict(dtype="float32"))
    rounded, rows = harvest.run(harvest.sample)
    exact, rows_too = in_float32.run(harvest.sample)  # the same tokens
    kept = np.flatnonzero(rows.dropped.isna() & rows_too.dropped.isna())
    exact = in_float32.divided_by * exact[kept].double()  # [row, place, d_model]
    error = harvest.divided_by * rounded[kept].double() - exact
    del in_float32
    gc.collect()  # NNsight's models have reference cycles
    error = error[:, 1::2] - error[:, ::2]  # of B - A [row, layer, d_model]
    size = exact[:, ::2].norm(dim=2).mean(0)
    return (error.norm(dim=2).mean(0) / size).tolist()


class Stream:
    """Data of train.py that needs no disk: rows of a Harvest, shuffled in memory. With two layers
    it has four models: base and finetuned at the first layer, and then at the second.
    """

    def __init__(self, config, docs_read=0):
        """Takes the first docs of 2 * val_tokens tokens, and holds out val_tokens of their rows.
        Starts after these docs, or after the `docs_read` docs that a resumed run has read.
        """
        self.config = config
        self.harvest = Harvest(with_base(config))
        self.d_model = self.harvest.d_model
        self.n_models = len(self.harvest.places)
        self.generator = torch.Generator().manual_seed(config["seed"])
        docs = take_docs(self.harvest.read(), 2 * config["val_tokens"])
        raw = self.harvest.run_kept(docs)  # sorted by length: hold out random ones
        order = np.random.default_rng(0).permutation(len(raw))
        self.held_out = raw[order[: config["val_tokens"]]].split(1024)
        self.rows = raw[:0]
        self.shards = self.read()
        self.first = len(docs)  # doc to train on
        self.docs_read = max(docs_read, self.first)

    def read(self):
        """Yields this process's raw activations of one shard after the other, again and again."""
        n_processes = self.harvest.n_processes
        while True:
            docs = self.harvest.read(self.docs_read)
            # rows kept in this pass; one that begins in the middle may keep none
            n_rows = int(self.docs_read > self.first)
            while shard := take_docs(docs, self.config["shuffle_rows"] * n_processes):
                self.docs_read += len(shard)
                rows = self.harvest.run_kept(shard[PartialState().process_index :: n_processes])
                n_rows += len(rows)
                yield rows
            if not n_rows:  # it would wait for rows for ever
                fail(f"--text={self.config['text']}: too few are left, beside --val_tokens")
            print(f"all {self.docs_read} docs are read: they come again", file=sys.stderr)
            self.docs_read = self.first

    def batch(self, step):
        """Returns this process's next rows [batch_size / processes, n_models, d_model], whatever
        the step. Half a shard stays, to be mixed with the next one.
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


def describe_files(folder):
    """Writes what makes a Hugging Face dataset of the Arrow files in the folder."""
    files = sorted(folder.glob("*.arrow"))
    unset = "_fingerprint _format_columns _format_type _output_all_columns _split"
    state = dict.fromkeys(unset.split())
    state |= dict(_data_files=[dict(filename=file.name) for file in files], _format_kwargs={})
    write_json(state, folder / "state.json")
    write_json({}, folder / "dataset_info.json")


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
    meta |= dict(
        places=harvest.places,
        hooks=harvest.hooks,
        d_model=harvest.d_model,
        divided_by=harvest.divided_by,
        tokenizer=harvest.tokenizer.name_or_path,
        versions={p: version(p) for p in ("torch", "transformers", "nnsight", "datasets")},
    )
    is_main = PartialState().is_main_process
    if is_main and config["dtype"] != "float32" and "rounding" not in meta:
        meta["rounding"] = measure_rounding(harvest)
    building.mkdir(parents=True, exist_ok=True)
    with open(building / "lock", "w") as lock:
        with explain(f"{building} is being written already", BlockingIOError):
            if is_main:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        docs = harvest.read(meta["docs"])
        left = config["n_tokens"] - meta["tokens"]
        harvest.bar = tqdm(total=left // harvest.n_processes, unit="tok", unit_scale=True)
        while shard := take_docs(docs, min(left, config["shuffle_rows"] * harvest.n_processes)):
            add_shard(harvest, building, shard, meta)
            left = config["n_tokens"] - meta["tokens"]
            lost = Counter(meta["dropped"])
            del lost["special_token"], lost["skipped_position"]
            if lost.total() > meta["tokens"] / 100:
                harvest.bar.set_postfix_str(f"dropped: {dict(lost)}")
        harvest.bar.close()
    PartialState().wait_for_everyone()  # a slower process would make the folder again
    if is_main:
        (building / "lock").unlink()
        building.replace(out)
        print(f"{out}: {meta['tokens']} of {meta['n_tokens']} tokens, of {meta['hooks'][0]}")
        print(f"dropped: {meta['dropped']}\nscale: {meta['scale']}")


def add_shard(harvest, building, docs, meta):
    """Runs this process's share of the docs, writes the rows kept, and updates `meta`."""
    rank = PartialState().process_index
    raw, rows = harvest.run(docs[rank :: harvest.n_processes])

    # rows in random order; of the last shard as many as n_tokens needs, lower ranks first
    kept = np.flatnonzero(rows.dropped.isna())
    before = meta["tokens"] + sum(gather_object([len(kept)])[:rank])
    rng = np.random.default_rng([meta["seed"], rank, meta["shards"]])
    order = rng.permutation(kept)[: max(0, meta["n_tokens"] - before)]
    stored = rows.iloc[order]
    norms = stored[harvest.places].sum().to_dict()
    counts = Counter(rows.dropped.dropna(), tokens=len(order), **norms)
    stored["doc"] = meta["docs"] + rank + harvest.n_processes * stored["doc"]  # in the store's docs

    index = dict(stored[["token", "doc", "pos"]].astype("int32"))
    tables = {}
    for i, name in enumerate(harvest.places):
        flat = raw[order, i].flatten().numpy()
        activation = pa.FixedSizeListArray.from_arrays(flat, harvest.d_model)
        tables[name] = pa.table(dict(activation=activation) | index)
    if rank == 0:
        tables["docs"] = pa.Table.from_pylist(docs)
    for name, table in tables.items():
        (building / name).mkdir(exist_ok=True)
        path = building / name / f"data-{meta['shards']:05d}-{rank:03d}.arrow"
        write_atomically(path, lambda part: write_arrow(table, part))

    # Counts and sums of norms, over all shards and processes. They are gathered when each process
    # has written its files, so that meta.json counts only whole shards.
    counts = sum(gather_object([counts]), Counter(meta["counts"]))
    meta |= dict(counts=counts, tokens=counts["tokens"], docs=meta["docs"] + len(docs))
    meta["shards"] += 1
    meta["dropped"] = {reason: counts[reason] for reason in REASONS} | harvest.left_out
    unit = harvest.divided_by * harvest.d_model**0.5
    meta["scale"] = [unit * counts["tokens"] / (counts[n] or 1) for n in harvest.places]
    if rank == 0:
        for name in tables:
            describe_files(building / name)
        write_json(meta, building / "meta.json")


if __name__ == "__main__":
    with explain("stopped: the same command goes on", OSError):
        collect(checked(read_command_line(sys.argv[1:], __file__), config, allowed))
    PartialState().destroy_process_group()

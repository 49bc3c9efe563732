"""Cases of data files, each kind that a recipe reads."""

import csv
import functools
import gzip
import io
import json

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from fuzz_draws import ODD_CSV, ODD_JSON, garbled, rebuilt, scrambled
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from atp.data import DataSettings, chat_of, load_recipe, pack, read_examples

ROWS = {
    "text": [{"text": f"plain text number {n} about nothing"} for n in range(12)],
    "prompt": [{"prompt": f"is {n} odd?", "completion": " yes" if n % 2 else " no"} for n in range(12)],
    "premise": [{"premise": f"fact {n}", "hypothesis": "so it is", "label": "neutral"} for n in range(12)],
    "messages": [
        {"messages": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": "hi"}]}
        for n in range(12)
    ],
}


@functools.cache
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(["</s>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def use_data(draw, path):
    """What a run does with a data file."""
    labels = draw.choice(((), (), (), ("yes", "no"), ("neutral", "contradiction")))
    examples = read_examples(str(path), labels, limit=draw.choice((None, None, 5)), chat=chat_of(tokenizer()))
    pack(examples, tokenizer(), 32, loss_on=draw.choice(("all", "completion")))
    splits = load_recipe(DataSettings(recipe="custom", train=str(path), labels=labels, general_share=0.0))
    pack(splits.train, tokenizer(), 32)


def _odd_rows(draw):
    rows = [rebuilt(draw, row, draw.random() < 0.1) for row in ROWS[draw.choice(list(ROWS))]]
    return [json.dumps(row, ensure_ascii=draw.random() < 0.7) for row in rows]


def _odd_text(draw, text):
    if draw.random() < 0.6:
        text = scrambled(draw, text, ODD_JSON, draw.randrange(1, 3))
    content = text.encode("utf-8", "surrogatepass")
    return garbled(draw, content, draw.randrange(1, 3)) if draw.random() < 0.2 else content


def jsonl_case(draw, folder):
    path = folder / f"data{draw.choice(('.jsonl', '.jsonl', '.JSONL'))}"
    path.write_bytes(_odd_text(draw, "\n".join(_odd_rows(draw))))
    use_data(draw, path)


def json_case(draw, folder):
    """A JSON file: a list of rows, or an object that holds one."""
    path = folder / "data.json"
    text = f"[{', '.join(_odd_rows(draw))}]"
    path.write_bytes(_odd_text(draw, text if draw.random() < 0.7 else f'{{"version": 1, "data": {text}}}'))
    use_data(draw, path)


def gzip_case(draw, folder):
    path = folder / "data.jsonl.gz"
    content = gzip.compress(_odd_text(draw, "\n".join(_odd_rows(draw))), mtime=0)
    path.write_bytes(garbled(draw, content, draw.randrange(1, 4)) if draw.random() < 0.6 else content)
    use_data(draw, path)


def folder_case(draw, folder):
    path = folder / "data"
    path.mkdir()
    for number in range(draw.randrange(4)):
        name = draw.choice(("a.jsonl", "b.json", "c.csv", "README.md", ".hidden.jsonl", "d.jsonl.gz", "e.parquet"))
        (path / f"{number}{name}").write_bytes(_odd_text(draw, "\n".join(_odd_rows(draw))))
    if draw.random() < 0.2:
        (path / "deeper").mkdir()
    use_data(draw, path)


def csv_case(draw, folder):
    path = folder / "data.csv"
    rows = ROWS[draw.choice(("text", "prompt", "premise"))]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=draw.choice((",", ",", ",", ";", "\t")))
    writer.writeheader()
    writer.writerows(rows)
    text = scrambled(draw, file.getvalue(), ODD_CSV, draw.randrange(4))
    content = text.encode(draw.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")), "replace")
    path.write_bytes(garbled(draw, content, draw.randrange(1, 4)) if draw.random() < 0.3 else content)
    use_data(draw, path)


def _odd_table(draw):
    """An Arrow table of one shape with columns of odd types."""
    rows = ROWS[draw.choice(list(ROWS))]
    table = pyarrow.Table.from_pylist(rows)
    odd = [
        pyarrow.array(range(len(rows))), pyarrow.array([2.5] * len(rows)), pyarrow.array([b"\xff"] * len(rows)),
        pyarrow.array([None] * len(rows)), pyarrow.array([2**62 + 1] * len(rows), pyarrow.timestamp("ns")),
        pyarrow.array([-(2**62)] * len(rows), pyarrow.timestamp("ms")), pyarrow.array([[{"a": 1}]] * len(rows)),
        pyarrow.array(["a"] * len(rows)).dictionary_encode(), pyarrow.array([2**62] * len(rows), pyarrow.duration("s")),
    ]  # fmt: skip
    for _ in range(draw.randrange(3)):
        name = draw.choice([*table.column_names, "other", "document", "label"])
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, draw.choice(odd))
        else:
            table = table.append_column(name, draw.choice(odd))
    return table


def parquet_case(draw, folder):
    path = folder / "data.parquet"
    options = {"compression": draw.choice(("none", "snappy", "gzip", "zstd")), "use_dictionary": draw.random() < 0.5}
    pyarrow.parquet.write_table(_odd_table(draw), path, row_group_size=draw.choice((1, 5, 100)), **options)
    if draw.random() < 0.7:
        path.write_bytes(garbled(draw, path.read_bytes(), draw.choice((1, 1, 2, 8, 40))))
    use_data(draw, path)


def arrow_case(draw, folder):
    path, table = folder / "data.arrow", _odd_table(draw)
    write = draw.choice((pyarrow.ipc.new_file, pyarrow.ipc.new_stream))
    with write(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=draw.choice((1, 5, 100)))
    if draw.random() < 0.7:
        path.write_bytes(garbled(draw, path.read_bytes(), draw.choice((1, 1, 2, 8, 40))))
    use_data(draw, path)

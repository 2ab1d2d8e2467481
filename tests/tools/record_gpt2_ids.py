#!/usr/bin/env python3
"""Records the ids that tiktoken and Hugging Face's tokenizers give for GPT-2's vocabulary, as a fixture.

    pip install tiktoken tokenizers xxhash
    record_gpt2_ids.py DATA_FOLDER > tests/fixtures/data/gpt2_ids.json

DATA_FOLDER holds gpt2-bpe/{encoder.json,vocab.bpe} and the texts named below. For each text: its size, the
number of ids, the XXH3-64 of all ids as little-endian 32-bit numbers, and the first ids in full. Fails where
the two libraries disagree.
"""

import json
import pathlib
import struct
import sys

import tiktoken
import tokenizers
import xxhash
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

TEXTS = [
    "utf8/blns.txt",
    "utf8/commonmark-spec.txt",
    "utf8/emoji-17.0-strings.txt",
    "utf8/udhr_multilingual.txt",
    "utf8/utf8_bmp_assigned_printable.txt",
    "utf8/wagahai_japanese_excerpt.txt",
    "utf8/whitespace_code_selfmade.txt",
    "tinyshakespeare/input.txt",
    "wikitext2/valid.txt",
]
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
IDS_IN_FULL = 400


def main() -> None:
    data = pathlib.Path(sys.argv[1])
    vocabulary, merges = data / "gpt2-bpe/encoder.json", data / "gpt2-bpe/vocab.bpe"
    ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(vocabulary))
    openai = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    model = tokenizers.models.BPE.from_file(str(vocabulary), str(merges))
    hugging_face = tokenizers.Tokenizer(model)
    hugging_face.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)

    records = []
    for name in TEXTS:
        text = (data / name).read_bytes().decode("utf-8")
        ids = openai.encode(text, disallowed_special=())
        other = hugging_face.encode(text).ids
        if ids != other:
            at = next(i for i, (a, b) in enumerate(zip(ids, other)) if a != b)
            sys.exit(f"{name}: the libraries differ from id {at}: {ids[at:at + 8]} and {other[at:at + 8]}, "
                     f"{openai.decode(ids[at:at + 4])!r}")
        records.append({
            "text": name,
            "bytes": len(text.encode()),
            "ids": len(ids),
            "xxh3": xxhash.xxh3_64_hexdigest(struct.pack(f"<{len(ids)}i", *ids)),
            "first": ids[:IDS_IN_FULL],
        })
    versions = f"tiktoken {tiktoken.__version__}, tokenizers {tokenizers.__version__}"
    print("{\"recorded_with\": " + json.dumps(versions) + ", \"texts\": [")
    print(",\n".join(json.dumps(record) for record in records))
    print("]}")


if __name__ == "__main__":
    main()

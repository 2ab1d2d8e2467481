#!/usr/bin/env python3
"""Records the merges that Hugging Face's BPE trainer finds, as a fixture.

    pip install tokenizers
    record_bpe_training.py DATA_FOLDER > tests/fixtures/data/bpe_training.json
"""

import json
import pathlib
import sys

import tokenizers

TRAININGS = [("tinyshakespeare/input.txt", 1000), ("utf8/udhr_multilingual.txt", 800)]


def main() -> None:
    data = pathlib.Path(sys.argv[1])
    records = []
    for name, vocab_size in TRAININGS:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
        tokenizer.train_from_iterator([(data / name).read_bytes().decode("utf-8")], trainer)
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        records.append({"text": name, "vocab_size": vocab_size,
                        "merges": "#version: 0.2\n" + "".join(line + "\n" for line in lines)})
    print(json.dumps({"recorded_with": f"tokenizers {tokenizers.__version__}", "trainings": records}, indent=1))


if __name__ == "__main__":
    main()

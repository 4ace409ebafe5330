"""Build the small tokenizer of `mini`: byte-level BPE in CLIP's file format (vocab.json, merges.txt)."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from .data.factors import COLOURS, EXPRESSIONS, POSES, SCENES, STYLES, Factors, caption

START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(folder: Path, text_length: int = 32, vocab_size: int = 1024):
    """Train BPE merges on captions and write a CLIPTokenizer folder; returns the loaded transformers tokenizer.

    All 256 bytes are in the vocabulary, inside and at the end of a word, so that any prompt can be written.
    """
    from transformers import CLIPTokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [c + "</w>" for c in alphabet]
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(alphabet) - 2, min_frequency=2, initial_alphabet=alphabet,
                                  end_of_word_suffix="</w>", show_progress=False)
    model.train_from_iterator(_corpus(), trainer)
    merges = [m if isinstance(m, list) else m.split(" ") for m in json.loads(model.to_str())["model"]["merges"]]
    vocabulary = list(dict.fromkeys(base + ["".join(m) for m in merges])) + [START, END]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=text_length,
                              bos_token=START, eos_token=END, pad_token=END, unk_token=END)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _corpus(count: int = 4000) -> list[str]:
    rng = np.random.default_rng(0)
    return [caption(Factors(rng.choice(STYLES), rng.choice([*COLOURS, *SCENES]), rng.choice(EXPRESSIONS), rng.choice(POSES)), rng)
            for _ in range(count)]
